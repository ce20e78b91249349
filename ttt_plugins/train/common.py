"""The model that training starts from, and the checks that run before training starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..adapter import Adapter
from ..artifacts.folder import Artifact, checked_text
from ..artifacts.hub import read_named
from ..artifacts.schema import (
    OWN_WEIGHTS,
    common_config,
    pretrained_settings,
    timm_config,
)
from ..backbones.backbone import Backbone
from ..backbones.statistics import NormStatistics
from ..core.registry import get_method
from ..data.images import LabelledImages, to_float
from ..errors import InputError
from ..methods import Source

__all__ = [
    "Normalise",
    "initial_model",
    "read_start",
    "steps_per_epoch",
]


class Described(Protocol):
    """The fields of a recipe that describe the model."""

    @property
    def arch(self) -> str:
        """Name of the timm architecture."""
        ...

    @property
    def model_args(self) -> Mapping[str, Any] | None:
        """Keyword arguments for its constructor."""
        ...

    @property
    def seed(self) -> int:
        """Seed for the initial weights."""
        ...


def read_start(name: str) -> Artifact | None:
    """Read the artifact whose model training starts from; None if the name is empty.

    Raises:
        InputError: the artifact carries no model.
    """
    if not name:
        return None
    artifact = read_named(name)
    if artifact.weights is None:
        raise InputError(f"{name} carries no model to start from; name an artifact that does")
    return artifact


def initial_model(
    recipe: Described, config: Any, train: LabelledImages, start: Artifact | None, **dropout: float
) -> nn.Module:
    """Create the timm model that training starts from, with one class for each label.

    Args:
        recipe: architecture, its constructor's arguments, and seed for the initial weights.
        config: config of the method that will use the model.
        train: labelled images to train on; one of them is passed through the model.
        start: artifact whose weights and preprocessing are used; None for random weights.
        **dropout: constructor's arguments for training only, which no artifact records.

    Raises:
        InputError: timm cannot create the model, the weights to start from belong to another
            architecture, the config's ``params`` select nothing in the model, or the model does
            not accept the images.
        ArtifactError: an artifact cannot hold the config or the arguments.
    """
    torch.manual_seed(recipe.seed)
    arguments = dict(recipe.model_args or {})
    model = _create(recipe.arch, int(train.labels.max()) + 1, arguments | dropout, start)
    _check_outcome(config, model, recipe.arch, arguments, train.images)
    return model


def _create(arch: str, classes: int, arguments: Mapping, start: Artifact | None) -> nn.Module:
    """Create a timm model, initialised from torch's global generator or an artifact's weights.

    An artifact's preprocessing is used together with the weights that were trained with it.
    """
    settings = None if start is None else pretrained_settings(start.config)
    try:
        model = timm.create_model(
            arch, num_classes=classes, pretrained_cfg_overlay=settings, **arguments
        )
    except Exception as error:  # a constructor may raise any error for unsuitable arguments
        reason = str(error) or type(error).__name__
        raise InputError(f"timm could not create {arch!r} with {arguments} ({reason})") from error
    if start is not None and start.weights is not None:
        try:
            model.load_state_dict(start.weights)
        except RuntimeError as error:
            # A title line, then one line per tensor: the first tensor's line is enough.
            reason = "".join(str(error).splitlines()[1:2]).strip() or error
            raise InputError(f"the weights to start from do not fit {arch}: {reason}") from error
    return model


def _check_outcome(
    config: Any, model: nn.Module, arch: str, arguments: Mapping, images: Tensor
) -> None:
    """Check that a model can be trained, and that its adapter can be created, saved and loaded."""
    record = get_method(config)
    backbone = Backbone(model, statistics=NormStatistics.of(config))
    Adapter(backbone, record, config)  # selects the parameters that adapt
    try:
        # Without adaptation, because the method's heads have not been trained yet.
        Adapter(backbone, get_method("source"), Source())(to_float(images[:1]).to(backbone.device))
    except InputError as error:
        raise InputError(
            f"{error}; train on images that {arch} accepts, or give it model_args that fit these "
            "images (many architectures take img_size)"
        ) from error
    description = common_config(record.name, config, {"source": OWN_WEIGHTS, "name": arch})
    description |= timm_config(model, arch, dict(arguments))
    checked_text(description, Path("the artifact"))


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Number of whole batches in an epoch.

    Raises:
        InputError: the images do not fill one batch.
    """
    if images < batch_size:
        raise InputError(f"{images} images do not fill one batch of {batch_size}")
    return images // batch_size


class Normalise(nn.Module):
    """Maps images in [0, 1] to ``(image - mean) / std`` per channel, by a timm model's settings."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module):
        super().__init__()
        settings = resolve_model_data_config(model)
        self.register_buffer("mean", torch.tensor(settings["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(settings["std"])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images (N, C, H, W) of any floating-point type."""
        return (x - self.mean) / self.std
