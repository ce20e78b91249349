"""The report on a field: accuracies by stream and method, and differences from the source."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from ..utils.text import align, printable
from . import plots
from .cells import CLEAN
from .comparison import render
from .protocols import WITH_CLEAN
from .results import CellRecord, Results, finite

__all__ = ["FieldCell", "FieldResults", "field_cell"]

#: A cell is marked if the adapter is more than this many percentage points below the source.
_TOLERANCE = 0.5


@dataclass(frozen=True)
class FieldCell:
    """One method on one stream.

    Attributes:
        accuracy: share of all images of the stream that are predicted correctly, in [0, 1]; the
            mean over the seeds.
        error: standard error of the accuracy over the seeds; None for a single seed.
        parts: accuracy by part of the stream: the tenths of a repeated stream, and the images
            before, in and after the corruption of ``clean-corrupt-clean``.
        memory: peak memory in bytes in each of these parts, for tenths only.
        images: number of images for one seed.
        seconds: wall time for adapting and predicting.
        skipped_updates: number of skipped updates.
    """

    accuracy: float
    error: float | None
    parts: dict[str, float]
    memory: list[int]
    images: int
    seconds: float
    skipped_updates: int


def _accuracy(cells: Sequence[CellRecord]) -> float:
    return sum(sum(c.correct_per_batch) for c in cells) / sum(c.n for c in cells)


def _tenths(cells: Sequence[CellRecord], batch_size: int) -> tuple[list[float], list[int]]:
    """Accuracy and peak memory in every tenth of a stream, to the nearest batch."""
    total, position = sum(cell.n for cell in cells), 0
    correct, images, memory = [0] * 10, [0] * 10, [0] * 10
    for cell in cells:
        for hits, count in plots.batch_counts([cell], batch_size, interleaved=False):
            tenth = 10 * position // total
            correct[tenth] += hits
            images[tenth] += count
            memory[tenth] = max(memory[tenth], cell.peak_memory)
            position += count
    shares = [c / n if n else math.nan for c, n in zip(correct, images, strict=True)]
    return shares, memory


def field_cell(results: Results, tenths: bool) -> FieldCell:
    """What the results of a run say about its first method; ``tenths`` is for long streams."""
    method = results.methods[0]
    by_seed: dict[int | None, list[CellRecord]] = {}
    for cell in method.cells:
        by_seed.setdefault(cell.seed, []).append(cell)
    shares = [_accuracy(cells) for cells in by_seed.values()]
    parts, memory = {}, []
    if tenths:
        measured = [_tenths(c, results.settings["batch_size"]) for c in by_seed.values()]
        columns = enumerate(zip(*(shares for shares, _ in measured), strict=True), 1)
        parts = {f"tenth {number}": fmean(column) for number, column in columns}
        memory = [max(column) for column in zip(*(m for _, m in measured), strict=True)]
    elif results.settings["protocol"] in WITH_CLEAN:
        clean = [c for c in method.cells if c.corruption == CLEAN[0]]
        parts = {
            "clean before": _accuracy([c for c in clean if not c.visit]),
            "corrupted": _accuracy([c for c in method.cells if c.corruption != CLEAN[0]]),
            "clean after": _accuracy([c for c in clean if c.visit]),
        }
    return FieldCell(
        accuracy=fmean(shares),
        error=stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None,
        parts=parts,
        memory=memory,
        images=sum(cell.n for cell in method.cells) // len(by_seed),
        seconds=sum(cell.seconds for cell in method.cells),
        skipped_updates=method.skipped_updates,
    )


@dataclass(frozen=True)
class FieldResults:
    """Methods on the streams of a field.

    Attributes:
        settings: settings of the field, and each method's config and description.
        notes: remarks that must accompany the figures.
        cells: the figures by stream and then by method.
    """

    settings: dict[str, Any]
    notes: list[str]
    cells: dict[str, dict[str, FieldCell]] = field(repr=False)

    @property
    def methods(self) -> list[str]:
        """The labels of the methods, in their order."""
        return list(next(iter(self.cells.values())))

    def accuracies(self) -> dict[str, dict[str, float]]:
        """Accuracy in [0, 1] by stream and method."""
        return {s: {m: c.accuracy for m, c in row.items()} for s, row in self.cells.items()}

    def differences(self) -> dict[str, dict[str, float]]:
        """Points above the method labelled ``source`` by stream and method; empty without it."""
        if "source" not in self.methods:
            return {}
        return {
            stream: {m: 100 * (row[m] - row["source"]) for m in row if m != "source"}
            for stream, row in self.accuracies().items()
        }

    def rows(self) -> list[list[str]]:
        """The table, header first: accuracy in %, and for adapters the points above the source."""
        differences = self.differences()
        rows = [["accuracy in %", "images", *self.methods]]
        for stream, row in self.cells.items():
            shown = []
            for method, cell in row.items():
                points = differences.get(stream, {}).get(method)
                shown.append(_with_points(cell.accuracy, points))
            rows.append([stream, str(next(iter(row.values())).images), *shown])
        means = {m: fmean(row[m].accuracy for row in self.cells.values()) for m in self.methods}
        source = means.get("source")
        last = [
            _with_points(mean, None if source is None or m == "source" else 100 * (mean - source))
            for m, mean in means.items()
        ]
        return [*rows, ["mean", "", *last]]

    def table(self) -> str:
        """`rows` as aligned lines, followed by the parts of streams and the notes."""
        lines = [align(self.rows()), *map(printable, self._remarks())]
        return "\n".join(lines)

    def markdown(self) -> str:
        """`rows` as a Markdown table, followed by a list of the same remarks as in `table`."""
        header, *lines = [[printable(c).replace("|", r"\|") for c in row] for row in self.rows()]
        ruler = ["---", *["---:"] * (len(header) - 1)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *lines])
        remarks = "\n".join(f"- {printable(remark)}" for remark in self._remarks())
        return f"{table}\n\n{remarks}\n"

    def _remarks(self) -> list[str]:
        """Sentences on the streams below the source and on parts of streams, and the notes."""
        remarks = []
        differences = self.differences()
        for method in self.methods:
            points = {s: row[method] for s, row in differences.items() if method in row}
            if points:
                worst = min(points, key=lambda stream: points[stream])
                below = sum(value < -_TOLERANCE for value in points.values())
                remarks.append(
                    f"{method}: {below} of {len(points)} streams more than {_TOLERANCE} points "
                    f"below the source (marked !), the lowest {worst} with {points[worst]:+.1f}"
                )
        for stream, row in self.cells.items():
            for method, cell in row.items():
                if cell.parts:
                    shown = ", ".join(f"{k} {100 * v:.1f}" for k, v in cell.parts.items())
                    if cell.memory:
                        first, last = (f"{cell.memory[i] / 1e6:.0f}" for i in (0, -1))
                        shown += f"; peak memory {first} MB in the first tenth, {last} in the last"
                    remarks.append(f"{stream}, {method}: {shown}")
        return [*remarks, *self.notes]

    def to_json(self) -> str:
        """The text of ``field.json``; figures that are not finite are written as null."""
        cells = {s: {m: vars(c) for m, c in row.items()} for s, row in self.cells.items()}
        content = {
            "format_version": 1,
            "settings": self.settings,
            "notes": self.notes,
            "streams": cells,
            "points_above_source": self.differences(),
        }
        return json.dumps(finite(content), indent=1, allow_nan=False, default=str) + "\n"

    def files(self) -> dict[str, bytes]:
        """The contents of the files that `run_field` writes, by name."""
        texts = {"json": self.to_json(), "md": self.markdown(), "html": self.page()}
        return {f"field.{kind}": text.encode() for kind, text in texts.items()}

    def page(self) -> str:
        """The report as self-contained HTML, with the differences as a heat map.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        figures, differences = {}, self.differences()
        if adapters := [m for m in self.methods if m != "source"]:
            points = [[row[m] for m in adapters] for row in differences.values()]
            if points:
                drawn = plots.heat_map(list(differences), adapters, points)
                figures["Points above the source"] = drawn
        long = self.cells.get("long")
        if long is not None:
            tenths = [(m, list(range(1, 11)), list(c.parts.values())) for m, c in long.items()]
            colours = (plots.COLOURS * len(tenths))[: len(tenths)]
            drawn = plots.curves(tenths, colours, "tenth of the stream", "accuracy in it in %")
            figures["Along the long stream"] = drawn
        configs = self.settings["methods"]
        shared = {k: v for k, v in self.settings.items() if k != "methods"}
        settings = [("all methods", shared), *configs.items()]
        texts = [(printable(label), _texts(facts)) for label, facts in settings]
        title = f"{self.settings['model']} in the field"
        return render(printable(title), self.rows(), ("Remarks:", self._remarks()), figures, texts)


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    texts = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in facts.items()}
    return {printable(k): printable(v) for k, v in texts.items()}


def _with_points(share: float, points: float | None) -> str:
    if points is None:
        return f"{100 * share:.2f}"
    return f"{100 * share:.2f} ({points:+.2f}{'!' if points < -_TOLERANCE else ''})"
