"""Figures of runs; matplotlib is imported only when something is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.datasets import dataset_title
from ..errors import MissingDependencyError
from ..utils.text import printable
from .results import CellRecord, MethodRecord, Results

__all__ = [
    "COLOURS",
    "accuracy_along",
    "bars",
    "batch_counts",
    "curves",
    "figure",
    "heat_map",
    "percentages",
    "plot_results",
    "scatter",
    "to_png",
    "to_svg",
]

#: Colours of the source model and of the adapters after it (Okabe & Ito, distinguishable for
#: colour-blind readers).
COLOURS = ["#999999", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442"]
#: Largest number of points in a curve; more points would only show noise.
_POINTS = 50
#: Differences beyond this many percentage points have the same colour in a heat map.
_MOST_POINTS = 20.0


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure with sizes in inches, independent of the user's backend.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _name(text: str) -> str:
    """Escape a name so that matplotlib shows it unchanged.

    Dollar signs would start a formula, and legends omit labels with a leading underscore.
    """
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def to_png(drawn: Any, dpi: int = 120) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def to_svg(drawn: Any) -> str:
    """A figure as an ``<svg>`` element for an HTML page; its text remains text."""
    import matplotlib

    buffer = io.StringIO()
    omitted = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn.savefig(buffer, format="svg", metadata=omitted)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


# -- figures -----------------------------------------------------------------------------


def bars(columns: Mapping[str, Mapping[str, float]], colours: Sequence[str], width: float) -> Any:
    """Bar chart of the accuracy in % on each corruption and of the mean, for each label."""
    drawn = figure(width, 4.2)
    axes = drawn.add_subplot()
    thickness = 0.8 / len(columns)
    names = list(next(iter(columns.values())))
    for position, ((label, column), colour) in enumerate(
        zip(columns.items(), colours, strict=True)
    ):
        lefts = [i + position * thickness for i in range(len(names))]
        heights = [column[name] for name in names]
        axes.bar(lefts, heights, thickness, color=colour, label=_name(label))
    middle = (len(columns) - 1) * thickness / 2
    ticks = [i + middle for i in range(len(names))]
    axes.set_xticks(ticks, list(map(_name, names)), rotation=40, ha="right")
    axes.set_ylim(0, 115)  # space for the legend above bars of any height
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy in %")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=min(4, len(columns)), loc="upper right", fontsize=8)
    return drawn


def curves(
    lines: Sequence[tuple[str, Sequence[int], Sequence[float]]],
    colours: Sequence[str],
    x_label: str = "images since the last reset",
    y_label: str = "accuracy so far in %",
) -> Any:
    """One curve per method, given as label, positions along the stream, and accuracy in [0, 1]."""
    drawn = figure(8, 4)
    axes = drawn.add_subplot()
    for (label, positions, values), colour in zip(lines, colours, strict=True):
        shares = [100 * value for value in values]
        axes.plot(positions, shares, color=colour, label=_name(label), marker=".")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return drawn


def heat_map(rows: Sequence[str], columns: Sequence[str], points: Sequence[Sequence[float]]) -> Any:
    """Heat map of differences in percentage points: blue above zero, red below it.

    Args:
        rows: labels of the rows.
        columns: labels of the columns.
        points: one sequence of differences for each row; NaN for a missing difference.
    """
    drawn = figure(2.6 + 0.9 * len(columns), 1.2 + 0.32 * len(rows))
    axes = drawn.add_subplot()
    most = max((abs(v) for row in points for v in row if math.isfinite(v)), default=0.0)
    limit = max(1.0, min(most, _MOST_POINTS))
    shown = axes.imshow(points, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(columns)), list(map(_name, columns)), rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), list(map(_name, rows)))
    for row, values in enumerate(points):
        for column, value in enumerate(values):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            text = f"{value:+.1f}" if math.isfinite(value) else "–"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    drawn.colorbar(shown, label="points above the source")
    return drawn


def scatter(methods: Sequence[tuple[str, MethodRecord]], colours: Sequence[str]) -> Any:
    """Scatter plots of each method's mean accuracy against its time and its passes."""
    drawn = figure(8, 4)
    panels = drawn.subplots(1, 2, sharey=True)
    for (label, method), colour in zip(methods, colours, strict=True):
        passes = method.per_image("forwards") + method.per_image("backwards")
        share = percentages(method)["mean"]
        for axes, cost in zip(panels, (1000 * method.per_image("seconds"), passes), strict=True):
            axes.scatter(cost, share, color=colour, label=_name(label), zorder=2)
    panels[0].set_xlabel("ms per image")
    panels[1].set_xlabel("passes per image (forward and backward)")
    panels[0].set_ylabel("mean accuracy in %")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    panels[1].legend(fontsize=8)
    return drawn


def plot_results(results: Results) -> bytes:
    """Bar chart of accuracy by corruption for the source model and the adapter, as PNG."""
    settings = results.settings
    methods = results.methods[::-1]  # the source first, so that the gain is to its right
    shares = [percentages(m) for m in methods]
    columns = {
        f"{m.method} (mean {share['mean']:.1f} %)": share
        for m, share in zip(methods, shares, strict=True)
    }
    names = methods[0].by("corruption")
    colours = COLOURS[: len(methods)] if len(methods) > 1 else COLOURS[1:2]
    drawn = bars(columns, colours, max(6.0, 0.62 * len(names) + 2))
    severities = ", ".join(map(str, methods[0].by("severity")))
    drawn.axes[0].set_title(
        f"{_name(settings['model'])} on {dataset_title(settings['dataset'])} "
        f"(severity {severities})\n"
        f"{settings['protocol']}, batch size {settings['batch_size']}",
        fontsize=10,
    )
    return to_png(drawn)


# -- figures of methods ------------------------------------------------------------------


def percentages(method: MethodRecord) -> dict[str, float]:
    """Accuracy in % on each corruption, and the mean over them as ``mean``."""
    shares = {name: 100 * value for name, value in method.by("corruption").items()}
    return {**shares, "mean": 100 * (method.mean() or 0.0)}


def batch_counts(
    cells: Sequence[CellRecord], batch_size: int, interleaved: bool
) -> list[list[int]]:
    """[number correct, number of images] for each batch of one stream, from its cells' records."""
    if interleaved:
        total = sum(cell.n for cell in cells)
        counts = [sum(batch) for batch in zip(*(c.correct_per_batch for c in cells), strict=True)]
        return [[n, min(batch_size, total - i * batch_size)] for i, n in enumerate(counts)]
    return [
        [correct, min(batch_size, cell.n - i * batch_size)]
        for cell in cells
        for i, correct in enumerate(cell.correct_per_batch)
    ]


def accuracy_along(
    method: MethodRecord, batch_size: int, interleaved: bool
) -> tuple[list[int], list[float]]:
    """Cumulative accuracy from one reset to the next.

    Args:
        method: record of the method.
        batch_size: number of images in a batch.
        interleaved: whether a batch holds images of several cells.

    Returns:
        numbers of images since the last reset, and the accuracy in [0, 1] on the images so far.
        Only streams with the same batches as the longest one are included, so that every point
        covers the same streams.
    """
    grouped: dict[tuple[int | None, int], list[CellRecord]] = {}
    for cell in method.cells:
        grouped.setdefault((cell.seed, cell.stream), []).append(cell)
    streams = [batch_counts(cells, batch_size, interleaved) for cells in grouped.values()]
    sizes = [[images for _, images in stream] for stream in streams]
    longest = max(sizes, key=sum)
    chosen = [s for s, size in zip(streams, sizes, strict=True) if size == longest]
    positions, values, correct, images = [], [], 0, 0
    for batches in zip(*chosen, strict=True):
        correct += sum(batch[0] for batch in batches)
        images += sum(batch[1] for batch in batches)
        positions.append(images // len(chosen))
        values.append(correct / images)
    # Thinned from the end, so that the last point is the accuracy on the whole stream.
    step = -(-len(positions) // _POINTS)
    thinned = slice((len(positions) - 1) % step, None, step)
    return positions[thinned], values[thinned]
