"""A run: evaluation of an adapter and its unadapted model on the cells of a data folder."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts.tensor_files import fingerprint
from ..core.adaptive import AdaptiveModel, device_of
from ..core.records import in_cell
from ..data.datasets import DATASETS, PICTURES
from ..data.images import LabelledImages, to_float
from ..errors import InputError
from ..utils import robustbench as bridge
from ..utils.checks import check_seed
from ..utils.processes import Worker
from ..utils.progress import progress_bar
from . import plots
from .cells import CorruptionData
from .device import Execution, Loader, accelerator
from .jobs import Job, claim, job_records, planned, run_job
from .leaderboard import leaderboard_files, mean_corruption_error
from .protocols import CONCENTRATION, PROTOCOLS, WITH_CLEAN, describe_order, shuffled
from .results import CellRecord, MethodRecord, Results, read_results
from .resume import (
    UNFINISHED,
    Progress,
    begun,
    check_out,
    machine,
    versions,
    write_files,
)

__all__ = ["run_benchmark"]

#: Name of the claim for assembling the results, which one of several processes takes at the end.
_MERGE = "merge"
#: Seconds between two checks of jobs that other processes are working on.
_POLL = 0.1


def run_benchmark(
    net: AdaptiveModel,
    data: CorruptionData,
    *,
    baseline: AdaptiveModel | None = None,
    out: str | Path | None = None,
    protocol: str = "reset-per-cell",
    concentration: float = CONCENTRATION,
    batch_size: int = 64,
    seed: int | Sequence[int] | None = None,
    execution: Execution | None = None,
    model_name: str = "model",
    command: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    worker: Worker | None = None,
    progress: bool = True,
    only_results: bool = False,
) -> Results:
    """Evaluate an adapter on every cell, and its unadapted model on the same images.

    Clean accuracy is ``robustbench.utils.clean_accuracy`` of a freshly reset adapter, if the data
    has clean images, in the order of the first seed.

    Args:
        net: the adapter; its and the baseline's ``on_batch``, if any, are called after every batch.
        data: cells from `open_dataset` or `CorruptionData.from_arrays`.
        baseline: the same model wrapped as ``"source"``.
        out: folder for ``results.json``, RobustBench's two files and ``plot.png``, written together
            at the end; until then its subfolder ``unfinished`` has the pieces. None writes nothing.
        protocol: a key of `PROTOCOLS`: the order of the images, and where ``net`` is reset.
        concentration: concentration of the Dirichlet distribution for ``correlated``, above 0.
        batch_size: number of images in a batch, at least 1.
        seed: seed for the order of the images; None keeps the stored order. With several seeds the
            run is repeated with each, which then also seeds the adapter, and figures are means.
        execution: memory layout, precision, compilation.
        model_name: name of the model in the files.
        command: the command line that started the run, for the record.
        overwrite: whether to replace other results or an unfinished run in ``out``.
        resume: whether to resume an unfinished run of the same settings, with the figures of an
            uninterrupted one, or to return a finished run's results; otherwise a run starts.
        worker: this process, if several share the run and ``out``.
        progress: whether to show a progress bar.
        only_results: whether ``results.json`` is the only file to write.

    Returns:
        the results; each of several processes returns the results of all.

    Raises:
        InputError: the settings contradict each other, the model or the contents of ``out``.
        DataError: the data cannot be read, or ``out`` cannot be written.
        DistributedError: the processes lost their connection.
    """
    nets = [net] if baseline is None else [net, baseline]
    seeds = [seed] if seed is None or isinstance(seed, int) else list(dict.fromkeys(seed))
    _check_arguments(nets, data, batch_size, seeds)
    if out is None and worker is not None:
        raise InputError("several processes need a shared folder: give out")
    out = None if out is None else check_out(out)
    execution = execution or Execution()
    data = data.with_clean() if protocol in WITH_CLEAN else data
    order = {"protocol": protocol, "concentration": concentration, "batch_size": batch_size}
    settings = _settings(model_name, nets, data, order, seeds, execution)
    run = _Run(nets, data, settings, execution, command, progress, only_results)
    if out is None:
        return run.in_memory()
    if not only_results:
        plots.figure(1, 1)  # reports a missing matplotlib now rather than after hours
    with begun(out, settings, resume, overwrite, worker) as stored:
        return run.into(out, worker) if stored is None else stored


def _check_arguments(
    nets: Sequence[AdaptiveModel],
    data: CorruptionData,
    batch_size: int,
    seeds: Sequence[int | None],
) -> None:
    for net in nets:
        if not isinstance(net, AdaptiveModel):
            raise InputError(
                f"{type(net).__name__} is not an adapter: wrap the model first, as in "
                'ttt_plugins.wrap(model, "tent")'
            )
    classes = None if data.dataset == PICTURES else DATASETS[data.dataset].classes
    if classes is not None and nets[0].num_classes not in (None, classes):
        raise InputError(f"{data.dataset} has {classes} classes, the model {nets[0].num_classes}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size >= 1 << 31:
        raise InputError(f"batch_size must be less than {1 << 31}, got {batch_size}")
    for seed in seeds:
        if seed is not None:
            check_seed(seed)


def _settings(
    model_name: str,
    nets: Sequence[AdaptiveModel],
    data: CorruptionData,
    order: dict[str, Any],
    seeds: Sequence[int | None],
    execution: Execution,
) -> dict[str, Any]:
    """The settings that define the experiment."""
    net, device = nets[0], device_of(nets[0])
    protocol = PROTOCOLS.get(order["protocol"])
    if protocol is None or not protocol.by_class:
        order = order | {"concentration": None}
    gpu = accelerator(device)
    return {
        "model": model_name,
        # Fingerprint of the wrapped model and of the tensors that the method learned beforehand.
        "weights": fingerprint(net.backbone.source_state_dict() | net.learned_tensors()),
        "method": net.method,
        "config": dataclasses.asdict(net.config),
        "baseline": len(nets) > 1,
        "dataset": data.dataset,
        "layout": data.layout,
        "cells": {f"{name} {severity}": count for (name, severity), count in data.counts.items()},
        **order,
        "seeds": seeds,
        "adapter_seeds": seeds if len(seeds) > 1 else [net.seed],
        "device": device.type,
        # The number of threads affects the order of summation, and so the last bits.
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "execution": dataclasses.asdict(execution),
        # Present only for a GPU: older CPU runs without this setting can then still be resumed.
        **({} if gpu is None else {"accelerator": gpu}),
    }


class _Run:
    """The jobs of a run, executed by one or several processes, whose results are then joined.

    Args:
        nets: the adapter, and the unadapted model if it is evaluated too.
        data: the cells.
        settings: settings of the run, as in ``results.json``.
        execution: memory layout, precision, compilation.
        command: the command line that started the run.
        show: whether to show a progress bar.
        only_results: whether ``results.json`` is the only file to write.

    Raises:
        InputError: the protocol does not exist or does not fit the data.
    """

    def __init__(
        self,
        nets: list[AdaptiveModel],
        data: CorruptionData,
        settings: dict[str, Any],
        execution: Execution,
        command: str | None,
        show: bool,
        only_results: bool = False,
    ):
        self.only_results = only_results
        self.nets, self.data, self.settings = nets, data, settings
        self.execution, self.command, self.show = execution, command, show
        self.batch_size: int = settings["batch_size"]
        self.clean: LabelledImages | None = None
        self.jobs = planned(settings, data, len(nets))
        self._seeded: dict[tuple[int, int | None], AdaptiveModel] = {}
        if data.clean is not None:
            bridge.import_robustbench()
            clean, seed = data.clean(), settings["seeds"][0]
            self.clean = clean[shuffled(len(clean), seed)]
            first = [Job(f"method{i}-clean", i, seed, 0) for i in range(len(nets))]
            self.jobs = first + self.jobs

    # -- executing the jobs ----------------------------------------------------------------

    def in_memory(self) -> Results:
        """Execute all jobs in this process and write nothing."""
        progress = Progress(None)
        self._do_all(progress)
        return self._assemble(progress)

    def into(self, out: Path, worker: Worker | None) -> Results:
        """Execute all jobs, or a share of them among several processes; write the results."""
        progress = Progress(out / UNFINISHED)
        if worker is None:
            self._do_all(progress)
            self._finish(out, progress)
        else:
            self._share(out, progress, worker)
        return read_results(out / "results.json")

    def _do_all(self, progress: Progress) -> None:
        with self._working() as (loader, bar):
            for job, following in zip(self.jobs, [*self.jobs[1:], None], strict=True):
                bar.set_description(job.title)
                self._do(job, loader, progress, bar.update, following)

    def _share(self, out: Path, progress: Progress, worker: Worker) -> None:
        """Execute jobs until no process has any left; one process writes the results."""
        self.show = self.show and worker.rank == 0
        # The longest jobs come first, so that no process waits long for the last one.
        waiting = sorted(self.jobs, key=len, reverse=True)
        with self._working() as (loader, bar):
            while waiting:
                before = len(waiting)
                for job in list(waiting):
                    bar.set_description(job.title)
                    if claim(progress, job.name, self._do, job, loader, progress, bar.update):
                        waiting.remove(job)
                if len(waiting) == before:
                    time.sleep(_POLL)
        while not claim(progress, _MERGE, self._finish, out, progress):
            time.sleep(_POLL)

    @contextlib.contextmanager
    def _working(self) -> Iterator[tuple[Loader, Any]]:
        for net in self.nets:
            self.execution.prepare(net)
        clean = 0 if self.clean is None else -(-len(self.clean) // self.batch_size)
        total = sum(job.batches(self.batch_size) or clean for job in self.jobs)
        loader = Loader(self.data.load, self.data.load_rows)
        try:
            with progress_bar(total=total, unit="batch", show=self.show) as bar:
                yield loader, bar
        finally:
            loader.close()

    def _do(
        self,
        job: Job,
        loader: Loader,
        progress: Progress,
        advance: Callable[[int], object],
        following: Job | None = None,
    ) -> None:
        net = self._net(job)
        if job.stretches:
            ahead = None if following is None else following.first_piece(self.batch_size)
            run_job(job, net, loader, progress, self.batch_size, self.execution, advance, ahead)
        elif self.clean is not None:
            if progress.value(job.name) is None:
                with in_cell(net, job.title):
                    accuracy = self._clean_accuracy(net, self.clean, advance)
                progress.save_value(job.name, accuracy)
            else:
                advance(-(-len(self.clean) // self.batch_size))

    def _net(self, job: Job) -> AdaptiveModel:
        """The job's adapter; with several seeds, a copy on the same model with the job's seed."""
        net = self.nets[job.method]
        if len(self.settings["seeds"]) < 2:
            return net
        key = (job.method, job.seed)
        if key not in self._seeded:
            self._seeded = {k: n for k, n in self._seeded.items() if k[1] == job.seed}
            self._seeded[key] = net.with_tensors(net.config)
            self._seeded[key].seed = job.seed or 0
        return self._seeded[key]

    def _clean_accuracy(
        self, net: AdaptiveModel, clean: LabelledImages, advance: Callable[[int], object]
    ) -> float:
        """Accuracy on clean images of the reset adapter, which is reset again afterwards."""
        device = device_of(net)

        def model(images: Tensor) -> Tensor:
            advance(1)
            with self.execution.context(device):
                return net(images)

        net.reset()
        images = to_float(clean.images)
        accuracy = bridge.clean_accuracy(model, images, clean.labels, self.batch_size, device)
        net.reset()
        return accuracy

    # -- the results -----------------------------------------------------------------------

    def _finish(self, out: Path, progress: Progress) -> None:
        results = self._assemble(progress)
        files = {"results.json": results.to_json().encode()}
        if not self.only_results:
            texts = leaderboard_files(results)
            files |= {name: text.encode() for name, text in texts.items()}
            files["plot.png"] = plots.plot_results(results)
        write_files(out, files)
        progress.discard()

    def _assemble(self, progress: Progress) -> Results:
        """Join the results of the finished jobs, in the order of the plan."""
        settings = self.settings
        cells: list[list[CellRecord]] = [[] for _ in self.nets]
        clean: list[float | None] = [None for _ in self.nets]
        skipped = [0 for _ in self.nets]
        for job in self.jobs:
            if job.stretches:
                records, count = job_records(job, progress, self.batch_size)
                cells[job.method] += records
                skipped[job.method] += count
            else:
                clean[job.method] = progress.value(job.name)
        model = re.split(r"[/:\\]", settings["model"].rstrip("/\\"))[-1]
        methods = [
            MethodRecord(
                f"{model}_{net.method}",
                net.method,
                dataclasses.asdict(net.config),
                net.describe(),
                clean[i],
                skipped[i],
                cells[i],
            )
            for i, net in enumerate(self.nets)
        ]
        count = None if self.clean is None else len(self.clean)
        circumstances = {
            "order": describe_order(
                settings["protocol"], settings["seeds"], settings["concentration"]
            ),
            "data_note": self.data.note,
            "clean": count and {"n": count, "by": "robustbench.utils.clean_accuracy"},
            "versions": versions(),
            "machine": machine(device_of(self.nets[0])),
            "command": self.command,
            "corruptions_mce": {
                m.name: mean_corruption_error(m, settings["dataset"]) for m in methods
            },
        }
        return Results(settings, circumstances, methods)
