"""The two layouts of a data folder; each is checked whole when it is opened.

RobustBench's own, read through its loaders, and a compact one: ``<corruption>.npz`` files with
arrays ``severity_1`` .. ``severity_5`` near the parquet files of the clean images.
"""

from __future__ import annotations

import functools
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from .. import robustbench_bridge as bridge
from ..data import LabelledImages, read_parquet
from ..errors import DataError
from .cells import DATASETS, EXTRA_CORRUPTIONS, Cell, CorruptionData, Dataset

__all__ = ["open_compact", "open_robustbench"]

COMPACT_NOTE = "re-encoded CIFAR-10 images; not official CIFAR-10-C figures"


def _enough(path: Path, have: int, n_examples: int | None, what: str) -> int:
    """How many images to use of ``have``."""
    if n_examples is not None and n_examples > have:
        raise DataError(f"{path}: {what} has {have} images, {n_examples} are asked for")
    return n_examples or have


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{path}: labels must be integers from 0 to {classes - 1}")


def _test_parquet(folder: Path, labels: str | Path | None) -> Path | None:
    if labels is not None:
        return Path(labels)
    places = (folder, folder.parent, folder / "cifar10", folder.parent / "cifar10")
    return next((p / "test.parquet" for p in places if (p / "test.parquet").is_file()), None)


def _read_clean(file: Path, n_examples: int | None) -> LabelledImages:
    return read_parquet(file)[:n_examples]


# -- the compact layout ------------------------------------------------------------------


def _read_npz(path: Path, severities: Sequence[int] | None) -> dict[int, np.ndarray]:
    """Arrays of the wanted severities (all there are if None), read whole and so checked."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not an npz file, or cut short")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            there = [s for s in range(1, 6) if f"severity_{s}" in arrays]
            found = {s: arrays[f"severity_{s}"] for s in severities or there if s in there}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a readable npz file ({error})") from error
    missing = [s for s in severities or range(1, 6) if s not in there]
    if missing and (severities or not there):
        raise DataError(f"{path}: has no array severity_{missing[0]}, only severities {there}")
    for severity, images in found.items():
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
            raise DataError(
                f"{path}: severity_{severity} must be uint8 (N, 32, 32, 3), "
                f"is {images.dtype} {images.shape}"
            )
    return found


def open_compact(
    folder: Path,
    names: list[str],
    severities: list[int] | None,
    n_examples: int | None,
    labels: str | Path | None,
) -> CorruptionData:
    """Check a folder of ``<corruption>.npz`` files; arguments and errors as for `open_dataset`."""
    file = _test_parquet(folder, labels)
    if file is None:
        raise DataError(
            f"{folder}: no test.parquet with the labels here, beside it or in cifar10/; "
            "name it with --labels"
        )
    read = functools.cache(read_parquet)
    cells: dict[Cell, LabelledImages] = {}
    for name in names:
        path = folder / f"{name}.npz"
        for severity, images in _read_npz(path, severities).items():
            extra = name in EXTRA_CORRUPTIONS
            source = file.with_name("train.parquet") if extra else file
            known = read(source).labels
            if not 1 <= len(images) <= len(known):
                raise DataError(
                    f"{path}: severity_{severity} has {len(images)} images, but {source} has "
                    f"{len(known)} labels"
                )
            _check_labels(source, known.numpy(), 10)
            used = _enough(path, len(images), n_examples, f"severity_{severity}")
            # The extra ones are made from the last rows of the training file, in its order.
            known = known[len(known) - len(images) :] if extra else known
            pixels = torch.from_numpy(images[:used]).permute(0, 3, 1, 2).contiguous()
            cells[name, severity] = LabelledImages(pixels, known[:used])
    return CorruptionData(
        "cifar10",
        "compact",
        {cell: len(images) for cell, images in cells.items()},
        cells.__getitem__,
        functools.partial(_read_clean, file, n_examples),
        COMPACT_NOTE,
    )


# -- RobustBench's layout ----------------------------------------------------------------


def _to_bytes(images: torch.Tensor, labels: torch.Tensor) -> LabelledImages:
    """RobustBench's floats k/255 back to the bytes they came from, which is exact."""
    return LabelledImages(images.mul(255).round_().to(torch.uint8), labels.long())


def _check_cifar(folder: Path, names: list[str], spec: Dataset) -> None:
    """Headers of all files, and the labels; RobustBench reads 10,000 rows a severity."""
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
            _check_labels(path, array, spec.classes)
        elif array.shape != (5 * spec.rows, 32, 32, 3) or array.dtype != np.uint8:
            raise DataError(
                f"{path}: must be uint8 ({5 * spec.rows}, 32, 32, 3), {spec.rows} images for "
                f"each severity; is {array.dtype} {array.shape}"
            )


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
    used = _enough(root / spec.folder, spec.rows, n_examples, "a cell")
    cells = [(name, severity) for name in names for severity in severities or range(1, 6)]
    imagenet = dataset.startswith("imagenet")
    if imagenet:
        for name, severity in cells:
            _check_imagenet(root / spec.folder / name / str(severity), used)
    else:
        _check_cifar(root / spec.folder, names, spec)
    # The published clean images, if they are there, before re-encoded ones.
    published = labels is None and bridge.has_clean_images(dataset, root)
    look = dataset == "cifar10" and not published
    parquet = _test_parquet(root, labels) if look else None

    def read(loader: Callable, *what) -> LabelledImages:
        try:
            return _to_bytes(*loader(dataset, *what, used, root))
        except Exception as error:  # a damaged picture surfaces as whatever the decoder raises
            raise DataError(
                f"{root}: RobustBench's loader failed on {what or 'the clean images'} ({error})"
            ) from error

    clean: Callable[[], LabelledImages] | None = None
    if parquet is not None:
        clean = functools.partial(_read_clean, parquet, n_examples)
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
    )
