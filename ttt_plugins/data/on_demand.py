"""Images that are read when they are used, instead of a tensor that holds all of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..utils.progress import progress_bar
from .decode import PictureError
from .loading import Pieces, Transform, intact, worker_count
from .source import OPEN_BLOCKS, ImageSource, shuffled_blocks

__all__ = ["ImagesOnDemand", "intact_rows", "read_batches", "shuffled_rows"]


class ImagesOnDemand:
    """The images of a source, read and decoded when they are indexed.

    It stands in for a tensor of images (N, C, S, S) where images are taken in batches: it has a
    tensor's ``shape``, ``dtype``, ``device``, ``to`` and ``split``, and indexing gives a tensor.

    Args:
        source: the images.
        transform: resizes and crops pictures, so that all have the same size.
        rows: rows of the source (N,) to use, in order; None for all.
        workers: number of decoding processes of `batches`, 0 for none; by default one per CPU.

    Raises:
        DataError: there are no images, or the first is damaged.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform | None,
        *,
        rows: Tensor | None = None,
        workers: int | None = None,
    ):
        self.source = source
        self.rows = torch.arange(len(source)) if rows is None else rows
        if not len(self.rows):
            raise DataError(f"{source.location}: no images")
        self.device = torch.device("cpu")
        self._pieces = Pieces(source, transform)
        self._workers = worker_count(source, transform) if workers is None else workers
        first = self[:1]
        self.shape, self.dtype = torch.Size((len(self.rows), *first.shape[1:])), first.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Tensor | slice) -> Tensor:
        """Read the images (B, C, S, S) at some positions, in this process."""
        positions = positions.cpu() if isinstance(positions, Tensor) else positions
        return intact(self._pieces[self.rows[positions].tolist()]).to(self.device)

    def to(self, device: torch.device | str) -> ImagesOnDemand:
        """The same images, with batches that are moved to a device."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, in batches of at most ``size``."""
        return self.batches(torch.arange(len(self)).split(size))

    def batches(self, positions: Sequence[Tensor]) -> Generator[Tensor]:
        """Batches (B, C, S, S) of the images at some positions, decoded ahead by worker processes.

        At most a few batches per process are in memory.

        Raises:
            PictureError: a picture is damaged.
            DataError: the source cannot be read, or pictures have different sizes.
        """
        loader = DataLoader(
            self._pieces,
            sampler=[self.rows[batch.cpu()].tolist() for batch in positions],
            batch_size=None,
            num_workers=min(self._workers, len(positions)),
            generator=torch.Generator(),  # torch's global generator belongs to the training
        )
        for piece in loader:
            yield intact(piece).to(self.device)


def read_batches(images: Any, positions: Sequence[Tensor]) -> Iterator[Tensor]:
    """Batches of the images at some positions, from a tensor or from `ImagesOnDemand`."""
    if isinstance(images, ImagesOnDemand):
        with contextlib.closing(images.batches(positions)) as batches:
            yield from batches
        return
    for batch in positions:
        yield images[batch]


def shuffled_rows(images: Any, generator: torch.Generator) -> Tensor:
    """The positions of all images (N,) in random order, on the generator's device.

    If the source can only be read in blocks of rows, the blocks are shuffled, and then the rows of
    a few consecutive blocks together, as in `read_order`.
    """
    if isinstance(images, ImagesOnDemand):
        blocks = images.source.blocks()
        if len(blocks) > OPEN_BLOCKS:
            starts = torch.tensor([block.start for block in blocks])
            order = torch.argsort(images.rows, stable=True)
            owners = torch.searchsorted(starts, images.rows[order], right=True)
            sizes = torch.unique_consecutive(owners, return_counts=True)[1].tolist()
            seed = torch.randint(1 << 31, (), generator=generator, device=generator.device)
            on_cpu = torch.Generator().manual_seed(int(seed))
            return shuffled_blocks(order.split(sizes), on_cpu).to(generator.device)
    return torch.randperm(len(images), generator=generator, device=generator.device)


class _Damage(Dataset):
    """The error that each picture raises, empty for intact ones."""

    def __init__(self, source: ImageSource, transform: Transform | None):
        self._pieces = Pieces(source, transform)

    def __getitem__(self, row: int) -> str:
        try:
            intact(self._pieces[[row]])
        except PictureError as error:
            return str(error)
        return ""


def intact_rows(
    source: ImageSource, transform: Transform | None, rows: Tensor, workers: int | None
) -> tuple[Tensor, list[str]]:
    """Decode all pictures once to find the rows that are not damaged.

    Returns:
        the intact rows (M,), in the given order, and a line for each damaged picture.

    Raises:
        DataError: all pictures are damaged, or the source cannot be read.
    """
    count = worker_count(source, transform) if workers is None else workers
    loader = DataLoader(
        _Damage(source, transform),
        sampler=rows.tolist(),
        batch_size=None,
        num_workers=min(count, len(rows)),
        generator=torch.Generator(),
    )
    errors = list(progress_bar(loader, f"pictures of {source.location}"))
    if all(errors):
        raise DataError(f"{source.location}: every picture is damaged, the first: {errors[0]}")
    return rows[torch.tensor([not line for line in errors])], [line for line in errors if line]
