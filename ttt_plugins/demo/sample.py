"""The demo's images: real ones, clean and corrupted, that ship with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError, InputError

__all__ = ["CLEAN", "SAMPLE", "Sample", "load_sample"]

SAMPLE = Path(__file__).parent.parent / "assets" / "demo"
CLEAN = "clean"


@dataclass(frozen=True)
class Sample:
    """Labels (N,) and, for ``clean`` and each corruption, uint8 images (N, 3, H, W)."""

    labels: Tensor
    images: dict[str, Tensor]

    @property
    def corruptions(self) -> list[str]:
        """Names of all kinds of images except the clean ones."""
        return [name for name in self.images if name != CLEAN]


def _tiles(path: Path, side: int = 32) -> Tensor:
    """uint8 images (N, 3, side, side) from one lossless picture that holds them row by row."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    grid = pixels.view(rows, side, columns, side, 3).permute(0, 2, 4, 1, 3)
    return grid.reshape(rows * columns, 3, side, side)


def load_sample(folder: str | Path = SAMPLE, n: int | None = None) -> Sample:
    """Load the first ``n`` images of each kind, from ``labels.json`` and ``<kind>.webp`` files.

    Raises:
        InputError: ``n`` is below 1 or larger than the number of images.
        DataError: a file is missing or has another layout.
    """
    folder = Path(folder)
    try:
        labels = torch.tensor(json.loads((folder / "labels.json").read_text()))
        images = {path.stem: _tiles(path) for path in sorted(folder.glob("*.webp"))}
        if not images or any(len(kind) != len(labels) for kind in images.values()):
            raise ValueError("pictures and labels do not match")
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{folder}: not the demo's images ({reason}); reinstall ttt-plugins"
        ) from error
    if n is not None and not 1 <= n <= len(labels):
        raise InputError(f"the demo can use 1 to {len(labels)} images of each kind, got {n}")
    order = sorted(images, key=lambda name: (name != CLEAN, name))
    return Sample(labels[:n], {name: images[name][:n].contiguous() for name in order})
