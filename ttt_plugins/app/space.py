"""The page as a Space of the Hugging Face Hub: the files that a Space needs."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from ..artifacts import hub
from ..errors import DataError, InputError
from ..utils.files import write_text
from ..version import __version__

__all__ = ["export_space"]

_APP = '''"""A network that adapts itself to what it sees, beside the same network as it is."""

import os

from ttt_plugins.cli import main

os.chdir(os.path.dirname(os.path.abspath(__file__)))
main(["app", {arguments}])
'''
_CARD = """---
title: {title}
sdk: gradio
{version}app_file: app.py
license: apache-2.0
tags:
- ttt_plugins
- test-time-adaptation
---

# {title}

Pictures go by; a classifier predicts them as it is and while it adapts itself to them, without
labels. Made with `ttt-plugins app {model} --export-space DIR`.
"""


def export_space(model: str, folder: str | Path, *, method: str | None = None) -> Path:
    """Write ``app.py``, ``requirements.txt`` and the card ``README.md``.

    An artifact in a local folder is copied, so that the Space has it too.

    Args:
        model: a bundled artifact, a local one, or one on the Hub, or a timm name.
        folder: where to write; must be empty or missing.
        method: the method to begin with, instead of the artifact's own.

    Returns:
        the folder.

    Raises:
        DataError: the folder is not empty or cannot be written.
        InputError: the model is a local folder that is no artifact.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: not an empty folder")
    name, local = model, Path(model).expanduser()
    if local.is_dir():
        if hub.find(model) is None:
            raise InputError(f"{model}: no artifact (it has no config.json)")
        name = "artifact"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if local.is_dir():
            shutil.copytree(local, folder / name)
    except OSError as error:
        raise DataError(f"{folder}: cannot write ({error.strerror})") from error
    arguments = ["./artifact" if name == "artifact" else name]
    arguments += [] if method is None else ["--method", method]
    quoted = ", ".join(map(repr, arguments)).replace("'", '"')
    title = f"{local.name if name == 'artifact' else name.removeprefix('bundled:')} adapts itself"
    write_text(folder / "app.py", _APP.format(arguments=quoted))
    write_text(folder / "requirements.txt", f"ttt-plugins[app]=={__version__}\n")
    card = _CARD.format(title=title, version=_version(), model=model if name == model else "FOLDER")
    write_text(folder / "README.md", card)
    return folder


def _version() -> str:
    try:
        return f"sdk_version: {metadata.version('gradio')}\n"
    except metadata.PackageNotFoundError:
        return ""
