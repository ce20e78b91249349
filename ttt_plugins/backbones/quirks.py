"""Layers that need special treatment, found by what they are."""

from __future__ import annotations

from torch import nn

__all__ = ["biased_attention", "caches", "recurrent"]


def biased_attention(model: nn.Module) -> list[nn.Module]:
    """Attention layers of timm whose fused kernel gets a mask that depends on the queries (SAM).

    PyTorch takes another kernel where the mask needs a gradient, which rounds otherwise.
    """
    return [
        module
        for module in model.modules()
        if getattr(module, "fused_attn", False) and getattr(module, "rel_pos_h", None) is not None
    ]


def recurrent(model: nn.Module) -> bool:
    """Whether it has recurrent layers, which have no batching rule: ``vmap`` cannot run them."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def caches(model: nn.Module) -> list[dict]:
    """Dicts in which modules keep what they computed from parameters in eval mode.

    LeViT and its kin look attention biases up that way, for ever. With other parameters that is
    the wrong value, and of a function's transform (``grad``, ``vmap``) not even a value.
    """
    return [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, dict) and name.endswith("cache") and not name.startswith("_")
    ]
