"""What all trainings share: the start, draws, checkpoints, schedule, accuracy, normalisation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..artifacts import Artifact
from ..data import LabelledImages, to_float
from ..errors import InputError
from ..hub import read_named

__all__ = [
    "Normalise",
    "accuracy",
    "create_model",
    "epoch_generator",
    "load_checkpoint",
    "rate",
    "read_start",
    "save_checkpoint",
    "write_entry",
]


def read_start(name: str) -> Artifact:
    """The artifact whose model a training starts from.

    Raises:
        InputError: it carries none.
    """
    found = read_named(name)
    if found.weights is None:
        raise InputError(f"{name} carries no model to start from")
    return found


def create_model(
    arch: str, classes: int, arguments: Mapping, weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A timm model, fresh from torch's global generator or with weights.

    Raises:
        InputError: timm cannot create it, or the weights are another architecture's.
    """
    try:
        model = timm.create_model(arch, num_classes=classes, **arguments)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"timm could not create {arch!r} with {arguments} ({error})") from error
    if weights is not None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"the weights to start from do not fit {arch}: {error}") from error
    return model


def epoch_generator(seed: int, epoch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """For all that an epoch draws: a resumed run draws what an unbroken one would have drawn."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


def write_entry(entry: Mapping[str, float]) -> None:
    """A line above the progress bar."""
    shown = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in entry.items() if k != "epoch")
    tqdm.write(f"epoch {entry['epoch']:3d}  {shown}")


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
