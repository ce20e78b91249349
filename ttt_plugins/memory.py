"""How much memory adapting to one image takes, and how many images fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["chunk_size", "image_bytes"]

#: Share of the free memory that images adapting together may take.
_SHARE = 0.5
#: ``torch.func`` keeps what a second derivative would need, and attention runs unfused: an image
#: among others took 1.7 (GroupNorm ResNet) to 3 times (ViT) what it takes alone.
_AMONG_OTHERS = 3


def image_bytes(
    loss: Callable[..., Tensor], params: Mapping[str, Tensor], views: tuple[Tensor, ...]
) -> int:
    """Bytes at the peak of one gradient step on one image, beyond the model itself.

    Measured, not modelled: the loss runs once, and what its graph keeps is counted. To that come
    the gradients of the largest activation on their way back, the views, and three copies of the
    adapted tensors (before, gradient, after).

    Args:
        loss: ``(params, *views) -> scalar``.
        params: the tensors that adapt.
        views: one image's views.
    """
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    known = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *views)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # The model's own weights are kept as well; only what was made on the way counts.
        if tensor.untyped_storage().data_ptr() not in known and tensor.grad_fn is not None:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # Detached: a saved output that kept its own graph alive would never be freed.
        return tensor.detach()

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(leaves, *views)
    own = sum(t.numel() * t.element_size() for t in leaves.values())
    seen = sum(t.numel() * t.element_size() for t in views)
    return sum(kept.values()) + 2 * max(kept.values(), default=0) + seen + 3 * own


def chunk_size(wanted: int | str, per_image: Callable[[], int], device: torch.device) -> int:
    """Images to adapt together: ``wanted``, or for ``"auto"`` what the device does best.

    One on a CPU, where more are slower; elsewhere what fits into half of the free memory.
    """
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, int(_SHARE * free / max(1, _AMONG_OTHERS * per_image())))
