"""Opening of data folders of either layout, with checks of their cells.

A folder is checked completely when it is opened, before the adapter sees the first image. Data on
disk is used; missing data is downloaded only on request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.pictures import picture_transform
from ..data.datasets import DATASETS, CompactLayout, Dataset
from ..data.folders import FolderSource
from ..data.images import LabelledImages
from ..data.labelled import LabelledPictures
from ..data.labels import class_folders
from ..data.npy_files import NpzImages, map_array
from ..data.parquet import read_labels, read_parquet
from ..errors import DataError, InputError
from ..utils import robustbench as bridge
from .cells import Cell, CorruptionData

__all__ = ["has_extra_corruptions", "load_stream", "open_class_folders", "open_dataset"]


def open_dataset(
    dataset: str,
    data_dir: str | Path,
    *,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    n_examples: int | None = None,
    labels: str | Path | None = None,
    download: bool = False,
) -> CorruptionData:
    """Find and check a data folder.

    Args:
        dataset: a key of `DATASETS`, such as ``"cifar10"``.
        data_dir: the folder ``CIFAR-10-C`` (or that of another data set) or its parent, or a folder
            of ``<corruption>.npz`` files, or the parent of such a folder named ``cifar10c``.
        corruptions: names of the corruptions; by default the benchmark's own.
        severities: integers from 1 to 5; by default all that the folder has.
        n_examples: number of images to use from the start of each cell, at least 1; by default all.
        labels: parquet file of the uncorrupted test images and their labels, if it is not
            ``test.parquet`` in ``data_dir``, beside it, or in a folder ``cifar10`` there.
        download: whether to download CIFAR-10-C or CIFAR-100-C (about 2.9 GB) with RobustBench's
            downloader if ``data_dir`` has neither layout; this is announced on standard output.
            RobustBench cannot download the ImageNet data sets.

    Returns:
        the cells, in the order of ``corruptions`` and ``severities``. The clean images are the test
        images; if all corruptions are extra ones of the compact layout, they are the training
        images from which these are made.

    Raises:
        InputError: an argument is unknown, out of range, or not for this data set.
        DataError: a file is missing or damaged, has another shape or type, or too few rows.
    """
    spec, names = _chosen(dataset, corruptions)
    if spec.layout == "folders":
        raise InputError(f"{dataset} consists of class folders; open it with open_class_folders")
    levels = list(dict.fromkeys(severities)) if severities else None
    if levels and not set(levels) <= set(spec.severities):
        lowest, highest = spec.severities[0], spec.severities[-1]
        raise InputError(f"severities must be from {lowest} to {highest}, got {levels}")
    if n_examples is not None and n_examples < 1:
        raise InputError(f"n_examples must be at least 1, got {n_examples}")
    if labels is not None and spec.compact is None:
        raise InputError(f"a parquet file of labels is for the compact layout, not for {dataset}")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    root = folder.parent if folder.name == spec.title else folder
    if not (root / spec.title).is_dir():
        if spec.compact is not None:
            for candidate in (folder, folder / spec.compact.folder):
                if any(candidate.glob("*.npz")):
                    return _open_compact(dataset, candidate, names, levels, n_examples, labels)
        _download(spec, root, folder, download)
    return _open_robustbench(dataset, root, names, levels, n_examples, labels)


def _chosen(dataset: str, corruptions: Sequence[str] | None) -> tuple[Dataset, list[str]]:
    """The record of a data set, and the names of the chosen corruptions."""
    if dataset not in DATASETS:
        raise InputError(f"unknown dataset {dataset!r}; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    known = spec.corruptions + spec.extra_corruptions
    names = list(dict.fromkeys(corruptions or spec.corruptions))
    for name in names:
        if name not in known:
            raise InputError(f"unknown corruption {name!r}; there are {', '.join(known)}")
    return spec, names


def open_class_folders(
    dataset: str,
    data_dir: str | Path,
    net: Any,
    *,
    corruptions: Sequence[str] | None = None,
    n_examples: int | None = None,
    size: int | None = None,
    **options: Any,
) -> CorruptionData:
    """Find and check a data set of class folders, such as ImageNet-R; pictures are read by row.

    Args:
        dataset: a key of `DATASETS` with the layout ``"folders"``.
        data_dir: the data set's folder or the one that contains it.
        net: an adapter on a model with the data set's classes, which resizes the pictures.
        corruptions: names of the cells; by default all.
        n_examples: number of images of each cell, drawn with a fixed seed; by default all.
        size: side of the images in pixels; by default the model's own.
        **options: ``workers`` and ``skip_damaged`` of `LabelledPictures`.

    Raises:
        InputError: the dataset or a cell's name is unknown, or the model has other classes.
        DataError: a folder is missing, is not complete, or cannot be read.
    """
    spec, names = _chosen(dataset, corruptions)
    if spec.layout != "folders":
        raise InputError(f"{dataset} does not consist of class folders; open it with open_dataset")
    if n_examples is not None and n_examples < 1:
        raise InputError(f"n_examples must be at least 1, got {n_examples}")
    if net.num_classes not in (None, spec.classes):
        raise InputError(f"{spec.title} has {spec.classes} classes, the model {net.num_classes}")
    transform = picture_transform(net.backbone, size)
    published = dict(zip(spec.corruptions, spec.folders, strict=True))
    pictures = {}
    for name in names:
        candidates = (Path(data_dir) / published[name], Path(data_dir))
        folder = next((p for p in candidates if p.is_dir() and p.name == published[name]), None)
        if folder is None:
            raise DataError(f"{data_dir}: holds no folder {published[name]}")
        source = FolderSource(folder, class_folders(spec))
        counted = {"count": n_examples, **options}
        pictures[name] = LabelledPictures(source, transform, spec.classes, **counted)
    return CorruptionData.from_pictures(pictures, dataset=dataset)


def load_stream(
    data_dir: str | Path,
    corruption: str,
    severity: int = 5,
    *,
    dataset: str = "cifar10",
    **options: Any,
) -> LabelledImages:
    """The images of one cell; ``options`` as for `open_dataset`."""
    data = open_dataset(
        dataset, data_dir, corruptions=[corruption], severities=[severity], **options
    )
    return data.load((corruption, severity))


def has_extra_corruptions(dataset: str, data_dir: str | Path) -> bool:
    """Whether a data folder, in either layout, has all extra corruptions of the data set."""
    spec, folder = DATASETS[dataset], Path(data_dir)
    candidates = [folder, folder / spec.title]
    candidates += [] if spec.compact is None else [folder / spec.compact.folder]
    files = [
        [p / f"{n}.{'npy' if p.name == spec.title else 'npz'}" for n in spec.extra_corruptions]
        for p in candidates
    ]
    return bool(spec.extra_corruptions) and any(all(f.is_file() for f in row) for row in files)


def _download(spec: Dataset, root: Path, folder: Path, allowed: bool) -> None:
    if not allowed:
        also = "" if spec.compact is None else " and no <corruption>.npz files"
        raise DataError(f"{folder}: holds no folder {spec.title}{also}; nothing was downloaded")
    if spec.download_size is not None:
        print(
            f"{root / spec.title} does not exist: downloading {spec.download_size} with "
            "RobustBench's downloader (if that is a mistake, press Ctrl-C and give --no-download)",
            flush=True,
        )
    assert spec.robustbench is not None
    bridge.download_corruptions(spec.robustbench, root)


# -- what both layouts need --------------------------------------------------------------


def _enough(path: Path, count: int, n_examples: int | None, what: str) -> int:
    """The number of images to use out of ``count``."""
    if n_examples is not None and n_examples > count:
        raise DataError(f"{path}: {what} has {count} images, but {n_examples} are requested")
    return n_examples or count


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{path}: labels must be integers from 0 to {classes - 1}")


def _find_test_parquet(
    compact: CompactLayout, folder: Path, labels: str | Path | None
) -> Path | None:
    """The parquet file of the clean test images in or near a folder."""
    if labels is not None:
        return Path(labels)
    name = compact.clean_folder
    folders = (folder, folder.parent, folder / name, folder.parent / name)
    return next((f / "test.parquet" for f in folders if (f / "test.parquet").is_file()), None)


def _read_clean(file: Path, n_examples: int | None) -> LabelledImages:
    return read_parquet(file, stop=n_examples)


# -- the compact layout ------------------------------------------------------------------


def _read_npz(path: Path, spec: Dataset, severities: Sequence[int] | None) -> dict[int, np.ndarray]:
    """Read the arrays of the given severities, or of all in the file if None."""
    file = NpzImages(path, spec.side, spec.rows)
    present = [s for s in spec.severities if f"severity_{s}" in file.names]
    wanted = severities or present
    missing = [s for s in severities or spec.severities if s not in present]
    if missing and (severities or not present):
        raise DataError(f"{path}: has no array severity_{missing[0]}, only severities {present}")
    return {severity: file.read(f"severity_{severity}") for severity in wanted}


def _open_compact(
    dataset: str,
    folder: Path,
    names: list[str],
    severities: list[int] | None,
    n_examples: int | None,
    labels: str | Path | None,
) -> CorruptionData:
    """Read a folder of ``<corruption>.npz`` files; arguments and errors as for `open_dataset`."""
    spec = DATASETS[dataset]
    assert spec.compact is not None
    test = _find_test_parquet(spec.compact, folder, labels)
    if test is None:
        raise DataError(
            f"{folder}: no test.parquet with the labels in this folder, beside it or in "
            f"{spec.compact.clean_folder}/; name it with --labels"
        )
    read = functools.cache(read_labels)
    cells: dict[Cell, LabelledImages] = {}
    clean = functools.partial(_read_clean, test, n_examples)
    from_rows: set[int] = set()
    paths = [folder / f"{name}.npz" for name in names]
    with ThreadPoolExecutor() as threads:  # decompression releases the GIL
        read_file = functools.partial(_read_npz, spec=spec, severities=severities)
        arrays = list(threads.map(read_file, paths))
    for name, path, by_severity in zip(names, paths, arrays, strict=True):
        for severity, images in by_severity.items():
            extra = name in spec.extra_corruptions
            source = test.with_name("train.parquet") if extra else test
            known = read(source)
            if not 1 <= len(images) <= len(known):
                raise DataError(
                    f"{path}: severity_{severity} has {len(images)} images, but {source} has "
                    f"{len(known)} labels"
                )
            _check_labels(source, known.numpy(), spec.classes)
            used = _enough(path, len(images), n_examples, f"severity_{severity}")
            # Extra corruptions are made from the last rows of the training file, in its order.
            first = len(known) - len(images) if extra else 0
            known = known[first:]
            from_rows.add(first)
            pixels = torch.from_numpy(images[:used]).permute(0, 3, 1, 2).contiguous()
            cells[name, severity] = LabelledImages(pixels, known[:used])
    # Test images must not influence a choice that is made on the extra corruptions.
    only_extra = set(names) <= set(spec.extra_corruptions) and len(from_rows) == 1
    if only_extra:
        train, start = test.with_name("train.parquet"), from_rows.pop()
        stop = None if n_examples is None else start + n_examples
        clean = functools.partial(read_parquet, train, start, stop)
    return CorruptionData(
        dataset,
        "compact",
        {cell: len(images) for cell, images in cells.items()},
        cells.__getitem__,
        clean,
        spec.compact.note,
        from_clean=only_extra,
    )


# -- RobustBench's layout ----------------------------------------------------------------


def _to_bytes(images: Tensor, labels: Tensor) -> LabelledImages:
    """Convert RobustBench's floats k/255 back to the original bytes, exactly."""
    return LabelledImages(images.mul(255).round_().to(torch.uint8), labels.long())


def _check_arrays(folder: Path, names: list[str], spec: Dataset) -> Tensor:
    """Check the headers of all files, and return the labels (rows,) that all cells share."""
    levels = len(spec.severities)
    shape = (levels * spec.rows, spec.side, spec.side, 3)
    file = folder / "labels.npy"
    labels = map_array(file)
    # The published file repeats the labels for each severity.
    if labels.shape not in ((spec.rows,), (levels * spec.rows,)):
        raise DataError(
            f"{file}: must hold {spec.rows} labels (or {levels} times as many), got the shape "
            f"{labels.shape}"
        )
    _check_labels(file, labels, spec.classes)
    for name in names:
        path = folder / f"{name}.npy"
        array = map_array(path)
        if array.shape != shape or array.dtype != np.uint8:
            raise DataError(
                f"{path}: must be uint8 {shape}, {spec.rows} images for each severity, got "
                f"{array.dtype} {array.shape}"
            )
    return torch.from_numpy(labels[: spec.rows].astype(np.int64))


def _picture_labels() -> Tensor:
    """Labels of the images in RobustBench's order: indices in the sorted list of classes."""
    names = [file.split("/")[0] for file in bridge.imagenet_test_files()]
    indices = {name: i for i, name in enumerate(sorted(set(names)))}
    return torch.tensor([indices[name] for name in names])


def _check_pictures(folder: Path, n_examples: int) -> None:
    """Check that one cell's folder has all classes and all files that will be read."""
    files = bridge.imagenet_test_files()
    classes = {file.split("/")[0] for file in files}
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    present = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    # Labels are indices in the sorted list of folders: an extra or missing folder shifts them.
    if present != classes:
        name = min(present ^ classes)
        state = "is missing" if name in classes else "is not one of ImageNet's classes"
        raise DataError(f"{folder}: must hold the {len(classes)} class folders; {name} {state}")
    for file in files[:n_examples]:
        if not (folder / file).is_file():
            raise DataError(f"{folder / file}: no such file, one of the first {n_examples} images")


def _open_robustbench(
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
    folder = root / spec.title
    used = _enough(folder, spec.rows, n_examples, "a cell")
    cells = [(name, severity) for name in names for severity in severities or spec.severities]
    pictures = spec.layout == "pictures"
    if pictures:
        for name, severity in cells:
            _check_pictures(folder / name / str(severity), used)
        known = _picture_labels()[:used]
        published = (root / spec.clean_images).is_dir()
    else:
        known = _check_arrays(folder, names, spec)[:used]
        published = labels is None and bridge.has_clean_arrays(spec.clean_images, root)

    def read(loader: Callable, *what: Any) -> LabelledImages:
        try:
            return _to_bytes(*loader(spec.robustbench, *what, used, root))
        except Exception as error:  # decoders raise any error for damaged pictures
            raise DataError(
                f"{root}: RobustBench's loader failed on {what or 'the clean images'} ({error})"
            ) from error

    clean: Callable[[], LabelledImages] | None = None
    # The published clean images, if present, take precedence over re-encoded ones.
    if published:
        if pictures:
            _check_pictures(root / spec.clean_images, used)
        clean = functools.partial(read, bridge.load_clean_images)
    elif spec.compact is not None:
        parquet = _find_test_parquet(spec.compact, root, labels)
        clean = parquet and functools.partial(_read_clean, parquet, n_examples)
    return CorruptionData(
        dataset,
        "robustbench",
        dict.fromkeys(cells, used),
        lambda cell: read(bridge.load_corrupted_images, *cell),
        clean,
        read_labels=lambda _: known,
    )
