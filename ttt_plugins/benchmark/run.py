"""The loop: an adapter over the cells of a data folder, the unadapted model beside it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import robustbench_bridge as bridge
from ..data import LabelledImages
from ..errors import InputError
from . import plots
from .cells import DATASETS, CorruptionData
from .evaluate import cell_records, classify, device_of, to_unit
from .leaderboard import leaderboard_files
from .output import check_folder, machine, versions, write_files
from .protocols import describe_order, plan, shuffled
from .records import CellRecord, MethodRecord, Results

__all__ = ["run_benchmark"]


def _clean_accuracy(
    net: nn.Module, clean: LabelledImages, batch_size: int, advance: Callable[[], object]
) -> float:
    """On its own: a fresh adapter before, and none of it left after."""

    def model(images: Tensor) -> Tensor:
        advance()
        return net(images)

    net.reset()
    images = to_unit(clean.images, torch.device("cpu"))
    found = bridge.clean_accuracy(model, images, clean.labels, batch_size, device_of(net))
    net.reset()
    return found


def _settings(net, data, model_name, protocol, batch_size, seed) -> dict[str, Any]:
    return {
        "model": model_name,
        "method": net.method,
        "config": dataclasses.asdict(net.config),
        "dataset": data.dataset,
        "layout": data.layout,
        "cells": {f"{name} {severity}": count for (name, severity), count in data.counts.items()},
        "protocol": protocol,
        "batch_size": batch_size,
        "seed": seed,
        "device": device_of(net).type,
    }


def run_benchmark(
    net: nn.Module,
    data: CorruptionData,
    *,
    baseline: nn.Module | None = None,
    out: str | Path | None = None,
    protocol: str = "reset-per-cell",
    batch_size: int = 64,
    seed: int | None = None,
    model_name: str = "model",
    command: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Results:
    """Evaluate an adapter on every cell, and its unadapted model on the same images.

    Args:
        net: the adapter.
        data: from `open_dataset`, or `CorruptionData.from_arrays`.
        baseline: the same model wrapped as ``"source"``.
        out: folder that gets ``results.json``, RobustBench's two files and ``plot.png``, at the
            end and all together; None writes nothing.
        protocol: see `protocols.plan`.
        seed: of the images' order; None keeps the stored one.
        model_name: how the model is called in the files.
        command: the command line that started this, for the record.
        overwrite: replace results of other settings in ``out``.

    Clean accuracy is ``robustbench.utils.clean_accuracy`` of a freshly reset adapter, where the
    data has clean images.

    Raises:
        InputError: settings that do not fit each other, the model, or what ``out`` holds.
        DataError: the data cannot be read, or ``out`` cannot be written.
    """
    classes = DATASETS[data.dataset].classes
    if net.num_classes not in (None, classes):
        raise InputError(f"{data.dataset} has {classes} classes, the model {net.num_classes}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    stretches = plan(protocol, data.counts, seed)
    settings = _settings(net, data, model_name, protocol, batch_size, seed)
    clean = None if data.clean is None else data.clean()
    if clean is not None:
        bridge.import_robustbench()
        clean = clean[shuffled(len(clean), seed)]
    if out is not None:
        plots.figure(1, 1)  # a missing matplotlib is found now, not after hours
        check_folder(Path(out), settings, overwrite)
    nets = [net] if baseline is None else [net, baseline]
    clean_accuracy: list[float | None] = [None for _ in nets]
    cells: list[list[CellRecord]] = [[] for _ in nets]
    skipped = [0 for _ in nets]
    lengths = [len(s) for s in stretches] + ([] if clean is None else [len(clean)])
    total = len(nets) * sum(-(-length // batch_size) for length in lengths)
    with tqdm(total=total, unit="batch", disable=not progress, leave=False) as bar:
        if clean is not None:
            bar.set_description("clean")
            clean_accuracy = [_clean_accuracy(n, clean, batch_size, bar.update) for n in nets]
        for stretch in stretches:
            bar.set_description(stretch.cells[0][0] if len(stretch.cells) == 1 else protocol)
            parts = {i: data.load(cell) for i, cell in enumerate(stretch.cells)}
            for i, each in enumerate(nets):
                if stretch.reset:
                    each.reset()
                outcome = classify(each, parts, stretch.rows, batch_size, bar.update)
                cells[i] += cell_records(stretch, parts, outcome, batch_size)
                skipped[i] += outcome.skipped
    short = re.split(r"[/:\\]", model_name.rstrip("/\\"))[-1]
    methods = [
        MethodRecord(
            f"{short}_{n.method}",
            n.method,
            dataclasses.asdict(n.config),
            n.describe(),
            clean_accuracy[i],
            skipped[i],
            cells[i],
        )
        for i, n in enumerate(nets)
    ]
    circumstances = {
        "order": describe_order(protocol, seed),
        "data_note": data.note,
        "clean": None
        if clean is None
        else {"n": len(clean), "by": "robustbench.utils.clean_accuracy"},
        "versions": versions(),
        "machine": machine(device_of(net)),
        "command": command,
    }
    results = Results(settings, circumstances, methods)
    if out is not None:
        texts = {**leaderboard_files(results), "results.json": results.to_json()}
        files = {name: text.encode() for name, text in texts.items()}
        write_files(Path(out), {"plot.png": plots.plot_results(results), **files})
    return results
