"""``wrap`` and ``from_pretrained``: from a name or a module to an adapter."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import cards, hub
from .adapter import Adapter
from .backbone import Backbone
from .errors import ArtifactError, InputError
from .methods import Source
from .registry import Method, configure, get_method

__all__ = ["from_pretrained", "save_pretrained", "save_with_model", "wrap"]


def _timm_model(name: str, pretrained: bool, seed: int | None) -> nn.Module:
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
            return timm.create_model(name, pretrained=pretrained)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"timm could not create {name!r}: {error}") from error


def _own_model(artifact: hub.Artifact, folder: Path) -> nn.Module:
    """The classifier whose weights an artifact carries."""
    config = artifact.config
    try:
        if not timm.is_model(config["architecture"]):
            raise ValueError(f"timm knows no {config['architecture']!r}")
        # Named here, so that no artifact can pass them: they would fetch or unpickle files.
        model = timm.create_model(
            config["architecture"],
            pretrained=False,
            pretrained_cfg=None,
            pretrained_cfg_overlay=None,
            checkpoint_path="",
            num_classes=config["num_classes"],
            **config["model_args"],
        )
        model.load_state_dict(artifact.weights, strict=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder} does not hold a model that loads: {error}") from error
    _check_fingerprint(model, config["backbone"], str(folder), strict=True)
    return model


def _check_fingerprint(model: nn.Module, backbone: dict, name: str, strict: bool) -> None:
    wanted = backbone.get("fingerprint")
    if wanted is None or (found := hub.fingerprint(model.state_dict())) == wanted:
        return
    message = (
        f"{name} was made for {backbone.get('name')!r} with weights {wanted}, "
        f"but this {type(model).__name__} has {found}"
    )
    if strict:
        raise ArtifactError(message + "; pass strict_backbone=False to use it all the same")
    warnings.warn(message, stacklevel=3)


def _load_model(
    model: str | nn.Module, pretrained: bool, model_dir: str | Path, seed: int | None = None
) -> tuple[nn.Module, dict[str, Any], hub.Artifact | None]:
    """A module, where it came from, and the artifact it was in.

    For a timm name, a zoo name, an artifact that carries a model, or a module.
    """
    if isinstance(model, nn.Module):
        return model, {"source": "module", "name": type(model).__name__}, None
    if not isinstance(model, str):
        raise InputError(f"model must be a name or an nn.Module, got {type(model).__name__}")
    if model.startswith("robustbench:"):
        from .robustbench_bridge import load_zoo_model

        return load_zoo_model(model, model_dir), {"source": "robustbench", "name": model}, None
    if (folder := hub.named_folder(model)) is not None:
        artifact = hub.read(folder)
        if artifact.weights is None:
            raise InputError(
                f"{model} is an adapter without a model of its own; load it with "
                f"from_pretrained({model!r})"
            )
        if model.startswith("bundled:"):
            origin = {"source": "bundled", "name": model}
        else:
            origin = {"source": "folder", "name": str(folder.resolve())}
        return _own_model(artifact, folder), origin, artifact
    origin = {"source": "timm", "name": model, "pretrained": pretrained, "timm": timm.__version__}
    return _timm_model(model, pretrained, seed), origin, None


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
    **overrides: Any,
) -> Adapter:
    """Wrap an image classifier so that it adapts itself at inference.

    Args:
        model: a timm name, ``"robustbench:<dataset>/<name>"`` (corruptions zoo), a bundled or
            local artifact that carries a model (``"bundled:source-resnet26-cifar10"``), or any
            ``nn.Module`` from normalised images (B, C, H, W) to logits (B, classes).
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
        **overrides: fields of the method's config.

    Returns:
        An `Adapter`: images in [0, 1] in, logits out.

    Raises:
        InputError: unknown model, method or field, or nothing to adapt.
        ArtifactError: a bundled or local artifact does not load.
    """
    record = get_method(method)
    if not isinstance(normalize, bool):
        raise InputError(f"normalize must be True or False, got {normalize!r}")
    module, origin, artifact = _load_model(model, pretrained, model_dir, seed)
    if origin["source"] == "robustbench":
        normalize = False
    config, where = record.config() if isinstance(method, str) else method, "tensors"
    if tensors is None and artifact is not None and artifact.config["method"] == record.name:
        tensors, where = artifact.tensors, str(model)
        if isinstance(method, str):
            config = _config_of(record, artifact.config, where)
    elif tensors is None and record.default_artifact is not None:
        # A learned optimizer and its step size belong together, so a bare name takes both.
        where = record.default_artifact(module)
        bundled = hub.read(hub.bundled_folder(where))
        tensors = bundled.tensors
        if hub.fingerprint(module.state_dict()) != bundled.config["backbone"].get("fingerprint"):
            # The optimizer fits any network, the source statistics only their own.
            tensors = {n: t for n, t in tensors.items() if not n.startswith("source.")}
        if isinstance(method, str):
            config = _config_of(record, bundled.config, where)
    if params is not None:
        overrides["params"] = tuple(params) if isinstance(params, (list, set)) else params
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


def _config_of(record: Method, config: dict[str, Any], name: str) -> Any:
    fields = dict(config["fields"])
    if isinstance(fields.get("params"), list):
        fields["params"] = tuple(fields["params"])
    try:
        return configure(record.config(), fields)
    except InputError as error:
        raise ArtifactError(f"{name}/config.json: {error}") from error


def from_pretrained(
    name: str | Path,
    *,
    backbone: str | nn.Module | None = None,
    strict_backbone: bool = True,
    device: str | torch.device | None = None,
    seed: int | None = None,
    **overrides: Any,
) -> Adapter:
    """Load an adapter.

    Args:
        name: ``"bundled:<name>"`` or a local folder.
        backbone: the classifier, where the artifact does not say where to find it.
        strict_backbone: a classifier with other weights than the adapter was made for is an
            error; False makes it a warning.
        device, seed: as in `wrap`.
        **overrides: fields of the method's config to change.

    Raises:
        ArtifactError: the artifact is missing, damaged, or made for another classifier.
    """
    name = str(name)
    folder = hub.named_folder(name)
    if folder is None:
        raise ArtifactError(
            f"{name!r} is neither a folder with a config.json nor bundled; bundled are "
            f"{['bundled:' + n for n in hub.list_bundled()]}"
        )
    artifact = hub.read(folder)
    config, described = artifact.config, artifact.config["backbone"]
    record = get_method(config["method"])
    fields = configure(_config_of(record, config, name), overrides)
    if artifact.weights is not None and backbone is None:
        module = _own_model(artifact, folder)
        origin = {"source": hub.OWN_WEIGHTS, "name": name, "timm": hub.timm_part(config)}
    elif backbone is not None or (
        described.get("source") in ("bundled", "folder", "robustbench", "timm")
        and isinstance(described.get("name"), str)
    ):
        chosen = described["name"] if backbone is None else backbone
        module, origin, _ = _load_model(chosen, bool(described.get("pretrained")), "models")
        _check_fingerprint(module, described, name, strict_backbone)
    else:
        raise ArtifactError(
            f"{name} was made for a {described.get('name')!r} that it cannot find by itself; pass "
            "it as backbone="
        )
    return _build(
        module,
        record,
        fields,
        tensors=artifact.tensors,
        where=name,
        origin=origin,
        mean=described.get("mean"),
        std=described.get("std"),
        normalize=bool(described.get("normalize", True)),
        device=device,
        seed=seed,
    )


def save_pretrained(
    net: Adapter, folder: str | Path, *, training: dict[str, Any] | None = None
) -> Path:
    """Write an adapter's artifact: its config and what it learned, not the classifier.

    The adapted parameters of a running stream are not part of it; see
    ``Adapter.adaptation_state``.

    Args:
        training: how it was made; goes into ``config.json`` and the card.
    """
    normal, state = net.backbone.normalize, net.backbone.source_state_dict()
    backbone = {k: v for k, v in net.origin.items() if k != "timm"} | {
        "num_classes": net.num_classes,
        "normalize": normal,
        "mean": net.backbone.mean.flatten().tolist() if normal else None,
        "std": net.backbone.std.flatten().tolist() if normal else None,
        "fingerprint": hub.fingerprint(state),
    }
    own = net.origin.get("timm")
    if own is not None:
        backbone["name"] = own["architecture"]
    config = hub.common_config(net.method, net.config, backbone) | (own or {})
    weights = None if own is None else state
    return _write(folder, config, net.learned_tensors(), weights, training)


def save_with_model(
    model: nn.Module,
    architecture: str,
    model_args: dict[str, Any],
    folder: str | Path,
    *,
    config: Any = None,
    tensors: dict[str, Tensor] | None = None,
    training: dict[str, Any] | None = None,
) -> Path:
    """Write a trained timm classifier, and what a method learned with it, as one artifact.

    The folder is a timm repository too: ``model.safetensors`` is the classifier alone.

    Args:
        config: the method's, `Source` unless given.
        tensors: what the method learned.
        training: as for `save_pretrained`.
    """
    config = Source() if config is None else config
    state = model.state_dict()
    described = {"source": hub.OWN_WEIGHTS, "name": architecture}
    described["fingerprint"] = hub.fingerprint(state)
    written = hub.common_config(get_method(config).name, config, described)
    written |= hub.timm_config(model, architecture, model_args)
    return _write(folder, written, tensors or {}, state, training)


def _write(
    folder: str | Path,
    config: dict,
    tensors: dict[str, Tensor],
    weights: dict[str, Tensor] | None,
    training: dict | None,
) -> Path:
    if training is not None:
        config["training"] = training
    card = cards.render(Path(folder).resolve().name, config)
    return hub.write(folder, hub.Artifact(config, tensors, weights, card))
