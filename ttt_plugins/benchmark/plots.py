"""The picture of a run; matplotlib is imported here only, and only when it is drawn."""

from __future__ import annotations

import io

from ..errors import MissingDependencyError
from .records import Results

__all__ = ["figure", "plot_results", "to_png"]

#: Colours of the source model and of the adapters after it (Okabe & Ito, told apart by
#: colour-blind readers).
COLOURS = ["#999999", "#0072b2", "#e69f00", "#009e73", "#cc79a7"]


def figure(width: float, height: float):
    """An empty matplotlib figure, sizes in inches, that leaves the user's backend alone.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def to_png(drawn, dpi: int = 120) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plot_results(results: Results) -> bytes:
    """Accuracy of each corruption as bars, the source model beside the adapter, as PNG."""
    settings = results.settings
    methods = results.methods[::-1]  # the source first, so that the gain is to its right
    names = list(methods[0].by("corruption"))
    columns = [[100 * m.by("corruption")[name] for name in names] for m in methods]
    for column, method in zip(columns, methods, strict=True):
        column.append(100 * method.mean())
    drawn = figure(max(6.0, 0.62 * len(names) + 2), 4.2)
    axes = drawn.add_subplot()
    width = 0.8 / len(methods)
    for position, (method, column) in enumerate(zip(methods, columns, strict=True)):
        places = [i + position * width for i in range(len(column))]
        colour = COLOURS[position if len(methods) > 1 else 1]
        label = f"{method.method} (mean {column[-1]:.1f} %)"
        axes.bar(places, column, width, color=colour, label=label)
    middle = (len(methods) - 1) * width / 2
    axes.set_xticks(
        [i + middle for i in range(len(names) + 1)], [*names, "mean"], rotation=40, ha="right"
    )
    axes.set_ylim(0, 115)  # room for the legend above bars of any height
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy in %")
    severities = ", ".join(map(str, methods[0].by("severity")))
    axes.set_title(
        f"{settings['model']} on corrupted {settings['dataset']} (severity {severities})\n"
        f"{settings['protocol']}, batch size {settings['batch_size']}",
        fontsize=10,
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=len(methods), loc="upper right")
    return to_png(drawn)
