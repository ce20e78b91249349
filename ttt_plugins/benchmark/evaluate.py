"""Showing images to an adapter, batch by batch, and counting what it got right."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import LabelledImages
from ..errors import InputError
from .protocols import Stretch
from .records import CellRecord

__all__ = ["Outcome", "cell_records", "classify", "device_of", "evaluate_cell", "to_unit"]


class Outcome(NamedTuple):
    """What an adapter did with the images of a stretch, in the order met.

    ``predictions`` (N,) classes and ``losses`` (N,) cross-entropies in nats, both on the CPU.
    """

    predictions: Tensor
    losses: Tensor
    seconds: float
    forwards: int
    backwards: int
    skipped: int


def device_of(net: nn.Module) -> torch.device:
    """Where an adapter's tensors are; the CPU if it has none."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def to_unit(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images -> float32 in [0, 1] on the device, as exact as RobustBench's on the CPU.

    CUDA multiplies by the reciprocal of a Python number; by a tensor it divides.
    """
    return images.to(device).float().div_(torch.tensor(255.0, device=device))


def _gather(parts: Mapping[int, LabelledImages], picks: Tensor, field: str) -> Tensor:
    """The images or labels of the picked (part, row) pairs (B, 2), in their order."""
    sources = {part: getattr(parts[part], field) for part in picks[:, 0].unique().tolist()}
    like = next(iter(sources.values()))
    gathered = like.new_empty((len(picks), *like.shape[1:]))
    for part, source in sources.items():
        places = picks[:, 0] == part
        gathered[places] = source[picks[places, 1]]
    return gathered


def classify(
    net: nn.Module,
    parts: Mapping[int, LabelledImages],
    rows: Tensor,
    batch_size: int,
    advance: Callable[[], object] = lambda: None,
) -> Outcome:
    """Show an adapter the picked (part, row) pairs (N, 2) batch by batch; it is not reset.

    Raises:
        InputError: labels beyond the classes of the model, or a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    device = device_of(net)
    before = (net.forwards, net.backwards, net.skipped_updates)
    predictions, losses = [], []
    start = time.perf_counter()
    for picks in rows.split(batch_size):
        images, labels = _gather(parts, picks, "images"), _gather(parts, picks, "labels")
        with torch.no_grad():
            logits = net(to_unit(images, device)).float()
        if labels.max() >= logits.shape[1]:
            raise InputError(
                f"label {int(labels.max())} in the data, but the model has only classes "
                f"0 to {logits.shape[1] - 1}"
            )
        losses.append(F.cross_entropy(logits, labels.to(device), reduction="none"))
        predictions.append(logits.max(1)[1])  # ties go where robustbench's clean_accuracy puts them
        advance()
    # Moving to the CPU waits for the device, so it belongs to the time.
    found, loss = torch.cat(predictions).cpu(), torch.cat(losses).cpu()
    seconds = time.perf_counter() - start
    after = (net.forwards, net.backwards, net.skipped_updates)
    return Outcome(found, loss, seconds, *(b - a for a, b in zip(before, after, strict=True)))


def cell_records(
    stretch: Stretch, parts: Mapping[int, LabelledImages], outcome: Outcome, batch_size: int
) -> list[CellRecord]:
    """One record for each cell of a stretch, from what `classify` returned for it."""
    right = outcome.predictions == _gather(parts, stretch.rows, "labels")
    records = []
    for part, (corruption, severity) in enumerate(stretch.cells):
        mine = stretch.rows[:, 0] == part
        count = int(mine.sum())
        share = count / len(mine)
        batches = (right & mine).split(batch_size)
        records.append(
            CellRecord(
                corruption=corruption,
                severity=severity,
                n=count,
                accuracy=int(right[mine].sum()) / count,
                loss=outcome.losses[mine].double().mean().item(),
                seconds=outcome.seconds * share,
                forwards=round(outcome.forwards * share),
                backwards=round(outcome.backwards * share),
                correct_per_batch=[int(batch.sum()) for batch in batches],
            )
        )
    return records


def evaluate_cell(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    corruption: str = "",
    severity: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> CellRecord:
    """Show an adapter images (N, 3, H, W) uint8 in the given order; it is not reset.

    ``corruption`` and ``severity`` are only written into the record; ``advance`` is called after
    every batch.
    """
    parts = {0: LabelledImages(images, labels)}
    rows = torch.arange(len(labels))
    stretch = Stretch(False, ((corruption, severity),), torch.stack([rows * 0, rows], 1))
    outcome = classify(net, parts, stretch.rows, batch_size, advance)
    return cell_records(stretch, parts, outcome, batch_size)[0]
