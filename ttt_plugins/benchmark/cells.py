"""The cells of a benchmark: the images of one corruption at one severity, with their labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data.datasets import PICTURES
from ..data.fresh import corrupt_rows, flip_and_crop
from ..data.images import LabelledImages
from ..data.labelled import LabelledPictures
from ..errors import InputError

__all__ = ["CLEAN", "Cell", "CorruptionData"]

#: (corruption, severity)
Cell = tuple[str, int]
#: Largest memory, in bytes, for images that are read at once when a cell is read by row.
_PIECE_BYTES = 256 << 20
#: The uncorrupted images as a cell of a stream.
CLEAN: Cell = ("clean", 0)


@dataclass(frozen=True)
class CorruptionData:
    """The checked cells of a data folder.

    Attributes:
        dataset: a key of `DATASETS`, or `PICTURES`.
        layout: ``"robustbench"``, ``"compact"``, or a caller's name for its own arrays.
        counts: number of images in each cell, in the order in which the cells are evaluated.
        load: reads one cell, with uint8 images (N, 3, H, W).
        read_labels: reads only the labels (N,) of one cell; by default through ``load``.
        clean: reads the uncorrupted test images; None if the folder has none.
        note: remark on the images that must accompany published figures, or None.
        from_clean: whether row i of every cell is row i of the clean images, corrupted by a
            function of `ttt_plugins.data.corruptions`.
        device: device on which images are corrupted.
        load_rows: reads some rows (N,) of one cell, in their order, for cells that are too large to
            be in memory as a whole; it also reads `CLEAN` if there is a ``clean_count``.
        clean_count: number of clean images that ``load_rows`` reads; None if they are read by
            ``clean``, or if there are none.
        piece: largest number of images to read at once with ``load_rows``; None for the default.
    """

    dataset: str
    layout: str
    counts: Mapping[Cell, int]
    load: Callable[[Cell], LabelledImages] = field(repr=False)
    clean: Callable[[], LabelledImages] | None = field(default=None, repr=False)
    note: str | None = None
    read_labels: Callable[[Cell], Tensor] | None = field(default=None, repr=False)
    from_clean: bool = False
    device: str = "cpu"
    load_rows: Callable[[Cell, Tensor], LabelledImages] | None = field(default=None, repr=False)
    clean_count: int | None = None
    piece: int | None = None

    def labels(self, cell: Cell) -> Tensor:
        """The labels (N,) of one cell, int64."""
        return self.load(cell).labels if self.read_labels is None else self.read_labels(cell)

    def read(self, cell: Cell, rows: Tensor | None = None) -> LabelledImages:
        """Read one cell, or some of its rows (N,), in their order."""
        if rows is None or self.load_rows is None:
            whole = self.load(cell)
            return whole if rows is None else whole[rows]
        return self.load_rows(cell, rows)

    def with_clean(self) -> CorruptionData:
        """The same cells and the clean images as the cell `CLEAN`, after them.

        Raises:
            InputError: there are no clean images.
        """
        if CLEAN in self.counts:
            return self
        if self.clean_count is not None:
            return replace(self, counts={**self.counts, CLEAN: self.clean_count})
        if self.clean is None:
            raise InputError(
                "this protocol needs clean images, but the data has none; choose another protocol"
            )
        clean = functools.cache(self.clean)

        def load(cell: Cell) -> LabelledImages:
            return clean() if cell == CLEAN else self.load(cell)

        def labels(cell: Cell) -> Tensor:
            return clean().labels if cell == CLEAN else self.labels(cell)

        counts = {**self.counts, CLEAN: len(clean())}
        return replace(self, counts=counts, load=load, read_labels=labels, clean=clean)

    # -- other streams of the same images --------------------------------------------------

    @property
    def total(self) -> int:
        """Number of images of all cells."""
        return sum(self.counts.values())

    @property
    def highest(self) -> list[Cell]:
        """Each corruption at its highest severity."""
        severities: dict[str, int] = {}
        for name, severity in self.counts:
            if (name, severity) != CLEAN:
                severities[name] = max(severity, severities.get(name, 0))
        return list(severities.items())

    def view(
        self,
        cells: Iterable[Cell],
        base: Callable[[Cell], Cell] = lambda cell: cell,
        read: Callable[[Cell, Tensor | None], LabelledImages] | None = None,
    ) -> CorruptionData:
        """Some of the cells, or others that ``read`` computes from cells that ``base`` names."""
        read = read or self.read
        return replace(
            self,
            counts={cell: self.counts[base(cell)] for cell in cells},
            load=read,
            load_rows=None if self.load_rows is None else read,
            read_labels=lambda cell: self.labels(base(cell)),
            clean=None,
            clean_count=None,
        )

    def _corrupted(self, cell: Cell, rows: Tensor | None, repeat: int = 0) -> LabelledImages:
        """A cell, or rows of it, computed from the clean images with a numbered draw of noise."""
        clean = self.read(CLEAN, rows)
        rows = torch.arange(len(clean)) if rows is None else rows
        images = corrupt_rows(clean.images, rows, *cell, repeat=repeat, device=self.device)
        return LabelledImages(images, clean.labels)

    def corrupted(self, cells: Iterable[Cell]) -> CorruptionData:
        """These cells, computed from the cell `CLEAN`, which remains available to streams."""

        def read(cell: Cell, rows: Tensor | None = None) -> LabelledImages:
            return self.read(CLEAN, rows) if cell == CLEAN else self._corrupted(cell, rows)

        view = self.view(cells, lambda _: CLEAN, read)
        return replace(view, from_clean=True, clean_count=self.counts[CLEAN])

    def with_all_severities(self) -> CorruptionData | None:
        """The corruptions at all severities, computed from the clean images if only one is stored.

        None if only one severity is stored and others cannot be computed.
        """
        stored = [cell for cell in self.counts if cell != CLEAN]
        if len({severity for _, severity in stored}) > 1:
            return self.view(stored)
        if not self.from_clean or CLEAN not in self.counts:
            return None

        def read(cell: Cell, rows: Tensor | None = None) -> LabelledImages:
            return self.read(cell, rows) if cell in self.counts else self._corrupted(cell, rows)

        cells = [(name, severity) for name, _ in stored for severity in range(1, 6)]
        return self.view(cells, lambda cell: cell if cell in self.counts else CLEAN, read)

    def repeated(self, images: int) -> CorruptionData:
        """The cells of highest severity, repeated until there are at least this many images.

        Each repetition has fresh noise, or fresh flips and crops of the stored images where the
        corruption cannot be computed.
        """
        passes: dict[Cell, tuple[Cell, int]] = {}
        total = repeat = 0
        computed = self.from_clean and CLEAN in self.counts
        while total < images:
            for name, severity in self.highest:
                if total < images:
                    title = f"{name} again {repeat}" if repeat else name
                    passes[title, severity] = ((name, severity), repeat)
                    total += self.counts[name, severity]
            repeat += 1

        def read(cell: Cell, rows: Tensor | None = None) -> LabelledImages:
            base, repeat = passes[cell]
            if computed and repeat:
                return self._corrupted(base, rows, repeat)
            stored = self.read(base, rows)
            if not repeat:
                return stored
            rows = torch.arange(len(stored)) if rows is None else rows
            return LabelledImages(flip_and_crop(stored.images, rows, repeat), stored.labels)

        variation = "noise" if computed else "flips and crops"
        view = self.view(passes, lambda cell: passes[cell][0], read)
        return replace(view, layout=f"{self.layout}, repeated with fresh {variation}")

    @classmethod
    def from_pictures(
        cls,
        pictures: Mapping[str, LabelledPictures],
        corruptions: Sequence[str] = (),
        severities: Sequence[int] = (1, 2, 3, 4, 5),
        device: str = "cpu",
        dataset: str = PICTURES,
    ) -> CorruptionData:
        """Create cells from labelled pictures, which are read by row.

        Args:
            pictures: pictures by the name of their cell.
            corruptions: names among `TENSOR_CORRUPTIONS`; the cells are then computed from one
                source of clean pictures.
            severities: severities of these corruptions, from 1 to 5.
            device: device on which they are computed.
            dataset: name of the data set, unless the pictures are the user's own.

        Raises:
            InputError: several sources are to be corrupted, or a name is reserved.
        """
        cells = {(name, 0): source for name, source in pictures.items()}
        if corruptions:
            if len(pictures) > 1:
                raise InputError("only one source of pictures can be corrupted in a run; give one")
            cells = {CLEAN: next(iter(pictures.values()))}
        elif CLEAN in cells:
            raise InputError("the name 'clean' is reserved for pictures to corrupt; choose another")

        def read(cell: Cell, rows: Tensor | None = None) -> LabelledImages:
            source = cells[cell]
            return source.read(torch.arange(len(source)) if rows is None else rows)

        largest = max(source.side[0] * source.side[1] * 3 for source in cells.values())
        data = cls(
            dataset=dataset,
            layout="pictures",
            counts={cell: len(source) for cell, source in cells.items()},
            load=read,
            load_rows=read,
            read_labels=lambda cell: cells[cell].labels,
            device=device,
            piece=max(1, _PIECE_BYTES // largest),
        )
        if not corruptions:
            return data
        computed = data.corrupted((name, level) for name in corruptions for level in severities)
        return replace(computed, layout="pictures, corrupted")

    @classmethod
    def from_arrays(
        cls,
        cells: Mapping[Cell, LabelledImages],
        clean: LabelledImages | None = None,
        **fields: Any,
    ) -> CorruptionData:
        """Create cells from arrays in memory; ``fields`` are the other attributes."""
        fields = {"dataset": "cifar10", "layout": "memory", **fields}
        counts = {cell: len(images) for cell, images in cells.items()}
        return cls(
            counts=counts,
            load=cells.__getitem__,
            clean=None if clean is None else lambda: clean,
            **fields,
        )
