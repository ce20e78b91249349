"""Paths and files: what is there, and replacing it all or nothing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["nearest_path"]


def nearest_path(path: Path) -> Path:
    """The path itself, or the nearest above it that is there.

    Raises:
        OSError, ValueError: the system takes no such name: too long, or with a zero byte.
    """
    for place in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place)
            return place
    return path.absolute()
