"""``wrap`` and ``from_pretrained``: from a name or a module to an adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import artifacts, cards, hub, results, trust
from .adapter import Adapter
from .artifacts import OWN_WEIGHTS, Artifact
from .backbone import Backbone
from .data import gather_images
from .errors import ArtifactError, InputError
from .flags import check_device, check_seed
from .hub import Access
from .methods import Source
from .models import (
    carried_model,
    check_fingerprint,
    described_model,
    load_model,
    refuse_random,
)
from .registry import Method, configure, get_method

__all__ = ["from_pretrained", "save_pretrained", "save_with_model", "wrap"]


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
            statistics=config.statistics,
            prior=config.prior,
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
        artifact = artifacts.read(found.folder, found.name)
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
    artifact = artifacts.read(artifacts.bundled_folder(name))
    return artifact.config, artifact.tensors, name


def _made_for(record: Method, module: nn.Module) -> str | None:
    """The bundled artifact of a method that was made for a model's very weights."""
    state, mark = module.state_dict(), None
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in artifacts.list_bundled():
        config = artifacts.read_config(artifacts.bundled_folder(name))
        made_for = config["backbone"]
        if config["method"] != record.name or "fingerprint" not in made_for:
            continue
        # Hashing the weights of a large network takes long; their shapes alone may tell.
        carried = artifacts.named_folder(str(made_for.get("name")))
        if carried is not None:
            header = trust.tensor_header(carried / artifacts.MODEL)
            if shapes != {n: tensor.shape for n, tensor in header.items()}:
                continue
        mark = mark or artifacts.fingerprint(state)
        if mark == made_for["fingerprint"]:
            return name
    return None


def _config_of(record: Method, config: dict[str, Any], name: str) -> Any:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config["fields"].items()}
    try:
        return configure(record.config(), fields)
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
            f"not bundled; bundled are {['bundled:' + n for n in artifacts.list_bundled()]}"
        )
    access = Access(None, cache_dir, local_files_only, token)  # the revision was the adapter's
    artifact, where = artifacts.read(found.folder, found.name), found.name
    config, described = artifact.config, artifact.config["backbone"]
    record = get_method(config["method"])
    fields = configure(_config_of(record, config, where), overrides)
    anything = described.get("fits") == "any"
    if anything and not _fits_any(record, fields, artifact.tensors):
        raise ArtifactError(f"{where} says that it fits any architecture, but it does not")
    normal = {k: described.get(k) for k in ("mean", "std")}
    normal["normalize"] = described.get("normalize", True)
    if backbone is None and artifact.weights is not None:
        module = carried_model(artifact, found.folder, where)
        origin = {"source": OWN_WEIGHTS, "name": where, "timm": artifacts.timm_part(config)}
    elif backbone is None:
        module, origin = described_model(described, where, access)
        check_fingerprint(module, described, where, strict_backbone)
    else:
        trained = described.get("pretrained", True)
        module, origin, _ = load_model(backbone, trained, seed=seed, access=access)
        if not anything:
            check_fingerprint(module, described, where, strict_backbone)
        elif artifacts.fingerprint(module.state_dict()) != described.get("fingerprint"):
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


def _fits_any(record: Method, config: Any, tensors: Mapping[str, Tensor]) -> bool:
    return record.fits_any is not None and record.fits_any(config, tensors)


def save_pretrained(
    net: Adapter,
    folder: str | Path,
    *,
    training: dict[str, Any] | None = None,
    results: str | Path | Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter's artifact: its config and what it learned, not the classifier.

    The adapted parameters of a running stream are not part of it; see
    ``Adapter.adaptation_state``.

    Args:
        training: how it was made; goes into ``config.json`` and the card.
        results: what was measured with it: a benchmark's ``results.json``, or the form of
            `ttt_plugins.results`; goes into ``results.json`` and the card.
        card: ``license``, ``datasets`` and ``note`` for the card.

    Raises:
        ArtifactError: the folder holds something else, the disk refuses, or the results are none.
    """
    normal, state = net.backbone.normalize, net.backbone.source_state_dict()
    learned = net.learned_tensors()
    backbone = {k: v for k, v in net.origin.items() if k != "timm" and v is not None} | {
        "num_classes": net.num_classes,
        "normalize": normal,
        "mean": net.backbone.mean.flatten().tolist() if normal else None,
        "std": net.backbone.std.flatten().tolist() if normal else None,
        "fingerprint": artifacts.fingerprint(state),
    }
    backbone.setdefault("source", "module")
    if backbone["source"] == "hub":
        backbone["name"], _, backbone["revision"] = backbone["name"].partition("@")
    if _fits_any(get_method(net.method), net.config, learned):
        backbone["fits"] = "any"
    own = net.origin.get("timm") if backbone["source"] == OWN_WEIGHTS else None
    if own is not None:
        backbone["name"] = own["architecture"]
    config = artifacts.common_config(net.method, net.config, backbone) | (own or {})
    try:
        trust.check_params(net.config.params if net.names else None, "params")
    except ArtifactError:
        # An expression that a stranger's artifact may not hold: the names it selects say as much.
        config["fields"]["params"] = list(net.names)
    weights = None if own is None else state
    return _write(folder, config, learned, weights, training, results, card)


def save_learned(
    config: Any,
    tensors: dict[str, Tensor],
    backbone: dict[str, Any],
    folder: str | Path,
    *,
    training: dict[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write what a method learned as an artifact, for a classifier that is not at hand.

    Args:
        config: the method's.
        tensors: what it learned.
        backbone: the part of ``config.json`` that says which classifier it is for.
        training, card: as for `save_pretrained`.
    """
    record = get_method(config)
    if _fits_any(record, config, tensors):
        backbone = backbone | {"fits": "any"}
    written = artifacts.common_config(record.name, config, backbone)
    return _write(folder, written, tensors, None, training, None, card)


def save_with_model(
    model: nn.Module,
    architecture: str,
    model_args: dict[str, Any],
    folder: str | Path,
    *,
    config: Any = None,
    tensors: dict[str, Tensor] | None = None,
    training: dict[str, Any] | None = None,
    results: str | Path | Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a trained timm classifier, and what a method learned with it, as one artifact.

    The folder is a timm repository too: ``model.safetensors`` is the classifier alone.

    Args:
        config: the method's, `Source` unless given.
        tensors: what the method learned.
        training, results, card: as for `save_pretrained`.
    """
    config = Source() if config is None else config
    record, state = get_method(config), model.state_dict()
    described = {"source": OWN_WEIGHTS, "name": architecture}
    described["fingerprint"] = artifacts.fingerprint(state)
    if _fits_any(record, config, tensors or {}):
        described["fits"] = "any"
    written = artifacts.common_config(record.name, config, described)
    written |= artifacts.timm_config(model, architecture, model_args)
    return _write(folder, written, tensors or {}, state, training, results, card)


def _write(
    folder: str | Path,
    config: dict,
    tensors: dict[str, Tensor],
    weights: dict[str, Tensor] | None,
    training: dict | None,
    measured: str | Path | Mapping[str, Any] | None,
    card: Mapping[str, Any] | None,
) -> Path:
    for tensor_name, tensor in (tensors | (weights or {})).items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{tensor_name} is not finite: such an artifact would not load")
    for key, value in (("training", training), ("card", card)):
        if value is None:
            continue
        try:
            config[key] = json.loads(json.dumps(dict(value), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{key} must be a dict that JSON can hold ({error})") from error
    found = None if measured is None else results.load(measured)
    artifact = Artifact(config, tensors, weights, "", found)
    name = Path(folder).resolve().name
    text = cards.render(name, artifact, bundled=artifacts.is_bundled(folder))
    return artifacts.write(folder, dataclasses.replace(artifact, card=text))
