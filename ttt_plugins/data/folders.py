"""Folders of picture files: one folder per class, or a single folder without labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .decode import PICTURE_SUFFIXES, decode
from .source import ImageSource, Sample

__all__ = ["FolderSource"]


class _Names:
    """Many file names in two buffers, which are small and which forked processes can share."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self._bytes[self._ends[row] : self._ends[row + 1]])


class FolderSource(ImageSource):
    """The picture files of a folder, sorted by class and then by name.

    Its subfolders are the classes, numbered in the sorted order of their names; pictures may lie at
    any depth below them. Pictures in a folder without subfolders have no labels.

    Args:
        root: the folder.
        classes: names of all class folders, in the order of their labels; sorted by default.

    Raises:
        DataError: there are no pictures, a class folder has none, some lie beside the class
            folders, or the class folders are not those that are given.
    """

    def __init__(self, root: str | Path, classes: Sequence[str] | None = None):
        self.location = str(root)
        self._root = Path(root)
        try:
            folders, flat = _entries(self._root)
            if classes is not None:
                _check_folders(self._root, folders, classes)
                folders = list(classes)
            per_class = {name: list(_pictures(self._root / name, name)) for name in folders}
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"{root} cannot be read ({error.strerror})") from error
        filled = [name for name in folders if per_class[name]]
        if not filled and not flat:
            raise DataError(f"{root}: no pictures; looked for {', '.join(PICTURE_SUFFIXES)} files")
        if filled and flat:
            raise DataError(
                f"{root / Path(flat[0])}: a picture beside the class folders; move it into one of "
                f"them, or out of {root}"
            )
        if filled and len(filled) < len(folders):
            empty = next(name for name in folders if not per_class[name])
            raise DataError(
                f"{root / Path(empty)}: a class folder without pictures, which would shift the "
                "labels of the classes after it; remove it or fill it"
            )
        self._files = _Names(flat or [file for name in filled for file in per_class[name]])
        if filled:
            self.classes, self.labelled = tuple(filled), True
            # For each class, the row after its last one.
            self._ends = np.cumsum([len(per_class[name]) for name in filled])

    def __len__(self) -> int:
        return len(self._files)

    def read(self, row: int) -> Sample:
        """Read and decode one file; its name is its path in the folder."""
        file = self._files[row]
        label = int(np.searchsorted(self._ends, row, "right")) if self.labelled else None
        path = self._root / file
        return Sample(decode(path, str(path)), label, file)

    def read_labels(self) -> Tensor:
        """The positions of the rows' folders."""
        return torch.from_numpy(np.searchsorted(self._ends, np.arange(len(self)), "right"))


def _check_folders(root: Path, folders: Sequence[str], classes: Sequence[str]) -> None:
    """Check that the folders are exactly those of the classes: others would shift the labels."""
    mismatched = set(folders) ^ set(classes)
    if mismatched:
        name = min(mismatched)
        state = "is missing" if name in classes else "is not one of them"
        raise DataError(f"{root}: must hold the {len(classes)} class folders; {name} {state}")


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Folders and pictures directly in a folder, sorted; hidden ones are skipped."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in shown if entry.is_dir())
    pictures = (e.name for e in shown if e.name.lower().endswith(PICTURE_SUFFIXES) and e.is_file())
    return folders, sorted(pictures)


def _pictures(folder: Path, name: str) -> Iterator[str]:
    """Paths of all pictures in and below a folder; each path starts with ``name``."""
    folders, pictures = _entries(folder)
    for picture in pictures:
        yield os.path.join(name, picture)
    for inner in folders:
        yield from _pictures(folder / inner, os.path.join(name, inner))
