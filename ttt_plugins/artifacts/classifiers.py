"""Loading classifiers by name: from timm, RobustBench, torchvision, an artifact or the Hub.

Each classifier comes with its origin: what an artifact must record to find the same weights again.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn

from ..backbones.kinds import classifier, named_kind
from ..backbones.refused import check_wrappable
from ..backbones.shell import Shell
from ..errors import ArtifactError, InputError
from ..utils.robustbench import load_zoo_model
from . import hub
from .folder import CONFIG, Artifact, bundled_folder, read_artifact
from .hub import Place
from .hub_access import DEFAULT_ACCESS, Access
from .repositories import described_by_config, repository_model
from .schema import OWN_WEIGHTS
from .strict_json import read_json
from .tensor_files import described, fingerprint, read_tensors

__all__ = ["carried_model", "check_fingerprint", "described_model", "load_model", "refuse_random"]

Origin = dict[str, Any]
#: Names that timm's own loaders give to the weights in a repository, in the order they try them.
_TIMM_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


# -- timm ------------------------------------------------------------------------------------


def _timm_model(name: str, pretrained: bool, seed: int | None, **options: Any) -> nn.Module:
    """A timm model by the name of its architecture, never by a prefixed name that timm parses."""
    plain = name.split(".")[0]
    if not re.fullmatch(r"[\w.\-]+", name) or not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), 3)
        raise InputError(
            f"{name[:200]!r} is not a model that timm {timm.__version__} knows"
            + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
        )
    try:
        return _seeded(lambda: timm.create_model(name, pretrained=pretrained, **options), seed)
    except Exception as error:  # timm passes on any exception of the connection to the Hub
        hint = ""
        if pretrained:
            hint = (
                "; its weights come from the Hugging Face Hub: check the connection, and that "
                f"timm {timm.__version__} fits huggingface_hub (timm 1.0.20 and earlier does not "
                "fit huggingface_hub 2)"
            )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"timm could not create {name!r}: {reason}{hint}") from error


def _seeded(create: Callable[[], nn.Module], seed: int | None) -> nn.Module:
    """What ``create`` makes of a seed; with None it draws from torch's global generator."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return create()


def _timm_origin(name: str, model: nn.Module, pretrained: bool) -> Origin:
    origin = {"source": "timm", "name": name, "pretrained": pretrained, "timm": timm.__version__}
    repository = (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id")
    if pretrained and isinstance(repository, str) and "/" in repository:
        origin["revision"] = hub.timm_commit(repository.partition("@")[0], _TIMM_FILES)
    return origin


def _safe_timm_model(name: str, revision: str | None, access: Access) -> tuple[nn.Module, str]:
    """A timm model with weights from a safetensors file of one commit, read by this package.

    timm tells which repository holds the weights. Its own loader is not used, because some versions
    of it unpickle files if the repository has no safetensors file.

    Returns:
        the model, and the commit.

    Raises:
        ArtifactError: timm has no such model, or no weights for it on the Hub.
        HubError: the weights cannot be downloaded, or the repository has no safetensors file.
    """
    repository = hub.timm_repository(name)
    if repository is None:
        raise ArtifactError(f"timm {timm.__version__} has no weights for {name!r} on the Hub")
    # They belong in timm's own cache, wherever `cache_dir` is.
    access = replace(access, revision=revision, cache_dir=None)
    file, commit = hub.download_weights(repository, access)
    weights = {"state_dict": read_tensors(file)}
    model = _timm_model(name, True, None, pretrained_cfg_overlay=weights)
    cast("dict[str, Any]", model.pretrained_cfg)["state_dict"] = None  # the model has them now
    return model, commit


# -- models inside artifacts ------------------------------------------------------------------


def carried_model(artifact: Artifact, where: str) -> nn.Module:
    """The classifier whose weights an artifact carries.

    Args:
        artifact: an artifact that has ``weights``.
        where: name of the artifact in error messages.

    Raises:
        ArtifactError: the weights are not those that ``config.json`` describes.
    """
    weights = artifact.weights or {}
    model = described_by_config(artifact.config, described(weights), where)
    model.load_state_dict(weights, strict=True)
    check_fingerprint(model, artifact.config["backbone"], where, strict=True)
    return model


def check_fingerprint(
    model: nn.Module,
    backbone: Mapping[str, Any],
    name: str,
    strict: bool = True,
    remedy: str = "pass strict_backbone=False to use it anyway",
) -> None:
    """Compare the weights of a classifier with those that an adapter was made for.

    Args:
        model: the classifier.
        backbone: the part of ``config.json`` that describes the adapter's classifier.
        name: name of the artifact in messages.
        strict: whether a difference is an error; otherwise it is a warning.
        remedy: last part of the error message.

    Raises:
        ArtifactError: the weights differ, and ``strict`` is true.
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
    """Refuse to train on top of a network with random weights by mistake.

    Args:
        model: a name as for `load_model`, or a module, which is always accepted.
        pretrained: whether the library's weights are requested.

    Raises:
        InputError: the model is the name of an architecture, and ``pretrained`` is false.
    """
    if not isinstance(model, str) or pretrained or Path(model).is_dir():
        return
    plain = model.removeprefix("timm:")
    of_timm = ":" not in plain and timm.is_model(plain.split(".")[0])
    if of_timm or named_kind(model) is not None:
        library = "timm" if of_timm else model.partition(":")[0]
        raise InputError(
            f"{model} alone would be a network with random weights: request {library}'s "
            "weights (pretrained=True, --pretrained), or name an artifact, a Hub repository or a "
            "RobustBench model, or give a module"
        )


# -- by name ---------------------------------------------------------------------------------


def load_model(
    model: str | nn.Module,
    pretrained: bool = False,
    model_dir: str | Path = "models",
    seed: int | None = None,
    access: Access = DEFAULT_ACCESS,
    labels: Sequence[str] | None = None,
) -> tuple[nn.Module, Origin, Artifact | None]:
    """Load a classifier.

    Args:
        model: the name of a timm model; a repository of timm or transformers on the Hub or in a
            folder (``"hf:org/name"``, ``"local-dir:path"``), which is always loaded with its
            weights; the name of another kind (``"torchvision:resnet18"``) or of a model in
            RobustBench's zoo (``"robustbench:…"``); an artifact that carries a model (bundled, in
            a folder or on the Hub); an adapter, whose unadapted model is returned; or a module.
        pretrained: whether to load the weights of timm or torchvision for a name of theirs.
        model_dir: folder of RobustBench's checkpoints.
        seed: seed for random weights; None for torch's global generator.
        access: how to reach the Hub.
        labels: names of the classes, for a module that compares images with texts.

    Returns:
        the classifier, its origin, and the artifact that carried it, None if there was none.

    Raises:
        InputError: there is no such model, or the artifact carries no model.
        ArtifactError: the artifact is damaged or missing.
    """
    # Of a compiled module, the module inside: adaptation passes new parameters with every call.
    model = getattr(model, "_orig_mod", model)
    if labels is not None and (isinstance(model, Shell) or not isinstance(model, nn.Module)):
        raise InputError("labels= needs a module that compares images with texts, as of open_clip")
    if isinstance(model, Shell):
        return model.backbone.model, model.origin, None
    if isinstance(model, nn.Module):
        check_wrappable(model)
        return classifier(model, labels), _module_origin(model), None
    if not isinstance(model, (str, Path)):
        raise InputError(f"model must be a name or an nn.Module, got {type(model).__name__}")
    name = str(model)
    if name.startswith("robustbench:"):
        return load_zoo_model(name, model_dir), {"source": "robustbench", "name": name}, None
    if name.startswith("local-dir:"):
        module = repository_model(Path(name.removeprefix("local-dir:")), name)
        return module, _module_origin(module), None  # a path is of no use on another machine
    if (found := named_kind(name)) is not None:
        kind, own_name = found
        module = _seeded(lambda: kind.named(own_name, pretrained), seed)
        origin = {"source": kind.prefix, "name": name, "pretrained": pretrained}
        return module, origin, None
    plain = re.sub(r"^(hf|hf-hub|hf_hub):", "", name)
    place = hub.find(plain, access)
    if place is None and plain != name:
        raise InputError(f"{name[:200]!r} names no Hub repository: it must be hf:ORG/NAME")
    if place is None:
        name = name.removeprefix("timm:")
        if pretrained:
            hub.await_answer(hub.timm_repository(name))  # timm itself would wait for minutes
        module = _timm_model(name, pretrained, seed)
        return module, _timm_origin(name, module, pretrained), None
    return _model_at(place, bundled=name.startswith("bundled:"))


def _module_origin(module: nn.Module) -> Origin:
    return {"source": "module", "name": type(module).__name__}


def _model_at(place: Place, bundled: bool) -> tuple[nn.Module, Origin, Artifact | None]:
    """The classifier in an artifact's folder or a model's repository, as for `load_model`."""
    if place.repository is not None:
        origin = {"source": "hub", "name": place.name}
        if "format_version" not in read_json(place.folder / CONFIG):
            return repository_model(place.folder, place.name), origin, None
    elif bundled:
        origin = {"source": "bundled", "name": place.name}
    else:
        origin = {"source": "folder", "name": str(place.folder.resolve())}
    artifact = read_artifact(place.folder, place.name)
    if artifact.weights is None:
        raise InputError(
            f"{place.name} is an adapter that carries no model; load it with "
            f"from_pretrained({place.name!r})"
        )
    return carried_model(artifact, place.name), origin, artifact


def described_model(
    backbone: Mapping[str, Any], where: str, access: Access
) -> tuple[nn.Module, Origin]:
    """The classifier that an artifact's ``config.json`` names, and its origin.

    Args:
        backbone: the part of ``config.json`` that describes the classifier.
        where: name of the artifact in error messages.
        access: how to reach the Hub.

    Raises:
        ArtifactError: the classifier cannot be found from this description.
    """
    source, name = backbone["source"], backbone.get("name")
    if named_kind(f"{source}:"):
        raise ArtifactError(
            f"{where} was made for {name}, whose weights are no safetensors and are not read on an "
            f'artifact\'s word: pass backbone="{name}"'
        )
    if source in (OWN_WEIGHTS, "module") or name is None:
        raise ArtifactError(
            f"{where} was made for a {name!r} that cannot be loaded by name; pass it as backbone="
        )
    try:
        return _named_by_artifact(source, name, backbone, access)
    except ArtifactError as error:
        raise type(error)(f"the classifier of {where}: {error}") from error


def _named_by_artifact(
    source: str, name: str, backbone: Mapping[str, Any], access: Access
) -> tuple[nn.Module, Origin]:
    """The classifier from one source; the name is never parsed as that of another source."""
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
            raise ArtifactError(f"{name} is named without the commit that the adapter was made for")
        place = hub.download(name, replace(access, revision=revision))
    else:  # "bundled" or "folder"
        bundled = source == "bundled"
        folder = bundled_folder(name.removeprefix("bundled:")) if bundled else Path(name)
        place = Place(folder, name)
    return _model_at(place, bundled=source == "bundled")[:2]
