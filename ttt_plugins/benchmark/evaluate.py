"""Show images to a model batch by batch: what it got right, and what that cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import LabelledImages
from ..errors import InputError
from .adaptive import AdaptiveModel, device_of
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

#: Bins of the calibration error, of equal width, as in the paper's experiments.
ECE_BINS = 15

#: Images in [0, 1] -> logits.
Predictor = Callable[[Tensor], Tensor]


# -- the accuracy loop -------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a model said about some images, in the order met; tensors (N,) on the CPU.

    Attributes:
        predictions: classes, int64.
        right: whether the predicted class is the label's.
        losses: cross-entropies in nats, float32.
        confidences: probabilities of the predicted classes, float32.
    """

    predictions: Tensor
    right: Tensor
    losses: Tensor
    confidences: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What an adapter did with some images.

    Attributes:
        answers: what it said.
        seconds: wall time of adapting and predicting, images already in memory.
        forwards, backwards: passes of an image through the model, in either direction.
        skipped: updates that were skipped.
        peak_memory: bytes that tensors took at most on the GPU; on a CPU, that the process had
            taken so far.
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
    """Show a model images batch by batch: the one loop of this package that counts right answers.

    Args:
        model: images (B, 3, H, W) in [0, 1] on the device -> logits (B, classes).
        parts: labelled uint8 images by number.
        rows: (N, 2) int64, number of a part and row of it, in the order in which they are shown.
        batch_size: at least 1.
        device: where the model is.
        execution: memory layout and precision.
        advance: called after every batch.

    Returns:
        one answer for each of the rows.

    Raises:
        InputError: labels beyond the classes of the model, or a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    execution = execution or Execution()
    labels = gather(parts, rows, "labels")
    highest = int(labels.max())
    targets = labels.to(device).split(batch_size)
    # Made once: small tensors that stay from every batch would scatter over the allocator's memory.
    predictions = torch.empty_like(labels, device=device)
    right = torch.empty_like(predictions, dtype=torch.bool)
    losses = torch.empty_like(predictions, dtype=torch.float32)
    columns = (predictions, right, losses, torch.empty_like(losses))
    places = zip(*(column.split(batch_size) for column in columns), strict=True)
    shown = zip(batches(parts, rows, batch_size, device), targets, places, strict=True)
    for images, target, place in shown:
        with torch.no_grad(), execution.context(device):
            logits = model(execution.unit(images))
        logits = logits.float()
        if highest >= logits.shape[1]:
            raise InputError(
                f"label {highest} in the data, but the model has only classes "
                f"0 to {logits.shape[1] - 1}"
            )
        # Ties go where robustbench's clean_accuracy puts them.
        predicted = logits.max(1)[1]
        values = (
            predicted,
            predicted == target,
            F.cross_entropy(logits, target, reduction="none"),
            (logits.amax(1) - logits.logsumexp(1)).exp(),
        )
        for column, value in zip(place, values, strict=True):
            column.copy_(value)
        advance()
    return Answers(*(column.cpu() for column in columns))


def accuracy(
    model: Predictor,
    data: LabelledImages,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> float:
    """Share of right answers of a model on all images in their order, in [0, 1].

    Args:
        model: images (B, 3, H, W) in [0, 1] on the device -> logits (B, classes). An adapter goes
            on from the state that it is in.
        data: uint8 images and their labels.
        batch_size: images at a time.
        device: where the model is.

    Returns:
        the share.
    """
    answers = predict(model, {0: data}, _all_rows(len(data)), batch_size, torch.device(device))
    return int(answers.right.sum()) / len(data)


def _all_rows(count: int) -> Tensor:
    rows = torch.arange(count)
    return torch.stack([torch.zeros_like(rows), rows], 1)


@contextlib.contextmanager
def _trusting_pixels(net: AdaptiveModel) -> Iterator[None]:
    """8-bit images divided by 255 need no look at their pixels, which a GPU would wait for."""
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
    """Show an adapter images, and measure what that costs; it is not reset.

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
    # The answers were moved to the CPU, which waits for the device: that belongs to the time.
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
    """The evaluation of images that were met one part after another."""
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
        confidences: (N,) probabilities of the predicted classes.
        right: (N,) whether each prediction was right.

    Returns:
        the error; NaN if a confidence is.
    """
    if confidences.isnan().any():
        return float("nan")
    places = (confidences * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
    gaps = right.double() - confidences.double()
    sums = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, places, gaps)
    return sums.abs().sum().item() / len(right)


def cell_records(
    stretch: Stretch,
    evaluation: Evaluation,
    batch_size: int,
    *,
    seed: int | None = None,
    stream: int = 0,
) -> list[CellRecord]:
    """One record for each cell of a stretch, from what `classify` returned for it."""
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
    """Show an adapter images (N, 3, H, W) uint8 in the given order; it is not reset.

    ``corruption`` and ``severity`` are only written into the record; ``advance`` is called after
    every batch.
    """
    stretch = Stretch(False, ((corruption, severity),), _all_rows(len(labels)))
    parts = {0: LabelledImages(images, labels)}
    evaluation = classify(net, parts, stretch.rows, batch_size, advance)
    return cell_records(stretch, evaluation, batch_size)[0]
