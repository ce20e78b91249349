"""Layers that need special treatment, found by what they are."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["caches", "derived", "prepare", "recurrent"]


def prepare(model: nn.Module) -> None:
    """Switch off, in a structural copy of a model, what cannot be adapted through.

    Attention layers of timm whose fused kernel gets a mask that depends on the queries (SAM):
    PyTorch takes another kernel where the mask needs a gradient, which rounds otherwise.
    Recomputation of activations: it is made for ``backward()`` and refuses gradients that are
    asked for by name.
    """
    for module in model.modules():
        named = vars(module)
        if named.get("fused_attn") and getattr(module, "rel_pos_h", None) is not None:
            named["fused_attn"] = False
        if named.get("grad_checkpointing"):
            named["grad_checkpointing"] = False


def recurrent(model: nn.Module) -> bool:
    """Whether it has recurrent layers, which have no batching rule: ``vmap`` cannot run them."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def caches(model: nn.Module) -> list[dict]:
    """Dicts in which modules keep what they computed from parameters in eval mode.

    LeViT and similar networks look up attention biases there, and never renew them. With other
    parameters that is the wrong value, and inside a function transform (``grad``, ``vmap``) it is
    no value at all.
    """
    return [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, dict) and name.endswith("cache") and not name.startswith("_")
    ]


def derived(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Tensors that hooks compute from parameters before each forward pass: module, name, tensor.

    Those of pruning and of the older ``weight_norm`` and ``spectral_norm``. They are attributes,
    and may be part of a graph.
    """
    found = []
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
                name = str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", ""))
                if isinstance(tensor := vars(module).get(name), Tensor):
                    found.append((module, name, tensor))
    return found
