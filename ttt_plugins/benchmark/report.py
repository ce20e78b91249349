"""A page on several runs that needs nothing beside itself: pictures are inside, as SVG."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from ..version import __version__
from . import plots
from .compare import PAGE_MARK, Entry, differences, rows
from .records import CellRecord, MethodRecord

__all__ = ["accuracy_along", "page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
.settings td { text-align: left; overflow-wrap: anywhere; vertical-align: top }
svg { max-width: 100%; height: auto }
"""
#: Points of a curve at most; more would be noise.
_POINTS = 50


def _batches(cells: Sequence[CellRecord], batch_size: int, interleaved: bool) -> list[list[int]]:
    """[right, images] of each batch of one stream."""
    if interleaved:
        total = sum(cell.n for cell in cells)
        right = [sum(column) for column in zip(*(c.correct_per_batch for c in cells), strict=True)]
        return [[r, min(batch_size, total - i * batch_size)] for i, r in enumerate(right)]
    return [
        [right, min(batch_size, cell.n - i * batch_size)]
        for cell in cells
        for i, right in enumerate(cell.correct_per_batch)
    ]


def accuracy_along(
    method: MethodRecord, batch_size: int, interleaved: bool
) -> tuple[list[int], list[float]]:
    """Images since the last reset, and the accuracy in [0, 1] up to there.

    Over all streams of the greatest length, so that the streams do not change on the way.
    ``interleaved`` says that a batch holds images of several cells.
    """
    grouped: dict[tuple, list[CellRecord]] = {}
    for cell in method.cells:
        grouped.setdefault((cell.seed, cell.stream), []).append(cell)
    longest = max(sum(cell.n for cell in cells) for cells in grouped.values())
    chosen = [
        _batches(cells, batch_size, interleaved)
        for cells in grouped.values()
        if sum(cell.n for cell in cells) == longest
    ]
    places, values, right, shown = [], [], 0, 0
    for column in zip(*chosen, strict=True):
        right += sum(batch[0] for batch in column)
        shown += sum(batch[1] for batch in column)
        places.append(shown // len(chosen))
        values.append(right / shown)
    # Every so many, counted from the end, whose value is the stream's.
    kept = slice((len(places) - 1) % (step := -(-len(places) // _POINTS)), None, step)
    return places[kept], values[kept]


def _bars(entries: Sequence[Entry], colours: list[str]) -> str:
    columns = {entry.label: plots.percentages(entry.method) for entry in entries}
    drawn = plots.figure(max(7.0, 0.25 * len(entries) * len(columns[entries[0].label])), 4.2)
    plots.bars(drawn, columns, colours)
    return plots.to_svg(drawn)


def _along(entries: Sequence[Entry], colours: list[str]) -> str:
    drawn = plots.figure(8, 4)
    axes = drawn.add_subplot()
    for entry, colour in zip(entries, colours, strict=True):
        settings = entry.results.settings
        mixed = settings["protocol"] == "mixed"
        places, values = accuracy_along(entry.method, settings["batch_size"], mixed)
        axes.plot(places, [100 * v for v in values], color=colour, label=entry.label, marker=".")
    axes.set_xlabel("images since the last reset")
    axes.set_ylabel("accuracy so far in %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return plots.to_svg(drawn)


def _cost(entries: Sequence[Entry], colours: list[str]) -> str:
    drawn = plots.figure(8, 4)
    panels = drawn.subplots(1, 2, sharey=True)
    for entry, colour in zip(entries, colours, strict=True):
        method = entry.method
        passes = method.per_image("forwards") + method.per_image("backwards")
        for axes, cost in zip(panels, (1000 * method.per_image("seconds"), passes), strict=True):
            axes.scatter(cost, 100 * method.mean(), color=colour, label=entry.label, zorder=2)
    panels[0].set_xlabel("ms an image")
    panels[1].set_xlabel("passes an image (forward and backward)")
    panels[0].set_ylabel("mean accuracy in %")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    panels[1].legend(fontsize=8)
    return plots.to_svg(drawn)


def _table(lines: Sequence[Sequence[str]], kind: str = "") -> str:
    found = []
    for number, line in enumerate(lines):
        tag = "td" if number or kind else "th"
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        found.append(f"<tr>{cells}</tr>")
    return f'<table class="{kind}">{"".join(found)}</table>'


def _settings(entry: Entry) -> str:
    results = entry.results
    shown = {
        "method": {"name": entry.method.method, **entry.method.config},
        **{k: v for k, v in results.settings.items() if k not in ("method", "config", "cells")},
        **{k: results.circumstances.get(k) for k in ("order", "data_note", "versions", "machine")},
        "skipped updates": entry.method.skipped_updates,
        "command": results.circumstances.get("command"),
    }
    lines = [[k, v if isinstance(v, str) else json.dumps(v)] for k, v in shown.items()]
    return f"<h3>{html.escape(entry.label)}</h3>{_table(lines, 'settings')}"


def page(entries: Sequence[Entry]) -> str:
    """The whole page as HTML.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    palette = (plots.COLOURS * len(entries))[: len(entries)]
    dataset = html.escape(entries[0].results.settings["dataset"])
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in differences(entries))
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"{PAGE_MARK}<title>ttt-plugins: {dataset}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Adaptation on corrupted {dataset}</h1>",
        _table(rows(entries)),
        f"<p>Not the same in all runs:</p><ul>{notes}</ul>" if notes else "",
        "<h2>By corruption</h2>",
        _bars(entries, palette),
        "<h2>Along the stream</h2>",
        _along(entries, palette),
        "<h2>Against cost</h2>",
        _cost(entries, palette),
        "<h2>Settings</h2>",
        *map(_settings, entries),
        f"<p>ttt_plugins {__version__}</p></body></html>\n",
    ]
    return "\n".join(parts)
