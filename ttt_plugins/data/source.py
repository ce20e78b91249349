"""The interface of sources of images, and the order in which their rows are read."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

__all__ = [
    "IMAGE_COLUMNS",
    "LABEL_COLUMNS",
    "OPEN_BLOCKS",
    "Columns",
    "ImageSource",
    "ImageStream",
    "Sample",
    "read_order",
    "shuffled_blocks",
]

#: Names of the columns (or arrays) of images and of labels; None to find them by name.
Columns = tuple[str | None, str | None]

#: Common names of these columns, the most common first.
IMAGE_COLUMNS = ("image", "images", "img", "picture", "jpg", "png", "webp", "x", "data", "arr_0")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target", "targets", "y", "arr_1")

#: A shuffled order mixes the rows of this many blocks, so a reader caches as many.
OPEN_BLOCKS = 8


class Sample(NamedTuple):
    """One row of a source.

    Attributes:
        image: an RGB picture, an encoded picture, uint8 pixels (C, H, W), or floats (C, H, W) in
            [0, 1] that already have the model's input size and are not transformed.
        label: index of its class; None if the source has no labels.
        name: the picture's path, or its position in the source.
    """

    image: Image.Image | bytes | Tensor
    label: int | None
    name: str


class ImageSource(abc.ABC):
    """Images that can be read in any order by row; it can be pickled for other processes.

    Attributes:
        location: where the images are, for messages.
        classes: names of the classes by label; None if there are none.
        labelled: whether the rows have labels.
    """

    location: str
    classes: tuple[str, ...] | None = None
    labelled: bool = False

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, row: int) -> Sample:
        """Read and decode one row.

        Raises:
            PictureError: this picture is damaged; others may be intact.
            DataError: the source cannot be read.
        """

    def read_labels(self) -> Tensor:
        """The labels (N,) of all rows of a labelled source, int64.

        Sources that can do so read them without decoding pictures.

        Raises:
            DataError: as for `read`.
        """
        return torch.tensor([self.read(row).label for row in range(len(self))])

    @property
    def decodes(self) -> bool:
        """Whether `read` is slow enough for worker processes to be worthwhile."""
        return True

    def blocks(self) -> Sequence[range]:
        """Consecutive rows that are cheap to read together; all of them in one block by default."""
        return [range(len(self))]


class ImageStream(abc.ABC):
    """Images in a fixed order, such as a loader's; like `ImageSource`, but without `read`."""

    location: str
    classes: tuple[str, ...] | None = None
    labelled: bool = False

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Sample]: ...


def read_order(source: ImageSource, seed: int | None) -> Tensor:
    """The rows of a source (N,) in reading order: the source's own, or shuffled by a seed.

    Blocks are shuffled; then the rows of every `OPEN_BLOCKS` consecutive blocks are shuffled
    together.
    """
    if seed is None:
        return torch.arange(len(source))
    blocks = [torch.arange(block.start, block.stop) for block in source.blocks()]
    return shuffled_blocks(blocks, torch.Generator().manual_seed(seed))


def shuffled_blocks(blocks: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The rows of all blocks, shuffled as for `read_order`."""
    order = torch.randperm(len(blocks), generator=generator).tolist()
    windows = []
    for first in range(0, len(order), OPEN_BLOCKS):
        rows = torch.cat([blocks[i] for i in order[first:][:OPEN_BLOCKS]])
        windows.append(rows[torch.randperm(len(rows), generator=generator)])
    return torch.cat(windows) if windows else torch.arange(0)
