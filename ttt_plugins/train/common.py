"""The model that training starts from, and the checks that run before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from ..data.images import to_float
from ..errors import InputError
from ..methods import Source

__all__ = [
    "Normalise",
    "check_outcome",
    "create_model",
    "read_start",
    "steps_per_epoch",
]


def read_start(name: str) -> Artifact:
    """Read the artifact whose model training starts from.

    Raises:
        InputError: the artifact carries no model.
    """
    artifact = read_named(name)
    if artifact.weights is None:
        raise InputError(f"{name} carries no model to start from")
    return artifact


def create_model(
    arch: str, classes: int, arguments: Mapping, start: Artifact | None = None
) -> nn.Module:
    """Create a timm model, initialised from torch's global generator or an artifact's weights.

    An artifact's preprocessing is taken over together with the weights that were trained with it.

    Raises:
        InputError: timm cannot create the model, or the weights belong to another architecture.
    """
    settings = None if start is None else pretrained_settings(start.config)
    try:
        model = timm.create_model(
            arch, num_classes=classes, pretrained_cfg_overlay=settings, **arguments
        )
    except Exception as error:  # a constructor may raise anything for unsuitable arguments
        reason = str(error) or type(error).__name__
        raise InputError(f"timm could not create {arch!r} with {arguments} ({reason})") from error
    if start is not None and start.weights is not None:
        try:
            model.load_state_dict(start.weights)
        except RuntimeError as error:
            # A title line, then one line per tensor: the first of those is enough.
            reason = "".join(str(error).splitlines()[1:2]).strip() or error
            raise InputError(f"the weights to start from do not fit {arch}: {reason}") from error
    return model


def check_outcome(
    config: Any, model: nn.Module, arch: str, arguments: Mapping, images: Tensor
) -> None:
    """Check that a model can be trained, and that its adapter can be created, saved and loaded.

    Args:
        config: the method's config.
        model: the model to train, created by timm from ``arch`` and ``arguments``; it is not
            changed.
        arch: name of the timm architecture.
        arguments: keyword arguments for its constructor.
        images: uint8 images (N, C, H, W) to train on; one of them is passed through the model.

    Raises:
        InputError: the config's ``params`` select nothing in the model, or the model does not
            accept the images.
        ArtifactError: an artifact cannot hold these fields or arguments.
    """
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
    described = {"source": OWN_WEIGHTS, "name": arch}
    written = common_config(record.name, config, described)
    written |= timm_config(model, arch, dict(arguments))
    checked_text(written, Path("the artifact"))


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Number of whole batches in an epoch.

    Raises:
        InputError: the images do not fill one batch.
    """
    if images < batch_size:
        raise InputError(f"{images} images do not fill one batch of {batch_size}")
    return images // batch_size


class Normalise(nn.Module):
    """Images in [0, 1] -> ``(image - mean) / std`` per channel, with a timm model's settings."""

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
