"""Classifiers by name: timm, RobustBench's zoo, an artifact that carries one, a Hub repository.

Each comes with its origin: what an artifact has to say so that the same weights are found again.
"""

from __future__ import annotations

import difflib
import inspect
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..errors import ArtifactError, InputError
from . import hub
from .build_budget import BuildBudget
from .folder import CONFIG, MODEL, OWN_WEIGHTS, Artifact, bundled_folder, read_artifact
from .hub import Access, Found
from .schema import check_timm_part, pretrained_settings
from .strict_json import read_json
from .tensor_files import TensorInfo, fingerprint, read_tensors, tensor_header

__all__ = ["carried_model", "check_fingerprint", "described_model", "load_model", "refuse_random"]

#: What timm's own loaders call the weights of a repository, in the order they look.
_TIMM_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


# -- timm ------------------------------------------------------------------------------------


def _timm_model(name: str, pretrained: bool, seed: int | None, **options) -> nn.Module:
    plain = name.split(":")[-1].split(".")[0]
    if ":" not in name and not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), 3)
        raise InputError(
            f"{name!r} is not a model timm {timm.__version__} knows"
            + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
        )
    try:
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm passes on whatever the Hub's transport raises
        lines = str(error).strip().splitlines()
        hint = ""
        if pretrained:
            hint = "; its weights come from the Hugging Face Hub: check the connection, and that "
            hint += f"timm {timm.__version__} fits huggingface_hub (timm 1.0.20 and earlier does "
            hint += "not fit huggingface_hub 2)"
        reason = lines[0] if lines else type(error).__name__
        raise InputError(f"timm could not create {name!r}: {reason}{hint}") from error


def _hub_id(model: nn.Module) -> str | None:
    found = (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id")
    return found.partition("@")[0] if isinstance(found, str) and "/" in found else None


def _timm_origin(name: str, model: nn.Module, pretrained: bool) -> dict[str, Any]:
    if ":" in name:  # timm's "local-dir:": a path of this machine
        return {"source": "module", "name": type(model).__name__}
    origin = {"source": "timm", "name": name, "pretrained": pretrained, "timm": timm.__version__}
    if pretrained and (repository := _hub_id(model)):
        origin["revision"] = hub.timm_commit(repository, _TIMM_FILES)
    return origin


def _safe_timm_model(name: str, revision: str | None, access: Access) -> tuple[nn.Module, str]:
    """A timm model whose weights come from safetensors of one commit, by our own reader.

    timm itself says which repository they are in. Its own loader is not asked for them: some
    versions unpickle a repository that holds no safetensors.

    Raises:
        ArtifactError: timm has no such model or no weights for it on the Hub.
        HubError: they cannot be fetched, or the repository has none in safetensors.
    """
    settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
    repository = settings.hf_hub_id if settings is not None else None
    if not repository:
        raise ArtifactError(f"timm {timm.__version__} has no weights for {name!r} on the Hub")
    if repository.endswith("/"):  # the tag completes it
        repository += settings.architecture + (f".{settings.tag}" if settings.tag else "")
    # timm's own cache, which `cache_dir` does not move.
    access = replace(access, revision=revision, cache_dir=None)
    file, commit = hub.download_weights(repository, access)
    weights = {"state_dict": read_tensors(file)}
    model = _timm_model(name, True, None, pretrained_cfg_overlay=weights)
    model.pretrained_cfg["state_dict"] = None  # the tensors are the model's now
    return model, commit


# -- models that an artifact carries ---------------------------------------------------------


def _constructor_keywords(architecture: str) -> set[str]:
    """Keywords of the model classes in the module that registers an architecture."""
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    found = {name for c in classes for name in inspect.signature(c.__init__).parameters}
    # These belong to timm's loader, which could fetch and unpickle files.
    loader = set(inspect.signature(timm.create_model).parameters) | {"self", "args", "kwargs"}
    return {n for n in found - loader if not n.startswith("pretrained")}


def _build(config: dict[str, Any], file: Path, where: str) -> nn.Module:
    """The architecture that a timm ``config.json`` describes, with the weights beside it."""
    check_timm_part(config, where)
    architecture, arguments = config["architecture"], config.get("model_args", {})
    if not timm.is_model(architecture.split(".")[0]):
        raise ArtifactError(f"{where}: timm {timm.__version__} knows no {architecture!r}")
    known = _constructor_keywords(architecture.split(".")[0])
    if extra := sorted(arguments.keys() - known):
        raise ArtifactError(f"{where}: {architecture} takes no argument {extra[0]!r}")
    header = tensor_header(file)
    budget = BuildBudget(sum(math.prod(t.shape) for t in header.values()), len(header))
    try:
        with torch.random.fork_rng(devices=[]), budget:
            # Named here, so that no artifact can pass them: they would fetch or unpickle files.
            model = timm.create_model(
                architecture,
                pretrained=False,
                pretrained_cfg=None,
                pretrained_cfg_overlay=pretrained_settings(config),
                checkpoint_path="",
                num_classes=config["num_classes"],
                **arguments,
            )
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from error
    except Exception as error:  # a constructor raises anything when its arguments do not fit
        raise ArtifactError(
            f"{where}: {architecture} cannot be built with {arguments} "
            f"({type(error).__name__}: {error})"
        ) from error
    floating = {t.dtype for t in header.values() if t.dtype.is_floating_point}
    if len(floating) == 1:
        model = model.to(floating.pop())
    wanted = {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in model.state_dict().items()}
    for name in sorted(wanted.keys() | header.keys()):
        if (has := header.get(name)) != (needs := wanted.get(name)):
            raise ArtifactError(
                f"{where}: {file.name} does not fit {architecture}: {name[:80]!r} is "
                f"{_said(has)}, expected {_said(needs)}"
            )
    return model


def _said(tensor: TensorInfo | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tensor.shape}"


def carried_model(artifact: Artifact, folder: Path, where: str) -> nn.Module:
    """The classifier whose weights an artifact carries.

    Raises:
        ArtifactError: what ``config.json`` describes is not what the weights are.
    """
    model = _build(artifact.config, folder / MODEL, where)
    model.load_state_dict(artifact.weights, strict=True)
    check_fingerprint(model, artifact.config["backbone"], where, strict=True)
    return model


def _timm_repository(folder: Path, where: str) -> nn.Module:
    """A classifier from somebody's timm repository: safetensors only."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ArtifactError(f"{where}: config.json is not a JSON object")
    model = _build(config, folder / MODEL, where)
    model.load_state_dict(read_tensors(folder / MODEL), strict=True)
    return model.eval()


def check_fingerprint(
    model: nn.Module,
    backbone: dict[str, Any],
    name: str,
    strict: bool = True,
    remedy: str = "pass strict_backbone=False to use it all the same",
) -> None:
    """Compare a classifier with the one an adapter was made for.

    Raises:
        ArtifactError: they differ; a warning unless ``strict``.
    """
    wanted = backbone.get("fingerprint")
    if wanted is None or (found := fingerprint(model.state_dict())) == wanted:
        return
    message = (
        f"{name} was made for {backbone.get('name')!r} with weights {wanted}, "
        f"but this {type(model).__name__} has {found}"
    )
    if strict:
        raise ArtifactError(f"{message}; {remedy}")
    warnings.warn(message, stacklevel=4)


def refuse_random(model: str | nn.Module, pretrained: bool) -> None:
    """Nothing is trained on top of a network with random weights by mistake.

    Raises:
        InputError: the name of a timm architecture alone.
    """
    if not isinstance(model, str) or pretrained or Path(model).is_dir():
        return
    if ":" not in model and timm.is_model(model.split(".")[0]):
        raise InputError(
            f"{model} alone would be a network with random weights: ask for timm's "
            "(pretrained=True, --pretrained), or name an artifact, a Hub repository or a "
            "RobustBench model, or give a module"
        )


# -- by name ---------------------------------------------------------------------------------


def load_model(
    model: str | nn.Module,
    pretrained: bool = False,
    model_dir: str | Path = "models",
    seed: int | None = None,
    access: Access = Access(),
) -> tuple[nn.Module, dict[str, Any], Artifact | None]:
    """A classifier, its origin, and the artifact it was in.

    Args:
        model: a timm name (``"hf-hub:org/name"`` too: always with its weights), a zoo name, an
            artifact that carries a model (bundled, a folder, on the Hub), or a module.

    Raises:
        InputError: no such model.
        ArtifactError: an artifact that is damaged, missing, or carries no model.
    """
    # A compiled module's own one: adapting gives it other parameters on every call.
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "a TorchScript module runs with its own parameters only: wrap the Python module that "
            "it was made from"
        )
    if isinstance(model, nn.Module):
        return model, {"source": "module", "name": type(model).__name__}, None
    if not isinstance(model, (str, Path)):
        raise InputError(f"model must be a name or an nn.Module, got {type(model).__name__}")
    model = str(model)
    if model.startswith("robustbench:"):
        from ..utils.robustbench import load_zoo_model

        return load_zoo_model(model, model_dir), {"source": "robustbench", "name": model}, None
    plain = model.removeprefix("hf-hub:").removeprefix("hf_hub:")
    found = hub.find(plain, access)
    if found is None and plain != model:
        raise InputError(f"{model[:200]!r} names no Hub repository: it must be hf-hub:ORG/NAME")
    if found is None:
        module = _timm_model(model, pretrained, seed)
        return module, _timm_origin(model, module, pretrained), None
    return _found_model(found, bundled=model.startswith("bundled:"))


def _found_model(found: Found, bundled: bool) -> tuple[nn.Module, dict[str, Any], Artifact | None]:
    """The classifier in an artifact's folder or a timm repository, as for `load_model`."""
    if found.repository is not None:
        origin = {"source": "hub", "name": found.name}
        if "format_version" not in read_json(found.folder / CONFIG):
            return _timm_repository(found.folder, found.name), origin, None
    elif bundled:
        origin = {"source": "bundled", "name": found.name}
    else:
        origin = {"source": "folder", "name": str(found.folder.resolve())}
    artifact = read_artifact(found.folder, found.name)
    if artifact.weights is None:
        raise InputError(
            f"{found.name} is an adapter without a model of its own; load it with "
            f"from_pretrained({found.name!r})"
        )
    return carried_model(artifact, found.folder, found.name), origin, artifact


def described_model(
    described: dict[str, Any], where: str, access: Access
) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier that an artifact's ``config.json`` names, and its origin.

    Raises:
        ArtifactError: it names none that can be found again.
    """
    source, name = described["source"], described.get("name")
    if source in (OWN_WEIGHTS, "module") or name is None:
        raise ArtifactError(
            f"{where} was made for a {name!r} that it cannot find by itself; pass it as backbone="
        )
    try:
        return _named_by_artifact(source, name, described, access)
    except ArtifactError as error:
        raise type(error)(f"the classifier of {where}: {error}") from error


def _named_by_artifact(
    source: str, name: str, described: dict[str, Any], access: Access
) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier of one source; the name is data and is never parsed for another one."""
    revision, trained = described.get("revision"), bool(described.get("pretrained"))
    if source == "timm":
        origin = {"source": "timm", "name": name, "pretrained": trained}
        if not trained:
            return _timm_model(name, False, None), origin | {"timm": timm.__version__}
        module, commit = _safe_timm_model(name, revision, access)
        return module, origin | {"revision": commit}
    if source == "robustbench":
        return load_model(name, access=access)[:2]
    if source == "hub":
        if not revision:
            raise ArtifactError(f"{name} is named without the commit it was made for")
        found = hub.download(name, replace(access, revision=revision))
    else:  # "bundled" or "folder"
        bundled = source == "bundled"
        folder = bundled_folder(name.removeprefix("bundled:")) if bundled else Path(name)
        found = Found(folder, name)
    module, origin, _ = _found_model(found, bundled=source == "bundled")
    return module, origin
