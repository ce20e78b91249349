"""Field tests: methods on a matrix of streams, each a run with its own protocol and batch size.

The streams have small batches, images in the order of their classes, shifts that come and go, or
very many images. What `run_benchmark` measures for one stream is measured for all of them and
compared with the unadapted model's accuracy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from ..core.adaptive import AdaptiveModel
from ..data.datasets import DATASETS, EXTRA_CORRUPTIONS, PICTURES
from ..data.images import LabelledImages
from ..errors import InputError
from ..utils.locks import FileLock
from ..utils.processes import Worker
from . import plots
from .cells import CLEAN, Cell, CorruptionData
from .field_report import FieldResults, field_cell
from .protocols import CONCENTRATION, WITH_CLEAN
from .results import Results
from .resume import check_out, write_files
from .run import run_benchmark

__all__ = ["FIELD", "FieldStream", "field_views", "run_field"]

#: Name of the folder with the results of every stream and method.
_RUNS = "runs"
#: Seconds between two checks of runs that other processes are working on.
_POLL = 0.1

Factory = Callable[[], AdaptiveModel]


@dataclass(frozen=True)
class FieldStream:
    """A stream: a protocol on some of the cells.

    Attributes:
        protocol: a key of `PROTOCOLS`.
        batch_size: number of images in a batch; None for the field's default.
        cells: ``"highest"`` for each corruption at its highest severity; ``"all"`` for every
            severity; ``"clean"`` for only the clean images; or ``"repeated"`` for the highest
            severities again and again, each time with fresh noise, or with fresh flips and crops
            where the corruption cannot be computed.
        concentration: concentration of the Dirichlet distribution for ``correlated``.
    """

    protocol: str
    batch_size: int | None = None
    cells: Literal["highest", "all", "clean", "repeated"] = "highest"
    concentration: float = CONCENTRATION


#: The streams of the field, by name.
FIELD: Mapping[str, FieldStream] = {
    **{f"batch-{size}": FieldStream("reset-per-cell", size) for size in (1, 4, 16, 64, 200)},
    "dirichlet-0.1": FieldStream("correlated", concentration=0.1),
    "dirichlet-0.01": FieldStream("correlated", concentration=0.01),
    "sorted": FieldStream("sorted"),
    "continual": FieldStream("continual"),
    "gradual": FieldStream("gradual", cells="all"),
    "mixed": FieldStream("mixed"),
    "clean": FieldStream("reset-per-cell", cells="clean"),
    "clean-corrupt-clean": FieldStream("clean-corrupt-clean"),
    "long": FieldStream("continual", cells="repeated"),
}


# -- the cells of a stream ---------------------------------------------------------------


def _cells_of(stream: FieldStream, data: CorruptionData, long: int) -> CorruptionData | None:
    """The cells of a stream; None if the data does not have them."""
    if stream.cells == "all":
        return data.with_all_severities()
    if stream.cells == "repeated":
        return data.repeated(long)
    needs_clean = stream.cells == "clean" or stream.protocol in WITH_CLEAN
    if needs_clean and CLEAN not in data.counts:
        return None
    cells = [] if stream.cells == "clean" else data.highest
    return data.view([*cells, CLEAN] if needs_clean else cells)


def field_views(
    streams: Mapping[str, FieldStream], data: CorruptionData, long: int
) -> tuple[dict[str, CorruptionData], list[str]]:
    """The cells of each stream for which the data has them, and a remark on each other stream.

    Raises:
        InputError: the data allows none of the streams.
    """
    if data.clean or data.clean_count:
        data = data.with_clean()
    data = dataclasses.replace(data, clean=None)
    views, missing = {}, []
    for name, stream in streams.items():
        view = _cells_of(stream, data, long)
        if view is None:
            lacks = "other severities" if stream.cells == "all" else "clean images"
            missing.append(f"stream {name} left out: the data has no {lacks}")
        else:
            views[name] = view
    if not views:
        raise InputError(f"nothing to measure: {'; '.join(missing)}")
    return views, missing


# -- the runs ----------------------------------------------------------------------------


def run_field(
    methods: Mapping[str, AdaptiveModel | Factory],
    data: CorruptionData | Mapping[Cell, LabelledImages],
    *,
    streams: Sequence[str] | Mapping[str, FieldStream] | None = None,
    long: int = 10_000,
    batch_size: int = 64,
    seed: int | Sequence[int] = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    worker: Worker | None = None,
    progress: bool = False,
    **options: Any,
) -> FieldResults:
    """Evaluate methods on a matrix of streams.

    Examples:
        >>> data = open_dataset("cifar10", folder, corruptions=EXTRA_CORRUPTIONS, n_examples=256)
        >>> methods = {m: functools.partial(tp.wrap, model, m) for m in ("source", "tent")}
        >>> results = run_field(methods, data, streams=["batch-1", "sorted"])
        >>> results.accuracies()["sorted"]["tent"]

    Args:
        methods: adapters by label, or functions that create them, each called once when it is
            needed. Differences are relative to the method labelled ``source``.
        data: cells from `open_dataset`, or arrays by (corruption, severity). Streams use each
            corruption at its highest severity, ``gradual`` at all of them.
        streams: names of streams in `FIELD`, by default all; or other streams by name.
        long: smallest number of images of the stream ``long``, which consists of whole cells.
        batch_size: number of images in a batch, except in streams that set their own.
        seed: seed for the order of the images, or several, over which figures are averaged.
        out: folder for ``field.json``, ``field.md``, ``field.html`` and the results of each run,
            in ``runs/<stream>/<method>``; None writes nothing.
        overwrite: whether to replace the results in ``out``.
        resume: whether to keep the finished runs in ``out`` and resume the unfinished ones;
            streams and methods may be added.
        worker: this process, if several share the runs and ``out``.
        progress: whether to show progress bars and to print each finished figure.
        **options: ``execution``, ``model_name`` and ``command`` of `run_benchmark`.

    Returns:
        the results; each of several processes returns the results of all.

    Raises:
        InputError: a stream is unknown, there is no method, or as for `run_benchmark`.
        DataError: as for `run_benchmark`.
    """
    if not isinstance(data, CorruptionData):
        data = CorruptionData.from_arrays(data, dataset=PICTURES)
    chosen = _chosen(methods, streams, long)
    views, missing = field_views(chosen, data, long)
    if out is None and worker is not None:
        raise InputError("several processes need a shared folder: give out")
    folder = None if out is None else _prepare(check_out(out), resume, overwrite, worker)
    leads = worker is None or worker.rank == 0
    options |= {
        "seed": seed,
        "resume": resume or worker is not None,
        "progress": progress and leads,
    }
    runs = [_Run(m, name, chosen[name], views[name], batch_size) for m in methods for name in views]
    measured = _measured(runs, methods, folder, worker, options)
    settings = {"batch_size": batch_size, "seed": seed, "long": long, **options}
    results = _assemble(data, settings, chosen, measured, missing)
    if out is not None and leads:
        write_files(Path(out), results.files())
    return results


def _chosen(
    methods: Mapping[str, Any],
    streams: Sequence[str] | Mapping[str, FieldStream] | None,
    long: int,
) -> Mapping[str, FieldStream]:
    """Check the arguments of `run_field` and return the chosen streams by name."""
    if not methods:
        raise InputError("there are no methods to evaluate; name at least one")
    if long < 1:
        raise InputError(f"the long stream must have at least 1 image, got {long}")
    if streams is None or isinstance(streams, Mapping):
        return FIELD if streams is None else streams
    for name in streams:
        if name not in FIELD:
            raise InputError(f"unknown stream {name!r}; there are {', '.join(FIELD)}")
    return {name: FIELD[name] for name in streams}


def _notes(data: CorruptionData) -> list[str]:
    """What the corruptions may be used for, and the data's own remark."""
    names = {name for name, _ in data.counts}
    known = DATASETS.get(data.dataset)
    extra = EXTRA_CORRUPTIONS if known is None else known.extra_corruptions
    notes = []
    if names <= set(extra):
        notes.append(
            f"measured on extra corruptions ({', '.join(sorted(names))}), on which settings may be "
            "chosen; these are not benchmark figures"
        )
    elif known is not None and names & set(known.corruptions):
        notes.append(
            "measured on the benchmark's own corruptions: no setting may be chosen by these figures"
        )
    return [*notes, *([data.note] if data.note else [])]


def _prepare(out: Path, resume: bool, overwrite: bool, worker: Worker | None) -> Path:
    """The folder of the runs, which are removed if they are to be replaced.

    Raises:
        InputError: it holds runs that are neither to be resumed nor replaced, or cannot be created.
    """
    folder = out / _RUNS
    with worker.main_process_first() if worker else contextlib.nullcontext(True) as leading:
        if leading:
            if folder.exists() and not resume:
                if not overwrite:
                    raise InputError(
                        f"{out} already holds the runs of a field; resume or extend them "
                        "(--resume) or start over (--overwrite)"
                    )
                shutil.rmtree(folder)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"{folder}: cannot create this folder ({error.strerror})"
                ) from error
    plots.figure(1, 1)  # reports a missing matplotlib now rather than after hours
    return folder


@dataclass(frozen=True)
class _Run:
    """One method, by its label, on one stream."""

    label: str
    name: str
    stream: FieldStream
    data: CorruptionData
    batch_size: int

    @property
    def length(self) -> float:
        """Estimated duration, in images: a batch takes as long as four further images."""
        return self.data.total * (1 + 4 / (self.stream.batch_size or self.batch_size))

    def out(self, folder: Path) -> Path:
        """The folder of its results; the method's label is converted to a valid folder name."""
        safe = re.sub(r"[^\w.=-]+", "_", self.label)
        if safe != self.label:
            safe += f"-{sha256(self.label.encode()).hexdigest()[:8]}"
        return folder / self.name / safe

    def __call__(self, net: AdaptiveModel, out: Path | None, options: Mapping[str, Any]) -> Results:
        return run_benchmark(
            net,
            self.data,
            out=out,
            protocol=self.stream.protocol,
            concentration=self.stream.concentration,
            batch_size=self.stream.batch_size or self.batch_size,
            only_results=True,
            **options,
        )


def _each(
    runs: Sequence[_Run],
    methods: Mapping[str, AdaptiveModel | Factory],
    folder: Path | None,
    worker: Worker | None,
    options: Mapping[str, Any],
) -> Iterator[tuple[_Run, Results]]:
    """Yield each run and its results as it finishes.

    Several processes share the runs: each takes those that no other has claimed, and reads the
    results of those that others have finished.
    """
    nets: dict[str, AdaptiveModel] = {}
    waiting = list(runs)
    while waiting:
        before = len(waiting)
        for run in list(waiting):
            with contextlib.ExitStack() as stack:
                out = None if folder is None else run.out(folder)
                if out is not None and worker is not None:
                    out.parent.mkdir(exist_ok=True)
                    lock = stack.enter_context(FileLock(out.with_name(f"{out.name}.lock")))
                    if not lock.take():
                        continue
                if run.label not in nets:
                    method = methods[run.label]
                    nets[run.label] = method if isinstance(method, AdaptiveModel) else method()
                yield run, run(nets[run.label], out, options)
            waiting.remove(run)
            if all(other.label != run.label for other in waiting):
                del nets[run.label]
        if len(waiting) == before:
            time.sleep(_POLL)


def _measured(
    runs: Sequence[_Run],
    methods: Mapping[str, AdaptiveModel | Factory],
    folder: Path | None,
    worker: Worker | None,
    options: Mapping[str, Any],
) -> dict[str, dict[str, Results]]:
    """The results by stream and method, in the order of ``runs``."""
    # The longest runs come first, so that no process waits long for another's last run.
    order = sorted(runs, key=lambda run: (list(methods).index(run.label), -run.length))
    finished: dict[tuple[str, str], Results] = {}
    for run, results in _each(order, methods, folder, worker, options):
        finished[run.name, run.label] = results
        if options["progress"]:
            share = 100 * field_cell(results, False).accuracy
            tqdm.write(f"{run.label}, {run.name}: {share:.2f} %")
    table: dict[str, dict[str, Results]] = {}
    for run in runs:
        table.setdefault(run.name, {})[run.label] = finished[run.name, run.label]
    return table


def _assemble(
    data: CorruptionData,
    options: dict[str, Any],
    streams: Mapping[str, FieldStream],
    measured: Mapping[str, Mapping[str, Results]],
    missing: Sequence[str],
) -> FieldResults:
    """The results of a field from those of its runs."""
    first = next(iter(measured.values()))
    facts = next(iter(first.values()))
    configs = {}
    for label, results in first.items():
        method = results.methods[0]
        configs[label] = {"method": method.method, **method.config, "adapts": method.description}
    settings = {
        "model": facts.settings["model"],
        "dataset": data.dataset,
        "layout": data.layout,
        "cells": {f"{name} {severity}": n for (name, severity), n in data.counts.items()},
        "streams": {name: vars(streams[name]) for name in measured},
        **{name: options[name] for name in ("batch_size", "seed", "long")},
        **{name: facts.circumstances[name] for name in ("command", "versions", "machine")},
        "methods": configs,
    }
    cells = {
        name: {label: field_cell(r, streams[name].cells == "repeated") for label, r in row.items()}
        for name, row in measured.items()
    }
    return FieldResults(settings, [*_notes(data), *missing], cells)
