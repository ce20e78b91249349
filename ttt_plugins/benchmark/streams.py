"""From a data folder to checked cells.

Everything that can be wrong with a folder is found when it is opened, before the first image is
adapted to. What is on disk is used; what is missing is downloaded only where that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.images import LabelledImages
from ..errors import DataError, InputError
from ..utils import robustbench as bridge
from .cells import DATASETS, EXTRA_CORRUPTIONS, CorruptionData
from .compact import open_compact
from .layouts import open_robustbench

__all__ = ["load_stream", "open_dataset"]


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
        dataset: cifar10, cifar100, imagenet or imagenet3dcc.
        data_dir: holds ``CIFAR-10-C`` (or the like), or is it; or holds ``<corruption>.npz``
            files, or a folder ``cifar10c`` of them.
        corruptions: the benchmark's own by default.
        severities: 1 to 5; by default all that the folder has.
        n_examples: the first so many images of each cell; by default all there are.
        labels: parquet file of the uncorrupted test images and their labels, if it is not
            ``test.parquet`` in ``data_dir``, beside it, or in a folder ``cifar10`` there.
        download: fetch CIFAR-10-C or CIFAR-100-C (about 2.9 GB, over the network) with
            RobustBench's downloader if ``data_dir`` has neither layout; a line on standard
            output says so first. RobustBench cannot download the ImageNet ones.

    Raises:
        InputError: an unknown dataset, corruption or severity.
        DataError: a file is missing, has another shape or type, or too few rows.
    """
    if dataset not in DATASETS:
        raise InputError(f"unknown dataset {dataset!r}; there are {', '.join(DATASETS)}")
    known = DATASETS[dataset].corruptions + (EXTRA_CORRUPTIONS if dataset == "cifar10" else [])
    names = list(dict.fromkeys(corruptions or DATASETS[dataset].corruptions))
    for name in names:
        if name not in known:
            raise InputError(f"unknown corruption {name!r}; there are {', '.join(known)}")
    levels = list(dict.fromkeys(severities)) if severities else None
    if levels and not set(levels) <= {1, 2, 3, 4, 5}:
        raise InputError(f"severities are 1 to 5, got {levels}")
    if n_examples is not None and n_examples < 1:
        raise InputError(f"n_examples must be at least 1, got {n_examples}")
    if labels is not None and dataset != "cifar10":
        raise InputError(f"a parquet file of labels is for cifar10, not for {dataset}")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    name = DATASETS[dataset].folder
    root = folder.parent if folder.name == name else folder
    if (root / name).is_dir():
        return open_robustbench(dataset, root, names, levels, n_examples, labels)
    for candidate in (folder, folder / "cifar10c"):
        if dataset == "cifar10" and any(candidate.glob("*.npz")):
            return open_compact(candidate, names, levels, n_examples, labels)
    if download:
        if dataset.startswith("cifar"):
            print(
                f"{root / name} is not there: fetching about 2.9 GB with RobustBench's downloader "
                "(Ctrl-C, and --no-download, if that is a mistake)",
                flush=True,
            )
        bridge.download_corruptions(dataset, root)
        return open_robustbench(dataset, root, names, levels, n_examples, labels)
    also = " and no <corruption>.npz files" if dataset == "cifar10" else ""
    raise DataError(f"{folder}: holds no folder {name}{also}; nothing was downloaded")


def load_stream(
    data_dir: str | Path, corruption: str, severity: int = 5, *, dataset: str = "cifar10", **options
) -> LabelledImages:
    """The images of one cell; ``options`` as for `open_dataset`."""
    cell = (corruption, severity)
    data = open_dataset(
        dataset, data_dir, corruptions=[corruption], severities=[severity], **options
    )
    return data.load(cell)
