"""What the benchmark evaluates on: datasets, their corruptions, and the cells of a folder.

A cell is the images of one corruption at one severity, with their labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..data.images import LabelledImages

__all__ = ["CORRUPTIONS", "CORRUPTIONS_3D", "DATASETS", "EXTRA_CORRUPTIONS", "Cell"]
__all__ += ["CorruptionData", "Dataset"]

#: (corruption, severity 1..5)
Cell = tuple[str, int]

#: The fifteen of Hendrycks & Dietterich (arXiv 1903.12261), in RobustBench's column order.
CORRUPTIONS = [
    "shot_noise",
    "motion_blur",
    "snow",
    "pixelate",
    "gaussian_noise",
    "defocus_blur",
    "brightness",
    "fog",
    "zoom_blur",
    "frost",
    "glass_blur",
    "impulse_noise",
    "contrast",
    "jpeg_compression",
    "elastic_transform",
]
#: The same paper's four extra ones; in the compact layout they are made from the last rows of
#: ``train.parquet``.
EXTRA_CORRUPTIONS = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
#: ImageNet-3DCC (Kar et al., arXiv 2203.01441), in RobustBench's column order.
CORRUPTIONS_3D = [
    "near_focus",
    "far_focus",
    "bit_error",
    "color_quant",
    "flash",
    "fog_3d",
    "h265_abr",
    "h265_crf",
    "iso_noise",
    "low_light",
    "xy_motion_blur",
    "z_motion_blur",
]


@dataclass(frozen=True)
class Dataset:
    """Folder name, number of classes, corruptions, and most images of a cell."""

    folder: str
    classes: int
    corruptions: list[str]
    rows: int


DATASETS = {
    "cifar10": Dataset("CIFAR-10-C", 10, CORRUPTIONS, 10_000),
    "cifar100": Dataset("CIFAR-100-C", 100, CORRUPTIONS, 10_000),
    "imagenet": Dataset("ImageNet-C", 1000, CORRUPTIONS, 5_000),
    "imagenet3dcc": Dataset("ImageNet-3DCC", 1000, CORRUPTIONS_3D, 5_000),
}


@dataclass(frozen=True)
class CorruptionData:
    """The checked cells of a data folder.

    Attributes:
        dataset: a key of `DATASETS`.
        layout: ``"robustbench"``, ``"compact"``, or what a caller names its own arrays.
        counts: images of each cell, in the order in which the cells are to be met.
        load: reads one cell, images as uint8 (N, 3, H, W).
        read_labels: reads the labels (N,) of one cell alone; by default through ``load``.
        clean: reads the uncorrupted test images; None where the folder has none.
        note: what a reader of the figures must know about the images, or None.
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
        cls, cells: Mapping[Cell, LabelledImages], clean: LabelledImages | None = None, **fields
    ) -> CorruptionData:
        """Cells that are in memory already; ``fields`` are the other attributes."""
        fields = {"dataset": "cifar10", "layout": "memory", **fields}
        counts = {cell: len(images) for cell, images in cells.items()}
        return cls(
            counts=counts,
            load=cells.__getitem__,
            clean=None if clean is None else lambda: clean,
            **fields,
        )
