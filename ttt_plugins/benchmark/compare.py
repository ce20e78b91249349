"""Results of several runs side by side: a table, and a page with pictures (`report`)."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import DataError, InputError
from .leaderboard import mean_corruption_error
from .output import write_file
from .records import MethodRecord
from .results import Results, align

__all__ = ["PAGE_MARK", "Entry", "compare", "comparison_table", "differences", "read_entries"]

#: By which a page of ours is known again; near its beginning.
PAGE_MARK = '<meta name="generator" content="ttt-plugins compare">'
#: Settings that a reader must know to differ before comparing figures.
_COMPARED = ("model", "protocol", "concentration", "batch_size", "seeds", "layout", "device")


@dataclass(frozen=True)
class Entry:
    """One column of a comparison: a method of a run, cut to the cells that all runs have."""

    label: str
    results: Results
    method: MethodRecord

    @property
    def mce(self) -> float | None:
        """Mean corruption error, where it is defined."""
        return mean_corruption_error(self.method, self.results.settings["dataset"])

    def per_image(self, field: str) -> float:
        """Mean of ``loss`` or ``ece`` over the cells, each counting the same."""
        return fmean(getattr(cell, field) for cell in self.method.cells)


def _read(folder: Path) -> Results:
    file = folder / "results.json"
    if not file.is_file():
        raise DataError(f"{file}: no such file; {folder} is not the OUT of a finished benchmark")
    try:
        return Results.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not the results of this program ({error})") from error


def read_entries(folders: Sequence[str | Path]) -> list[Entry]:
    """The adapters of finished runs, after the unadapted models that differ.

    Raises:
        DataError: a folder holds no results, or unreadable ones.
        InputError: runs on different datasets, or with no cell in common.
    """
    paths = [Path(folder) for folder in folders]
    runs = [_read(path) for path in paths]
    datasets = list(dict.fromkeys(run.settings["dataset"] for run in runs))
    if len(datasets) > 1:
        raise InputError(f"runs on different datasets cannot be compared: {', '.join(datasets)}")
    everywhere = [set(method.accuracies()) for run in runs for method in run.methods]
    shared = set.intersection(*everywhere)
    if not shared:
        raise InputError("these runs have no cell in common")
    names = [path.resolve().name for path in paths]
    twice = len(set(names)) < len(names)
    adapted, sources = [], {}
    for path, name, run in zip(paths, names, runs, strict=True):
        for position, method in enumerate(run.methods):
            cells = [c for c in method.cells if (c.corruption, c.severity) in shared]
            cut = replace(method, cells=cells)
            if position == 0:
                adapted.append(Entry(str(path) if twice else name, run, cut))
            else:
                # One model wrapped by several methods has one unadapted row.
                loss = round(fmean(cell.loss for cell in cells), 5)
                key = (str(loss), tuple(sorted(cut.accuracies().items())))
                sources.setdefault(key, Entry(method.method, run, cut))
    if len(sources) > 1:
        sources = {k: replace(e, label=e.method.name) for k, e in sources.items()}
    entries = [*sources.values(), *adapted]
    seen: dict[str, int] = {}
    for place, entry in enumerate(entries):
        seen[entry.label] = seen.get(entry.label, 0) + 1
        if seen[entry.label] > 1:
            entries[place] = replace(entry, label=f"{entry.label} ({seen[entry.label]})")
    return entries


def _shown(value: float | None, scale: float = 100, digits: int = 2) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def rows(entries: Sequence[Entry]) -> list[list[str]]:
    """The table's rows, header first: accuracies in %, then what they cost."""
    table = [["accuracy in %", *(entry.label for entry in entries)]]
    columns = [entry.method.by("corruption") for entry in entries]
    for name in columns[0]:
        table.append([name, *(_shown(column[name]) for column in columns)])
    methods = [entry.method for entry in entries]
    table.append(["mean", *(_shown(m.mean()) for m in methods)])
    table.append(["standard error over seeds", *(_shown(m.standard_error()) for m in methods)])
    table.append(["clean", *(_shown(m.clean_accuracy) for m in methods)])
    table.append(["mCE", *(_shown(entry.mce) for entry in entries)])
    table.append(["loss in nats", *(_shown(e.per_image("loss"), 1, 3) for e in entries)])
    table.append(["calibration error", *(_shown(e.per_image("ece")) for e in entries)])
    for field in ("forwards", "backwards"):
        table.append([f"{field} an image", *(_shown(m.per_image(field), 1) for m in methods)])
    table.append(["ms an image", *(_shown(m.per_image("seconds"), 1000, 3) for m in methods)])
    peaks = [max(cell.peak_memory for cell in m.cells) for m in methods]
    table.append(["peak memory in MB", *(_shown(peak, 1e-6, 0) for peak in peaks)])
    return table


def differences(entries: Sequence[Entry]) -> list[str]:
    """Sentences on what is not the same in all runs beside the method."""
    found = []

    def note(name: str, values: list[Any]) -> None:
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{e.label}: {v}" for e, v in zip(entries, values, strict=True))
            found.append(f"{name} differs ({shown})")

    for name in _COMPARED:
        note(name, [entry.results.settings[name] for entry in entries])
    note("execution", [entry.results.settings["execution"] for entry in entries])
    note("torch", [entry.results.circumstances["versions"]["torch"] for entry in entries])
    note("machine", [entry.results.circumstances["machine"] for entry in entries])
    note("images", [sum(c.n for c in e.method.cells if not c.visit) for e in entries])
    whole = max(len(entry.results.settings["cells"]) for entry in entries)
    if (common := len(entries[0].method.accuracies())) < whole:
        found.append(f"only the {common} cells that all runs have are compared, of up to {whole}")
    return found


def comparison_table(entries: Sequence[Entry]) -> str:
    """`rows` as aligned lines, what differs below."""
    return "\n".join([align(rows(entries)), *differences(entries)])


def _check_page(file: Path, folders: Sequence[str | Path]) -> None:
    """Raise unless the page would be a new file, or replace an earlier page."""
    try:
        results = [(Path(folder) / "results.json").resolve() for folder in folders]
        given = file.resolve() in results
        there, folder, place = os.path.lexists(file), file.is_dir(), file.parent.is_dir()
        with file.open("rb") if file.is_file() else io.BytesIO() as opened:
            ours = PAGE_MARK.encode() in opened.read(1000)
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)[:200]!r}: cannot be written ({error})") from error
    if given:
        raise InputError(f"{file} is one of the results to compare; name another file")
    if folder:
        raise InputError(f"{file} is a folder; name a file for the page")
    if not place:
        raise DataError(f"{file}: cannot be written ({file.parent} is no folder)")
    if there and not ours:
        raise InputError(f"{file} is there and no page of compare; it stays, name another file")


def compare(folders: Sequence[str | Path], html: str | Path | None = None) -> str:
    """The table of several results folders; the page is written to ``html``.

    What is there under that name is replaced only if it is an earlier page.

    Raises:
        DataError: a folder holds no results, or the page cannot be written.
        InputError: runs that cannot be compared, or something else than a page under its name.
        MissingDependencyError: a page is wanted, and matplotlib is not installed.
    """
    if html is not None:
        _check_page(Path(html), folders)
    entries = read_entries(folders)
    if html is not None:
        from .report import page

        write_file(Path(html), page(entries).encode())
    return comparison_table(entries)
