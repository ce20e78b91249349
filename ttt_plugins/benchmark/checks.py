"""What the layouts of a data folder have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.images import LabelledImages
from ..data.parquet import read_parquet
from ..errors import DataError

__all__ = ["check_labels", "enough", "find_test_parquet", "read_clean"]


def enough(path: Path, have: int, n_examples: int | None, what: str) -> int:
    """How many images to use of ``have``."""
    if n_examples is not None and n_examples > have:
        raise DataError(f"{path}: {what} has {have} images, {n_examples} are asked for")
    return n_examples or have


def check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    """Class numbers, or a `DataError`."""
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{path}: labels must be integers from 0 to {classes - 1}")


def find_test_parquet(folder: Path, labels: str | Path | None) -> Path | None:
    """The parquet file of the clean test images in or near a folder."""
    if labels is not None:
        return Path(labels)
    places = (folder, folder.parent, folder / "cifar10", folder.parent / "cifar10")
    return next((p / "test.parquet" for p in places if (p / "test.parquet").is_file()), None)


def read_clean(file: Path, n_examples: int | None) -> LabelledImages:
    """The first images of a parquet file."""
    return read_parquet(file)[:n_examples]
