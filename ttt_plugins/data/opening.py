"""`open_images`, which turns any supported input into a source of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError, InputError
from .arrays import ArraySource, DatasetSource, LoaderStream, open_array_file
from .folders import FolderSource
from .images import LabelledImages
from .parquet import ParquetSource
from .source import ImageSource, ImageStream

__all__ = ["open_images"]

_HUB = "hf://"


def open_images(
    source: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    stream: bool = False,
) -> ImageSource | ImageStream:
    """Open a source of images; nothing is decoded yet, and files are never loaded as a whole.

    Args:
        source: a folder of class folders, a folder of pictures (which have no labels), a parquet
            file or a folder of its shards, an ``.npy`` or ``.npz`` file,
            ``"hf://datasets/ORG/NAME[@REVISION][/SPLIT or PATTERN]"``, a tensor or array of
            images, `LabelledImages`, a tuple of images and labels, a map-style torch data set, or
            a loader. A source that is already open is returned unchanged.
        image_column: name of the column (parquet) or array (npz) of images; found by name unless
            given.
        label_column: name of the column or array of labels; found by name unless given.
        stream: whether to stream a data set from the Hub instead of downloading its shards first;
            this needs the ``datasets`` package and cannot be shuffled.

    Raises:
        DataError: the source is missing, damaged, or has another layout.
        InputError: the source is none of these, or something other than a Hub data set is streamed.
        HubError: the Hub does not have the data set or cannot be reached.
        MissingDependencyError: parquet files need pyarrow, and ``stream`` needs `datasets`.
    """
    columns = (image_column, label_column)
    if stream and not (isinstance(source, str) and source.startswith(_HUB)):
        raise InputError("only data sets on the Hub (hf://datasets/ORG/NAME) can be streamed")
    if isinstance(source, (ImageSource, ImageStream)):
        return source
    if isinstance(source, str) and source.startswith(_HUB):
        from .hub_datasets import open_hub_dataset

        return open_hub_dataset(source, columns, stream)
    if isinstance(source, (str, Path)):
        return _open_path(Path(source), *columns)
    if isinstance(source, LabelledImages):
        return ArraySource(source.images, source.labels, "the labelled images")
    if isinstance(source, (Tensor, np.ndarray)):
        return ArraySource(source, None, "the tensor of images")
    if (
        isinstance(source, tuple)
        and len(source) == 2
        and isinstance(source[0], (Tensor, np.ndarray))
    ):
        return ArraySource(source[0], source[1], "the images and labels")
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return DatasetSource(source, columns)
    if isinstance(source, Iterable):
        return LoaderStream(source, columns)
    raise InputError(
        "images come from a folder, a parquet, npy or npz file, hf://datasets/ORG/NAME, a tensor, "
        f"a torch data set or a loader; got {type(source).__name__}"
    )


def _open_path(path: Path, image_column: str | None, label_column: str | None) -> ImageSource:
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if shards:
            return ParquetSource(shards, image_column, label_column)
        return FolderSource(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    kind = path.suffix.lower()
    if kind == ".parquet":
        return ParquetSource([path], image_column, label_column)
    if kind in (".npy", ".npz"):
        return open_array_file(path, image_column, label_column)
    raise DataError(f"{path}: not a folder and not a .parquet, .npy or .npz file")
