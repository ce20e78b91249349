"""RobustBench's layout of a data folder, read through its loaders; checked when it is opened."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.images import LabelledImages
from ..errors import DataError
from ..utils import robustbench as bridge
from .cells import DATASETS, CorruptionData, Dataset
from .checks import check_labels, enough, find_test_parquet, read_clean

__all__ = ["open_robustbench"]


def _to_bytes(images: torch.Tensor, labels: torch.Tensor) -> LabelledImages:
    """RobustBench's floats k/255 back to the bytes they came from, which is exact."""
    return LabelledImages(images.mul(255).round_().to(torch.uint8), labels.long())


def _check_cifar(folder: Path, names: list[str], spec: Dataset) -> Tensor:
    """Headers of all files, and the labels; RobustBench reads 10,000 rows a severity.

    Returns the labels (10,000,), which are the same for every cell.
    """
    for name in ["labels", *names]:
        path = folder / f"{name}.npy"
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: not a readable npy file ({error})") from error
        if name == "labels":
            # The published file repeats the 10,000 labels for each severity.
            if array.shape not in ((spec.rows,), (5 * spec.rows,)):
                raise DataError(
                    f"{path}: must hold {spec.rows} labels (or five times as many), has shape "
                    f"{array.shape}"
                )
            check_labels(path, array, spec.classes)
            labels = torch.from_numpy(array[: spec.rows].astype(np.int64))
        elif array.shape != (5 * spec.rows, 32, 32, 3) or array.dtype != np.uint8:
            raise DataError(
                f"{path}: must be uint8 ({5 * spec.rows}, 32, 32, 3), {spec.rows} images for "
                f"each severity; is {array.dtype} {array.shape}"
            )
    return labels


def _imagenet_labels() -> Tensor:
    """Of the 5,000 images in RobustBench's order: positions in the sorted list of classes."""
    names = [file.split("/")[0] for file in bridge.imagenet_test_files()]
    places = {name: i for i, name in enumerate(sorted(set(names)))}
    return torch.tensor([places[name] for name in names])


def _check_imagenet(folder: Path, n_examples: int) -> None:
    """One folder of ImageNet images: all classes, and the files that will be read."""
    files = bridge.imagenet_test_files()
    classes = {file.split("/")[0] for file in files}
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    # Labels are positions in the sorted list of folders: one more or less shifts them all.
    if found != classes:
        odd = min(found ^ classes)
        state = "is missing" if odd in classes else "is not one of ImageNet's classes"
        raise DataError(f"{folder}: must hold the {len(classes)} class folders; {odd} {state}")
    for file in files[:n_examples]:
        if not (folder / file).is_file():
            raise DataError(f"{folder / file}: no such file, one of the first {n_examples} images")


def open_robustbench(
    dataset: str,
    root: Path,
    names: list[str],
    severities: list[int] | None,
    n_examples: int | None,
    labels: str | Path | None,
) -> CorruptionData:
    """Check a folder in RobustBench's layout; arguments and errors as for `open_dataset`."""
    spec = DATASETS[dataset]
    bridge.import_robustbench()
    used = enough(root / spec.folder, spec.rows, n_examples, "a cell")
    cells = [(name, severity) for name in names for severity in severities or range(1, 6)]
    imagenet = dataset.startswith("imagenet")
    if imagenet:
        for name, severity in cells:
            _check_imagenet(root / spec.folder / name / str(severity), used)
        known = _imagenet_labels()[:used]
    else:
        known = _check_cifar(root / spec.folder, names, spec)[:used]
    # The published clean images, if they are there, before re-encoded ones.
    published = labels is None and bridge.has_clean_images(dataset, root)
    look = dataset == "cifar10" and not published
    parquet = find_test_parquet(root, labels) if look else None

    def read(loader: Callable, *what) -> LabelledImages:
        try:
            return _to_bytes(*loader(dataset, *what, used, root))
        except Exception as error:  # a damaged picture surfaces as whatever the decoder raises
            raise DataError(
                f"{root}: RobustBench's loader failed on {what or 'the clean images'} ({error})"
            ) from error

    clean: Callable[[], LabelledImages] | None = None
    if parquet is not None:
        clean = functools.partial(read_clean, parquet, n_examples)
    elif published:
        if imagenet:
            _check_imagenet(root / "val", used)
        clean = functools.partial(read, bridge.load_clean_images)
    return CorruptionData(
        dataset,
        "robustbench",
        dict.fromkeys(cells, used),
        lambda cell: read(bridge.load_corrupted_images, *cell),
        clean,
        read_labels=lambda cell: known,
    )
