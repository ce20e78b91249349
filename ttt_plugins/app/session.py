"""What the page does, without the page: a stream that source and adapter predict side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapter import Adapter
from ..core.guard import Event
from ..core.registry import get_method, list_methods
from ..core.window import OnlineFields
from ..data.corruptions import TENSOR_CORRUPTIONS, corrupt
from ..data.images import to_float
from ..errors import InputError
from .pictures import Pictures

__all__ = ["CORRUPTIONS", "Point", "Session", "Step", "offered_methods"]

#: What the page can do to pictures, beside nothing.
CORRUPTIONS = TENSOR_CORRUPTIONS


def offered_methods(stored: str | None) -> list[str]:
    """Methods that a page offers: the artifact's own, and all that adapt along a stream.

    Args:
        stored: the artifact's method; None for a model.
    """
    online = [name for name in list_methods() if issubclass(get_method(name).config, OnlineFields)]
    first = [stored] if stored not in (None, "source") else []
    return list(dict.fromkeys([*first, *online]))


@dataclass(frozen=True)
class Step:
    """One batch of the stream.

    Attributes:
        images: the images as they were predicted, uint8 (B, 3, H, W).
        labels: int64 classes (B,), or None.
        source, adapter: predicted classes (B,).
        source_confidence, adapter_confidence: probabilities of these classes (B,).
    """

    images: Tensor
    labels: Tensor | None
    source: Tensor
    adapter: Tensor
    source_confidence: Tensor
    adapter_confidence: Tensor


@dataclass(frozen=True)
class Point:
    """Where the stream stands after a batch.

    Attributes:
        images: number of images since the last reset.
        source, adapter: accuracy so far on the images with labels, in percent; None without any.
        source_confidence, adapter_confidence: mean confidence so far, in percent.
    """

    images: int
    source: float | None
    adapter: float | None
    source_confidence: float
    adapter_confidence: float


@dataclass
class _Sums:
    images: int = 0
    labelled: int = 0
    right: list[int] = field(default_factory=lambda: [0, 0])
    confidence: list[float] = field(default_factory=lambda: [0.0, 0.0])


class Session:
    """A visitor's adapter and what it has seen.

    Args:
        build: creates the adapter of a method by its name; ``"source"`` is the unadapted model.
        method: the method to begin with.
    """

    def __init__(self, build: Callable[[str], Adapter], method: str):
        self._build = build
        self.source = build("source")
        self.choose(method)

    def choose(self, method: str) -> None:
        """Switch to another method, which begins at the source."""
        self.net = self._build(method)
        self.method = method
        self._start()

    def reset(self) -> None:
        """Return to the source and forget what was counted."""
        self.net.reset()
        self._start()

    def _start(self) -> None:
        self.points: list[Point] = []
        self._sums = _Sums()

    def stream(
        self,
        pictures: Pictures,
        *,
        batch_size: int = 16,
        corruption: str | None = None,
        severity: int = 3,
        seed: int = 0,
    ) -> Iterator[Step]:
        """Predict pictures batch by batch; the adapter goes on from where it is.

        Args:
            pictures: the pictures, in the order of the stream.
            batch_size: number of images in a batch, at least 1.
            corruption: one of `CORRUPTIONS`; None leaves the pictures as they are.
            severity: strength of the corruption, an integer from 1 to 5.
            seed: seed of the corruption's noise.

        Raises:
            InputError: an argument is out of range, or as for the adapter.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        generator = torch.Generator().manual_seed(seed)
        for rows in torch.arange(len(pictures)).split(batch_size):
            images = pictures.images[rows]
            if corruption is not None:
                images = corrupt(images, corruption, severity, generator=generator)
            labels = None if pictures.labels is None else pictures.labels[rows]
            sure, source = self._answer(self.source, images)
            now, adapter = self._answer(self.net, images)
            step = Step(images, labels, source, adapter, sure, now)
            self._count(step)
            yield step

    @staticmethod
    def _answer(net: Adapter, images: Tensor) -> tuple[Tensor, Tensor]:
        """Confidences and predicted classes (B,)."""
        with torch.no_grad():
            logits = net(to_float(images).to(net.backbone.device))
        confidences, classes = logits.float().softmax(1).max(1)
        return confidences.cpu(), classes.cpu()

    def _count(self, step: Step) -> None:
        sums = self._sums
        sums.images += len(step.images)
        sums.confidence[0] += step.source_confidence.sum().item()
        sums.confidence[1] += step.adapter_confidence.sum().item()
        if step.labels is not None:
            sums.labelled += len(step.labels)
            sums.right[0] += int((step.source == step.labels).sum())
            sums.right[1] += int((step.adapter == step.labels).sum())
        shares = [100 * right / sums.labelled if sums.labelled else None for right in sums.right]
        sure = [100 * total / sums.images for total in sums.confidence]
        self.points.append(Point(sums.images, shares[0], shares[1], sure[0], sure[1]))

    @property
    def health(self) -> dict[str, float]:
        """The guard's signals, see `Adapter.health`."""
        return self.net.health()

    @property
    def events(self) -> Sequence[Event]:
        """What the guard did, see `Adapter.guard_events`."""
        return self.net.guard_events
