"""Facts about the benchmark's data sets; a new data set needs a record in `DATASETS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..utils.robustbench import RobustBenchDataset

__all__ = [
    "CORRUPTIONS",
    "CORRUPTIONS_3D",
    "DATASETS",
    "EXTRA_CORRUPTIONS",
    "PICTURES",
    "CompactLayout",
    "Dataset",
    "dataset_title",
]

#: The fifteen corruptions of Hendrycks & Dietterich (arXiv 1903.12261), in RobustBench's order.
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
#: The same paper's four extra corruptions.
EXTRA_CORRUPTIONS = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
#: The corruptions of ImageNet-3DCC (Kar et al., arXiv 2203.01441), in RobustBench's order.
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
#: AlexNet's top-1 error rates on ImageNet-C, each the mean of the five severities over the 50,000
#: validation images, as Hendrycks & Dietterich published them with the benchmark (repository
#: hendrycks/robustness). RobustBench looks for a row "AlexNet" in its own CSV file instead, which
#: it does not ship, neither for ImageNet-C nor for ImageNet-3DCC.
_ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.92264,
    "defocus_blur": 0.81988,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.79836,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.71784,
    "jpeg_compression": 0.6065,
}


@dataclass(frozen=True)
class CompactLayout:
    """``<corruption>.npz`` files near parquet files of the clean images.

    Attributes:
        folder: name of the folder of npz files.
        clean_folder: name of the folder of ``test.parquet`` and ``train.parquet``.
        note: remark on these images that must accompany published figures.
    """

    folder: str
    clean_folder: str
    note: str


@dataclass(frozen=True)
class Dataset:
    """A data set of corrupted images.

    Attributes:
        title: name of the data set, and of its folder in RobustBench's layout.
        classes: number of classes.
        corruptions: the benchmark's corruptions, in the order of RobustBench's columns.
        rows: number of images of each corruption at each severity.
        robustbench: RobustBench's names for the data set.
        layout: how RobustBench's layout stores the images: ``"npy"``, one array of all severities
            for each corruption, or ``"pictures"``, a folder of image files for each cell, with one
            subfolder for each class.
        clean_images: source of the uncorrupted test images: the name of torchvision's reader, or,
            for ``"pictures"``, the name of a folder.
        side: height and width of the images in the arrays, in pixels.
        severities: severity levels of each corruption.
        extra_corruptions: corruptions outside the benchmark; in the compact layout they are made
            from the last rows of ``train.parquet``.
        compact: the compact layout, None if the data set has none.
        download_size: size of RobustBench's download, in words; None if it has no downloader.
        reference_errors: AlexNet's error rate in [0, 1] for each corruption, which the mean
            corruption error is relative to; None where they are not published.
    """

    title: str
    classes: int
    corruptions: tuple[str, ...]
    rows: int
    robustbench: RobustBenchDataset
    layout: Literal["npy", "pictures"]
    clean_images: str
    side: int = 32
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    extra_corruptions: tuple[str, ...] = ()
    compact: CompactLayout | None = None
    download_size: str | None = None
    reference_errors: Mapping[str, float] | None = None

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Every (corruption, severity) of the benchmark."""
        return [(name, severity) for name in self.corruptions for severity in self.severities]


def _cifar(classes: int) -> Dataset:
    return Dataset(
        title=f"CIFAR-{classes}-C",
        classes=classes,
        corruptions=tuple(CORRUPTIONS),
        rows=10_000,
        robustbench=RobustBenchDataset(f"cifar{classes}"),
        layout="npy",
        clean_images=f"CIFAR{classes}",
        download_size="about 2.9 GB",
    )


def _imagenet(title: str, corruptions: list[str], threat: str) -> Dataset:
    return Dataset(
        title=title,
        classes=1000,
        corruptions=tuple(corruptions),
        rows=5_000,
        robustbench=RobustBenchDataset("imagenet", threat, "Res224", "Res256Crop224"),
        layout="pictures",
        clean_images="val",
    )


DATASETS = {
    "cifar10": replace(
        _cifar(10),
        extra_corruptions=tuple(EXTRA_CORRUPTIONS),
        compact=CompactLayout(
            folder="cifar10c",
            clean_folder="cifar10",
            note="re-encoded CIFAR-10 images; not official CIFAR-10-C figures",
        ),
    ),
    "cifar100": _cifar(100),
    "imagenet": replace(
        _imagenet("ImageNet-C", CORRUPTIONS, "corruptions"), reference_errors=_ALEXNET_ERRORS
    ),
    "imagenet3dcc": _imagenet("ImageNet-3DCC", CORRUPTIONS_3D, "corruptions_3d"),
}

#: In results, the name of labelled pictures of the user's own, which `DATASETS` does not describe.
PICTURES = "pictures"


def dataset_title(name: str) -> str:
    """The title of a data set of `DATASETS`, or of `PICTURES`."""
    return DATASETS[name].title if name in DATASETS else name
