"""CIFAR-10 in the parquet layout of the Hugging Face Hub, decoded once into memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import DataError, InputError, MissingDependencyError

__all__ = [
    "CIFAR10_CLASSES",
    "EXTRA_ROWS",
    "LabelledImages",
    "batch_images",
    "gather_images",
    "read_labels",
    "read_parquet",
    "to_float",
]

#: In CIFAR-10's own order.
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
#: The last rows of the training file carry the four extra corruptions that MGG is meta-trained
#: on; no other training may see them.
EXTRA_ROWS = 1024


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, 3, H, W) as uint8 and labels (N,) as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows) -> LabelledImages:
        return LabelledImages(self.images[rows], self.labels[rows])


def to_float(images: Tensor) -> Tensor:
    """uint8 images in 0..255 -> float32 images in [0, 1]; floating-point ones pass as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def batch_images(batch: object) -> Tensor:
    """The images of a loader's batch, which is them or a tuple or list that begins with them.

    Raises:
        InputError: it is anything else.
    """
    found = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(found, Tensor):
        raise InputError(
            "a loader must yield tensors of images, or tuples that begin with one; got "
            f"{type(batch).__name__}"
        )
    return found


def gather_images(data: Tensor | Iterable) -> Tensor:
    """Images as one tensor (N, C, H, W): from a tensor, or a loader of batches or tuples.

    Raises:
        InputError: it yields nothing, something else, or batches of different types or sizes.
    """
    if isinstance(data, Tensor):
        return data
    if not isinstance(data, Iterable):
        raise InputError(f"data must be images or a loader of them, got {type(data).__name__}")
    parts = [batch_images(part) for part in data]
    if not parts:
        raise InputError("the loader yielded no images")
    kinds = {(part.dtype, part.device, part.shape[1:]) for part in parts}
    if len(kinds) > 1:
        a, b, *_ = (f"{dtype} {tuple(shape)} on {where}" for dtype, where, shape in kinds)
        raise InputError(f"the loader's batches do not make one tensor of images: {a} and {b}")
    return torch.cat(parts)


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
    """pyarrow's parquet module, for a file that is there; what goes wrong becomes one error."""
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
