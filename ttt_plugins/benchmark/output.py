"""The results folder: what a run depends on, and files that appear all together or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..artifacts.folder import CONFIG
from ..errors import DataError, InputError
from ..utils.files import nearest_path
from ..utils.robustbench import version
from ..version import __version__
from .results import finite

__all__ = ["check_folder", "check_out", "locked", "machine", "versions"]
__all__ += ["write_file", "write_files"]


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on; None for what is not installed."""
    names = ("torch", "torchvision", "timm", "robustbench", "numpy")
    found = {name: version(name) for name in names}
    return {"ttt_plugins": __version__, "python": platform.python_version(), **found}


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, its threads, and the accelerator if one is used."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = names[0] if names else processor
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": processor, "threads": torch.get_num_threads(), "gpu": gpu}


def check_out(out: str | Path) -> Path:
    """Whether a run may write into this folder at all, which need not be there yet.

    Raises:
        InputError: it is an artifact, whose own ``results.json`` has another form, or no folder.
    """
    out = Path(out)
    try:
        there, taken = nearest_path(out), (out / CONFIG).exists()
        good = there.is_dir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(out)[:200]!r}: cannot make this folder ({reason})") from error
    if not good:
        raise InputError(f"{out}: cannot make this folder ({there} is no folder)")
    if taken:
        raise InputError(
            f"{out} holds a {CONFIG}: it is an artifact or a model, which a benchmark's files "
            "would spoil; choose another folder"
        )
    return out


def check_folder(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that holds results of other settings.

    Args:
        file: a JSON file with what is there under ``settings``; nothing is there if it is not.

    Raises:
        InputError: other settings, or a file that is not of ours.
    """
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    wanted = json.loads(json.dumps(finite(settings), default=str))
    if found != wanted:
        known = found if isinstance(found, dict) else {}
        other = next((k for k in wanted if known.get(k) != wanted[k]), "format")
        raise InputError(
            f"{file.parent} holds results of other settings ({other} differs); choose another "
            "folder or pass overwrite=True (--overwrite)"
        )


@contextlib.contextmanager
def locked(
    out: Path, shared: bool = False, patience: float = 0.0
) -> Iterator[Callable[[], object]]:
    """Make the folder if it is new and hold it against other runs; the system lets go of it with
    the process, however that ends.

    Waits up to ``patience`` seconds. Yields a function that lets others in who ask for a
    ``shared`` hold.

    Raises:
        InputError: another run holds it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot make this folder ({error.strerror})") from error
    try:
        import fcntl
    except ImportError:  # Windows: two runs into one folder go unnoticed there
        yield lambda: None
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise InputError(f"{out}: another run is writing into this folder") from error
                time.sleep(0.05)
                continue
            except OSError:
                pass  # a file system without locks
            break

        def share() -> None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_SH)

        yield share
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; when this returns, it survives a crash of the system.

    Raises:
        DataError: the disk refuses; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        # On a full disk even this may fail; the first error is the one to tell.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write all files, or none: under temporary names first, then renamed.

    Raises:
        DataError: the disk refuses; what was there before stays.
    """
    temporary = {out / f".{name}.{os.getpid()}.tmp": out / name for name in files}
    try:
        for path, content in zip(temporary, files.values(), strict=True):
            path.write_bytes(content)
        for path, final in temporary.items():
            os.replace(path, final)
    except OSError as error:
        raise DataError(f"{out}: cannot write the results ({error.strerror})") from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
