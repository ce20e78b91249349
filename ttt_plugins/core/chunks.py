"""The memory that adapting to one image takes, and the number of images that adapt together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backbones.backbone import Backbone
from .algorithm import Algorithm, Chunked, Outcome, Tensors
from .scope import no_recomputation

__all__ = ["adapt", "chunk_size", "image_bytes", "memory_line"]

#: Fraction of the free memory that images adapting together may take.
_SHARE = 0.5
#: Largest ratio of the memory of an image that adapts among others to that of an image alone, from
#: 1.7 (GroupNorm ResNet) to 3 (ViT): ``torch.func`` keeps tensors for a second derivative, and
#: attention is not fused.
_AMONG_OTHERS = 3


class _Peak(TorchDispatchMode):
    """Measures the peak size of all tensors created in the block, in bytes, to within 2 %."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # A view has the storage of an input, which is already counted or was created outside.
        given = {s.data_ptr() for s in _storages((args, kwargs))}
        for storage in _storages(out):
            where = storage.data_ptr()
            if where not in given:
                # An earlier storage at this address has been freed.
                _, gone = self.alive.get(where, (None, 0))
                self.alive[where] = StorageWeakRef(storage), storage.nbytes()
                self.total += storage.nbytes() - gone
        # Checking whether every storage is still alive is slow, so only at a new peak.
        if self.total > 1.02 * self.peak:
            self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
            self.total = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.total)
        return out


def _storages(tree) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)]


def image_bytes(
    loss: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    views: tuple[Tensor, ...],
    steps: int,
) -> int:
    """Peak memory in bytes of adapting to one image by gradient steps, besides the model itself.

    This is measured: a gradient is computed once, and the tensors alive at the peak are counted.
    The views, and in later steps the results of the step before, are added.

    Args:
        loss: ``(params, *views) -> scalar``.
        params: tensors that adapt.
        views: views of one image.
        steps: number of gradient steps for an image.
    """
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    with torch.enable_grad(), no_recomputation(), _Peak() as measured:
        torch.autograd.grad(loss(leaves, *views), list(leaves.values()), allow_unused=True)
    own = sum(t.numel() * t.element_size() for t in leaves.values())
    seen = sum(t.numel() * t.element_size() for t in views)
    # The initial parameters are the model's; later steps have their own, and the last gradients. At
    # the end of a step there are the parameters before it, gradients, and the parameters after it.
    later = steps > 1
    return seen + max(measured.peak + 2 * later * own, (2 + later) * own)


def chunk_size(wanted: int | str, per_image: Callable[[], int], device: torch.device) -> int:
    """The number of images that adapt together.

    Args:
        wanted: the number, or ``"auto"`` for one on a CPU, where more are slower, and as many as
            fit into half of the free memory on an accelerator, rounded down to a power of two,
            because sums depend on it and free memory differs a little from run to run.
        per_image: returns the memory of adapting to one image, in bytes.
        device: device of the images.
    """
    if isinstance(wanted, int):
        return wanted
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fitting = int(_SHARE * free / max(1, _AMONG_OTHERS * per_image()))
    return 1 << max(0, fitting.bit_length() - 1)


def adapt(
    algorithm: Algorithm, chunks: dict[tuple, int], params: Tensors, state: Tensors, images: Tensor
) -> Outcome:
    """The algorithm on a batch; how many images adapt together is planned once a size.

    Args:
        algorithm: the method.
        chunks: how many that was, by what decides it; what is new is added.
        params: the adapted tensors.
        state: the algorithm's state.
        images: (B, C, H, W) in [0, 1].
    """
    if not isinstance(algorithm, Chunked):
        return algorithm.adapt(params, state, images)
    autocast = torch.is_autocast_enabled(images.device.type)
    key = (images.shape[1:], images.dtype, images.device, autocast)
    if key not in chunks:
        chunks[key] = algorithm.plan(images[:1])
    outcome = algorithm.with_chunk(chunks[key]).adapt(params, state, images)
    if outcome.chunk is not None:
        chunks[key] = outcome.chunk
    return outcome


def memory_line(
    size: tuple[int | None, ...] | None,
    backbone: Backbone,
    per_image: Callable[[Tensor], int],
    plan: Callable[[Tensor], int],
) -> str:
    """A line on the memory that adapting to images takes, for an adapter's description.

    Args:
        size: channels, height and width of the images, or None if they are unknown; a side that
            is None is unknown as well.
        backbone: the classifier.
        per_image: image (1, C, H, W) -> bytes that adapting to it takes.
        plan: image (1, C, H, W) -> number of images like it that adapt together.
    """
    if size is None:
        return "memory: unknown before the first image; the model names no size"
    if size[1] != size[2]:
        return "memory: unknown; the views need square images"
    with torch.inference_mode(False):
        shape = (1, *(side for side in size if side is not None))
        image = torch.full(shape, 0.5, device=backbone.device, dtype=backbone.dtype)
        chunk, needed = plan(image), per_image(image) / 1e6
    together = "one image" if chunk == 1 else f"{chunk} images"
    return f"memory: about {needed:.1f} MB an image; {together} at a time"
