"""From an adapter or a trained model to an artifact folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..backbones.backbone import Backbone
from ..core.registry import get_method
from ..errors import ArtifactError
from .card import render_card
from .folder import Artifact, check_target, is_bundled, write_artifact
from .learned import fits_any
from .measured import load_measured
from .schema import OWN_WEIGHTS, check_params, common_config, timm_config
from .tensor_files import fingerprint

__all__ = ["Saveable", "save_learned", "save_pretrained", "save_with_model"]


class Saveable(Protocol):
    """What is saved of a net: a `ttt_plugins.Adapter` has it.

    Attributes:
        method: the name of the method.
        config: its fields, a dataclass.
        origin: where the classifier came from, as `ttt_plugins.artifacts.classifiers.load_model`
            says.
        backbone: the classifier.
        names: the parameters that adapt.
    """

    method: str
    config: Any
    origin: dict[str, Any]
    backbone: Backbone
    names: list[str]

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None while unknown."""
        ...

    def learned_tensors(self) -> dict[str, Tensor]:
        """What was learned beforehand, by name."""
        ...


def save_pretrained(
    net: Saveable,
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
        net: the adapter.
        folder: where; an earlier artifact there is replaced.
        training: how it was made; goes into ``config.json`` and the card.
        results: what was measured with it: a benchmark's ``results.json``, or the form of
            `ttt_plugins.artifacts.measured`; goes into ``results.json`` and the card.
        card: ``license``, ``datasets`` and ``note`` for the card.

    Returns:
        The folder.

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
        "fingerprint": fingerprint(state),
    }
    if net.backbone.classes is not None:
        backbone["classes"] = list(net.backbone.classes)
    backbone.setdefault("source", "module")
    if backbone["source"] == "hub":
        backbone["name"], _, backbone["revision"] = backbone["name"].partition("@")
    if fits_any(get_method(net.method), net.config, learned):
        backbone["fits"] = "any"
    own = net.origin.get("timm") if backbone["source"] == OWN_WEIGHTS else None
    if own is not None:
        backbone["name"] = own["architecture"]
    config = common_config(net.method, net.config, backbone) | (own or {})
    try:
        check_params(config["fields"].get("params") if net.names else None, "params")
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
        folder: where; an earlier artifact there is replaced.
        training: how it was made; goes into ``config.json`` and the card.
        card: ``license``, ``datasets`` and ``note`` for the card.

    Returns:
        The folder.
    """
    record = get_method(config)
    if fits_any(record, config, tensors):
        backbone = backbone | {"fits": "any"}
    written = common_config(record.name, config, backbone)
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
        model: the classifier.
        architecture: its name in timm.
        model_args: the arguments it was created with.
        folder: where; an earlier artifact there is replaced.
        config: the method's, `ttt_plugins.Source` unless given.
        tensors: what the method learned.
        training: how it was made; goes into ``config.json`` and the card.
        results: what was measured with it, as for `save_pretrained`.
        card: ``license``, ``datasets`` and ``note`` for the card.

    Returns:
        The folder.
    """
    config = get_method("source").config() if config is None else config
    record, state = get_method(config), model.state_dict()
    described = {"source": OWN_WEIGHTS, "name": architecture}
    described["fingerprint"] = fingerprint(state)
    if fits_any(record, config, tensors or {}):
        described["fits"] = "any"
    written = common_config(record.name, config, described)
    written |= timm_config(model, architecture, model_args)
    return _write(folder, written, tensors or {}, state, training, results, card)


def _write(
    folder: str | Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    weights: dict[str, Tensor] | None,
    training: Mapping[str, Any] | None,
    measured: str | Path | Mapping[str, Any] | None,
    card: Mapping[str, Any] | None,
) -> Path:
    check_target(folder)
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
    results = None if measured is None else load_measured(measured)
    artifact = Artifact(config, tensors, weights, "", results)
    name = os.path.basename(os.path.realpath(folder))
    text = render_card(name, artifact, bundled=is_bundled(folder))
    return write_artifact(folder, dataclasses.replace(artifact, card=text))
