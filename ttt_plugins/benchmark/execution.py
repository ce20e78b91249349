"""How a run uses the machine: memory layout, reduced precision, compilation. All recorded."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["Execution", "peak_memory", "reset_peak_memory", "to_unit"]


@dataclass(frozen=True)
class Execution:
    """Options of the fast path; the defaults change nothing.

    Attributes:
        channels_last: images and convolution weights in NHWC memory layout. The model's own
            weights are moved there; their values stay.
        autocast: ``"bfloat16"`` or ``"float16"``: run the model under ``torch.autocast``.
        compile: backend of ``torch.compile`` for the model, such as ``"inductor"``.

    Raises:
        InputError: no such type or compile backend.
    """

    channels_last: bool = False
    autocast: str | None = None
    compile: str | None = None

    def __post_init__(self):
        if self.autocast not in (None, "bfloat16", "float16"):
            raise InputError(f"autocast is bfloat16 or float16, got {self.autocast!r}")
        if self.compile is not None:
            known = torch.compiler.list_backends(exclude_tags=())
            if self.compile not in known:
                raise InputError(f"no compile backend {self.compile!r}; there are {known}")

    def prepare(self, net: nn.Module) -> None:
        """Bring an adapter into this form, in place."""
        if self.channels_last:
            net.to(memory_format=torch.channels_last)
        if self.compile is not None:
            # In place, so that the parameters keep the names by which they adapt.
            net.backbone.model.compile(backend=self.compile)

    def context(self, device: torch.device) -> contextlib.AbstractContextManager:
        """What the model runs inside."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, self.autocast))

    def unit(self, images: Tensor) -> Tensor:
        """uint8 images on the device -> float32 in [0, 1], in this memory layout."""
        found = to_unit(images)
        return found.contiguous(memory_format=torch.channels_last) if self.channels_last else found


def to_unit(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1], as exact as RobustBench's on the CPU.

    CUDA multiplies by the reciprocal of a Python number; by a tensor it divides. That tensor is
    filled on the device: a copy from the host would wait.
    """
    return images.float().div_(torch.full((), 255.0, device=images.device))


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure anew what `peak_memory` returns; without effect on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU; on the CPU, that the process has taken."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
