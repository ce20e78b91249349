"""Locks that the system releases when their process ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["FileLock", "locked_folder"]

#: Seconds between two attempts to take a lock.
_POLL = 0.05


class FileLock:
    """A lock on a file or an existing folder, which the system releases when its process ends.

    Nothing is written into the file or folder.

    Attributes:
        supported: whether the system and the file system support such locks, as far as the
            attempts so far have shown; without support, every attempt succeeds.

    Args:
        path: the file or folder.
        create: whether to create an empty file if nothing exists there.

    Raises:
        OSError: the file or folder cannot be opened.
    """

    def __init__(self, path: Path, create: bool = True):
        create = create and not path.is_dir()
        flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
        self._handle = os.open(path, flags, 0o666)
        self.supported = fcntl is not None

    def take(self, *, shared: bool = False, patience: float = 0.0) -> bool:
        """Try to lock for at most ``patience`` seconds; a lock already held is converted.

        Returns:
            whether this process now holds the lock.
        """
        if fcntl is None:
            return True
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    return False
                time.sleep(_POLL)
                continue
            except OSError:
                self.supported = False
            return True

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # otherwise a child forked meanwhile would keep it
                fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)


@contextlib.contextmanager
def locked_folder(folder: Path, patience: float = float("inf")) -> Iterator[bool]:
    """Hold the exclusive lock of an existing folder, if that is possible.

    Yields:
        whether the lock is held. It is not if another process or thread holds it for longer than
        ``patience`` seconds, if the folder cannot be opened, or if locks are not supported.
    """
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(OSError):
            lock = stack.enter_context(FileLock(folder, create=False))
            held = lock.take(patience=patience) and lock.supported
        yield held
