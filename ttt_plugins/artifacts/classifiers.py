"""Classifiers by name: timm, RobustBench's zoo, an artifact that carries one, a Hub repository.

Each comes with its origin: what an artifact has to say so that the same weights are found again.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn

from ..backbones.refused import check_wrappable
from ..backbones.shell import Shell
from ..errors import ArtifactError, InputError
from ..utils.robustbench import load_zoo_model
from . import hub
from .build_budget import TOO_LARGE, BuildBudget, rehearse
from .folder import CONFIG, MODEL, Artifact, bundled_folder, read_artifact
from .hub import Place
from .hub_access import DEFAULT_ACCESS, Access
from .schema import OWN_WEIGHTS, check_timm_part, pretrained_settings
from .strict_json import read_json
from .tensor_files import TensorInfo, described, fingerprint, read_tensors, tensor_header

__all__ = ["carried_model", "check_fingerprint", "described_model", "load_model", "refuse_random"]

#: What an artifact has to say so that the same weights are found again.
Origin = dict[str, Any]

#: What timm's own loaders call the weights of a repository, in the order they look.
_TIMM_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


# -- timm ------------------------------------------------------------------------------------


def _timm_model(name: str, pretrained: bool, seed: int | None, **options: Any) -> nn.Module:
    """A timm model by the name of its architecture; never by a name that timm would parse."""
    plain = name.split(".")[0]
    if not re.fullmatch(r"[\w.\-]+", name) or not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), 3)
        raise InputError(
            f"{name[:200]!r} is not a model timm {timm.__version__} knows"
            + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
        )
    try:
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm passes on whatever the Hub's transport raises
        hint = ""
        if pretrained:
            hint = (
                "; its weights come from the Hugging Face Hub: check the connection, and that "
                f"timm {timm.__version__} fits huggingface_hub (timm 1.0.20 and earlier does not "
                "fit huggingface_hub 2)"
            )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"timm could not create {name!r}: {reason}{hint}") from error


def _timm_origin(name: str, model: nn.Module, pretrained: bool) -> Origin:
    origin = {"source": "timm", "name": name, "pretrained": pretrained, "timm": timm.__version__}
    repository = (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id")
    if pretrained and isinstance(repository, str) and "/" in repository:
        origin["revision"] = hub.timm_commit(repository.partition("@")[0], _TIMM_FILES)
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
    if settings is None or not repository:
        raise ArtifactError(f"timm {timm.__version__} has no weights for {name!r} on the Hub")
    if repository.endswith("/"):  # the tag completes it
        repository += str(settings.architecture) + (f".{settings.tag}" if settings.tag else "")
    # timm's own cache, which `cache_dir` does not move.
    access = replace(access, revision=revision, cache_dir=None)
    file, commit = hub.download_weights(repository, access)
    weights = {"state_dict": read_tensors(file)}
    model = _timm_model(name, True, None, pretrained_cfg_overlay=weights)
    cast("dict[str, Any]", model.pretrained_cfg)["state_dict"] = None  # the model has them now
    return model, commit


# -- models that a config.json describes -----------------------------------------------------


def _constructor_keywords(architecture: str) -> set[str]:
    """Keywords of the model classes in the module that registers an architecture."""
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    keywords = {name for c in classes for name in inspect.signature(c.__init__).parameters}
    # These belong to timm's loader, which could fetch and unpickle files.
    loader = set(inspect.signature(timm.create_model).parameters) | {"self", "args", "kwargs"}
    return {n for n in keywords - loader if not n.startswith("pretrained")}


def _described(
    config: Mapping[str, Any], header: Mapping[str, TensorInfo], where: str
) -> nn.Module:
    """The architecture that a timm ``config.json`` describes, with weights yet to be loaded.

    Args:
        config: the ``config.json``.
        header: types and shapes of the weights beside it, which bound what is built.
        where: what to call the artifact in errors.

    Raises:
        ArtifactError: the description is not one of a timm model, builds something far larger
            than the weights, or something that they do not fit.
    """
    check_timm_part(config, where)
    architecture, arguments = config["architecture"], config.get("model_args", {})
    plain = architecture.split(".")[0]
    if not timm.is_model(plain):
        raise ArtifactError(f"{where}: timm {timm.__version__} knows no {architecture!r}")
    if extra := sorted(arguments.keys() - _constructor_keywords(plain)):
        raise ArtifactError(f"{where}: {architecture} takes no argument {extra[0]!r}")
    elements = sum(math.prod(t.shape) for t in header.values())
    create = partial(_create, config, elements, len(header), where)
    known = timm.get_pretrained_cfg(plain)
    size = pretrained_settings(config).get("input_size")
    if arguments or (size is not None and (known is None or size != tuple(known.input_size))):
        rehearse(create, elements, where)
    model = create()
    floating = {t.dtype for t in header.values() if t.dtype.is_floating_point}
    if len(floating) == 1:
        model = model.to(floating.pop())
    wanted = described(model.state_dict())
    for name in sorted(wanted.keys() | header.keys()):
        if (has := header.get(name)) != (needs := wanted.get(name)):
            raise ArtifactError(
                f"{where}: {MODEL} does not fit {architecture}: {name[:80]!r} is {_said(has)}, "
                f"expected {_said(needs)}"
            )
    return model


def _create(config: Mapping[str, Any], elements: int, tensors: int, where: str) -> nn.Module:
    architecture, arguments = config["architecture"], config.get("model_args", {})
    try:
        with torch.random.fork_rng(devices=[]), BuildBudget(elements, tensors):
            # Named here, so that no artifact can pass them: they would fetch or unpickle files.
            return timm.create_model(
                architecture,
                pretrained=False,
                pretrained_cfg=None,
                pretrained_cfg_overlay=pretrained_settings(config),
                checkpoint_path="",
                num_classes=config["num_classes"],
                **arguments,
            )
    except (ArtifactError, MemoryError) as error:
        raise ArtifactError(f"{where}: {str(error) or TOO_LARGE}") from error
    except Exception as error:  # a constructor raises anything when its arguments do not fit
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise ArtifactError(
            f"{where}: {architecture} cannot be built with {arguments} ({reason})"
        ) from error


def _said(tensor: TensorInfo | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tensor.shape}"


def carried_model(artifact: Artifact, where: str) -> nn.Module:
    """The classifier whose weights an artifact carries.

    Args:
        artifact: one that has ``weights``.
        where: what to call it in errors.

    Raises:
        ArtifactError: what ``config.json`` describes is not what the weights are.
    """
    weights = artifact.weights or {}
    model = _described(artifact.config, described(weights), where)
    model.load_state_dict(weights, strict=True)
    check_fingerprint(model, artifact.config["backbone"], where, strict=True)
    return model


def _timm_repository(folder: Path, where: str) -> nn.Module:
    """A classifier from a timm repository, whoever wrote it: safetensors only."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ArtifactError(f"{where}: config.json is not a JSON object")
    if not (folder / MODEL).is_file():
        raise ArtifactError(
            f"{where}: {MODEL} is missing, and pickled weights are not read: save the model as "
            "safetensors"
        )
    header = tensor_header(folder / MODEL)
    model = _described(config, header, where)
    model.load_state_dict(read_tensors(folder / MODEL), strict=True)
    return model.eval()


def check_fingerprint(
    model: nn.Module,
    backbone: Mapping[str, Any],
    name: str,
    strict: bool = True,
    remedy: str = "pass strict_backbone=False to use it all the same",
) -> None:
    """Compare a classifier with the one an adapter was made for.

    Args:
        model: the classifier.
        backbone: the part of ``config.json`` that describes the one it was made for.
        name: what to call the artifact in errors.
        strict: whether another classifier is an error, or else a warning.
        remedy: the end of the error's message.

    Raises:
        ArtifactError: they differ, and ``strict``.
    """
    wanted = backbone.get("fingerprint")
    if wanted is None or (actual := fingerprint(model.state_dict())) == wanted:
        return
    message = (
        f"{name} was made for {backbone.get('name')!r} with weights {wanted}, "
        f"but this {type(model).__name__} has {actual}"
    )
    if strict:
        raise ArtifactError(f"{message}; {remedy}")
    warnings.warn(message, stacklevel=4)


def refuse_random(model: str | nn.Module, pretrained: bool) -> None:
    """Nothing is trained on top of a network with random weights by mistake.

    Args:
        model: a name as for `load_model`, or a module, which is always accepted.
        pretrained: whether timm's weights are asked for.

    Raises:
        InputError: the name of a timm architecture alone.
    """
    if not isinstance(model, str) or pretrained or Path(model).is_dir():
        return
    plain = model.removeprefix("timm:")
    if ":" not in plain and timm.is_model(plain.split(".")[0]):
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
    access: Access = DEFAULT_ACCESS,
) -> tuple[nn.Module, Origin, Artifact | None]:
    """A classifier, its origin, and the artifact it was in.

    Args:
        model: a timm name, a timm repository on the Hub or in a folder (``"hf-hub:org/name"``,
            ``"local-dir:path"``: always with its weights), a zoo name, an artifact that carries a
            model (bundled, a folder, on the Hub), an adapter, of which the unadapted model is
            taken, or a module.
        pretrained: whether a timm name comes with timm's weights.
        model_dir: where RobustBench keeps its checkpoints.
        seed: of the random weights of a timm model; torch's global generator without it.
        access: how to reach the Hub.

    Raises:
        InputError: no such model.
        ArtifactError: an artifact that is damaged, missing, or carries no model.
    """
    # A compiled module's own one: adapting gives it other parameters on every call.
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, Shell):
        return model.backbone.model, model.origin, None
    if isinstance(model, nn.Module):
        check_wrappable(model)
        return model, _module_origin(model), None
    if not isinstance(model, (str, Path)):
        raise InputError(f"model must be a name or an nn.Module, got {type(model).__name__}")
    name = str(model)
    if name.startswith("robustbench:"):
        return load_zoo_model(name, model_dir), {"source": "robustbench", "name": name}, None
    if name.startswith("local-dir:"):
        module = _timm_repository(Path(name.removeprefix("local-dir:")), name)
        return module, _module_origin(module), None  # the path of one machine says nothing
    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    place = hub.find(plain, access)
    if place is None and plain != name:
        raise InputError(f"{name[:200]!r} names no Hub repository: it must be hf-hub:ORG/NAME")
    if place is None:
        name = name.removeprefix("timm:")
        module = _timm_model(name, pretrained, seed)
        return module, _timm_origin(name, module, pretrained), None
    return _model_at(place, bundled=name.startswith("bundled:"))


def _module_origin(module: nn.Module) -> Origin:
    return {"source": "module", "name": type(module).__name__}


def _model_at(place: Place, bundled: bool) -> tuple[nn.Module, Origin, Artifact | None]:
    """The classifier in an artifact's folder or a timm repository, as for `load_model`."""
    if place.repository is not None:
        origin = {"source": "hub", "name": place.name}
        if "format_version" not in read_json(place.folder / CONFIG):
            return _timm_repository(place.folder, place.name), origin, None
    elif bundled:
        origin = {"source": "bundled", "name": place.name}
    else:
        origin = {"source": "folder", "name": str(place.folder.resolve())}
    artifact = read_artifact(place.folder, place.name)
    if artifact.weights is None:
        raise InputError(
            f"{place.name} is an adapter without a model of its own; load it with "
            f"from_pretrained({place.name!r})"
        )
    return carried_model(artifact, place.name), origin, artifact


def described_model(
    backbone: Mapping[str, Any], where: str, access: Access
) -> tuple[nn.Module, Origin]:
    """The classifier that an artifact's ``config.json`` names, and its origin.

    Args:
        backbone: the part of ``config.json`` that describes it.
        where: what to call the artifact in errors.
        access: how to reach the Hub.

    Raises:
        ArtifactError: it names none that can be found again.
    """
    source, name = backbone["source"], backbone.get("name")
    if source in (OWN_WEIGHTS, "module") or name is None:
        raise ArtifactError(
            f"{where} was made for a {name!r} that it cannot find by itself; pass it as backbone="
        )
    try:
        return _named_by_artifact(source, name, backbone, access)
    except ArtifactError as error:
        raise type(error)(f"the classifier of {where}: {error}") from error


def _named_by_artifact(
    source: str, name: str, backbone: Mapping[str, Any], access: Access
) -> tuple[nn.Module, Origin]:
    """The classifier of one source; the name is data and is never parsed for another one."""
    revision, trained = backbone.get("revision"), bool(backbone.get("pretrained"))
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
        place = hub.download(name, replace(access, revision=revision))
    else:  # "bundled" or "folder"
        bundled = source == "bundled"
        folder = bundled_folder(name.removeprefix("bundled:")) if bundled else Path(name)
        place = Place(folder, name)
    return _model_at(place, bundled=source == "bundled")[:2]
