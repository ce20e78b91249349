"""Facts about the benchmark's data sets; each is a record in `DATASETS`.

Other packages add data sets through entry points of the group ``ttt_plugins.datasets``, whose name
is the data set's and whose object is a `Dataset`::

    [project.entry-points."ttt_plugins.datasets"]
    my-cameras = "my_package:CAMERAS"

They are loaded when the names are first listed, or when an unknown name is requested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Literal

from ..errors import InputError
from ..utils.plugins import use_plugins
from ..utils.robustbench import RobustBenchDataset

__all__ = [
    "CORRUPTIONS",
    "CORRUPTIONS_3D",
    "DATASETS",
    "EXTRA_CORRUPTIONS",
    "GROUP",
    "PICTURES",
    "CompactLayout",
    "Dataset",
    "dataset_title",
    "robustbench_dataset",
]

#: The group of entry points.
GROUP = "ttt_plugins.datasets"

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
    """A data set of corrupted or otherwise shifted images.

    Attributes:
        title: name of the data set, and of its folder in RobustBench's layout.
        classes: number of classes.
        corruptions: the benchmark's corruptions, in the order of RobustBench's columns; in the
            layout ``"folders"``, the names of the cells.
        layout: how the images are stored. In RobustBench's layouts: ``"npy"``, one array of all
            severities for each corruption, or ``"pictures"``, a folder of image files for each
            cell, with one subfolder for each class. ``"folders"``: a folder of class folders for
            each of ``corruptions``, at severity 0.
        rows: number of images of each corruption at each severity in RobustBench's layouts.
        robustbench: RobustBench's names for the data set; None in the layout ``"folders"``.
        clean_images: source of the uncorrupted test images: the name of torchvision's reader, or,
            for ``"pictures"``, the name of a folder.
        side: height and width of the images in the arrays, in pixels.
        severities: severity levels of each corruption.
        extra_corruptions: corruptions outside the benchmark; in the compact layout they are made
            from the last rows of ``train.parquet``.
        compact: the compact layout; None if the data set has none.
        download_size: size of RobustBench's download, as text; None if it has no downloader.
        reference_errors: AlexNet's error rate in [0, 1] for each corruption, which the mean
            corruption error is relative to; None if they are not published.
        folders: in the layout ``"folders"``, the published name of each cell's folder.
        labels: in that layout, names of the class folders in the order of the classes, or one of
            `ttt_plugins.data.labels.LABEL_SETS`, whose positions among ImageNet's 1,000 classes
            a model is restricted to; None for folders named by numbers, from 0.
    """

    title: str
    classes: int
    corruptions: tuple[str, ...]
    layout: Literal["npy", "pictures", "folders"]
    rows: int = 0
    robustbench: RobustBenchDataset | None = None
    clean_images: str = ""
    side: int = 32
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    extra_corruptions: tuple[str, ...] = ()
    compact: CompactLayout | None = None
    download_size: str | None = None
    reference_errors: Mapping[str, float] | None = None
    folders: tuple[str, ...] = ()
    labels: str | tuple[str, ...] | None = None

    def __post_init__(self):
        in_folders = self.layout == "folders"
        if in_folders and len(self.folders) != len(self.corruptions):
            raise InputError(
                f"{self.title}: there must be one folder for each of {self.corruptions}"
            )
        if in_folders and isinstance(self.labels, tuple) and len(self.labels) != self.classes:
            raise InputError(f"{self.title}: {self.classes} classes have {len(self.labels)} labels")
        if not in_folders and self.robustbench is None:
            raise InputError(f"{self.title}: the layout {self.layout!r} needs RobustBench's names")

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


def _folders(title: str, classes: int, labels: str | None, folders: Mapping[str, str]) -> Dataset:
    return Dataset(
        title=title,
        classes=classes,
        corruptions=tuple(folders),
        layout="folders",
        severities=(0,),
        folders=tuple(folders.values()),
        labels=labels,
    )


class _Datasets(Mapping[str, Dataset]):
    """The records by name; those of other packages are added when they are needed."""

    def __init__(self, own: Mapping[str, Dataset]):
        self._records, self._own, self._discovered = dict(own), frozenset(own), False

    def __getitem__(self, name: str) -> Dataset:
        if name not in self._records:
            self._discover()
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(self._records)

    def __len__(self) -> int:
        self._discover()
        return len(self._records)

    def _discover(self) -> None:
        if not self._discovered:
            self._discovered = True
            use_plugins(GROUP, self._use)

    def _use(self, point: metadata.EntryPoint) -> None:
        if point.name in self._own:
            raise InputError(f"it would replace this package's own {point.name}; rename it")
        record = point.load()
        if not isinstance(record, Dataset):
            raise InputError(f"it must be a Dataset, not {type(record).__name__}")
        self._records[point.name] = record


_OWN = {
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
    # Hendrycks et al. (arXiv 2006.16241 and 1907.07174), Wang et al. (1905.13549) and Recht et al.
    # (1902.10811); the folders are those of the published archives.
    "imagenet-r": _folders("ImageNet-R", 200, "imagenet-r", {"ImageNet-R": "imagenet-r"}),
    "imagenet-a": _folders("ImageNet-A", 200, "imagenet-a", {"ImageNet-A": "imagenet-a"}),
    "imagenet-sketch": _folders(
        "ImageNet-Sketch", 1000, "imagenet-1k", {"ImageNet-Sketch": "sketch"}
    ),
    "imagenetv2": _folders(
        "ImageNetV2",
        1000,
        None,
        {
            name: f"imagenetv2-{name}-format-val"
            for name in ("matched-frequency", "threshold0.7", "top-images")
        },
    ),
}
DATASETS = _Datasets(_OWN)

#: In results, the name of labelled pictures of the user's own, which `DATASETS` does not describe.
PICTURES = "pictures"


def dataset_title(name: str) -> str:
    """The title of a data set of `DATASETS`, or of `PICTURES`."""
    return DATASETS[name].title if name in DATASETS else name


def robustbench_dataset(name: str) -> Dataset | None:
    """The data set of that name if it is one of RobustBench's; None for others and `PICTURES`."""
    spec = DATASETS.get(name)
    return None if spec is None or spec.robustbench is None else spec
