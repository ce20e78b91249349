"""Atomic replacement of files and folders, and queries about paths."""

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

from .locks import locked_folder

__all__ = [
    "can_write",
    "longest_neighbour",
    "nearest_path",
    "read_unchanged",
    "recover_folder",
    "remove_abandoned_files",
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
        OSError, ValueError: the path is too long for the system, or contains a null byte.
    """
    for candidate in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(candidate)
            return candidate
    return path.absolute()


def can_write(path: Path) -> bool:
    """Whether this process may write to a folder, or create it if it is missing.

    Raises:
        OSError, ValueError: as for `nearest_path`.
    """
    return os.access(nearest_path(path), os.W_OK)


def temporary_path(path: Path) -> Path:
    """A hidden name beside ``path`` that no other thread, process or machine uses."""
    owner = f"{platform.node()}.{os.getpid()}.{threading.get_ident()}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, if the file system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# -- files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file atomically: this package writes all of its files in this way.

    The block writes to the temporary path it is given. When it ends without an error, the file is
    flushed to the disk and replaces ``path``; otherwise it is removed and ``path`` is unchanged.

    Raises:
        OSError: the file cannot be written; the caller reports which one.
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


def remove_abandoned_files(path: Path) -> None:
    """Remove temporary files for ``path`` of `replacing` in processes that were killed here."""
    pattern, machine = f".{path.name}.", f"{platform.node()}."
    candidates: list[str] = []
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        candidates = [e.path for e in entries if e.name.startswith(pattern + machine)]
    for temporary in map(Path, candidates):
        owner = temporary.name.removeprefix(pattern + machine).removesuffix(".tmp")
        process, _, thread = owner.partition(".")
        if process.isdecimal() and thread.isdecimal() and not _runs(int(process)):
            with contextlib.suppress(OSError):
                temporary.unlink()


def _runs(process: int) -> bool:
    """Whether a process of this machine is running; True if that cannot be determined."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


# -- folders ---------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Replace a folder atomically, as `replacing` does with a file.

    The block fills the new folder that it is given, which lies beside ``folder``. When it ends
    without an error, its files are flushed to the disk and the two folders are exchanged: in one
    step if the system supports it (Linux), otherwise by two renames, between which
    `recover_folder` restores the earlier folder. A link is followed: the folder that it points to
    is replaced. Temporary folders of processes that died are removed first.

    Raises:
        OSError: the folder cannot be written; an existing folder is unchanged.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with locked_folder(folder.parent):
            _remove_abandoned(folder)
            made = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent)
            new = Path(made)
            stack.callback(shutil.rmtree, new, ignore_errors=True)
            stack.enter_context(locked_folder(new))  # shows that its owner is alive
        yield new
        for path in new.rglob("*"):
            if path.is_file() and not path.is_symlink():
                _flush(path)
        sync_folder(new)
        with locked_folder(folder.parent):
            _restore(folder)
            _exchange(new, folder)
            sync_folder(folder.parent)


def read_unchanged(folder: Path, read: Callable[[], Result]) -> Result:
    """Call ``read``, and call it again if the folder that it reads was replaced meanwhile.

    Raises:
        OSError: the folder was replaced during every one of 50 attempts.
        Exception: any exception of ``read`` if the folder was not replaced.
    """
    for attempt in range(_ATTEMPTS):
        recover_folder(folder)
        try:
            # While the folder is open, its inode number is not reused for its successor.
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS // 2:
                continue  # perhaps it is missing only between two renames
            return read()  # the folder does not exist, or the system cannot open folders
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
    """Whether an open folder is still the folder at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except OSError:
        return False


def longest_neighbour(folder: Path) -> Path:
    """The longest path that `replacing_folder` needs beside a folder."""
    return folder.with_name(f".{folder.name}.{'x' * 8}.tmp")


def recover_folder(folder: Path) -> None:
    """Restore a folder whose replacement was interrupted between the two renames."""
    folder = Path(os.path.realpath(folder))
    if not _old(folder).is_dir():
        return
    with contextlib.suppress(OSError), locked_folder(folder.parent):
        _restore(folder)


def _old(folder: Path) -> Path:
    """Path of the earlier folder between the two renames."""
    return folder.with_name(f".{folder.name}.old")


def _restore(folder: Path) -> None:
    if (old := _old(folder)).is_dir() and not folder.exists():
        os.rename(old, folder)


def _exchange(new: Path, folder: Path) -> None:
    """Exchange ``new`` and ``folder``, or rename ``new`` if ``folder`` does not exist."""
    try:
        os.rename(new, folder)  # succeeds only if nothing or an empty folder is there
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
    """Exchange two paths in one step; return False if the system cannot."""
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
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM):  # not supported by the file system
        return False
    raise OSError(number, os.strerror(number), str(other))


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary folders whose processes have died, which are no longer locked."""
    pattern = f".{folder.name}."
    temporary: list[str] = []  # stays empty where a folder may be written but not listed
    with contextlib.suppress(OSError), os.scandir(folder.parent) as entries:
        names = (e.name for e in entries)
        temporary = [n for n in names if n.startswith(pattern) and n.endswith(".tmp")]
    for path in map(folder.parent.joinpath, temporary):
        middle = path.name.removeprefix(pattern).removesuffix(".tmp")
        # The random part has no dot; other names are files of `replacing`, or of another folder.
        if "." in middle or not path.is_dir():
            continue
        with contextlib.suppress(OSError), locked_folder(path, patience=0) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)
