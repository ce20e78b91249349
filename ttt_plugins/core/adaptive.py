"""The interface that the benchmark needs from an adapter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..backbones.backbone import Backbone

__all__ = ["AdaptiveModel", "device_of"]


@runtime_checkable
class AdaptiveModel(Protocol):
    """An adapter, such as `ttt_plugins.Adapter`.

    Attributes:
        method: name of the method.
        config: fields of the method, a dataclass.
        seed: seed for the adapter's random draws.
        forwards, backwards: numbers of images passed through the model so far, in each direction.
        checks_pixels: whether the adapter checks the range of every batch's pixels.
    """

    method: str
    config: Any
    seed: int
    forwards: int
    backwards: int
    checks_pixels: bool

    @property
    def backbone(self) -> Backbone:
        """The wrapped classifier."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None while unknown."""
        ...

    @property
    def skipped_updates(self) -> int:
        """Number of updates skipped because a loss or gradient was not finite."""
        ...

    def __call__(self, images: Tensor, /) -> Tensor:
        """Adapt to images (B, C, H, W) in [0, 1] and return logits (B, classes)."""
        ...

    def reset(self) -> None:
        """Return to the source."""
        ...

    def describe(self) -> str:
        """A description of what adapts, in words."""
        ...

    def adaptation_state(self) -> dict[str, Tensor]:
        """Everything that has changed since the source."""
        ...

    def load_adaptation_state(self, state: dict[str, Tensor], /) -> None:
        """Resume from a state that `adaptation_state` returned."""
        ...

    def learned_tensors(self) -> dict[str, Tensor]:
        """Tensors that the method learned beforehand, by name."""
        ...

    def with_tensors(self, config: Any, /) -> Any:
        """A new adapter on the same model, with the same learned tensors and another config."""
        ...

    def to(self, *, memory_format: torch.memory_format) -> Any:
        """See ``nn.Module``."""
        ...

    def parameters(self) -> Iterator[Any]:
        """See ``nn.Module``."""
        ...

    def buffers(self) -> Iterator[Any]:
        """See ``nn.Module``."""
        ...


def device_of(net: AdaptiveModel) -> torch.device:
    """The device of an adapter's tensors; the CPU if it has none."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))
