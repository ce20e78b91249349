"""A run: an adapter over the cells of a data folder, the unadapted model beside it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..artifacts.tensor_files import fingerprint
from ..errors import InputError
from ..utils import robustbench as bridge
from ..utils.checks import check_seed
from . import plots
from .beginning import begin_run, join_run, read_results
from .cells import DATASETS, CorruptionData
from .evaluate import device_of
from .execution import Execution
from .leaderboard import leaderboard_files
from .output import check_out, locked, write_files
from .progress import UNFINISHED, Progress
from .protocols import CONCENTRATION
from .results import Results
from .sharding import Worker
from .work import Work

__all__ = ["run_benchmark"]


def _weights(net: nn.Module) -> str | None:
    """Fingerprint of the wrapped model and of what the method learned beforehand."""
    if not hasattr(net, "backbone"):
        return None
    return fingerprint(net.backbone.source_state_dict() | net.learned_tensors())


def run_benchmark(
    net: nn.Module,
    data: CorruptionData,
    *,
    baseline: nn.Module | None = None,
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
) -> Results:
    """Evaluate an adapter on every cell, and its unadapted model on the same images.

    Args:
        net: the adapter.
        data: from `open_dataset`, or `CorruptionData.from_arrays`.
        baseline: the same model wrapped as ``"source"``.
        out: folder that gets ``results.json``, RobustBench's two files and ``plot.png``, at the
            end and all together; until then every finished piece is kept in its folder
            ``unfinished``. None writes nothing.
        protocol, concentration: see `protocols.plan`.
        seed: of the images' order; None keeps the stored one. Several: the run is made once for
            each, with the adapter's own draws from it too, and figures are means.
        execution: memory layout, precision, compilation.
        model_name: how the model is called in the files.
        command: the command line that started this, for the record.
        overwrite: replace other results or an unfinished run in ``out``.
        resume: go on with an unfinished run of the same settings, to the figures of an unbroken
            one; return the results of a finished one; begin if there is neither.
        worker: this process among several that make the run together and share ``out``; each
            returns the results, which are those of a single process.

    Clean accuracy is ``robustbench.utils.clean_accuracy`` of a freshly reset adapter, where the
    data has clean images; of the first seed's order.

    Raises:
        InputError: settings that do not fit each other, the model, or what ``out`` holds, such as
            an artifact.
        DataError: the data cannot be read, or ``out`` cannot be written.
        DistributedError: the processes lost each other.
    """
    classes = DATASETS[data.dataset].classes
    if net.num_classes not in (None, classes):
        raise InputError(f"{data.dataset} has {classes} classes, the model {net.num_classes}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size >= 1 << 31:
        raise InputError(f"batch_size must have 31 bits at most, got {batch_size}")
    if worker is not None and out is None:
        raise InputError("several processes need a folder that they share: give out")
    if out is not None:
        out = check_out(out)
    execution = execution or Execution()
    device = device_of(net)
    nets = [net] if baseline is None else [net, baseline]
    seeds = [seed] if seed is None or isinstance(seed, int) else list(dict.fromkeys(seed))
    for each in seeds:
        if each is not None:
            check_seed(each)
    several = len(seeds) > 1
    settings = {
        "model": model_name,
        "weights": _weights(net),
        "method": net.method,
        "config": dataclasses.asdict(net.config),
        "baseline": baseline is not None,
        "dataset": data.dataset,
        "layout": data.layout,
        "cells": {f"{name} {severity}": count for (name, severity), count in data.counts.items()},
        "protocol": protocol,
        "concentration": concentration if protocol == "correlated" else None,
        "batch_size": batch_size,
        "seeds": seeds,
        "adapter_seeds": seeds if several else [getattr(net, "seed", None)],
        "device": device.type,
        # Sums are cut where the threads are, so that their number is in the last bits.
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "execution": dataclasses.asdict(execution),
    }
    work = Work(nets, data, settings, execution, command)
    if data.clean is not None:
        bridge.import_robustbench()
        work.read_clean()
    if out is None:
        for each in nets:
            execution.prepare(each)
        return work.alone(Progress(None), progress)
    plots.figure(1, 1)  # a missing matplotlib is found now, not after hours
    kept = Progress(out / UNFINISHED)

    def finish() -> None:
        if not kept.header.exists():
            return  # a process did this and died before it could say so
        results = work.results(kept)
        texts = {**leaderboard_files(results), "results.json": results.to_json()}
        files = {name: text.encode() for name, text in texts.items()}
        write_files(out, {"plot.png": plots.plot_results(results), **files})
        kept.discard()

    with contextlib.ExitStack() as held:
        if worker is None:
            held.enter_context(locked(out))
            stored = begin_run(out, settings, resume, overwrite)
        else:
            run = worker.next_run()
            with worker.leader_first(f"{run}/begun") as leading:
                # A process of ours may still be in the run before.
                share = held.enter_context(locked(out, not leading, worker.lease))
                if leading:
                    stored = begin_run(out, settings, resume, overwrite)
                    share()
                else:
                    stored = join_run(out, settings)
        if stored is not None:
            return stored
        for each in nets:
            execution.prepare(each)
        if worker is None:
            work.alone(kept, progress)
            finish()
        else:
            work.together(kept, worker, run, finish, progress)
        return read_results(out / "results.json")
