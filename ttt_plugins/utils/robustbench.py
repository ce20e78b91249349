"""Access to RobustBench, which only this module imports, and only when it is needed.

RobustBench 1.1.1 imports ``autoattack``, while its dependency pyautoattack installs that module
as ``pyautoattack``. The old name is defined only during the import, so that no other package finds
an ``autoattack`` that is not installed.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..errors import DataError, InputError, MissingDependencyError

__all__ = [
    "RobustBenchDataset",
    "clean_accuracy",
    "download_corruptions",
    "has_clean_arrays",
    "imagenet_test_files",
    "import_robustbench",
    "load_clean_images",
    "load_corrupted_images",
    "load_zoo_model",
    "version",
]

_INSTALL = 'pip install "ttt-plugins[robustbench]"'
#: The data sets for which RobustBench's zoo has models evaluated on common corruptions.
_ZOO = ("cifar10", "cifar100", "imagenet")


@dataclass(frozen=True)
class RobustBenchDataset:
    """RobustBench's names for a data set of corrupted images.

    Attributes:
        name: value in its ``BenchmarkDataset``.
        threat: name in its ``ThreatModel``.
        preprocessing: key in its ``PREPROCESSINGS`` for corrupted images; None for none.
        clean_preprocessing: the same for uncorrupted images.
    """

    name: str
    threat: str = "corruptions"
    preprocessing: str | None = None
    clean_preprocessing: str | None = None


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _autoattack_alias() -> Iterator[None]:
    if importlib.util.find_spec("autoattack") is not None:
        yield
        return
    try:
        for name in ("autoattack", "autoattack.state"):
            sys.modules[name] = importlib.import_module(f"py{name}")
        yield
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "autoattack"]:
            del sys.modules[name]


def _explain(error: Exception) -> str:
    """Cause and remedy of a failed import, in one line."""
    text = " ".join(str(error).split())
    if version("robustbench") is None:
        return f"this needs RobustBench, which is not installed: {_INSTALL}"
    if "pkg_resources" in text:
        return (
            "RobustBench imports pkg_resources, which setuptools "
            f"{version('setuptools') or '82 and later'} does not have: "
            'pip install "setuptools>=77.0.3,<82"'
        )
    if "torchvision" in text:
        return (
            f"torch {torch.__version__} and torchvision {version('torchvision')} do not match "
            f"({text}): install matching releases of both, from the same index"
        )
    packages = ("robustbench", "timm", "huggingface_hub", "setuptools", "pyautoattack")
    installed = ", ".join(f"{name} {version(name) or 'missing'}" for name in packages)
    return f"RobustBench cannot be imported together with {installed} ({text}): {_INSTALL}"


def _submodules() -> set[str]:
    return {name for name in sys.modules if name.startswith("robustbench.")}


def _forget(names: set[str]) -> None:
    """Remove submodules that a failed import has left in ``sys.modules``.

    Python removes only the package itself. The next import would find the old submodules and would
    not make them attributes of the new package.
    """
    for name in names:
        del sys.modules[name]


def import_robustbench() -> ModuleType:
    """Import ``robustbench`` with its submodules data, utils, loaders and model_zoo.

    Raises:
        MissingDependencyError: it is not installed, or cannot be imported together with the
            installed versions of other packages; the message says which, and what to install.
    """
    if {"robustbench", "robustbench.eval"} <= sys.modules.keys():
        return sys.modules["robustbench"]
    if "robustbench" not in sys.modules:
        _forget(_submodules())
    before = _submodules()
    try:
        # pkg_resources and torch.jit warn about RobustBench's own code, not the user's.
        with warnings.catch_warnings(), _autoattack_alias():
            warnings.simplefilter("ignore")
            return importlib.import_module("robustbench")
    except Exception as error:  # mismatched builds fail with RuntimeError, AttributeError, ...
        _forget(_submodules() - before)
        raise MissingDependencyError(_explain(error)) from error


def _enums(dataset: RobustBenchDataset):
    """RobustBench's (dataset, threat model)."""
    enums = import_robustbench().model_zoo.enums
    return enums.BenchmarkDataset(dataset.name), enums.ThreatModel[dataset.threat]


def load_zoo_model(spec: str, model_dir: str | Path) -> nn.Module:
    """Load a classifier of RobustBench's corruptions zoo, in eval mode, with its normalisation.

    Args:
        spec: ``robustbench:<dataset>/<name>``, where the dataset is cifar10, cifar100 or imagenet.
        model_dir: the weights are read from ``<model_dir>/<dataset>/corruptions/<name>.pt``;
            RobustBench downloads them to that file if they are missing.

    Raises:
        InputError: there is no such dataset or name; the message lists the closest names.
        DataError: the weights are missing and cannot be downloaded, or do not fit the model.
    """
    dataset, slash, name = spec.removeprefix("robustbench:").partition("/")
    if not slash or dataset not in _ZOO:
        raise InputError(
            f"{spec!r}: expected robustbench:<dataset>/<name> with the dataset cifar10, cifar100 "
            "or imagenet, such as robustbench:cifar10/Standard"
        )
    robustbench = import_robustbench()
    key, threat = _enums(RobustBenchDataset(dataset))
    zoo = robustbench.model_zoo.model_dicts[key][threat]
    if name not in zoo:
        close = difflib.get_close_matches(name, zoo, n=5, cutoff=0.4) or sorted(zoo)
        raise InputError(
            f"RobustBench's {dataset} corruptions zoo has no model {name!r}; "
            f"close names: {', '.join(close)}"
        )
    drive_ids = zoo[name]["gdrive_id"]
    file = Path(model_dir) / dataset / "corruptions" / f"{name}.pt"
    # Each member of an ensemble has its own file: <name>.pt_m0.pt, <name>.pt_m1.pt, ...
    ensemble = isinstance(drive_ids, list)
    files = [Path(f"{file}_m{i}.pt") for i in range(len(drive_ids))] if ensemble else [file]
    missing = [f for f in files if not f.is_file()]
    try:
        return robustbench.utils.load_model(name, str(model_dir), dataset, "corruptions")
    except Exception as error:  # the downloaders raise any error of requests, gdown and timm
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if not missing:
            raise DataError(f"{file}: not the weights of {spec} ({reason})") from error
        where = f" (Google Drive id {drive_ids})" if drive_ids else ""
        raise DataError(
            f"{missing[0]}: no such file, and RobustBench could not download it ({reason}); "
            f"download the weights of {spec}{where} in another way and put them there"
        ) from error


def clean_accuracy(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    device: torch.device,
) -> float:
    """``robustbench.utils.clean_accuracy``: float images in [0, 1] -> accuracy in [0, 1]."""
    return import_robustbench().utils.clean_accuracy(net, images, labels, batch_size, device)


def load_corrupted_images(
    dataset: RobustBenchDataset, corruption: str, severity: int, n_examples: int, data_dir: Path
) -> tuple[Tensor, Tensor]:
    """Read one cell with RobustBench's loader: float images (N, 3, H, W) in [0, 1], labels (N,).

    ImageNet images are resized to 224x224, as RobustBench does for corruptions. The loader
    downloads a missing folder without asking, so check that the folder exists first.
    """
    data = import_robustbench().data
    key, threat = _enums(dataset)
    load = data.CORRUPTION_DATASET_LOADERS[key][threat]
    preprocessing = data.PREPROCESSINGS[dataset.preprocessing]
    # By position: CIFAR's loaders call the preprocessing `_`, ImageNet's `prepr`.
    return load(n_examples, severity, str(data_dir), False, [corruption], preprocessing)


def download_corruptions(dataset: RobustBenchDataset, data_dir: Path) -> None:
    """Download the folder of corrupted images into ``data_dir`` with RobustBench's downloader.

    The folder appears only when it is complete: the downloader mistakes the archive of an
    interrupted download for a finished one, so it works in a temporary folder.

    Raises:
        DataError: RobustBench has no downloader for the dataset, or the download fails.
    """
    data = import_robustbench().data
    key, threat = _enums(dataset)
    name = data.CORRUPTIONS_DIR_NAMES[key][threat]
    if threat not in data.CORRUPTIONS_DICT[key] or key not in data.ZENODO_CORRUPTIONS_LINKS:
        raise DataError(
            f"{data_dir}: holds no folder {name}, and RobustBench has no downloader for it; "
            f"download it from the dataset's authors and unpack it there"
        )
    with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
        try:
            data.zenodo_download(*data.ZENODO_CORRUPTIONS_LINKS[key], save_dir=Path(folder))
            os.replace(Path(folder) / name, data_dir / name)
        except Exception as error:  # any exception of requests, json, tarfile or the disk
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{data_dir / name}: no such folder, and RobustBench could not download it "
                f"({reason}); download it in another way and put it there"
            ) from error


def has_clean_arrays(reader: str, data_dir: Path) -> bool:
    """Whether torchvision's reader finds its test images in a folder, without downloading."""
    from torchvision import datasets

    try:
        getattr(datasets, reader)(str(data_dir), train=False, download=False)
    except RuntimeError:
        return False
    return True


def load_clean_images(
    dataset: RobustBenchDataset, n_examples: int, data_dir: Path
) -> tuple[Tensor, Tensor]:
    """Read the uncorrupted test images, in the form of `load_corrupted_images`."""
    data = import_robustbench().data
    key, _ = _enums(dataset)
    preprocessing = data.PREPROCESSINGS[dataset.clean_preprocessing]
    return data.load_clean_dataset(key, n_examples, str(data_dir), preprocessing)


def imagenet_test_files() -> list[str]:
    """The 5,000 images that RobustBench evaluates on, ``<class>/<file>``, in its order."""
    folder = Path(import_robustbench().__path__[0])
    return (folder / "helper_files" / "imagenet_test_image_ids.txt").read_text().split()
