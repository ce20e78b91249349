"""What a run leaves behind: records of cells and methods, ``results.json``, and the table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

__all__ = ["CellRecord", "MethodRecord", "Results", "align", "finite"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CellRecord:
    """One method on one cell.

    Attributes:
        corruption, severity: the cell; severity 1 to 5.
        n: images.
        accuracy: share of right predictions, in [0, 1].
        loss: mean cross-entropy in nats.
        seconds: wall time of adapting and predicting, data already in memory.
        forwards, backwards: passes of an image through the model, in either direction. Where
            cells are mixed in one stream, each has its images' share of time and passes.
        correct_per_batch: right predictions among this cell's images, batch by batch.
    """

    corruption: str
    severity: int
    n: int
    accuracy: float
    loss: float
    seconds: float
    forwards: int
    backwards: int
    correct_per_batch: list[int]


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

    def mean(self, corruptions: Sequence[str] | None = None) -> float | None:
        """Mean accuracy of the cells (of these corruptions), each counting the same."""
        chosen = [
            c.accuracy for c in self.cells if corruptions is None or c.corruption in corruptions
        ]
        return fmean(chosen) if chosen else None

    def by(self, field: str) -> dict[Any, float]:
        """Mean accuracy by ``corruption`` or ``severity``, in the order met."""
        keys = dict.fromkeys(getattr(c, field) for c in self.cells)
        return {k: fmean(c.accuracy for c in self.cells if getattr(c, field) == k) for k in keys}

    def per_image(self, field: str) -> float:
        """Mean ``forwards``, ``backwards`` or ``seconds`` of an image."""
        return sum(getattr(c, field) for c in self.cells) / sum(c.n for c in self.cells)

    def to_dict(self) -> dict[str, Any]:
        averages = {
            "accuracy": self.mean(),
            "by_corruption": self.by("corruption"),
            "by_severity": {str(k): v for k, v in self.by("severity").items()},
            "seconds": sum(c.seconds for c in self.cells),
            "forwards_per_image": self.per_image("forwards"),
            "backwards_per_image": self.per_image("backwards"),
        }
        return {**asdict(self), "averages": averages}


@dataclass(frozen=True)
class Results:
    """A finished run; ``methods`` holds the adapter first, then the source model if it ran.

    ``settings`` is what makes two runs the same experiment; ``circumstances`` is the rest
    (order in words, data note, versions, machine, command).
    """

    settings: dict[str, Any]
    circumstances: dict[str, Any]
    methods: list[MethodRecord]

    def to_json(self) -> str:
        methods = [m.to_dict() for m in self.methods]
        text = json.dumps(
            finite(
                {
                    "format_version": FORMAT_VERSION,
                    "settings": self.settings,
                    **self.circumstances,
                    "methods": methods,
                }
            ),
            indent=1,
            allow_nan=False,
            default=str,
        )
        # A list of numbers on one line; a JSON string cannot contain a raw line break.
        return re.sub(r"\[\s+([-\d.,\se]+?)\s+\]", _one_line, text) + "\n"

    def table(self) -> str:
        """Accuracy in percent for each corruption (mean of its severities), aligned."""
        rows = [["corruption", "images", *(m.method for m in self.methods)]]
        compared = len(self.methods) == 2
        columns = [m.by("corruption") for m in self.methods]
        for name in columns[0]:
            count = sum(c.n for c in self.methods[0].cells if c.corruption == name)
            rows.append([name, str(count), *(f"{100 * column[name]:.2f}" for column in columns)])
        total = sum(c.n for c in self.methods[0].cells)
        rows.append(["mean", str(total), *(f"{100 * m.mean():.2f}" for m in self.methods)])
        clean = [m.clean_accuracy for m in self.methods]
        if clean[0] is not None:
            count = self.circumstances["clean"]["n"]
            rows.append(["clean", str(count), *(f"{100 * c:.2f}" for c in clean)])
        if compared:
            rows[0].append("gain")
            for row in rows[1:]:
                row.append(f"{float(row[2]) - float(row[3]):+.2f}")
        return align(rows)


def _one_line(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"


def finite(value: Any) -> Any:
    """JSON has no NaN: a loss that is not finite is written as null."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
