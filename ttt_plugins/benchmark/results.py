"""A finished run: ``results.json``, written and read back, and the table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .records import CellRecord, MethodRecord

__all__ = ["FORMAT_VERSION", "Results", "align", "finite"]

FORMAT_VERSION = 2


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

    @classmethod
    def from_json(cls, text: str) -> Results:
        """What `to_json` wrote; a figure that was not finite is NaN again.

        Raises:
            ValueError, KeyError, TypeError: the text is something else.
        """
        found = json.loads(text)
        if (version := found.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this program reads {FORMAT_VERSION}")
        methods = []
        for method in found.pop("methods"):
            del method["averages"]
            cells = [
                CellRecord(
                    **{k: math.nan if v is None and k != "seed" else v for k, v in c.items()}
                )
                for c in method.pop("cells")
            ]
            methods.append(MethodRecord(**method, cells=cells))
        return cls(found.pop("settings"), found, methods)

    def table(self) -> str:
        """Accuracy in percent for each corruption (mean of its severities), aligned."""
        rows = [["corruption", "images", *(m.method for m in self.methods)]]
        columns = [m.by("corruption") for m in self.methods]
        images = {}
        for cell in self.methods[0].cells:
            images[cell.corruption] = images.get(cell.corruption, 0) + cell.n
        for name, count in images.items():
            rows.append([name, str(count), *(f"{100 * column[name]:.2f}" for column in columns)])
        means = [f"{100 * m.mean():.2f}" for m in self.methods]
        rows.append(["mean", str(sum(images.values())), *means])
        clean = [m.clean_accuracy for m in self.methods]
        if clean[0] is not None:
            count = self.circumstances["clean"]["n"]
            rows.append(["clean", str(count), *(f"{100 * c:.2f}" for c in clean)])
        if len(self.methods) == 2:
            rows[0].append("gain")
            for row in rows[1:]:
                row.append(f"{float(row[2]) - float(row[3]):+.2f}")
        errors = [m.standard_error() for m in self.methods]
        if errors[0] is not None:
            spread = [f"{100 * e:.2f}" for e in errors]
            rows.append(["standard error", "", *spread, *[""] * (len(rows[0]) - 2 - len(spread))])
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
