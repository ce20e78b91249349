"""Batches from a source of images: decoded by worker processes, in a fixed order, resumable."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ..errors import DataError, InputError
from .decode import PictureError, decode
from .source import ImageSource, ImageStream, Sample, read_order

__all__ = [
    "ImageBatch",
    "ImageLoader",
    "Pieces",
    "Transform",
    "default_workers",
    "intact",
    "to_pixels",
    "worker_count",
]

#: A function from an RGB picture to uint8 pixels (C, H, W).
Transform = Callable[[Image.Image], Tensor]

_MOST_WORKERS = 8


class ImageBatch(NamedTuple):
    """A batch of images.

    Attributes:
        images: images (B, C, H, W), uint8, or floats if the source holds floats.
        labels: int64 classes (B,); None if the source has none.
        names: the pictures' paths, or their positions in the source.
        end: position in the reading order after this batch, counting damaged pictures; an
            `ImageLoader` with this ``start`` reads the images after it.
    """

    images: Tensor
    labels: Tensor | None
    names: list[str]
    end: int


class ImageLoader:
    """Batches of a source's images; each iteration over the loader is one epoch.

    The same seed gives the same batches for any number of workers. At most a few batches per
    worker are in memory.

    Args:
        source: a source that `open_images` returns.
        transform: resizes and crops pictures, such as `evaluation_transform` returns; without it
            all pictures must have the same size. Floating-point images are never transformed.
        batch_size: number of images in a batch, at least 1; the last batch, and batches from which
            pictures were skipped, have fewer.
        workers: number of decoding processes, 0 for none; by default one per CPU, at most 8. A
            stream is read by this process only.
        seed: seed for shuffling; None keeps the source's own order.
        start: number of images to skip at the start of the order.
        limit: largest number of images of the order to read, including those skipped at the start.
        rows: rows to read, in this order (N,), instead of the whole source; not for a stream.
        skip_damaged: skip damaged pictures and list them in ``skipped`` instead of raising.

    Attributes:
        skipped: one line for each damaged picture that was skipped so far.

    Raises:
        InputError: an argument is out of range, or a seed is given for a stream.
    """

    def __init__(
        self,
        source: ImageSource | ImageStream,
        *,
        transform: Transform | None = None,
        batch_size: int = 64,
        workers: int | None = None,
        seed: int | None = None,
        start: int = 0,
        limit: int | None = None,
        rows: Tensor | None = None,
        skip_damaged: bool = False,
    ):
        integers = {"batch_size": (batch_size, 1), "start": (start, 0)}
        integers |= {"workers": (workers or 0, 0), "limit": (1 if limit is None else limit, 1)}
        for name, (value, least) in integers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
        if seed is not None and isinstance(source, ImageStream):
            raise InputError(
                f"{source.location} yields images in one order only and cannot be shuffled; give a "
                "folder, files, arrays or a data set"
            )
        self.source, self.batch_size, self.skipped = source, batch_size, []
        self._transform, self._skip_damaged = transform, skip_damaged
        self._start, self._limit = start, limit
        if isinstance(source, ImageSource):
            self._order = (read_order(source, seed) if rows is None else rows)[:limit]
            self._workers = worker_count(source, transform) if workers is None else workers

    def __iter__(self) -> Iterator[ImageBatch]:
        end = self._start
        # The loader is closed at once if anything is raised; the garbage collector would wait for
        # its worker processes, which takes seconds.
        with contextlib.closing(self._pieces()) as pieces:
            for piece in pieces:
                end += piece.read
                _check(piece, self._skip_damaged)
                self.skipped += piece.damaged
                if piece.images is not None:
                    yield ImageBatch(piece.images, piece.labels, piece.names, end)

    def __len__(self) -> int:
        """Number of images to read, including damaged ones; for a stream, an upper bound.

        Raises:
            TypeError: the number is unknown, because the stream has no limit.
        """
        if isinstance(self.source, ImageSource):
            return max(0, len(self._order) - self._start)
        if self._limit is None:
            raise TypeError(f"{self.source.location} does not say how many images it has")
        return max(0, self._limit - self._start)

    def _pieces(self) -> Generator[_Piece]:
        if isinstance(self.source, ImageStream):
            samples = itertools.islice(self.source, self._start, self._limit)
            while batch := list(itertools.islice(samples, self.batch_size)):
                yield _assembled([functools.partial(Sample, *s) for s in batch], self._transform)
        elif self._start < len(self._order):
            rows = self._order[self._start :].split(self.batch_size)
            yield from DataLoader(
                Pieces(self.source, self._transform),
                sampler=_Lists(rows),
                batch_size=None,
                num_workers=min(self._workers, len(rows)),
            )


class _Lists(Sampler):
    """Yields the rows of each batch as a list."""

    def __init__(self, batches: Sequence[Tensor]):
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class Pieces(Dataset):
    """Turns the rows of a batch into a `_Piece`, in a worker process."""

    def __init__(self, source: ImageSource, transform: Transform | None):
        self._source, self._transform = source, transform

    def __getitem__(self, rows: list[int]) -> _Piece:
        return _assembled(
            [functools.partial(self._source.read, row) for row in rows], self._transform
        )


class _Piece(NamedTuple):
    """A batch and its errors, which the main process raises, without a worker's traceback."""

    images: Tensor | None
    labels: Tensor | None
    names: list[str]
    damaged: list[str]
    read: int
    error: str | None = None


def _check(piece: _Piece, skip_damaged: bool) -> None:
    if piece.damaged and not skip_damaged:
        raise PictureError(f"{piece.damaged[0]}; repair or remove it, or skip damaged pictures")
    if piece.error is not None:
        raise DataError(piece.error)


def intact(piece: _Piece) -> Tensor:
    """The images (B, C, H, W) of a piece in which nothing is damaged.

    Raises:
        PictureError: a picture is damaged.
        DataError: the source cannot be read, or pictures have different sizes.
    """
    _check(piece, skip_damaged=False)
    assert piece.images is not None
    return piece.images


def _assembled(reads: Iterable[Callable[[], Sample]], transform: Transform | None) -> _Piece:
    images, labels, names, damaged, read = [], [], [], [], 0
    for read, sample_of in enumerate(reads, 1):
        try:
            sample = sample_of()
            image = to_pixels(sample, transform)
        except PictureError as error:
            damaged.append(str(error))
            continue
        except DataError as error:
            return _Piece(None, None, [], damaged, read, str(error))
        if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
            sizes = [f"{t.dtype} {tuple(t.shape)}" for t in (images[0], image)]
            error = (
                f"{names[0]} is {sizes[0]} and {sample.name} is {sizes[1]}: pictures must have the "
                "same size and type; give a transform that resizes them"
            )
            return _Piece(None, None, [], damaged, read, error)
        images.append(image)
        labels.append(sample.label)
        names.append(sample.name)
    if not images:
        return _Piece(None, None, [], damaged, read)
    numbers = None if None in labels else torch.tensor(labels)
    return _Piece(torch.stack(images), numbers, names, damaged, read)


def to_pixels(sample: Sample, transform: Transform | None) -> Tensor:
    """A sample's pixels (C, H, W), uint8 and transformed, or the floats that it holds.

    Raises:
        PictureError: the sample is an encoded picture that is damaged.
    """
    image = sample.image
    if isinstance(image, bytes):
        image = decode(image, sample.name)
    if isinstance(image, Tensor):
        if image.is_floating_point():
            return image
        if transform is None:
            return image.expand(3, -1, -1) if image.shape[0] == 1 else image
        image = to_pil_image(image).convert("RGB")
    return pil_to_tensor(image) if transform is None else transform(image)


def worker_count(source: ImageSource, transform: Transform | None) -> int:
    """Number of worker processes that are worthwhile for a source: none if reading is fast."""
    if not source.decodes and transform is None:
        return 0
    return default_workers()


def default_workers() -> int:
    """Number of worker processes: one for each CPU of this process, at most 8."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cpus or 1, _MOST_WORKERS)
