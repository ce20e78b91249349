"""Paths and files: what is there, and replacing it all or nothing."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["nearest_path", "replacing", "sync_folder", "temporary_path", "write_text"]


def nearest_path(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists.

    Raises:
        OSError, ValueError: the system does not accept such a name: too long, or with a zero byte.
    """
    for place in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place)
            return place
    return path.absolute()


def temporary_path(path: Path) -> Path:
    """A hidden name beside ``path`` that no other thread, process or machine uses."""
    owner = f"{platform.node()}.{os.getpid()}.{threading.get_ident()}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the system, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file as a whole or not at all: the one way in which this package writes files.

    The block writes to the temporary path it is given. When it ends without an error, the file is
    flushed to the disk and takes the place of ``path``; otherwise it is removed and whatever was at
    ``path`` stays.

    Raises:
        OSError: the disk refuses; the caller says what could not be written.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        # On a full disk even this may fail; the first error is the one to report.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file as a whole or not at all.

    Raises:
        OSError: the disk refuses; what was there before stays.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
