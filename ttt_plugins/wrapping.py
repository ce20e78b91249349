"""``wrap`` and ``from_pretrained``: from a name or a module to an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .artifacts import hub
from .artifacts.classifiers import (
    carried_model,
    check_fingerprint,
    described_model,
    load_model,
    refuse_random,
)
from .artifacts.folder import (
    MODEL,
    OWN_WEIGHTS,
    Artifact,
    bundled_folder,
    list_bundled,
    named_folder,
    read_artifact,
    read_config,
    timm_part,
)
from .artifacts.hub import Access
from .artifacts.saving import fits_any
from .artifacts.tensor_files import fingerprint, tensor_header
from .backbones.backbone import Backbone
from .backbones.statistics import NormStatistics
from .core.registry import Method, configure, get_method, stored_config
from .data.images import gather_images
from .errors import ArtifactError, InputError
from .utils.checks import check_device, check_seed

__all__ = ["from_pretrained", "wrap"]


def _build(
    module: nn.Module,
    record: Method,
    config: Any,
    *,
    tensors: dict[str, Tensor],
    where: str,
    origin: dict[str, Any],
    mean=None,
    std=None,
    normalize: bool = True,
    device=None,
    seed: int | None = None,
) -> Adapter:
    with torch.inference_mode(False):
        backbone = Backbone(
            module,
            mean=mean,
            std=std,
            normalize=normalize,
            statistics=NormStatistics.of(config),
        )
        if record.check is not None:
            tensors = record.check(config, backbone, tensors, where)
        elif tensors:
            raise ArtifactError(f"{where}: {record.name} learns no tensors, got {sorted(tensors)}")
        tensors = {n: t.to(backbone.device, backbone.dtype) for n, t in tensors.items()}
        net = Adapter(backbone, record, config, tensors=tensors, origin=origin, seed=seed)
        return net.to(device) if device is not None else net


def wrap(
    model: str | nn.Module,
    method: str | Any,
    *,
    params: str | list[str] | None = None,
    mean=None,
    std=None,
    normalize: bool = True,
    pretrained: bool = False,
    device: str | torch.device | None = None,
    seed: int | None = None,
    model_dir: str | Path = "models",
    tensors: dict[str, Tensor] | None = None,
    head: str | Path | None = None,
    data: Any = None,
    **overrides: Any,
) -> Adapter:
    """Wrap an image classifier so that it adapts itself at inference.

    Args:
        model: a timm name, ``"robustbench:<dataset>/<name>"`` (corruptions zoo), an artifact that
            carries a model (``"bundled:source-resnet26-cifar10"``, a folder, or ``"org/name"`` or
            ``"org/name@revision"`` on the Hub), a timm repository (``"hf-hub:org/name"``, always
            with its weights), or any ``nn.Module`` from normalised images (B, C, H, W) to logits
            (B, classes).
        method: a name of `list_methods()` or a config object (``tp.MGG(lr=1e-3)``).
        params: what adapts: ``"norm"``, ``"all"``, a regular expression, or names; the method's
            own default unless given.
        mean, std: normalisation, from the model's ``pretrained_cfg`` unless given.
        normalize: False when the model normalises by itself (RobustBench's do, which is known).
        pretrained: download timm's weights.
        device: where to put the adapter; the model stays where it is unless given.
        seed: of everything random, the weights of an untrained timm model included; without it
            those come from torch's global generator.
        model_dir: where RobustBench keeps its checkpoints.
        tensors: what the method has learned beforehand (``"memory.<name>"`` for MGG), instead of
            a bundled artifact's.
        head: where the self-supervised head comes from: an artifact made for these weights (as in
            `from_pretrained`), or ``"train"``, which trains one on ``data`` while the model stays
            as it is (TTT's rotation head; ``ttt-plugins train ttt --freeze-trunk`` keeps it).
        data: clean images for ``head="train"``: (N, C, S, S), uint8 or in [0, 1], or a loader of
            such batches or of tuples that begin with one. No labels are used.
        **overrides: fields of the method's config.

    Returns:
        An `Adapter`: images in [0, 1] in, logits out.

    Raises:
        InputError: unknown model, method or field, or nothing to adapt.
        ArtifactError: an artifact does not load (`HubError` where the Hub is the reason).
    """
    record = get_method(method)
    if not isinstance(normalize, bool):
        raise InputError(f"normalize must be True or False, got {normalize!r}")
    _check_place(device, seed)
    learned_by_hand = tensors is None or isinstance(tensors, Mapping)
    if not learned_by_hand or not all(isinstance(t, Tensor) for t in (tensors or {}).values()):
        raise InputError("tensors must be a dict of tensors by name")
    if not isinstance(head, (str, Path, type(None))):
        raise InputError(f'head is "train" or an artifact, got {type(head).__name__}')
    if head is not None and tensors is not None:
        raise InputError("head and tensors both say what the method has learned: give one")
    if (head == "train") != (data is not None):
        raise InputError('head="train" and data=, the images to train it on, belong together')
    if params is not None:
        overrides["params"] = tuple(params) if isinstance(params, (list, set)) else params
    if head == "train":
        if record.fit is None:
            raise InputError(f"{record.name} has no head that is trained on a finished model")
        refuse_random(model, pretrained)
        config = configure(record.config() if isinstance(method, str) else method, overrides)
        return record.fit(
            model,
            gather_images(data),
            config,
            mean=mean,
            std=std,
            normalize=normalize,
            pretrained=pretrained,
            device=device,
            seed=seed,
            model_dir=model_dir,
        )
    module, origin, artifact = load_model(model, pretrained, model_dir, seed)
    if origin["source"] == "robustbench":
        normalize = False
    config, where = record.config() if isinstance(method, str) else method, "tensors"
    learned = None
    if tensors is None:
        found = _learned(record, module, head, artifact, str(model))
        if found is not None:
            learned, tensors, where = found
        if learned is not None and isinstance(method, str):
            # What was learned and its step size belong together, so a bare name takes both.
            config = _config_of(record, learned, where)
    config = configure(config, overrides)
    return _build(
        module,
        record,
        config,
        tensors=tensors or {},
        where=where,
        origin=origin,
        mean=mean,
        std=std,
        normalize=normalize,
        device=device,
        seed=seed,
    )


def _check_place(device: str | torch.device | None, seed: int | None) -> None:
    if seed is not None:
        check_seed(seed)
    check_device(device)


def _learned(
    record: Method, module: nn.Module, head: str | Path | None, model: Artifact | None, name: str
) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
    """Config, tensors and name of what a method has learned for a model; None if nothing is."""
    if head is not None:
        found = hub.find(head, Access())
        if found is None:
            raise ArtifactError(f"head={str(head)[:200]!r} is no artifact")
        artifact = read_artifact(found.folder, found.name)
        if artifact.config["method"] != record.name:
            raise InputError(f"{head} is made for {artifact.config['method']}, not {record.name}")
        remedy = 'train a head for this model with head="train"'
        check_fingerprint(module, artifact.config["backbone"], found.name, True, remedy)
        return artifact.config, artifact.tensors, found.name
    if model is not None and model.config["method"] == record.name:
        return model.config, model.tensors, name
    if record.default_artifact is None:
        return None
    name = _made_for(record, module) or record.default_artifact
    artifact = read_artifact(bundled_folder(name))
    return artifact.config, artifact.tensors, name


def _made_for(record: Method, module: nn.Module) -> str | None:
    """The bundled artifact of a method that was made for a model's very weights."""
    state, mark = module.state_dict(), None
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in list_bundled():
        config = read_config(bundled_folder(name))
        made_for = config["backbone"]
        if config["method"] != record.name or "fingerprint" not in made_for:
            continue
        # Hashing the weights of a large network takes long; their shapes alone may tell.
        carried = named_folder(str(made_for.get("name")))
        if carried is not None:
            header = tensor_header(carried / MODEL)
            if shapes != {n: tensor.shape for n, tensor in header.items()}:
                continue
        mark = mark or fingerprint(state)
        if mark == made_for["fingerprint"]:
            return name
    return None


def _config_of(record: Method, config: dict[str, Any], name: str) -> Any:
    try:
        return stored_config(record, config["fields"])
    except (InputError, TypeError, OverflowError) as error:
        raise ArtifactError(f"{name}/config.json: {error}") from error


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    backbone: str | nn.Module | None = None,
    strict_backbone: bool = True,
    device: str | torch.device | None = None,
    seed: int | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **overrides: Any,
) -> Adapter:
    """Load an adapter.

    Args:
        name: ``"org/name"`` or ``"org/name@revision"`` on the Hugging Face Hub,
            ``"bundled:<name>"``, or a local folder.
        revision: branch, tag or commit on the Hub (the default branch unless given). It is
            resolved once, and all files are taken from that commit.
        backbone: the classifier, where the artifact does not say where to find it, or instead of
            the one it names: whatever `wrap` takes (a timm name with its pretrained weights).
        strict_backbone: a classifier with other weights than the adapter was made for is an
            error; False makes it a warning. Without effect where the artifact declares that it
            fits any architecture.
        device, seed: as in `wrap`.
        cache_dir: where files from the Hub are kept (huggingface_hub's cache unless given; timm
            keeps its own weights there always).
        local_files_only: use that cache alone, without a connection.
        token: access token of the Hub; unless given the one of ``hf auth login`` or HF_TOKEN,
            none if False.
        **overrides: fields of the method's config to change.

    Raises:
        ArtifactError: the artifact is missing, damaged, or made for another classifier.
        HubError: (an `ArtifactError`) no such repository or revision, no access, no connection.
        InputError: an unknown field, or a revision of something that is not on the Hub.
    """
    _check_place(device, seed)
    access = Access(revision, cache_dir, local_files_only, token)
    found = hub.find(name, access)
    if found is None:
        raise ArtifactError(
            f"{str(name)[:200]!r} is no folder with a config.json, no ORG/NAME on the Hub and "
            f"not bundled; bundled are {['bundled:' + n for n in list_bundled()]}"
        )
    access = Access(None, cache_dir, local_files_only, token)  # the revision was the adapter's
    artifact, where = read_artifact(found.folder, found.name), found.name
    config, described = artifact.config, artifact.config["backbone"]
    record = get_method(config["method"])
    fields = configure(_config_of(record, config, where), overrides)
    anything = described.get("fits") == "any"
    if anything and not fits_any(record, fields, artifact.tensors):
        raise ArtifactError(f"{where} says that it fits any architecture, but it does not")
    normal = {k: described.get(k) for k in ("mean", "std")}
    normal["normalize"] = described.get("normalize", True)
    if backbone is None and artifact.weights is not None:
        module = carried_model(artifact, found.folder, where)
        origin = {"source": OWN_WEIGHTS, "name": where, "timm": timm_part(config)}
    elif backbone is None:
        module, origin = described_model(described, where, access)
        check_fingerprint(module, described, where, strict_backbone)
    else:
        trained = described.get("pretrained", True)
        module, origin, _ = load_model(backbone, trained, seed=seed, access=access)
        if not anything:
            check_fingerprint(module, described, where, strict_backbone)
        elif fingerprint(module.state_dict()) != described.get("fingerprint"):
            # Another classifier than the one this was made with has its own preprocessing.
            normal = {"normalize": origin["source"] != "robustbench"}
    return _build(
        module,
        record,
        fields,
        tensors=artifact.tensors,
        where=where,
        origin=origin,
        device=device,
        seed=seed,
        **normal,
    )
