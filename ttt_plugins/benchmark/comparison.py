"""Comparison of several runs: a table, and an HTML page with its figures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..data.datasets import dataset_title
from ..errors import DataError, InputError
from ..utils.files import write_text
from ..utils.text import align, printable
from ..version import __version__
from . import plots
from .leaderboard import mean_corruption_error
from .protocols import PROTOCOLS
from .results import MethodRecord, Results, read_results

__all__ = ["Entry", "compare", "comparison_table", "differences", "page", "read_entries"]
__all__ += ["render", "rows"]

#: Marks a page of this module, near its beginning, so that it may be replaced.
PAGE_MARK = '<meta name="generator" content="ttt-plugins compare">'
#: Settings whose differences must be reported beside the figures.
_COMPARED = (
    "model",
    "protocol",
    "concentration",
    "batch_size",
    "seeds",
    "layout",
    "device",
    "execution",
)


@dataclass(frozen=True)
class Entry:
    """One column of a comparison: a method of a run, restricted to the cells that all runs have.

    Attributes:
        label: heading of the column.
        results: results of the run.
        method: record of the method on the common cells.
    """

    label: str
    results: Results
    method: MethodRecord

    @property
    def mce(self) -> float | None:
        """Mean corruption error; None if it is not defined."""
        return mean_corruption_error(self.method, self.results.settings["dataset"])

    def per_cell(self, field: str) -> float:
        """Mean of ``loss`` or ``ece`` over the cells, with equal weights."""
        return fmean(getattr(cell, field) for cell in self.method.cells)


# -- the columns -------------------------------------------------------------------------


def read_entries(folders: Sequence[str | Path]) -> list[Entry]:
    """The adapters of finished runs, preceded by the distinct unadapted models.

    Raises:
        DataError: a folder holds no results, or unreadable ones.
        InputError: the runs are on different datasets, or have no cell in common.
    """
    paths = [Path(folder) for folder in folders]
    runs = [read_results(path / "results.json") for path in paths]
    datasets = list(dict.fromkeys(run.settings["dataset"] for run in runs))
    if len(datasets) > 1:
        raise InputError(f"runs on different datasets cannot be compared: {', '.join(datasets)}")
    shared = set.intersection(*(set(m.accuracies()) for run in runs for m in run.methods))
    if not shared:
        raise InputError("these runs have no cell in common, so they cannot be compared")
    names = [path.resolve().name for path in paths]
    ambiguous = len(set(names)) < len(names)
    adapted: list[Entry] = []
    sources: dict[tuple[Any, ...], Entry] = {}
    for path, name, run in zip(paths, names, runs, strict=True):
        for position, method in enumerate(run.methods):
            cells = [c for c in method.cells if (c.corruption, c.severity) in shared]
            restricted = replace(method, cells=cells)
            if position == 0:
                adapted.append(Entry(str(path) if ambiguous else name, run, restricted))
            else:
                # One model wrapped by several methods has one unadapted entry.
                loss = round(fmean(cell.loss for cell in cells), 5)
                key = (str(loss), *sorted(restricted.accuracies().items()))
                sources.setdefault(key, Entry(method.method, run, restricted))
    unadapted = list(sources.values())
    if len(unadapted) > 1:
        unadapted = [replace(entry, label=entry.method.name) for entry in unadapted]
    return _with_distinct_labels([*unadapted, *adapted])


def _with_distinct_labels(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with printable, distinct labels."""
    seen: dict[str, int] = {}
    labelled = []
    for entry in entries:
        label = printable(entry.label)
        seen[label] = seen.get(label, 0) + 1
        label = label if seen[label] == 1 else f"{label} ({seen[label]})"
        labelled.append(replace(entry, label=label))
    return labelled


# -- the table ---------------------------------------------------------------------------


def _shown(value: float | None, scale: float = 100, digits: int = 2) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def rows(entries: Sequence[Entry]) -> list[list[str]]:
    """The table's rows, header first: accuracies in %, then costs."""
    table = [["accuracy in %", *(entry.label for entry in entries)]]
    columns = [entry.method.by("corruption") for entry in entries]
    table += [
        [printable(name), *(_shown(column[name]) for column in columns)] for name in columns[0]
    ]
    methods = [entry.method for entry in entries]
    table.append(["mean", *(_shown(m.mean()) for m in methods)])
    table.append(["standard error over seeds", *(_shown(m.standard_error()) for m in methods)])
    table.append(["clean", *(_shown(m.clean_accuracy) for m in methods)])
    table.append(["mCE", *(_shown(entry.mce) for entry in entries)])
    table.append(["loss in nats", *(_shown(e.per_cell("loss"), 1, 3) for e in entries)])
    table.append(["calibration error", *(_shown(e.per_cell("ece")) for e in entries)])
    table += [
        [f"{field} per image", *(_shown(m.per_image(field), 1) for m in methods)]
        for field in ("forwards", "backwards")
    ]
    table.append(["ms per image", *(_shown(m.per_image("seconds"), 1000, 3) for m in methods)])
    peaks = [max(cell.peak_memory for cell in m.cells) for m in methods]
    table.append(["peak memory in MB", *(_shown(peak, 1e-6, 0) for peak in peaks)])
    return table


def differences(entries: Sequence[Entry]) -> list[str]:
    """Sentences about differences between the runs other than the method."""
    sentences = []

    def note(name: str, values: list[Any]) -> None:
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{e.label}: {v}" for e, v in zip(entries, values, strict=True))
            sentences.append(printable(f"{name} differs ({shown})"))

    for name in _COMPARED:
        note(name, [entry.results.settings[name] for entry in entries])
    note("accelerator", [entry.results.settings.get("accelerator") for entry in entries])
    note("torch", [entry.results.circumstances["versions"].get("torch") for entry in entries])
    note("machine", [entry.results.circumstances["machine"] for entry in entries])
    note("images", [sum(c.n for c in e.method.cells if not c.visit) for e in entries])
    whole = max(len(entry.results.settings["cells"]) for entry in entries)
    if (common := len(entries[0].method.accuracies())) < whole:
        sentences.append(
            f"only the {common} cells that all runs have are compared, of up to {whole}"
        )
    return sentences


def comparison_table(entries: Sequence[Entry]) -> str:
    """`rows` as aligned lines, followed by `differences`."""
    return "\n".join([align(rows(entries)), *differences(entries)])


# -- the page ----------------------------------------------------------------------------


def _settings(entry: Entry) -> dict[str, str]:
    results = entry.results
    shown = {
        "method": {"name": entry.method.method, **entry.method.config},
        **{k: v for k, v in results.settings.items() if k not in ("method", "config", "cells")},
        **{k: results.circumstances.get(k) for k in ("order", "data_note", "versions", "machine")},
        "skipped updates": entry.method.skipped_updates,
        "command": results.circumstances.get("command"),
    }
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in shown.items()}
    return {printable(k): printable(v) for k, v in texts.items()}


def _curve(entry: Entry) -> tuple[str, list[int], list[float]]:
    settings = entry.results.settings
    interleaved = PROTOCOLS[settings["protocol"]].interleaved
    positions, values = plots.accuracy_along(entry.method, settings["batch_size"], interleaved)
    return entry.label, positions, values


def page(entries: Sequence[Entry]) -> str:
    """The page as self-contained HTML, with figures as SVG elements.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    colours = (plots.COLOURS * len(entries))[: len(entries)]
    columns = {entry.label: plots.percentages(entry.method) for entry in entries}
    bars_in_all = len(entries) * len(columns[entries[0].label])
    methods = [(entry.label, entry.method) for entry in entries]
    figures = {
        "By corruption": plots.bars(columns, colours, max(7.0, 0.25 * bars_in_all)),
        "Along the stream": plots.curves(list(map(_curve, entries)), colours),
        "Against cost": plots.scatter(methods, colours),
    }
    return render(
        f"Adaptation on {dataset_title(entries[0].results.settings['dataset'])}",
        rows(entries),
        ("Differences between the runs other than the method:", differences(entries)),
        figures,
        [(entry.label, _settings(entry)) for entry in entries],
    )


def render(
    title: str,
    table: Sequence[Sequence[str]],
    remarks: tuple[str, Sequence[str]],
    figures: Mapping[str, Any],
    settings: Sequence[tuple[str, Mapping[str, str]]],
) -> str:
    """A self-contained HTML page.

    Args:
        title: heading of the page.
        table: rows of cells, header first.
        remarks: a sentence and the list below it; neither is shown if the list is empty.
        figures: matplotlib figures by heading.
        settings: a label and named settings for each column.
    """
    source = resources.files("ttt_plugins.benchmark") / "comparison.html.jinja"
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        source.read_text(encoding="utf-8")
    )
    return template.render(
        mark=Markup(PAGE_MARK),
        title=title,
        header=table[0],
        rows=table[1:],
        remarks=remarks,
        pictures=[(name, Markup(plots.to_svg(drawn))) for name, drawn in figures.items()],
        settings=settings,
        version=__version__,
    )


def _check_page(file: Path, folders: Sequence[str | Path]) -> None:
    """Raise an error unless the page would be a new file or replace an earlier page."""
    try:
        results = [(Path(folder) / "results.json").resolve() for folder in folders]
        is_input = file.resolve() in results
        exists, is_folder, has_folder = os.path.lexists(file), file.is_dir(), file.parent.is_dir()
        with file.open("rb") if file.is_file() else io.BytesIO() as opened:
            is_page = PAGE_MARK.encode() in opened.read(1000)
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)[:200]!r}: cannot be written ({error})") from error
    if is_input:
        raise InputError(f"{file} is one of the results to compare; name another file")
    if is_folder:
        raise InputError(f"{file} is a folder; name a file for the page")
    if not has_folder:
        raise DataError(f"{file}: cannot be written ({file.parent} is not a folder)")
    if exists and not is_page:
        raise InputError(f"{file} exists and is not a page of compare; name another file")


def compare(folders: Sequence[str | Path], html: str | Path | None = None) -> str:
    """Compare the results of several runs.

    Args:
        folders: results folders (OUT) of finished benchmarks.
        html: file for the page; None for no page. An existing file is replaced only if it is an
            earlier page.

    Returns:
        the table.

    Raises:
        DataError: a folder holds no results, or the page cannot be written.
        InputError: the runs cannot be compared, or ``html`` is an existing file of another kind.
        MissingDependencyError: a page is requested, and matplotlib is not installed.
    """
    if html is not None:
        _check_page(Path(html), folders)
    entries = read_entries(folders)
    if html is not None:
        text = page(entries)
        try:
            write_text(Path(html), text)
        except OSError as error:
            raise DataError(f"{html}: cannot be written ({error.strerror})") from error
    return comparison_table(entries)
