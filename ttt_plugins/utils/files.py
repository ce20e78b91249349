"""Replacing files and folders as a whole or not at all, and asking what is at a path."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "can_write",
    "longest_neighbour",
    "nearest_path",
    "read_unchanged",
    "recover_folder",
    "replacing",
    "replacing_folder",
    "sync_folder",
    "temporary_path",
    "write_text",
]

Result = TypeVar("Result")

_ATTEMPTS = 50
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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


def can_write(path: Path) -> bool:
    """Whether the system lets this process write to a folder, or make it where it is missing.

    Raises:
        OSError, ValueError: as `nearest_path`.
    """
    return os.access(nearest_path(path), os.W_OK)


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


# -- files -----------------------------------------------------------------------------------


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
        _flush(temporary)
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


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


# -- folders ---------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the exclusive lock of a folder, which the system drops when the process dies.

    Args:
        folder: an existing folder; nothing is written into it.
        wait: wait until the lock is free; otherwise find out whether it is.

    Yields:
        Whether the lock is held. It is not where another process or thread holds it, or the file
        system or the platform has no such locks.
    """
    if fcntl is None:
        yield False
        return
    handle, held = None, False
    try:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held
    finally:
        if handle is not None:
            if held:  # a child forked meanwhile would otherwise keep it
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Replace a folder as a whole or not at all, as `replacing` does with a file.

    The block fills the new folder that it is given, which lies beside ``folder``. When it ends
    without an error, its files are flushed to the disk and the two folders change places: in one
    step where the system has one (Linux), otherwise in two renames, between which
    `recover_folder` restores the earlier folder. A link is followed: the folder that it names is
    replaced. What processes that died here have left behind is removed first.

    Raises:
        OSError: the disk refuses; whatever was at ``folder`` stays.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with locked(folder.parent):
            _remove_abandoned(folder)
            made = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent)
            new = Path(made)
            stack.callback(shutil.rmtree, new, ignore_errors=True)
            stack.enter_context(locked(new))  # says that its owner is alive
        yield new
        for path in new.rglob("*"):
            if path.is_file() and not path.is_symlink():
                _flush(path)
        sync_folder(new)
        with locked(folder.parent):
            _restore(folder)
            _exchange(new, folder)
            sync_folder(folder.parent)


def read_unchanged(folder: Path, read: Callable[[], Result]) -> Result:
    """Call ``read``, again if the folder that it reads was replaced meanwhile.

    Raises:
        OSError: the folder was replaced during every one of many attempts.
        Exception: whatever ``read`` raises about a folder that stayed.
    """
    for attempt in range(_ATTEMPTS):
        recover_folder(folder)
        try:
            # The open folder keeps its number from being given to its successor.
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS // 2:
                continue  # perhaps between two renames
            return read()  # nothing is there, or a system that does not open folders
        try:
            result = read()
            if _is_at(handle, folder):
                return result
        except Exception:
            if _is_at(handle, folder):
                raise
        finally:
            os.close(handle)
    raise OSError(f"{folder} was replaced during every one of {_ATTEMPTS} attempts to read it")


def _is_at(handle: int, folder: Path) -> bool:
    """Whether an open folder is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except OSError:
        return False


def longest_neighbour(folder: Path) -> Path:
    """The longest path that `replacing_folder` needs beside a folder."""
    return folder.with_name(f".{folder.name}.{'x' * 8}.tmp")


def recover_folder(folder: Path) -> None:
    """Restore a folder whose replacement was interrupted between two renames; else do nothing."""
    folder = Path(os.path.realpath(folder))
    if not _old(folder).is_dir():
        return
    with contextlib.suppress(OSError), locked(folder.parent):
        _restore(folder)


def _old(folder: Path) -> Path:
    """Where the earlier folder is between the two renames of a system that needs two."""
    return folder.with_name(f".{folder.name}.old")


def _restore(folder: Path) -> None:
    if (old := _old(folder)).is_dir() and not folder.exists():
        os.rename(old, folder)


def _exchange(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``, and what was there, if anything, in its own."""
    try:
        os.rename(new, folder)  # only where nothing is there, or an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange_at_once(new, folder):
        return
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    os.rename(new, folder)
    os.rename(old, new)


def _exchange_at_once(one: Path, other: Path) -> bool:
    """Whether the system can exchange two paths in one step, and did."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an older C library
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM):  # the file system has no such step
        return False
    raise OSError(number, os.strerror(number), str(other))


def _remove_abandoned(folder: Path) -> None:
    """Remove the folders of replacements whose processes died, which hold no lock any more."""
    pattern = f".{folder.name}."
    with contextlib.suppress(OSError), os.scandir(folder.parent) as entries:
        found = [e.path for e in entries if e.name.startswith(pattern) and e.name.endswith(".tmp")]
    for path in map(Path, found):
        middle = path.name.removeprefix(pattern).removesuffix(".tmp")
        # Our own random part has no dot; others are files of `replacing`, or of another folder.
        if "." in middle or not path.is_dir():
            continue
        with contextlib.suppress(OSError), locked(path, wait=False) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)
