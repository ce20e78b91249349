"""Parquet files in the layout of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError, MissingDependencyError
from .images import LabelledImages

__all__ = ["read_labels", "read_parquet"]


def read_parquet(path: str | Path) -> LabelledImages:
    """Read a parquet file with columns ``image`` (struct of bytes and path) and ``label``.

    Raises:
        DataError: the file is missing, has other columns, or images of different sizes.
        MissingDependencyError: pyarrow is not installed.
    """
    with _reading(path) as parquet:
        table = parquet.read_table(path, columns=["image", "label"])
        rows = [row["bytes"] for row in table["image"].to_pylist()]
        decoded = [np.asarray(Image.open(io.BytesIO(row)).convert("RGB")) for row in rows]
        images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
        return LabelledImages(images, _labels(table))


def read_labels(path: str | Path) -> Tensor:
    """The labels (N,) alone of such a file; to decode its images takes many times as long.

    Raises:
        DataError, MissingDependencyError: as `read_parquet`, but for what its images may lack.
    """
    with _reading(path) as parquet:
        return _labels(parquet.read_table(path, columns=["label"]))


def _labels(table) -> Tensor:
    return torch.tensor(table["label"].to_pylist(), dtype=torch.int64)


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[ModuleType]:
    """Pyarrow's parquet module, for a file that is there; what goes wrong becomes one error."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; expected CIFAR-10 in the Hub's parquet layout")
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError(
            'reading parquet files needs pyarrow: pip install "ttt-plugins[train]"'
        ) from error
    try:
        yield parquet
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a parquet file with columns image{{bytes, path}} and label ({error})"
        ) from error
