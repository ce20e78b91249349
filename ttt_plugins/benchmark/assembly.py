"""Finished tasks put together: the records of the methods, and what else a result says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .cells import CorruptionData
from .leaderboard import mean_corruption_error
from .output import machine, versions
from .progress import Progress
from .protocols import describe_order
from .records import CellRecord, MethodRecord
from .tasks import Task, cell_records

__all__ = ["describe_run", "records_of_methods"]


def records_of_methods(
    tasks: Sequence[Task],
    nets: Sequence[nn.Module],
    kept: Progress,
    batch_size: int,
    model_name: str,
) -> list[MethodRecord]:
    """What each method did, its cells in the order of ``tasks``, all of which are finished."""
    cells: list[list[CellRecord]] = [[] for _ in nets]
    clean: list[float | None] = [None for _ in nets]
    skipped = [0 for _ in nets]
    for task in tasks:
        if task.stretches:
            records, count = cell_records(task, kept, batch_size)
            cells[task.method] += records
            skipped[task.method] += count
        else:
            clean[task.method] = kept.value(task.name)
    short = re.split(r"[/:\\]", model_name.rstrip("/\\"))[-1]
    return [
        MethodRecord(
            f"{short}_{net.method}",
            net.method,
            dataclasses.asdict(net.config),
            net.describe(),
            clean[i],
            skipped[i],
            cells[i],
        )
        for i, net in enumerate(nets)
    ]


def describe_run(
    settings: dict[str, Any],
    data: CorruptionData,
    methods: Sequence[MethodRecord],
    device: torch.device,
    clean: int | None,
    command: str | None,
) -> dict[str, Any]:
    """The circumstances in ``results.json``; ``clean`` counts the uncorrupted images."""
    return {
        "order": describe_order(settings["protocol"], settings["seeds"], settings["concentration"]),
        "data_note": data.note,
        "clean": clean and {"n": clean, "by": "robustbench.utils.clean_accuracy"},
        "versions": versions(),
        "machine": machine(device),
        "command": command,
        "corruptions_mce": {m.name: mean_corruption_error(m, settings["dataset"]) for m in methods},
    }
