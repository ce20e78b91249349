"""Showing images to an adapter, batch by batch, and counting what it got right."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import LabelledImages
from ..errors import InputError
from .batches import batches, gather
from .calibration import calibration_error
from .execution import Execution, peak_memory, reset_peak_memory
from .protocols import Stretch
from .records import CellRecord

__all__ = ["Outcome", "cell_records", "classify", "device_of", "join"]
__all__ += ["evaluate_cell"]


@dataclass(frozen=True)
class Outcome:
    """What an adapter did with some images, in the order met; tensors (N,) on the CPU.

    Attributes:
        predictions: classes, int64.
        right: whether the predicted class is the label's.
        losses: cross-entropies in nats, float32.
        confidences: probabilities of the predicted classes, float32.
        seconds: wall time of adapting and predicting, images already in memory.
        forwards, backwards: passes of an image through the model, in either direction.
        skipped: batches whose update was skipped.
        peak_memory: bytes, as `execution.peak_memory` says.
    """

    predictions: Tensor
    right: Tensor
    losses: Tensor
    confidences: Tensor
    seconds: float
    forwards: int
    backwards: int
    skipped: int
    peak_memory: int


def join(parts: list[Outcome]) -> Outcome:
    """The outcome of images met one part after another."""
    tensors = ("predictions", "right", "losses", "confidences")
    numbers = ("seconds", "forwards", "backwards", "skipped")
    return Outcome(
        *(torch.cat([getattr(p, name) for p in parts]) for name in tensors),
        *(sum(getattr(p, name) for p in parts) for name in numbers),
        max(p.peak_memory for p in parts),
    )


def device_of(net: nn.Module) -> torch.device:
    """Where an adapter's tensors are; the CPU if it has none."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


@contextlib.contextmanager
def _trusting(net: nn.Module) -> Iterator[None]:
    """8-bit images divided by 255 need no look at their pixels, which a GPU would wait for."""
    before = getattr(net, "checks_pixels", True)
    net.checks_pixels = False
    try:
        yield
    finally:
        net.checks_pixels = before


def classify(
    net: nn.Module,
    parts: Mapping[int, LabelledImages],
    rows: Tensor,
    batch_size: int,
    advance: Callable[[], object] = lambda: None,
    execution: Execution | None = None,
) -> Outcome:
    """Show an adapter the picked (part, row) pairs (N, 2) batch by batch; it is not reset.

    Raises:
        InputError: labels beyond the classes of the model, or a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    execution = execution or Execution()
    device = device_of(net)
    reset_peak_memory(device)
    before = (net.forwards, net.backwards, net.skipped_updates)
    start = time.perf_counter()
    labels = gather(parts, rows, "labels")
    highest = int(labels.max())
    answers = labels.to(device).split(batch_size)
    # Made once: small tensors that stay from every batch would scatter over the allocator's memory.
    predictions = torch.empty_like(labels, device=device)
    right = torch.empty_like(predictions, dtype=torch.bool)
    losses = torch.empty_like(predictions, dtype=torch.float32)
    kept = (predictions, right, losses, torch.empty_like(losses))
    places = zip(*(column.split(batch_size) for column in kept), strict=True)
    seen = zip(batches(parts, rows, batch_size, device), answers, places, strict=True)
    with _trusting(net):
        for images, answer, place in seen:
            with torch.no_grad(), execution.context(device):
                logits = net(execution.unit(images))
            logits = logits.float()
            if highest >= logits.shape[1]:
                raise InputError(
                    f"label {highest} in the data, but the model has only classes "
                    f"0 to {logits.shape[1] - 1}"
                )
            # Ties go where robustbench's clean_accuracy puts them.
            predicted = logits.max(1)[1]
            found = (
                predicted,
                predicted == answer,
                F.cross_entropy(logits, answer, reduction="none"),
                (logits.amax(1) - logits.logsumexp(1)).exp(),
            )
            for column, values in zip(place, found, strict=True):
                column.copy_(values)
            advance()
    # Moving to the CPU waits for the device, so it belongs to the time.
    tensors = [column.cpu() for column in kept]
    seconds = time.perf_counter() - start
    after = (net.forwards, net.backwards, net.skipped_updates)
    counts = [b - a for a, b in zip(before, after, strict=True)]
    return Outcome(*tensors, seconds, *counts, peak_memory(device))


def cell_records(
    stretch: Stretch,
    outcome: Outcome,
    batch_size: int,
    *,
    seed: int | None = None,
    stream: int = 0,
) -> list[CellRecord]:
    """One record for each cell of a stretch, from what `classify` returned for it."""
    records, right = [], outcome.right
    for part, (corruption, severity) in enumerate(stretch.cells):
        mine = stretch.rows[:, 0] == part
        count = int(mine.sum())
        share = count / len(mine)
        batch_counts = (right & mine).split(batch_size)
        records.append(
            CellRecord(
                corruption=corruption,
                severity=severity,
                n=count,
                accuracy=int(right[mine].sum()) / count,
                loss=outcome.losses[mine].double().mean().item(),
                ece=calibration_error(outcome.confidences[mine], right[mine]),
                seconds=outcome.seconds * share,
                forwards=round(outcome.forwards * share),
                backwards=round(outcome.backwards * share),
                peak_memory=outcome.peak_memory,
                correct_per_batch=[int(batch.sum()) for batch in batch_counts],
                seed=seed,
                stream=stream,
                visit=stretch.visit,
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
    rows = torch.arange(len(labels))
    stretch = Stretch(False, ((corruption, severity),), torch.stack([rows * 0, rows], 1))
    parts = {0: LabelledImages(images, labels)}
    outcome = classify(net, parts, stretch.rows, batch_size, advance)
    return cell_records(stretch, outcome, batch_size)[0]
