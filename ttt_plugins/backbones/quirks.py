"""Layers that need special treatment, recognised by their structure and not by model names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["avoid_fast_path", "caches", "derived", "prepare", "recurrent"]


def prepare(model: nn.Module) -> None:
    """Disable what adaptation does not support in a structural copy of a model.

    This disables the fused kernel in attention layers of timm whose mask depends on the queries
    (SAM): PyTorch uses another kernel if the mask needs a gradient, which rounds differently. It
    also disables recomputation of activations, which works with ``backward()`` but not with
    ``torch.autograd.grad``, and PyTorch's own fast path (`avoid_fast_path`).
    """
    avoid_fast_path(model)
    for module in model.modules():
        named = vars(module)
        if named.get("fused_attn") and getattr(module, "rel_pos_h", None) is not None:
            named["fused_attn"] = False
        if named.get("grad_checkpointing"):
            named["grad_checkpointing"] = False


def avoid_fast_path(model: nn.Module) -> None:
    """Make PyTorch's attention layers compute the same with and without gradients.

    Their fused inference path rounds differently, but an adapter whose parameters have not moved
    must equal the plain model bit for bit. PyTorch's switch for that path applies to the whole
    process, in all threads; training mode of these layers alone, without dropout, avoids the path
    too.
    """
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            module.training = True


def recurrent(model: nn.Module) -> bool:
    """Whether a model has recurrent layers, which ``vmap`` does not support."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def caches(model: nn.Module) -> list[dict]:
    """Dicts in which modules cache values computed from parameters in eval mode.

    LeViT and similar networks cache attention biases and never update them. The cached values are
    wrong for other parameters, and unusable outside the function transform (``grad``, ``vmap``) in
    which they were computed.
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
