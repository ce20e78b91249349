"""Images that are read when they are used, in place of a tensor that holds all of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..errors import DataError
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

    def __getitem__(self, places: Tensor | slice) -> Tensor:
        """Read the images (B, C, S, S) at some places, in this process."""
        places = places.cpu() if isinstance(places, Tensor) else places
        return intact(self._pieces[self.rows[places].tolist()]).to(self.device)

    def to(self, device: torch.device | str) -> ImagesOnDemand:
        """The same images, whose batches are moved to a device."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, in batches of a size."""
        return self.batches(torch.arange(len(self)).split(size))

    def batches(self, places: Sequence[Tensor]) -> Generator[Tensor]:
        """Batches (B, C, S, S) of the images at some places, decoded ahead by worker processes.

        At most a few batches for each process are in memory.

        Raises:
            PictureError: a picture is damaged.
            DataError: the source cannot be read, or pictures have different sizes.
        """
        loader = DataLoader(
            self._pieces,
            sampler=[self.rows[part.cpu()].tolist() for part in places],
            batch_size=None,
            num_workers=min(self._workers, len(places)),
            generator=torch.Generator(),  # torch's global one is the training's
        )
        for piece in loader:
            yield intact(piece).to(self.device)


def read_batches(images: Any, places: Sequence[Tensor]) -> Iterator[Tensor]:
    """Batches of the images at some places, from a tensor or from `ImagesOnDemand`."""
    if isinstance(images, ImagesOnDemand):
        with contextlib.closing(images.batches(places)) as batches:
            yield from batches
        return
    for part in places:
        yield images[part]


def shuffled_rows(images: Any, generator: torch.Generator) -> Tensor:
    """The places of all images (N,) in random order, on the generator's device.

    Of files in which only blocks of rows can be read, the blocks are shuffled, and then the rows
    of a few consecutive ones together, as in `read_order`.
    """
    if isinstance(images, ImagesOnDemand):
        blocks = images.source.blocks()
        if len(blocks) > OPEN_BLOCKS:
            starts = torch.tensor([block.start for block in blocks])
            order = torch.argsort(images.rows, stable=True)
            owners = torch.searchsorted(starts, images.rows[order], right=True)
            parts = order.split(torch.unique_consecutive(owners, return_counts=True)[1].tolist())
            seed = torch.randint(1 << 31, (), generator=generator, device=generator.device)
            drawn = torch.Generator().manual_seed(int(seed))
            return shuffled_blocks(parts, drawn).to(generator.device)
    return torch.randperm(len(images), generator=generator, device=generator.device)


class _Damage(Dataset):
    """What is wrong with single pictures, None for intact ones."""

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
    """Decode all pictures once, to find the rows that are not damaged.

    Returns:
        the rows (M,), in the given order, and a line for each damaged picture.

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
    found = list(tqdm(loader, f"pictures of {source.location}", leave=False))
    if all(found):
        raise DataError(f"{source.location}: every picture is damaged, the first: {found[0]}")
    return rows[torch.tensor([not line for line in found])], [line for line in found if line]
