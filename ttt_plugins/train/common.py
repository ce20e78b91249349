"""What a training starts from, and what is checked before it begins."""

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
    """Read the artifact whose model a training starts from.

    Raises:
        InputError: it carries none.
    """
    artifact = read_named(name)
    if artifact.weights is None:
        raise InputError(f"{name} carries no model to start from")
    return artifact


def create_model(
    arch: str, classes: int, arguments: Mapping, start: Artifact | None = None
) -> nn.Module:
    """A timm model, drawn from torch's global generator or with an artifact's weights.

    The preprocessing comes with the weights, which were trained behind it.

    Raises:
        InputError: timm cannot create it, or the weights are another architecture's.
    """
    settings = None if start is None else pretrained_settings(start.config)
    try:
        model = timm.create_model(
            arch, num_classes=classes, pretrained_cfg_overlay=settings, **arguments
        )
    except Exception as error:  # whatever a constructor does with arguments that it cannot take
        reason = str(error) or type(error).__name__
        raise InputError(f"timm could not create {arch!r} with {arguments} ({reason})") from error
    if start is not None and start.weights is not None:
        try:
            model.load_state_dict(start.weights)
        except RuntimeError as error:
            # A line on top, then one for every tensor: the first of them says enough.
            reason = "".join(str(error).splitlines()[1:2]).strip() or error
            raise InputError(f"the weights to start from do not fit {arch}: {reason}") from error
    return model


def check_outcome(
    config: Any, model: nn.Module, arch: str, arguments: Mapping, images: Tensor
) -> None:
    """Find what would keep a model from being trained, or its adapter from being made or loaded.

    Args:
        config: the method's.
        model: the model to train, made by timm of ``arch`` and ``arguments``; it stays as it is.
        arch: a timm architecture.
        arguments: of its constructor.
        images: uint8 images to train on; one of them passes through the model.

    Raises:
        InputError: the config's ``params`` select nothing in the model, or the model takes no such
            images.
        ArtifactError: an artifact may not hold such fields or arguments.
    """
    record = get_method(config)
    backbone = Backbone(model, statistics=NormStatistics.of(config))
    Adapter(backbone, record, config)  # chooses what adapts
    try:
        # Unadapted, because the method's heads are yet to be trained.
        Adapter(backbone, get_method("source"), Source())(to_float(images[:1]).to(backbone.device))
    except InputError as error:
        raise InputError(
            f"{error}; train on images that {arch} takes, or give it model_args that fit these "
            "(many architectures take img_size)"
        ) from error
    described = {"source": OWN_WEIGHTS, "name": arch}
    written = common_config(record.name, config, described)
    written |= timm_config(model, arch, dict(arguments))
    checked_text(written, Path("the artifact"))


def steps_per_epoch(images: int, batch_size: int) -> int:
    """How many whole batches there are.

    Raises:
        InputError: none.
    """
    if images < batch_size:
        raise InputError(f"{images} images do not fill one batch of {batch_size}")
    return images // batch_size


class Normalise(nn.Module):
    """Images in [0, 1] -> ``(image - mean) / std`` by channel, as a timm model's settings say."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module):
        super().__init__()
        settings = resolve_model_data_config(model)
        self.register_buffer("mean", torch.tensor(settings["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(settings["std"])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), any floating-point type."""
        return (x - self.mean) / self.std
