"""The compact layout: ``<corruption>.npz`` files near the parquet files of the clean images.

Each holds arrays ``severity_1`` .. ``severity_5``; all are checked, and read, when it is opened.
"""

from __future__ import annotations

import functools
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..data.images import LabelledImages
from ..data.parquet import read_labels
from ..errors import DataError
from .cells import EXTRA_CORRUPTIONS, Cell, CorruptionData
from .checks import check_labels, enough, find_test_parquet, read_clean

__all__ = ["open_compact"]

COMPACT_NOTE = "re-encoded CIFAR-10 images; not official CIFAR-10-C figures"


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
    file = find_test_parquet(folder, labels)
    if file is None:
        raise DataError(
            f"{folder}: no test.parquet with the labels here, beside it or in cifar10/; "
            "name it with --labels"
        )
    read = functools.cache(read_labels)
    cells: dict[Cell, LabelledImages] = {}
    paths = [folder / f"{name}.npz" for name in names]
    with ThreadPoolExecutor() as threads:  # decompression lets other threads run
        arrays = list(threads.map(functools.partial(_read_npz, severities=severities), paths))
    for name, path, found in zip(names, paths, arrays, strict=True):
        for severity, images in found.items():
            extra = name in EXTRA_CORRUPTIONS
            source = file.with_name("train.parquet") if extra else file
            known = read(source)
            if not 1 <= len(images) <= len(known):
                raise DataError(
                    f"{path}: severity_{severity} has {len(images)} images, but {source} has "
                    f"{len(known)} labels"
                )
            check_labels(source, known.numpy(), 10)
            used = enough(path, len(images), n_examples, f"severity_{severity}")
            # The extra ones are made from the last rows of the training file, in its order.
            known = known[len(known) - len(images) :] if extra else known
            pixels = torch.from_numpy(images[:used]).permute(0, 3, 1, 2).contiguous()
            cells[name, severity] = LabelledImages(pixels, known[:used])
    return CorruptionData(
        "cifar10",
        "compact",
        {cell: len(images) for cell, images in cells.items()},
        cells.__getitem__,
        functools.partial(read_clean, file, n_examples),
        COMPACT_NOTE,
    )
