"""The predictions of the demo's methods, and tables and sentences about them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..utils.text import align
from .sample import CLEAN, Sample

__all__ = ["DemoResult", "Frames"]


@dataclass(frozen=True)
class DemoResult:
    """Predicted classes (N,) by method and corruption, and each method's time in seconds."""

    predictions: dict[str, dict[str, Tensor]]
    seconds: dict[str, float]
    sample: Sample

    def accuracy(self, method: str, name: str) -> float:
        """Accuracy of a method on one kind of images, in percent."""
        correct = self.predictions[method][name] == self.sample.labels
        return 100 * correct.double().mean().item()

    def mean(self, method: str) -> float:
        """Mean accuracy of a method over the corruptions, in percent."""
        names = self.sample.corruptions
        return sum(self.accuracy(method, name) for name in names) / len(names)

    def table(self) -> str:
        """Table of accuracies in percent, with one row per corruption and one column per method."""
        methods = list(self.predictions)
        rows = [["accuracy in %", *methods]]
        rows += [
            [name, *(f"{self.accuracy(m, name):.1f}" for m in methods)]
            for name in self.sample.images
        ]
        rows.append(["mean of corruptions", *(f"{self.mean(m):.1f}" for m in methods)])
        count = len(self.sample.labels) * len(self.sample.images)
        rows.append(["ms per image", *(f"{1e3 * self.seconds[m] / count:.1f}" for m in methods)])
        return align(rows)

    def changed(self, before: str, after: str) -> tuple[int, int]:
        """Numbers of corrupted images that only ``after``, and only ``before``, predicts right."""
        gained = lost = 0
        for name in self.sample.corruptions:
            was = self.predictions[before][name] == self.sample.labels
            now = self.predictions[after][name] == self.sample.labels
            gained += int((now & ~was).sum())
            lost += int((was & ~now).sum())
        return gained, lost

    def sentence(self, before: str = "source", after: str = "mgg") -> str:
        """One sentence on what adaptation changed, whether it is a gain or a loss."""
        images = len(self.sample.corruptions) * len(self.sample.labels)
        text = (
            f"Adapting without labels ({after}), the network is right on {self.mean(after):.1f} % "
            f"of {images:,} corrupted images instead of {self.mean(before):.1f} %"
        )
        if CLEAN in self.sample.images:
            clean = self.accuracy(after, CLEAN), self.accuracy(before, CLEAN)
            text += f", and on {clean[0]:.1f} % of the clean ones instead of {clean[1]:.1f} %"
        return text + "."


@dataclass(frozen=True)
class Frames:
    """A stream of single images whose kind changes, without a reset.

    Attributes:
        right: by method, whether each prediction is correct (N,), in the order of the stream.
        kinds: name of each stretch and its number of images, in order.
        windows: number of images in an update, by method, of those that make updates.
    """

    right: dict[str, Tensor]
    kinds: tuple[tuple[str, int], ...]
    windows: dict[str, int] = field(default_factory=dict)

    def mean(self, method: str) -> float:
        """Accuracy of a method on the whole stream, in percent."""
        return 100 * self.right[method].double().mean().item()

    def lately(self, method: str, span: int) -> Tensor:
        """Accuracy in percent on the last ``span`` images, or all so far, at each image (N,)."""
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), self.right[method].double()]).cumsum(
            0
        )
        ends = torch.arange(1, len(sums))
        starts = (ends - span).clamp(min=0)
        return 100 * (sums[ends] - sums[starts]) / (ends - starts)

    def table(self) -> str:
        """Table of accuracies in percent, with one row per stretch and one column per method."""
        rows = [["accuracy in %", *self.right]]
        start = 0
        for name, count in self.kinds:
            part = slice(start, start + count)
            start += count
            shares = (100 * right[part].double().mean().item() for right in self.right.values())
            rows.append([name, *(f"{share:.1f}" for share in shares)])
        rows.append(["whole stream", *(f"{self.mean(method):.1f}" for method in self.right)])
        rows.append(["images an update", *(str(self.windows.get(m, "–")) for m in self.right)])
        return align(rows)
