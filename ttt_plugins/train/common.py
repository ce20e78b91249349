"""What all trainings share: checkpoints, the rate's schedule, accuracy, normalisation."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import LabelledImages, to_float
from ..errors import InputError

__all__ = ["Normalise", "accuracy", "load_checkpoint", "rate", "save_checkpoint"]


class Normalise(nn.Module):
    """Images in [0, 1] -> ``(image - mean) / std``, by channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak rate: linear warm-up, then half a cosine down to zero."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@torch.inference_mode()
def accuracy(model: nn.Module, normalise: nn.Module, data: LabelledImages, device) -> float:
    """Share of right predictions, in [0, 1], in eval mode."""
    model.eval()
    right = 0
    for images, labels in zip(data.images.split(500), data.labels.split(500), strict=True):
        logits = model(normalise(to_float(images.to(device))))
        right += (logits.argmax(1) == labels.to(device)).sum().item()
    return right / len(data)


def save_checkpoint(file: Path, saved: dict) -> None:
    """Write all or nothing: an interrupted save leaves the last checkpoint."""
    torch.save(saved, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)


def load_checkpoint(file: Path, made_by: object, device, key: str = "made_by") -> dict | None:
    """The checkpoint to go on from, None when there is none yet.

    Raises:
        InputError: it was made by something else than ``made_by``.
    """
    if not file.is_file():
        return None
    saved = torch.load(file, map_location=device, weights_only=True)
    if saved.get(key) != made_by:
        raise InputError(f"{file} was made by another recipe, config or model: {saved.get(key)}")
    return saved
