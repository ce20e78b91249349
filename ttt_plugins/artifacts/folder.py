"""Artifacts: a folder with ``config.json``, ``model.safetensors`` and a card.

Only JSON and safetensors are read, and only after `trust` has looked at them; nothing in an
artifact can run code. Folders are written aside and renamed, so an interrupted save leaves what
was there before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ArtifactError
from ..utils.files import nearest_path
from ..version import __version__
from .measured import check_measured
from .schema import TIMM_KEYS, check_config
from .strict_json import MAX_CARD, parse_json, read_bytes, read_json
from .tensor_files import MAX_LEARNED, MAX_WEIGHTS, fingerprint, read_tensors

__all__ = [
    "Artifact",
    "bundled_folder",
    "check_plain",
    "check_target",
    "is_bundled",
    "list_bundled",
    "named_folder",
    "read_artifact",
    "rewrite_text",
    "write_artifact",
]

FORMAT_VERSION = 1
CONFIG, MODEL, LEARNED = "config.json", "model.safetensors", "adapter.safetensors"
CARD, RESULTS = "README.md", "results.json"
FILES = (CONFIG, MODEL, LEARNED, CARD, RESULTS)

#: ``config["backbone"]["source"]`` when the model's weights are in the artifact itself.
OWN_WEIGHTS = "artifact"
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Artifact:
    """Contents of an artifact.

    Attributes:
        config: the parsed ``config.json``.
        tensors: what the method has learned: in ``model.safetensors``, or in
            ``adapter.safetensors`` where the former holds the model.
        weights: the model's own ``state_dict``, None where the artifact names its model instead.
        card: the text of ``README.md``.
        results: the parsed ``results.json`` (see `results`), None where nothing was measured.
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
    """Names of the artifacts that ship inside the package."""
    return sorted(p.parent.name for p in _cards().glob("*/config.json"))


def bundled_folder(name: str) -> Path:
    """Folder of a bundled artifact.

    Raises:
        ArtifactError: there is none of that name.
    """
    if name not in list_bundled():
        raise ArtifactError(f"nothing bundled is called {name!r}; there are {list_bundled()}")
    return _cards() / name


def is_bundled(folder: str | Path) -> bool:
    """Whether a folder is one of those that ship inside the package."""
    folder = Path(folder).resolve()
    return folder.parent == _cards().resolve() and folder.name in list_bundled()


def named_folder(name: str) -> Path | None:
    """The folder that ``"bundled:<name>"`` or a path names, None when it is no artifact's."""
    if name.startswith("bundled:"):
        return bundled_folder(name.removeprefix("bundled:"))
    folder = Path(name)
    try:
        return folder if (folder / CONFIG).exists() else None
    except (OSError, ValueError):  # too long for the file system, or a zero byte
        return None


def read_artifact(folder: str | Path, where: str | None = None) -> Artifact:
    """Read an artifact folder.

    Args:
        where: what to call it in errors; the folder unless given.

    Raises:
        ArtifactError: a file is missing or damaged, holds what it must not, or the format is a
            newer one.
    """
    folder = Path(folder)
    where = where or str(folder)
    config = read_config(folder, where)
    tensors, weights = {}, None
    if config["backbone"]["source"] == OWN_WEIGHTS:
        weights = read_tensors(folder / MODEL, MAX_WEIGHTS)
        if (folder / LEARNED).exists():
            tensors = read_tensors(folder / LEARNED, MAX_LEARNED)
    else:
        tensors = read_tensors(folder / MODEL, MAX_LEARNED)
    if "learned" in config and fingerprint(tensors) != config["learned"]:
        raise ArtifactError(
            f"{where}: what the method learned is not what was saved: config.json says "
            f"{config['learned']}, the tensors have {fingerprint(tensors)}; fetch it again"
        )
    card = folder / CARD
    text = ""
    if card.exists():
        text = read_bytes(card, MAX_CARD).decode("utf-8", "replace")
    measured = read_json(folder / RESULTS) if (folder / RESULTS).exists() else None
    if measured is not None:
        check_measured(measured, f"{where}: {RESULTS}")
    return Artifact(config, tensors, weights, text, measured)


def check_plain(folder: Path) -> None:
    """Refuse a folder from which something else than its own files would be published.

    Raises:
        ArtifactError: a file of the artifact is a link, a folder, a pipe or a device.
    """
    for name in FILES:
        file = folder / name
        try:
            kind = os.lstat(file).st_mode
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{str(file)[:200]!r} cannot be looked at ({error})") from error
        if not stat.S_ISREG(kind):
            what = "a link to another file" if stat.S_ISLNK(kind) else "not a plain file"
            raise ArtifactError(
                f"{file} is {what}, whose content is not published: put a copy in its place"
            )


def read_config(folder: Path, where: str | None = None) -> dict[str, Any]:
    """The checked ``config.json`` of an artifact folder; its tensors are not read.

    Raises:
        ArtifactError: as for `read`.
    """
    where = where or str(folder)
    if not (folder / CONFIG).exists():
        raise ArtifactError(f"{where} is not an adapter artifact: there is no {CONFIG} in it")
    config = read_json(folder / CONFIG)
    found = config.get("format_version") if isinstance(config, dict) else None
    if isinstance(config, dict) and "format_version" not in config:
        kind = "another library's model" if "model_type" in config else "no adapter"
        hint = ""
        if "architecture" in config:
            kind, hint = "a timm model", '; wrap it as tp.wrap("hf-hub:ORG/NAME", method)'
        raise ArtifactError(f"{where} is {kind}: its {CONFIG} has no format_version{hint}")
    if type(found) is not int or found != FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: {CONFIG} has format_version {str(found)[:40]!r}; this version of "
            f"ttt_plugins ({__version__}) reads {FORMAT_VERSION}. A newer artifact needs a newer "
            "ttt_plugins."
        )
    check_config(config, f"{where}: {CONFIG}")
    return config


def check_target(folder: str | Path) -> Path:
    """Whether `write` could write an artifact here; trainings ask before they begin.

    Raises:
        ArtifactError: the folder is something else or has no name, or the disk would refuse.
    """
    folder = Path(folder)
    if folder.name in ("", ".."):
        raise ArtifactError(f"{str(folder)!r} is no name for an artifact's folder; give one")
    try:
        nearest_path(folder.with_name(f".{folder.name}-{'x' * 8}-old"))  # the longest `write` makes
        above = nearest_path(folder.parent)
        taken = os.path.lexists(folder)
        ours = folder.is_dir() and {p.name for p in folder.iterdir()} <= set(FILES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot write {str(folder)[:200]!r}: {reason}") from error
    if taken and not ours:
        raise ArtifactError(f"{folder} is not empty and not an artifact; choose another folder")
    if not above.is_dir():
        raise ArtifactError(f"cannot write {folder}: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write {folder}: no permission to write in {above}")
    return folder


def write_artifact(folder: str | Path, artifact: Artifact) -> Path:
    """Write an artifact folder, replacing an earlier artifact there, all or nothing.

    Raises:
        ArtifactError: the folder holds something else, or the disk refuses.
    """
    folder = check_target(folder)
    config = {k: v for k, v in artifact.config.items() if k != "learned"}
    if artifact.tensors:
        config["learned"] = fingerprint(artifact.tensors)
    text = checked_text(config, folder)
    aside = old = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        (aside / CONFIG).write_text(text, encoding="utf-8")
        if artifact.results is not None:
            (aside / RESULTS).write_text(as_json(artifact.results), encoding="utf-8")
        for file, tensors in _tensor_files(artifact).items():
            plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            save_file(plain, aside / file, metadata={"format": "pt"})
        (aside / CARD).write_text(artifact.card, encoding="utf-8")
        aside.chmod(0o755)  # temporary folders and their files are private; artifacts are not
        for file in aside.iterdir():
            file.chmod(0o644)
        if folder.exists():
            old = aside.with_name(aside.name + "-old")
            os.replace(folder, old)
        os.replace(aside, folder)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if old is not None and old.exists() and not folder.exists():
            os.replace(old, folder)
        raise ArtifactError(f"cannot write {folder}: {error}") from error
    finally:
        if aside is not None and aside.exists():
            shutil.rmtree(aside)
    return folder


def _tensor_files(artifact: Artifact) -> dict[str, dict[str, Tensor]]:
    if artifact.weights is None:
        return {MODEL: artifact.tensors}
    return {MODEL: artifact.weights} | ({LEARNED: artifact.tensors} if artifact.tensors else {})


def as_json(value: Any) -> str:
    """JSON as it stands in an artifact: sorted keys, no NaN."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def checked_text(config: dict[str, Any], folder: Path) -> str:
    """``config.json`` as it is written: what would not load is not.

    Raises:
        ArtifactError: what `trust.check_config` refuses, or what is no JSON.
    """
    try:
        text = as_json(config)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"cannot write {folder}: {error}") from error
    check_config(parse_json(text.encode(), folder), f"{folder}: {CONFIG}")
    return text


def rewrite_text(folder: Path, texts: Mapping[str, str]) -> None:
    """Replace text files of an artifact folder, each in one piece; its tensors stay.

    Raises:
        ArtifactError: the disk refuses.
    """
    written = {}
    try:
        for name, text in texts.items():
            aside = folder.parent / f".{folder.name}-{name}-{os.getpid()}"
            written[aside] = folder / name
            aside.write_text(text, encoding="utf-8")
        for aside, file in written.items():
            os.replace(aside, file)
    except OSError as error:
        raise ArtifactError(f"cannot write into {folder}: {error}") from error
    finally:
        for aside in written:
            aside.unlink(missing_ok=True)


def common_config(method: str, config: Any, backbone: dict[str, Any]) -> dict[str, Any]:
    """The part of ``config.json`` that every artifact has."""
    return {
        "format_version": FORMAT_VERSION,
        "ttt_plugins_version": __version__,
        "method": method,
        "fields": dataclasses.asdict(config),
        "backbone": backbone,
    }


def timm_part(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a ``config.json`` that `timm_config` wrote."""
    return {key: config[key] for key in TIMM_KEYS if key in config}


def timm_config(model: nn.Module, architecture: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """The keys that make a folder a timm repository too (``timm.create_model("hf-hub:…")``)."""
    settings = timm.data.resolve_model_data_config(model)
    kept = ("input_size", "mean", "std", "interpolation", "crop_pct")
    pretrained = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    pretrained = {k: pretrained[k] for k in kept if k in pretrained}
    pretrained["num_classes"] = model.num_classes
    for key in ("first_conv", "classifier"):
        if value := model.pretrained_cfg.get(key):
            pretrained[key] = list(value) if isinstance(value, tuple) else value
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": model_args,
        "pretrained_cfg": pretrained,
    }
