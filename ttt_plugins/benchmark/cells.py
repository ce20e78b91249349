"""The cells of a benchmark: the images of one corruption at one severity, with their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..data.images import LabelledImages

__all__ = ["Cell", "CorruptionData"]

#: (corruption, severity)
Cell = tuple[str, int]


@dataclass(frozen=True)
class CorruptionData:
    """The checked cells of a data folder.

    Attributes:
        dataset: a key of `DATASETS`.
        layout: ``"robustbench"``, ``"compact"``, or a caller's name for its own arrays.
        counts: number of images in each cell, in the order in which the cells are evaluated.
        load: reads one cell, with uint8 images (N, 3, H, W).
        read_labels: reads only the labels (N,) of one cell; by default through ``load``.
        clean: reads the uncorrupted test images; None if the folder has none.
        note: remark on the images that must accompany published figures, or None.
    """

    dataset: str
    layout: str
    counts: Mapping[Cell, int]
    load: Callable[[Cell], LabelledImages] = field(repr=False)
    clean: Callable[[], LabelledImages] | None = field(default=None, repr=False)
    note: str | None = None
    read_labels: Callable[[Cell], Tensor] | None = field(default=None, repr=False)

    def labels(self, cell: Cell) -> Tensor:
        """The labels (N,) of one cell, int64."""
        return self.load(cell).labels if self.read_labels is None else self.read_labels(cell)

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
