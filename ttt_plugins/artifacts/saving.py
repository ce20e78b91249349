"""Saving adapters and trained models as artifact folders."""

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
    """What an artifact records about an adapter; `ttt_plugins.Adapter` satisfies this protocol.

    Attributes:
        method: name of the method.
        config: the method's config, a dataclass.
        origin: where the classifier came from, as returned by
            `ttt_plugins.artifacts.classifiers.load_model`.
        backbone: the classifier.
        names: names of the parameters that adapt.
    """

    method: str
    config: Any
    origin: dict[str, Any]
    backbone: Backbone
    names: list[str]

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None while it is unknown."""
        ...

    def learned_tensors(self) -> dict[str, Tensor]:
        """Tensors that the method learned beforehand, by name."""
        ...


def save_pretrained(
    net: Saveable,
    folder: str | Path,
    *,
    training: dict[str, Any] | None = None,
    results: str | Path | Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter as an artifact: its config and learned tensors, but not the classifier.

    The parameters that have adapted to a stream are not saved; see ``Adapter.adaptation_state``.

    Args:
        net: the adapter.
        folder: folder to write; an artifact that is already there is replaced.
        training: facts about the training, recorded in ``config.json`` and shown in the card.
        results: measured results, recorded in ``results.json`` and shown in the card: a benchmark's
            ``results.json``, or the form described in `ttt_plugins.artifacts.measured`.
        card: ``license``, ``datasets`` and ``note`` for the card.

    Returns:
        the folder.

    Raises:
        ArtifactError: the folder holds anything but an artifact, it cannot be written, a tensor is
            not finite, or ``results`` has neither form.
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
    if net.backbone.output is not None:
        backbone["output"] = net.backbone.output
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
        # No artifact may hold this expression; the names that it selects are equivalent.
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
    """Write the learned tensors of a method as an artifact, without access to the classifier.

    Args:
        config: the method's config.
        tensors: learned tensors by name.
        backbone: the part of ``config.json`` that describes the classifier.
        folder: folder to write; an artifact that is already there is replaced.
        training: facts about the training, recorded in ``config.json`` and shown in the card.
        card: ``license``, ``datasets`` and ``note`` for the card.

    Returns:
        the folder.

    Raises:
        ArtifactError: as for `save_pretrained`.
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
    """Write a trained timm classifier and a method's learned tensors as one artifact.

    The folder is also a timm repository: ``model.safetensors`` holds only the classifier.

    Args:
        model: the classifier.
        architecture: name of its timm architecture.
        model_args: keyword arguments that it was created with.
        folder: folder to write; an artifact that is already there is replaced.
        config: the method's config; `ttt_plugins.Source` by default.
        tensors: learned tensors of the method by name.
        training: facts about the training, recorded in ``config.json`` and shown in the card.
        results: measured results, as for `save_pretrained`.
        card: ``license``, ``datasets`` and ``note`` for the card.

    Returns:
        the folder.

    Raises:
        ArtifactError: as for `save_pretrained`.
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
