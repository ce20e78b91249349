"""Artifacts: a folder with ``config.json``, ``model.safetensors`` and a card.

Only JSON and safetensors are read; nothing in an artifact can run code. Folders are written
aside and renamed, so an interrupted save leaves what was there before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import ArtifactError
from .version import __version__

__all__ = [
    "Artifact",
    "bundled_folder",
    "fingerprint",
    "list_bundled",
    "named_folder",
    "read",
    "read_named",
    "write",
]

FORMAT_VERSION = 1
_FILES = {"config.json", "model.safetensors", "adapter.safetensors", "README.md"}

#: ``config["backbone"]["source"]`` when the model's weights are in the artifact itself.
OWN_WEIGHTS = "artifact"
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Artifact:
    """Contents of an artifact.

    Attributes:
        config: the parsed ``config.json``.
        tensors: what the method has learned: in ``model.safetensors``, or in
            ``adapter.safetensors`` where the former holds the model.
        weights: the model's own ``state_dict``, None where the artifact names its model instead.
        card: the text of ``README.md``.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor] | None = None
    card: str = ""


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a model's ``state_dict()``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


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


def named_folder(name: str) -> Path | None:
    """The folder that ``"bundled:<name>"`` or a path names, None when it is no artifact's."""
    if name.startswith("bundled:"):
        return bundled_folder(name.removeprefix("bundled:"))
    folder = Path(name)
    return folder if (folder / "config.json").is_file() else None


def read_named(name: str) -> Artifact:
    """Read the artifact that ``"bundled:<name>"`` or a folder names.

    Raises:
        ArtifactError: there is none, or it does not load.
    """
    return read(named_folder(name) or name)


def read(folder: str | Path) -> Artifact:
    """Read an artifact folder.

    Raises:
        ArtifactError: a file is missing or damaged, or the format is a newer one.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{folder} is not an adapter artifact: {error}") from error
    except ValueError as error:
        raise ArtifactError(f"{folder}/config.json is not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        found = config.get("format_version") if isinstance(config, dict) else None
        raise ArtifactError(
            f"{folder}/config.json has format_version {found!r}; this version of ttt_plugins "
            f"({__version__}) reads {FORMAT_VERSION}. A newer artifact needs a newer ttt_plugins."
        )
    for key, kind in (("method", str), ("fields", dict), ("backbone", dict)):
        if not isinstance(config.get(key), kind):
            raise ArtifactError(f"{folder}/config.json: {key!r} must be a {kind.__name__}")
    tensors, weights = _read_tensors(folder / "model.safetensors"), None
    if config["backbone"].get("source") == OWN_WEIGHTS:
        second = folder / "adapter.safetensors"
        tensors, weights = _read_tensors(second) if second.is_file() else {}, tensors
    card = folder / "README.md"
    return Artifact(config, tensors, weights, card.read_text("utf-8") if card.is_file() else "")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read ({error})") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{file}: {name!r} holds non-finite values")
    return tensors


def write(folder: str | Path, artifact: Artifact) -> Path:
    """Write an artifact folder, replacing an earlier artifact there, all or nothing.

    Raises:
        ArtifactError: the folder holds something else, or the disk refuses.
    """
    folder = Path(folder)
    if folder.exists():
        ours = folder.is_dir() and {p.name for p in folder.iterdir()} <= _FILES
        if not ours:
            raise ArtifactError(f"{folder} is not empty and not an artifact; choose another folder")
    aside = old = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        text = json.dumps(artifact.config, indent=2, sort_keys=True, allow_nan=False)
        (aside / "config.json").write_text(text + "\n", encoding="utf-8")
        for file, tensors in _tensor_files(artifact).items():
            plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            save_file(plain, aside / file, metadata={"format": "pt"})
        (aside / "README.md").write_text(artifact.card, encoding="utf-8")
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
        return {"model.safetensors": artifact.tensors}
    files = {"model.safetensors": artifact.weights}
    return files | ({"adapter.safetensors": artifact.tensors} if artifact.tensors else {})


def common_config(method: str, config: Any, backbone: dict[str, Any]) -> dict[str, Any]:
    """The part of ``config.json`` that every artifact has."""
    return {
        "format_version": FORMAT_VERSION,
        "ttt_plugins_version": __version__,
        "method": method,
        "fields": dataclasses.asdict(config),
        "backbone": backbone,
    }


_TIMM_KEYS = ("architecture", "num_classes", "num_features", "model_args", "pretrained_cfg")


def timm_part(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a ``config.json`` that `timm_config` wrote."""
    return {key: config[key] for key in _TIMM_KEYS if key in config}


def timm_config(model: nn.Module, architecture: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """The keys that make a folder a timm repository too (``timm.create_model("hf-hub:…")``)."""
    settings = timm.data.resolve_model_data_config(model)
    kept = ("input_size", "mean", "std", "interpolation", "crop_pct")
    pretrained = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    pretrained = {k: pretrained[k] for k in kept if k in pretrained}
    pretrained["num_classes"] = model.num_classes
    for key in ("first_conv", "classifier"):
        if value := model.pretrained_cfg.get(key):
            pretrained[key] = value
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": model_args,
        "pretrained_cfg": pretrained,
    }
