"""Building a model that an artifact describes, within a budget of memory and operations."""

from __future__ import annotations

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArtifactError

__all__ = ["BuildBudget"]


# -- building a model that an artifact describes ---------------------------------------------
class BuildBudget(TorchDispatchMode):
    """Stops a constructor that asks for much more than the weights at hand could fill.

    Every tensor operation is looked at before it runs, so what is refused was never allocated.

    Args:
        elements: numbers in the weights file.
        tensors: tensors in it.

    Raises:
        ArtifactError: (inside the block) more than sixteen times that many numbers and 64 MB, or
            more than a hundred operations a tensor.
    """

    def __init__(self, elements: int, tensors: int):
        super().__init__()
        self._elements = 16 * elements + (16 << 20)
        self._calls = 100 * tensors + 20_000

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._calls -= 1
        if not func.is_view and not func._schema.is_mutable:
            self._elements -= _asked_for(args)
        if self._calls < 0 or self._elements < 0:
            raise ArtifactError("the model described is far larger than the weights beside it")
        return func(*args, **(kwargs or {}))


def _asked_for(args: tuple) -> int:
    """An upper bound of the numbers an operation creates, from its arguments alone."""
    given = [a.numel() for a in args if isinstance(a, torch.Tensor)]
    sizes = [a for a in args if isinstance(a, (list, tuple))]
    for part in sizes:
        given += [a.numel() for a in part if isinstance(a, torch.Tensor)]
    shapes = [a.shape for a in args if isinstance(a, torch.Tensor)]
    if len(shapes) > 1:
        try:
            given.append(math.prod(torch.broadcast_shapes(*shapes)))
        except RuntimeError:
            given.append(sum(given))
    counts = [math.prod(p) for p in sizes if p and all(type(n) is int and n >= 0 for n in p)]
    if not given:  # arange and linspace take numbers
        counts += [int(abs(a)) for a in args if isinstance(a, (int, float)) and math.isfinite(a)]
    return max(given, default=1) * max(counts, default=1) if counts else max(given, default=1)
