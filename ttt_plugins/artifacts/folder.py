"""Artifacts: a folder with ``config.json``, ``model.safetensors`` and a card.

Only JSON and safetensors files are read, so nothing in an artifact can run code. A folder is
replaced atomically (`ttt_plugins.utils.files.replacing_folder`): an interrupted save leaves the
earlier artifact unchanged, and a reader never sees files of two different saves.

The modules that check an artifact, in the order of loading:

====================================================  ==============================================
no config.json, another format, a changed tensor      here
not JSON, a duplicate key, too deep, too large        `strict_json`
a key, type, range or name in config.json             `schema`
truncated, damaged or non-finite tensors              `tensor_files`
results.json                                          `measured`
model_args, weights that do not fit, a fingerprint    `classifiers` (limits: `build_budget`)
a field or tensor that the method does not accept     the method, called by `ttt_plugins.wrapping`
====================================================  ==============================================
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..backbones.kinds import repository_kind
from ..errors import ArtifactError
from ..utils.files import (
    longest_neighbour,
    nearest_path,
    read_unchanged,
    recover_folder,
    replacing_folder,
    write_text,
)
from ..version import __version__
from .measured import check_measured
from .schema import FORMAT_VERSION, OWN_WEIGHTS, check_config
from .strict_json import MAX_CARD, parse_json, read_bytes, read_json
from .tensor_files import MAX_LEARNED, MAX_WEIGHTS, fingerprint, read_tensors

__all__ = [
    "Artifact",
    "as_json",
    "bundled_folder",
    "check_plain",
    "check_target",
    "checked_text",
    "is_bundled",
    "list_bundled",
    "named_folder",
    "read_artifact",
    "read_config",
    "rewrite_text",
    "write_artifact",
]

CONFIG, MODEL, LEARNED = "config.json", "model.safetensors", "adapter.safetensors"
CARD, RESULTS = "README.md", "results.json"
#: How pictures become the input of a model of transformers, in its own repositories.
PROCESSOR = "preprocessor_config.json"
FILES = (CONFIG, MODEL, LEARNED, CARD, RESULTS)

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Artifact:
    """Contents of an artifact.

    Attributes:
        config: the parsed ``config.json``.
        tensors: tensors that the method has learned, stored in ``model.safetensors``, or in
            ``adapter.safetensors`` if the former holds the model.
        weights: the model's ``state_dict``; None if the artifact only names its model.
        card: the text of ``README.md``.
        results: the parsed ``results.json`` (see `ttt_plugins.artifacts.measured`), None if there
            is none.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor] | None = None
    card: str = ""
    results: dict[str, Any] | None = None


def _cards() -> Path:
    """``hub_cards/``: inside the package when installed, beside it in a checkout."""
    installed = _PACKAGE / "hub_cards"
    return installed if installed.is_dir() else _PACKAGE.parent / "hub_cards"


def list_bundled() -> list[str]:
    """Names of the artifacts that are included in the package."""
    return sorted(p.parent.name for p in _cards().glob("*/config.json"))


def bundled_folder(name: str) -> Path:
    """Folder of a bundled artifact.

    Raises:
        ArtifactError: there is no bundled artifact of this name.
    """
    if name not in list_bundled():
        raise ArtifactError(f"no bundled artifact is called {name!r}; there are {list_bundled()}")
    return _cards() / name


def is_bundled(folder: str | Path) -> bool:
    """Whether a folder is that of a bundled artifact."""
    try:
        folder = Path(os.path.realpath(folder))
    except ValueError:  # a null byte
        return False
    return folder.parent == _cards().resolve() and folder.name in list_bundled()


def named_folder(name: str) -> Path | None:
    """The folder that ``"bundled:<name>"`` or a path names, None if it holds no artifact."""
    if name.startswith("bundled:"):
        return bundled_folder(name.removeprefix("bundled:"))
    folder = Path(name)
    try:
        if not (folder / CONFIG).exists():
            recover_folder(folder)
        return folder if (folder / CONFIG).exists() else None
    except (OSError, ValueError):  # the name is too long, or contains a null byte
        return None


# -- reading ---------------------------------------------------------------------------------


def read_artifact(folder: str | Path, where: str | None = None) -> Artifact:
    """Read an artifact folder; all returned contents were written by the same save.

    Args:
        folder: the folder.
        where: name of the artifact in error messages; by default the folder.

    Raises:
        ArtifactError: a file is missing or damaged or has content that is not allowed, or the
            format is newer than this package.
    """
    folder = Path(folder)
    try:
        return read_unchanged(folder, lambda: _read(folder, where or str(folder)))
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{str(where or folder)[:200]!r} cannot be read ({error})") from error


def _read(folder: Path, where: str) -> Artifact:
    config = read_config(folder, where)
    tensors, weights = {}, None
    if config["backbone"]["source"] == OWN_WEIGHTS:
        weights = read_tensors(folder / MODEL, MAX_WEIGHTS)
        if (folder / LEARNED).exists():
            tensors = read_tensors(folder / LEARNED, MAX_LEARNED)
    else:
        tensors = read_tensors(folder / MODEL, MAX_LEARNED)
    if "learned" in config and (actual := fingerprint(tensors)) != config["learned"]:
        raise ArtifactError(
            f"{where}: the learned tensors are not those that were saved: config.json has the "
            f"fingerprint {config['learned']}, the tensors have {actual}; fetch the artifact again"
        )
    card = folder / CARD
    text = read_bytes(card, MAX_CARD).decode("utf-8", "replace") if card.exists() else ""
    measured = read_json(folder / RESULTS) if (folder / RESULTS).exists() else None
    if measured is not None:
        check_measured(measured, f"{where}: {RESULTS}")
    return Artifact(config, tensors, weights, text, measured)


def check_plain(folder: Path) -> None:
    """Refuse a folder if content from outside it would be published.

    Args:
        folder: artifact folder.

    Raises:
        ArtifactError: a file of the artifact is a symbolic link, one of several hard links, a
            folder, a pipe or a device.
    """
    for name in FILES:
        file = folder / name
        try:
            status = os.lstat(file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{str(file)[:200]!r} cannot be read ({error})") from error
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            continue
        what = "not a plain file"
        if stat.S_ISLNK(status.st_mode):
            what = "a link to another file"
        elif stat.S_ISREG(status.st_mode):
            what = "one of several names of a file (a hard link)"
        raise ArtifactError(f"{file} is {what} and is not published: put a copy in its place")


def read_config(folder: Path, where: str | None = None) -> dict[str, Any]:
    """Read and check the ``config.json`` of an artifact folder, but not its tensors.

    Args:
        folder: the folder.
        where: name of the artifact in error messages; by default the folder.

    Raises:
        ArtifactError: as for `read_artifact`.
    """
    where = where or str(folder)
    if not (folder / CONFIG).exists():
        raise ArtifactError(f"{where} is not an adapter artifact: it contains no {CONFIG}")
    config = read_json(folder / CONFIG)
    version = config.get("format_version") if isinstance(config, dict) else None
    if isinstance(config, dict) and "format_version" not in config:
        kind = "another library's model" if "model_type" in config else "no adapter"
        hint = ""
        if "architecture" in config or repository_kind(config) is not None:
            kind = "a timm model" if "architecture" in config else kind
            hint = '; wrap it as tp.wrap("hf:ORG/NAME", method)'
        raise ArtifactError(f"{where} is {kind}: its {CONFIG} has no format_version{hint}")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: {CONFIG} has format_version {str(version)[:40]!r}; this version of "
            f"ttt_plugins ({__version__}) reads {FORMAT_VERSION}. A newer artifact needs a newer "
            "ttt_plugins."
        )
    check_config(config, f"{where}: {CONFIG}")
    return config


# -- writing ---------------------------------------------------------------------------------


def check_target(folder: str | Path) -> Path:
    """Check that `write_artifact` could write a folder, for example before training starts.

    Args:
        folder: folder of the future artifact; it need not exist.

    Returns:
        the folder.

    Raises:
        ArtifactError: the folder holds anything but an artifact, has no name, or cannot be
            written.
    """
    if not isinstance(folder, (str, Path)):
        raise ArtifactError(f"{folder!r} cannot be the name of an artifact; give another")
    folder = Path(folder)
    if folder.name in ("", ".."):
        raise ArtifactError(f"{str(folder)!r} cannot be the name of an artifact; give another")
    try:
        nearest_path(longest_neighbour(folder))
        above = nearest_path(folder.parent)
        taken = os.path.lexists(folder)
        ours = folder.is_dir() and {p.name for p in folder.iterdir()} <= set(FILES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot write {str(folder)[:200]!r}: {reason}") from error
    if taken and not ours:
        raise ArtifactError(f"{folder} is not empty and not an artifact; choose another folder")
    if not above.is_dir():
        raise ArtifactError(f"cannot write {folder}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write {folder}: no permission to write in {above}")
    return folder


def write_artifact(folder: str | Path, artifact: Artifact) -> Path:
    """Write an artifact folder atomically; an earlier artifact there is replaced.

    Args:
        folder: folder to write; if it is a link, the folder that it points to is replaced.
        artifact: the artifact; the fingerprint of its tensors is added to ``config.json``.

    Returns:
        the folder.

    Raises:
        ArtifactError: the folder holds anything but an artifact, or it cannot be written.
    """
    folder = check_target(folder)
    config = {k: v for k, v in artifact.config.items() if k != "learned"}
    if artifact.tensors:
        config["learned"] = fingerprint(artifact.tensors)
    text = checked_text(config, folder)
    try:
        with replacing_folder(folder) as new:
            (new / CONFIG).write_text(text, encoding="utf-8")
            if artifact.results is not None:
                (new / RESULTS).write_text(as_json(artifact.results), encoding="utf-8")
            for file, tensors in _tensor_files(artifact).items():
                plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
                save_file(plain, new / file, metadata={"format": "pt"})
            (new / CARD).write_text(artifact.card, encoding="utf-8")
            new.chmod(0o755)  # temporary folders are private; artifacts are not
            for file in new.iterdir():
                file.chmod(0o644)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {folder}: {error}") from error
    return folder


def _tensor_files(artifact: Artifact) -> dict[str, dict[str, Tensor]]:
    if artifact.weights is None:
        return {MODEL: artifact.tensors}
    return {MODEL: artifact.weights} | ({LEARNED: artifact.tensors} if artifact.tensors else {})


def as_json(value: Any) -> str:
    """JSON in the form of an artifact's files: with sorted keys, without NaN."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def checked_text(config: dict[str, Any], folder: Path) -> str:
    """The text of ``config.json``, checked so that it can be loaded again.

    Args:
        config: content of ``config.json``.
        folder: folder of the artifact, for error messages.

    Raises:
        ArtifactError: JSON cannot represent the content, or
            `ttt_plugins.artifacts.schema.check_config` refuses it.
    """
    try:
        text = as_json(config)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"cannot write {folder}: {error}") from error
    check_config(parse_json(text.encode(), folder), f"{folder}: {CONFIG}")
    return text


def rewrite_text(folder: Path, texts: Mapping[str, str]) -> None:
    """Replace text files of an artifact folder atomically; all other files are kept.

    Args:
        folder: artifact folder.
        texts: new contents by file name.

    Raises:
        ArtifactError: the files cannot be written; nothing is changed.
    """
    try:
        with replacing_folder(folder) as new:
            shutil.copytree(
                folder, new, symlinks=True, copy_function=_link_or_copy, dirs_exist_ok=True
            )
            for name, text in texts.items():
                write_text(new / name, text)  # replaces the link, so the earlier file is unchanged
    except (OSError, shutil.Error) as error:
        raise ArtifactError(f"cannot write into {folder}: {error}") from error


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
