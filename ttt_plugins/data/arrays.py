"""Arrays, tensors, torch data sets and loaders as sources of images."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError, InputError
from .npy_files import extract_array, map_array, read_labels
from .source import IMAGE_COLUMNS, LABEL_COLUMNS, Columns, ImageSource, ImageStream, Sample

__all__ = ["ArraySource", "DatasetSource", "LoaderStream", "open_array_file"]


class _MappedFile:
    """An npy file that each process memory-maps, so that it is never loaded as a whole."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    @functools.cached_property
    def array(self) -> np.ndarray:
        return map_array(self.path, self.name)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name}  # a pickled memory map contains all its data


class ArraySource(ImageSource):
    """Images of one array or tensor.

    Args:
        images: images of shape (N, H, W, 3), (N, 3, H, W) or, for greyscale, (N, H, W); uint8, or
            floats in [0, 1], which are not transformed.
        labels: integer classes (N,), or None.
        location: what error messages call the array.

    Raises:
        DataError: the shape or type is unsupported, or the number of labels differs.
    """

    def __init__(self, images: Tensor | np.ndarray | _MappedFile, labels: Any, location: str):
        self.location, self._images = location, images
        shape, dtype = tuple(self._array.shape), str(self._array.dtype).removeprefix("torch.")
        if len(shape) not in (3, 4) or 0 in shape:
            raise DataError(
                f"{location}: images must be (N, H, W, 3), (N, 3, H, W) or (N, H, W), not {shape}"
            )
        if dtype != "uint8" and "float" not in dtype:
            raise DataError(f"{location}: images must be uint8 or floats in [0, 1], not {dtype}")
        self._channels_last = len(shape) == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3)
        if labels is not None:
            self._labels, self.labelled = np.asarray(labels), True
            if self._labels.shape != shape[:1] or self._labels.dtype.kind not in "iu":
                raise DataError(
                    f"{location}: {shape[0]} images need as many integer labels, got "
                    f"{self._labels.dtype} {self._labels.shape}"
                )

    @property
    def _array(self) -> Tensor | np.ndarray:
        return self._images.array if isinstance(self._images, _MappedFile) else self._images

    @property
    def decodes(self) -> bool:
        """False: the pixels are already decoded."""
        return False

    def __len__(self) -> int:
        return len(self._array)

    def read(self, row: int) -> Sample:
        """Read one image of the array; its name is its row."""
        pixels = _to_tensor(self._array[row], self._channels_last)
        return Sample(pixels, int(self._labels[row]) if self.labelled else None, str(row))

    def read_labels(self) -> Tensor:
        """The array of labels."""
        return torch.from_numpy(self._labels.astype(np.int64))


def _to_tensor(pixels: Any, channels_last: bool | None = None) -> Tensor:
    """An image (C, H, W) from an array or tensor; None infers which axis holds the channels."""
    if not isinstance(pixels, Tensor):
        pixels = torch.from_numpy(np.array(pixels))  # a copy: a mapped file is read-only
    if pixels.ndim == 2:
        return pixels[None]
    if channels_last is None:
        channels_last = pixels.shape[0] not in (1, 3) and pixels.shape[-1] in (1, 3)
    return pixels.permute(2, 0, 1) if channels_last else pixels


def open_array_file(
    path: str | Path, image_key: str | None = None, label_key: str | None = None
) -> ArraySource:
    """Open an ``.npy`` file of images, or an ``.npz`` file of images and labels.

    An array in an npz file can only be read from its beginning, so the images are extracted, in
    pieces, to a temporary file that is deleted with the source.

    Args:
        path: the file.
        image_key: name of the array of images in an npz file; by default a usual name.
        label_key: name of the array of labels in an npz file; by default a usual name.

    Raises:
        DataError: the file is missing or damaged, or has no such array.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return ArraySource(_MappedFile(path, str(path)), None, str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
            label_key = _choose(path, keys, label_key, LABEL_COLUMNS)
            others = [key for key in keys if key != label_key]
            image_key = _choose(path, others, image_key, IMAGE_COLUMNS)
            image_key = image_key or (others[0] if len(others) == 1 else None)
            if image_key is None:
                raise DataError(
                    f"{path}: no array has a usual name for images; name one of {others}"
                )
            images = _unpacked(archive, image_key, f"{path}[{image_key}]")
            labels = None
            if label_key is not None:
                labels = read_labels(archive, label_key, len(images.array), str(path))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a readable npz file ({error})") from error
    return ArraySource(images, labels, str(path))


def _choose(path: Path, keys: Sequence[str], given: str | None, usual: Sequence[str]) -> str | None:
    if given is not None and given not in keys:
        raise DataError(f"{path}: no array {given!r}; there are {list(keys)}")
    return given or next((key for key in usual if key in keys), None)


def _unpacked(archive: zipfile.ZipFile, key: str, name: str) -> _MappedFile:
    folder = Path(tempfile.mkdtemp(prefix="ttt-plugins-"))
    mapped = _MappedFile(folder / "images.npy", name)
    weakref.finalize(mapped, _remove, folder, os.getpid())
    extract_array(archive, key, mapped.path, name)
    return mapped


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a worker process forked from the owner
        shutil.rmtree(folder, ignore_errors=True)


class DatasetSource(ImageSource):
    """A map-style torch data set of images, or of tuples that begin with an image and a label.

    An image is a PIL picture, uint8 pixels (as an array or a tensor), or floats in [0, 1], which
    are not transformed. Rows that are dicts, as in the Hub's `datasets`, are accepted too.

    Args:
        dataset: the data set.
        columns: keys of image and label in rows that are dicts; None to find them by name.
    """

    def __init__(self, dataset: Any, columns: Columns = (None, None)):
        self.location, self._dataset, self._columns = type(dataset).__name__, dataset, columns
        if not len(dataset):
            raise InputError(f"{self.location}: the data set is empty")
        self.labelled = self.read(0).label is not None
        classes = getattr(dataset, "classes", None)
        self.classes = tuple(map(str, classes)) if classes and self.labelled else None

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, row: int) -> Sample:
        """Read one item; its name is its row."""
        return _sample(self._dataset[row], str(row), self.location, self._columns)


class LoaderStream(ImageStream):
    """A loader, or any other iterable.

    It yields batches of images (B, C, H, W), or tuples that begin with images and labels; each
    batch is split into single images. Single images, and the rows that `DatasetSource` accepts,
    are accepted too.

    Args:
        loader: the loader.
        columns: keys of image and label in rows that are dicts; None to find them by name.
    """

    def __init__(self, loader: Iterable, columns: Columns = (None, None)):
        self.location, self._loader, self._columns = type(loader).__name__, loader, columns
        self.classes = None

    def __iter__(self) -> Iterator[Sample]:
        row = 0
        for item in self._loader:
            for single in _single_items(item):
                yield _sample(single, str(row), self.location, self._columns)
                row += 1


def _single_items(item: Any) -> Iterable[Any]:
    """The images of a batch, each with its label if there are labels; other items unchanged."""
    images = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(images, (Tensor, np.ndarray)) or images.ndim != 4:
        return [item]
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return zip(images, item[1], strict=True)
    return images


def _sample(item: Any, name: str, location: str, columns: Columns) -> Sample:
    """A sample from an image, a tuple that begins with image and label, or a dict of columns."""
    if isinstance(item, Mapping):
        keys = [
            given or next((key for key in usual if key in item), None)
            for given, usual in zip(columns, (IMAGE_COLUMNS, LABEL_COLUMNS), strict=True)
        ]
        item = tuple(item.get(key) for key in keys)
    parts = tuple(item) if isinstance(item, (tuple, list)) else (item,)
    image, label = parts[0] if parts else None, parts[1] if len(parts) > 1 else None
    if isinstance(image, Mapping):  # an encoded picture as `datasets` stores it
        name, image = image.get("path") or name, image.get("bytes")
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    elif isinstance(image, (Tensor, np.ndarray)) and image.ndim in (2, 3):
        image = _to_tensor(image)
    elif not isinstance(image, bytes):
        raise InputError(
            f"{location} must yield images, tuples that begin with an image and its label, or "
            f"rows with a column of images; item {name} has {type(image).__name__} instead"
        )
    if label is not None:
        try:
            label = int(label)
        except (TypeError, ValueError) as error:
            raise InputError(f"{location}: the label of item {name} is not an integer") from error
    return Sample(image, label, name)
