"""What the benchmark needs of an adapter."""

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
        seed: of the adapter's own random draws.
        forwards, backwards: images passed through the model so far, in either direction.
        checks_pixels: whether the adapter looks at the range of every batch's pixels.
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
        """Updates that were left out because a loss or gradient was not finite."""
        ...

    def __call__(self, images: Tensor, /) -> Tensor:
        """Adapt to a batch in [0, 1], and return its logits."""
        ...

    def reset(self) -> None:
        """Back to the source."""
        ...

    def describe(self) -> str:
        """What adapts, in words."""
        ...

    def adaptation_state(self) -> dict[str, Tensor]:
        """Everything that changed since the source."""
        ...

    def load_adaptation_state(self, state: dict[str, Tensor], /) -> None:
        """Resume where `adaptation_state` was taken."""
        ...

    def learned_tensors(self) -> dict[str, Tensor]:
        """What the method learned beforehand."""
        ...

    def with_tensors(self, config: Any, /) -> Any:
        """A new adapter on the same model."""
        ...

    def to(self, *, memory_format: torch.memory_format) -> Any:
        """As of ``nn.Module``."""
        ...

    def parameters(self) -> Iterator[Any]:
        """As of ``nn.Module``."""
        ...

    def buffers(self) -> Iterator[Any]:
        """As of ``nn.Module``."""
        ...


def device_of(net: AdaptiveModel) -> torch.device:
    """Where an adapter's tensors are; the CPU if it has none."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))
