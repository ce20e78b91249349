"""Evaluation of a model batch by batch: its predictions and their cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adaptive import AdaptiveModel, device_of
from ..data.images import LabelledImages
from ..errors import InputError
from .device import Execution, batches, gather, peak_memory, reset_peak_memory
from .protocols import Stretch
from .results import CellRecord

__all__ = [
    "Answers",
    "Evaluation",
    "Predictor",
    "accuracy",
    "calibration_error",
    "cell_records",
    "classify",
    "evaluate_cell",
    "join",
    "predict",
]

#: Number of bins of the calibration error, of equal width, as in the paper's experiments.
ECE_BINS = 15

#: Images in [0, 1] -> logits.
Predictor = Callable[[Tensor], Tensor]


# -- the accuracy loop -------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """A model's predictions for some images, in their order; tensors (N,) on the CPU.

    Attributes:
        predictions: predicted classes, int64.
        right: whether the predicted class is the label.
        losses: cross-entropies in nats, float32.
        confidences: probabilities of the predicted classes, float32.
    """

    predictions: Tensor
    right: Tensor
    losses: Tensor
    confidences: Tensor


@dataclass(frozen=True)
class Evaluation:
    """An adapter's predictions for some images, and their cost.

    Attributes:
        answers: the predictions.
        seconds: wall time for adapting and predicting, with images already in memory.
        forwards, backwards: numbers of images passed through the model, in each direction.
        skipped: number of skipped updates.
        peak_memory: peak memory in bytes while these images were evaluated: on a GPU that of
            tensors, on the CPU that of the process (since its start if the system is not Linux).
    """

    answers: Answers
    seconds: float
    forwards: int
    backwards: int
    skipped: int
    peak_memory: int


def predict(
    model: Predictor,
    parts: Mapping[int, LabelledImages],
    rows: Tensor,
    batch_size: int,
    device: torch.device,
    *,
    execution: Execution | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Answers:
    """Classify images batch by batch; every accuracy in this package is computed here.

    Args:
        model: maps images (B, 3, H, W) in [0, 1] on the device to logits (B, classes).
        parts: labelled uint8 images by number.
        rows: int64 pairs (N, 2) of a part's number and a row in it, in the order of prediction.
        batch_size: number of images in a batch, at least 1.
        device: device of the model.
        execution: memory layout and precision.
        advance: called after every batch.

    Returns:
        one prediction for each row.

    Raises:
        InputError: a label is not one of the model's classes, or the batch size is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    execution = execution or Execution()
    labels = gather(parts, rows, "labels")
    highest = int(labels.max())
    targets = labels.to(device).split(batch_size)
    # Allocated once: keeping small tensors of every batch would fragment the allocator's memory.
    predictions = torch.empty_like(labels, device=device)
    right = torch.empty_like(predictions, dtype=torch.bool)
    losses = torch.empty_like(predictions, dtype=torch.float32)
    columns = (predictions, right, losses, torch.empty_like(losses))
    slices = zip(*(column.split(batch_size) for column in columns), strict=True)
    steps = zip(batches(parts, rows, batch_size, device), targets, slices, strict=True)
    for images, target, outputs in steps:
        with torch.no_grad(), execution.context(device):
            logits = model(execution.unit(images))
        logits = logits.float()
        if highest >= logits.shape[1]:
            raise InputError(
                f"the data has the label {highest}, but the model only the classes 0 to "
                f"{logits.shape[1] - 1}"
            )
        # Ties are resolved as in robustbench's clean_accuracy.
        predicted = logits.max(1)[1]
        values = (
            predicted,
            predicted == target,
            F.cross_entropy(logits, target, reduction="none"),
            (logits.amax(1) - logits.logsumexp(1)).exp(),
        )
        for column, value in zip(outputs, values, strict=True):
            column.copy_(value)
        advance()
    return Answers(*(column.cpu() for column in columns))


def accuracy(
    model: Predictor,
    data: LabelledImages,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> float:
    """Accuracy in [0, 1] of a model on all images, in their order.

    Args:
        model: maps images (B, 3, H, W) in [0, 1] on the device to logits (B, classes). An adapter
            continues from its current state.
        data: uint8 images and their labels.
        batch_size: number of images in a batch, at least 1.
        device: device of the model.

    Returns:
        the accuracy.
    """
    answers = predict(model, {0: data}, _all_rows(len(data)), batch_size, torch.device(device))
    return int(answers.right.sum()) / len(data)


def _all_rows(count: int) -> Tensor:
    rows = torch.arange(count)
    return torch.stack([torch.zeros_like(rows), rows], 1)


@contextlib.contextmanager
def _trusting_pixels(net: AdaptiveModel) -> Iterator[None]:
    """Disable the check of pixels, which waits for the device; scaled 8-bit images pass it."""
    before = net.checks_pixels
    net.checks_pixels = False
    try:
        yield
    finally:
        net.checks_pixels = before


def classify(
    net: AdaptiveModel,
    parts: Mapping[int, LabelledImages],
    rows: Tensor,
    batch_size: int,
    advance: Callable[[], object] = lambda: None,
    execution: Execution | None = None,
) -> Evaluation:
    """Classify images with an adapter, without resetting it, and measure the cost.

    Arguments and errors are those of `predict`.
    """
    device = device_of(net)
    reset_peak_memory(device)
    before = (net.forwards, net.backwards, net.skipped_updates)
    start = time.perf_counter()
    with _trusting_pixels(net):
        answers = predict(
            net, parts, rows, batch_size, device, execution=execution, advance=advance
        )
    # Moving the predictions to the CPU waits for the device, which is part of the time.
    seconds = time.perf_counter() - start
    return Evaluation(
        answers,
        seconds,
        net.forwards - before[0],
        net.backwards - before[1],
        net.skipped_updates - before[2],
        peak_memory(device),
    )


def join(evaluations: list[Evaluation]) -> Evaluation:
    """Join the evaluations of consecutive parts of the images."""
    tensors = ("predictions", "right", "losses", "confidences")
    answers = [e.answers for e in evaluations]
    return Evaluation(
        Answers(*(torch.cat([getattr(a, name) for a in answers]) for name in tensors)),
        sum(e.seconds for e in evaluations),
        sum(e.forwards for e in evaluations),
        sum(e.backwards for e in evaluations),
        sum(e.skipped for e in evaluations),
        max(e.peak_memory for e in evaluations),
    )


# -- records of cells --------------------------------------------------------------------


def calibration_error(confidences: Tensor, right: Tensor) -> float:
    """Expected calibration error in [0, 1]: |accuracy - mean confidence|, bin by bin.

    Fifteen bins of equal width, each weighted by its share of the images (Guo et al. 2017, arXiv
    1706.04599, equation 3).

    Args:
        confidences: probabilities of the predicted classes (N,).
        right: whether each prediction is correct (N,).

    Returns:
        the error; NaN if a confidence is NaN.
    """
    if confidences.isnan().any():
        return float("nan")
    bins = (confidences * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
    gaps = right.double() - confidences.double()
    sums = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, gaps)
    return sums.abs().sum().item() / len(right)


def cell_records(
    stretch: Stretch,
    evaluation: Evaluation,
    batch_size: int,
    *,
    seed: int | None = None,
    stream: int = 0,
) -> list[CellRecord]:
    """One record for each cell of a stretch, from the result of `classify`."""
    records, answers = [], evaluation.answers
    for part, (corruption, severity) in enumerate(stretch.cells):
        in_cell = stretch.rows[:, 0] == part
        count = int(in_cell.sum())
        share = count / len(in_cell)
        right = answers.right[in_cell]
        by_batch = (answers.right & in_cell).split(batch_size)
        records.append(
            CellRecord(
                corruption=corruption,
                severity=severity,
                n=count,
                accuracy=int(right.sum()) / count,
                loss=answers.losses[in_cell].double().mean().item(),
                ece=calibration_error(answers.confidences[in_cell], right),
                seconds=evaluation.seconds * share,
                forwards=round(evaluation.forwards * share),
                backwards=round(evaluation.backwards * share),
                peak_memory=evaluation.peak_memory,
                correct_per_batch=[int(batch.sum()) for batch in by_batch],
                seed=seed,
                stream=stream,
                visit=stretch.visit,
            )
        )
    return records


def evaluate_cell(
    net: AdaptiveModel,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    corruption: str = "",
    severity: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> CellRecord:
    """Evaluate an adapter, without resetting it, on uint8 images (N, 3, H, W) in their order.

    ``corruption`` and ``severity`` are only written into the record; ``advance`` is called after
    every batch.
    """
    stretch = Stretch(False, ((corruption, severity),), _all_rows(len(labels)))
    parts = {0: LabelledImages(images, labels)}
    evaluation = classify(net, parts, stretch.rows, batch_size, advance)
    return cell_records(stretch, evaluation, batch_size)[0]
