"""Results of a run: records of cells and methods, ``results.json``, and the table."""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

from ..data.datasets import DATASETS, PICTURES
from ..errors import DataError
from ..utils.text import align
from .cells import Cell
from .protocols import PROTOCOLS

__all__ = [
    "FORMAT_VERSION",
    "CellRecord",
    "MethodRecord",
    "Results",
    "finite",
    "read_results",
]

FORMAT_VERSION = 2
Record = TypeVar("Record")
#: Largest file in bytes; 75 cells of 10,000 images at batch size 1 take about 5 MB per method.
_MAX_FILE = 1 << 30


# -- records -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CellRecord:
    """One method on one cell.

    Attributes:
        corruption, severity: the cell; the severity is from 1 to 5, or 0 without a corruption.
        n: number of images.
        accuracy: fraction of correct predictions, in [0, 1].
        loss: mean cross-entropy in nats.
        ece: expected calibration error in [0, 1], see `evaluate.calibration_error`.
        seconds: wall time for adapting and predicting, with data already in memory.
        forwards, backwards: numbers of images passed through the model, in each direction. If
            cells are mixed in one stream, each gets its images' share of time and passes.
        peak_memory: peak memory in bytes while these images were evaluated: on a GPU that of
            tensors, on the CPU that of the process (since its start if the system is not Linux).
        correct_per_batch: numbers of correct predictions among this cell's images, per batch.
        seed: seed for the order of the images.
        stream: number of the stream of this method and seed, from 0; there is a reset between one
            stream and the next.
        visit: number of times that the cell occurred before in the stream.
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
    """One method on all cells: the adapter, or the unadapted source model.

    Attributes:
        name: model and method, as in RobustBench's files.
        method: the method's name.
        config: fields of the method's config.
        description: description of what adapts, in words.
        clean_accuracy: accuracy on the uncorrupted images, in [0, 1]; None if it was not measured.
        skipped_updates: number of updates skipped because a loss or gradient was not finite.
        cells: records of the cells in the order of evaluation.
    """

    name: str
    method: str
    config: dict[str, Any]
    description: str
    clean_accuracy: float | None
    skipped_updates: int
    cells: list[CellRecord]

    def accuracies(self) -> dict[Cell, float]:
        """Accuracy on each cell in [0, 1], as the mean over its visits and seeds."""
        by_cell: dict[Cell, list[float]] = {}
        for cell in self.cells:
            by_cell.setdefault((cell.corruption, cell.severity), []).append(cell.accuracy)
        return {cell: fmean(values) for cell, values in by_cell.items()}

    def mean(self, corruptions: Sequence[str] | None = None) -> float | None:
        """Mean accuracy over all cells, or those of some corruptions, with equal weights."""
        chosen = [
            a for c, a in self.accuracies().items() if corruptions is None or c[0] in corruptions
        ]
        return fmean(chosen) if chosen else None

    def standard_error(self, corruptions: Sequence[str] | None = None) -> float | None:
        """Standard error of `mean`; None for a single seed.

        It is the sample standard deviation over seeds, divided by the square root of their number.
        """
        seeds = list(dict.fromkeys(cell.seed for cell in self.cells))
        if len(seeds) < 2:
            return None
        by_seed = [replace(self, cells=[c for c in self.cells if c.seed == s]) for s in seeds]
        means = [m for method in by_seed if (m := method.mean(corruptions)) is not None]
        return stdev(means) / len(means) ** 0.5 if len(means) > 1 else None

    def by(self, field: str) -> dict[Any, float]:
        """Mean accuracy by ``corruption`` or ``severity``, in the order of evaluation."""
        index = ("corruption", "severity").index(field)
        cells = self.accuracies()
        keys = dict.fromkeys(cell[index] for cell in cells)
        return {k: fmean(a for cell, a in cells.items() if cell[index] == k) for k in keys}

    def per_image(self, field: str) -> float:
        """Mean ``forwards``, ``backwards`` or ``seconds`` per image."""
        return sum(getattr(c, field) for c in self.cells) / sum(c.n for c in self.cells)

    def to_dict(self) -> dict[str, Any]:
        """The record in the form of ``results.json``, with averages for readers."""
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


# -- a finished run ----------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """A finished run.

    Attributes:
        settings: settings that define the experiment.
        circumstances: other facts, such as versions, machine and command.
        methods: the adapter first, then the source model if it was evaluated.
    """

    settings: dict[str, Any]
    circumstances: dict[str, Any]
    methods: list[MethodRecord]

    def to_json(self) -> str:
        """The text of ``results.json``; figures that are not finite are written as null."""
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
        """Read the text of `to_json`; null figures become NaN.

        Raises:
            ValueError: the text has another form.
        """
        try:
            stored = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(stored, dict):
            raise ValueError("it is not a JSON object")
        if (version := stored.pop("format_version", None)) != FORMAT_VERSION:
            raise ValueError(f"format version {version}, but this program reads {FORMAT_VERSION}")
        methods = stored.pop("methods", None)
        if not isinstance(methods, list) or not methods:
            raise ValueError("methods must be a list of at least one method")
        records = [_read_method(method, f"methods[{i}]") for i, method in enumerate(methods)]
        settings = stored.pop("settings", None)
        _check_types(settings, _SETTINGS, "settings")
        _check_types(stored, _CIRCUMSTANCES, "results")
        for name, known in (("dataset", (*DATASETS, PICTURES)), ("protocol", PROTOCOLS)):
            if name in settings and settings[name] not in known:
                raise ValueError(f"unknown {name} {settings[name][:40]!r}")
        return cls(settings, stored, records)

    def table(self) -> str:
        """Aligned table of accuracy in percent on each corruption (mean over its severities)."""
        rows = [["corruption", "images", *(m.method for m in self.methods)]]
        columns = [m.by("corruption") for m in self.methods]
        images: dict[str, int] = {}
        for cell in self.methods[0].cells:
            images[cell.corruption] = images.get(cell.corruption, 0) + cell.n
        for name, count in images.items():
            rows.append([name, str(count), *(f"{100 * column[name]:.2f}" for column in columns)])
        means = [_percent(m.mean()) for m in self.methods]
        rows.append(["mean", str(sum(images.values())), *means])
        clean = [m.clean_accuracy for m in self.methods]
        if clean[0] is not None:
            count = self.circumstances["clean"]["n"]
            rows.append(["clean", str(count), *map(_percent, clean)])
        if len(self.methods) == 2:
            rows[0].append("gain")
            for row in rows[1:]:
                row.append(f"{float(row[2]) - float(row[3]):+.2f}")
        errors = [m.standard_error() for m in self.methods]
        if errors[0] is not None:
            spread = list(map(_percent, errors))
            rows.append(["standard error", "", *spread, *[""] * (len(rows[0]) - 2 - len(spread))])
        return align(rows)


def _percent(share: float | None) -> str:
    return "nan" if share is None else f"{100 * share:.2f}"


def _one_line(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, because JSON has no NaN."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- reading -----------------------------------------------------------------------------

#: Settings that other parts of the package read if present, and their types.
_SETTINGS: dict[str, Any] = {
    "model": str,
    "dataset": str,
    "layout": str,
    "protocol": str,
    "device": str,
    "cells": dict[str, int],
    "batch_size": int,
    "concentration": float | None,
    "seeds": list[int | None],
    "execution": dict[str, Any],
}
_CIRCUMSTANCES: dict[str, Any] = {
    "order": str,
    "versions": dict[str, Any],
    "machine": dict[str, Any],
    "clean": dict[str, Any] | None,
    "data_note": str | None,
    "command": str | None,
}
#: Figures of a cell that may be unknown: written as null, read as NaN.
_MAY_BE_NAN = ("loss", "ece")
#: Limit of numbers: no result of a run is as large, and sums of smaller numbers do not overflow.
_LARGEST = 1e100


def read_results(file: Path) -> Results:
    """Read and check a ``results.json`` of the benchmark.

    Raises:
        DataError: it is missing, damaged, or not written by this version.
    """
    try:
        if not file.is_file():
            raise DataError(f"{file}: no such file; its folder is not the OUT of a finished run")
        if file.stat().st_size > _MAX_FILE:
            raise ValueError(f"it has more than {_MAX_FILE:,} bytes")
        results = Results.from_json(file.read_text(encoding="utf-8"))
        _check_complete(results)
        return results
    except DataError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{file}: not the results of this program ({reason})") from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has a type, which is given as in an annotation."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if kind is int:
        return type(value) is int and abs(value) < 1 << 63
    if kind is float:
        return (type(value) is float and abs(value) < _LARGEST) or _fits(value, int)
    return kind is Any or isinstance(value, kind)


def _check_types(stored: Any, kinds: Mapping[str, Any], where: str) -> None:
    if not isinstance(stored, dict):
        raise ValueError(f"{where}: must be an object")
    for name, kind in kinds.items():
        if name in stored and not _fits(stored[name], kind):
            raise ValueError(f"{where}: {name} must be {getattr(kind, '__name__', kind)}")


def _read_record(cls: type[Record], stored: Any, where: str, **read: Any) -> Record:
    """A record from its JSON object, whose keys must be exactly its fields."""
    _check_types(stored, typing.get_type_hints(cls), where)
    stored = stored | read
    needed = {f.name for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    if mismatched := sorted(needed ^ stored.keys()):
        state = "is missing" if mismatched[0] in needed else "is unknown"
        raise ValueError(f"{where}: {mismatched[0][:40]!r} {state}")
    return cls(**stored)


def _read_cell(stored: Any, where: str) -> CellRecord:
    unknown = {}
    if isinstance(stored, dict):
        unknown = {k: math.nan for k in _MAY_BE_NAN if stored.get(k, 0) is None}
        stored = {k: v for k, v in stored.items() if k not in unknown}
    return _read_record(CellRecord, stored, where, **unknown)


def _read_method(stored: Any, where: str) -> MethodRecord:
    if not isinstance(stored, dict) or not isinstance(stored.get("cells"), list):
        raise ValueError(f"{where}: must be an object with a list of cells")
    cells = [_read_cell(c, f"{where}.cells[{i}]") for i, c in enumerate(stored["cells"])]
    rest = {k: v for k, v in stored.items() if k not in ("averages", "cells")}
    return _read_record(MethodRecord, rest, where, cells=cells)


def _check_complete(results: Results) -> None:
    """Check that a file with the right types is complete and consistent.

    Raises:
        ValueError: a setting is missing, or the figures contradict each other.
    """
    for stored, kinds in ((results.settings, _SETTINGS), (results.circumstances, _CIRCUMSTANCES)):
        if missing := [name for name in kinds if name not in stored]:
            raise ValueError(f"{missing[0]!r} is missing")
    batch_size = results.settings["batch_size"]
    if batch_size < 1:
        raise ValueError("batch_size must be at least 1")
    interleaved = PROTOCOLS[results.settings["protocol"]].interleaved
    for method in results.methods:
        if not method.cells:
            raise ValueError(f"{method.name[:40]!r} has no cells")
        shares = [c.accuracy for c in method.cells]
        if method.clean_accuracy is not None:
            shares.append(method.clean_accuracy)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError("accuracies must be from 0 to 1")
        counts = [n for c in method.cells for n in (c.n - 1, c.forwards, c.backwards, c.seconds)]
        if min(counts) < 0:
            raise ValueError("a cell has no images, or a negative cost")
        streams: dict[tuple[int | None, int], int] = {}
        for cell in method.cells:
            key = (cell.seed, cell.stream)
            streams[key] = streams.get(key, 0) + cell.n
        for cell in method.cells:
            images = streams[cell.seed, cell.stream] if interleaved else cell.n
            if len(cell.correct_per_batch) != -(-images // batch_size):
                raise ValueError(f"{cell.corruption[:40]!r} has a wrong number of batches")
