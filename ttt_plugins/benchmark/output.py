"""The results folder: what a run depends on, and files that appear all together or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, InputError
from ..robustbench_bridge import version
from ..version import __version__
from .records import finite

__all__ = ["check_folder", "machine", "versions", "write_files"]


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


def check_folder(out: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Refuse a folder that results of other settings would be overwritten in; make it if new."""
    file = out / "results.json"
    if file.exists() and not overwrite:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        wanted = json.loads(json.dumps(finite(settings), default=str))
        if found != wanted:
            known = found if isinstance(found, dict) else {}
            other = next((k for k in wanted if known.get(k) != wanted[k]), "format")
            raise InputError(
                f"{out} holds results of other settings ({other} differs); choose another folder "
                "or pass overwrite=True (--overwrite)"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot make this folder ({error.strerror})") from error


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
