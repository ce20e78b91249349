"""What one method did on one cell, and on all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

from .cells import Cell

__all__ = ["CellRecord", "MethodRecord"]


@dataclass(frozen=True)
class CellRecord:
    """One method on one cell.

    Attributes:
        corruption, severity: the cell; severity 1 to 5.
        n: images.
        accuracy: share of right predictions, in [0, 1].
        loss: mean cross-entropy in nats.
        ece: expected calibration error in [0, 1], see `calibration.calibration_error`.
        seconds: wall time of adapting and predicting, data already in memory.
        forwards, backwards: passes of an image through the model, in either direction. Where
            cells are mixed in one stream, each has its images' share of time and passes.
        peak_memory: bytes that tensors took at most on the GPU; on a CPU, that the process had
            taken so far.
        correct_per_batch: right predictions among this cell's images, batch by batch.
        seed: of the order.
        stream: which stream of this method and seed the cell was met in, from 0; there is a
            reset between one stream and the next.
        visit: how many times the stream had met the cell before.
    """

    corruption: str
    severity: int
    n: int
    accuracy: float
    loss: float
    ece: float
    seconds: float
    forwards: int
    backwards: int
    peak_memory: int
    correct_per_batch: list[int]
    seed: int | None = None
    stream: int = 0
    visit: int = 0


@dataclass(frozen=True)
class MethodRecord:
    """One method on all cells: the adapter, or the unadapted source model beside it."""

    name: str
    method: str
    config: dict[str, Any]
    description: str
    clean_accuracy: float | None
    skipped_updates: int
    cells: list[CellRecord]

    def accuracies(self) -> dict[Cell, float]:
        """Accuracy of each cell, the mean of its visits and seeds."""
        found: dict[Cell, list[float]] = {}
        for cell in self.cells:
            found.setdefault((cell.corruption, cell.severity), []).append(cell.accuracy)
        return {cell: fmean(values) for cell, values in found.items()}

    def mean(self, corruptions: Sequence[str] | None = None) -> float | None:
        """Mean accuracy of the cells (of these corruptions), each counting the same."""
        chosen = [
            a for c, a in self.accuracies().items() if corruptions is None or c[0] in corruptions
        ]
        return fmean(chosen) if chosen else None

    def standard_error(self, corruptions: Sequence[str] | None = None) -> float | None:
        """Of `mean` over the seeds: their sample deviation over the root of their number.

        None for a single seed.
        """
        seeds = list(dict.fromkeys(cell.seed for cell in self.cells))
        if len(seeds) < 2:
            return None
        parts = [replace(self, cells=[c for c in self.cells if c.seed == s]) for s in seeds]
        means = [m for part in parts if (m := part.mean(corruptions)) is not None]
        return stdev(means) / len(means) ** 0.5 if means else None

    def by(self, field: str) -> dict[Any, float]:
        """Mean accuracy by ``corruption`` or ``severity``, in the order met."""
        place = ("corruption", "severity").index(field)
        cells = self.accuracies()
        keys = dict.fromkeys(cell[place] for cell in cells)
        return {k: fmean(a for cell, a in cells.items() if cell[place] == k) for k in keys}

    def per_image(self, field: str) -> float:
        """Mean ``forwards``, ``backwards`` or ``seconds`` of an image."""
        return sum(getattr(c, field) for c in self.cells) / sum(c.n for c in self.cells)

    def to_dict(self) -> dict[str, Any]:
        averages = {
            "accuracy": self.mean(),
            "standard_error": self.standard_error(),
            "by_corruption": self.by("corruption"),
            "by_severity": {str(k): v for k, v in self.by("severity").items()},
            "seconds": sum(c.seconds for c in self.cells),
            "forwards_per_image": self.per_image("forwards"),
            "backwards_per_image": self.per_image("backwards"),
        }
        return {**asdict(self), "averages": averages}
