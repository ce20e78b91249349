"""The picture of a run; matplotlib is imported here only, and only when it is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from ..errors import MissingDependencyError
from .records import MethodRecord
from .results import Results

__all__ = ["COLOURS", "bars", "figure", "percentages", "plot_results", "to_png", "to_svg"]

#: Colours of the source model and of the adapters after it (Okabe & Ito, told apart by
#: colour-blind readers).
COLOURS = ["#999999", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442"]


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


def to_svg(drawn) -> str:
    """A figure as an ``<svg>`` element to put into a page; its text stays text."""
    import matplotlib

    buffer = io.StringIO()
    silent = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn.savefig(buffer, format="svg", metadata=silent)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def bars(drawn, columns: Mapping[str, Mapping[str, float]], colours: Sequence[str]) -> None:
    """Accuracy in % by corruption and its mean, for each label in ``columns``."""
    axes = drawn.add_subplot()
    width = 0.8 / len(columns)
    names = list(next(iter(columns.values())))
    for position, ((label, column), colour) in enumerate(
        zip(columns.items(), colours, strict=True)
    ):
        places = [i + position * width for i in range(len(names))]
        axes.bar(places, [column[name] for name in names], width, color=colour, label=label)
    middle = (len(columns) - 1) * width / 2
    axes.set_xticks([i + middle for i in range(len(names))], names, rotation=40, ha="right")
    axes.set_ylim(0, 115)  # room for the legend above bars of any height
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy in %")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=min(4, len(columns)), loc="upper right", fontsize=8)


def percentages(method: MethodRecord) -> dict[str, float]:
    """Accuracy in % of each corruption, and of all as ``mean``."""
    found = {name: 100 * value for name, value in method.by("corruption").items()}
    return {**found, "mean": 100 * method.mean()}


def plot_results(results: Results) -> bytes:
    """Accuracy of each corruption as bars, the source model beside the adapter, as PNG."""
    settings = results.settings
    methods = results.methods[::-1]  # the source first, so that the gain is to its right
    columns = {f"{m.method} (mean {100 * m.mean():.1f} %)": percentages(m) for m in methods}
    names = methods[0].by("corruption")
    drawn = figure(max(6.0, 0.62 * len(names) + 2), 4.2)
    bars(drawn, columns, COLOURS[: len(methods)] if len(methods) > 1 else COLOURS[1:2])
    severities = ", ".join(map(str, methods[0].by("severity")))
    drawn.axes[0].set_title(
        f"{settings['model']} on corrupted {settings['dataset']} (severity {severities})\n"
        f"{settings['protocol']}, batch size {settings['batch_size']}",
        fontsize=10,
    )
    return to_png(drawn)
