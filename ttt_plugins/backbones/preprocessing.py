"""The size of the images that a model accepts, and their normalisation."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..errors import InputError
from .kinds import Settings
from .stages import image_size, inner, input_channels

__all__ = ["InputSize", "Preprocessing", "input_size", "preprocessing"]

#: (C, H, W); height and width are None if the model does not declare them.
InputSize = tuple[int, int | None, int | None]


class Preprocessing(NamedTuple):
    """Mean and standard deviation of images in [0, 1], each (C, 1, 1) or (1, 1, 1)."""

    mean: Tensor
    std: Tensor


def input_size(model: nn.Module, settings: Settings) -> InputSize:
    """Size (C, H, W) of the images that a model was made for, known or from what it says itself."""
    _, network = inner(model)
    if settings.size is not None:
        return input_channels(model), *settings.size
    if not getattr(network, "pretrained_cfg", None):
        height, width = image_size(network) or (None, None)
        return input_channels(model), height, width
    size = resolve_model_data_config(network)["input_size"]
    height, width = image_size(network) or size[1:]
    return size[0], height, width


def preprocessing(
    model: nn.Module, mean: Any, std: Any, normalize: bool, channels: int, known: Settings
) -> Preprocessing | None:
    """The normalisation of images, None if the model gets them unchanged.

    Args:
        model: the model, whose ``pretrained_cfg`` is used for values that are not given.
        mean: one number, or one for each channel.
        std: one number, or one for each channel.
        normalize: False for a model that normalises its input itself.
        channels: number of channels of the images.
        known: what is known about the model besides.

    Raises:
        InputError: mean, std and normalize contradict each other, mean or std is not finite, or std
            is not positive.
    """
    if not normalize:
        if mean is not None or std is not None:
            raise InputError(
                "normalize=False and mean or std contradict each other: give one of them"
            )
        return None
    configured = bool(getattr(model, "pretrained_cfg", None))
    settings = resolve_model_data_config(model) if configured else {}
    if known.mean is not None:
        settings = {"mean": known.mean, "std": known.std}
    elif not known.normalize and mean is None and std is None:
        return None
    mean = settings.get("mean") if mean is None else mean
    std = settings.get("std") if std is None else std
    if (mean is None) != (std is None):
        raise InputError("mean and std belong together: give both or neither")
    if mean is None:
        warnings.warn(
            f"{type(model).__name__} does not say how its input is normalised (it has no timm "
            "pretrained_cfg), so it gets images in [0, 1] unchanged. Pass mean= and std=, or "
            "preprocess= with its processor or transform, or normalize=False if it normalises them "
            "itself.",
            stacklevel=4,
        )
        return None
    _warn_of_double_normalisation(model)
    return Preprocessing(_numbers("mean", mean, channels), _numbers("std", std, channels))


def _numbers(name: str, value: Any, channels: int) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must consist of numbers, got {value!r}") from error
    if len(numbers) not in (1, channels) or not torch.isfinite(numbers).all():
        raise InputError(f"{name} must hold 1 or {channels} numbers, got {numbers}")
    if name == "std" and (numbers <= 0).any():
        raise InputError(f"std must be positive, got {numbers.tolist()}")
    return numbers.view(-1, 1, 1)


def _warn_of_double_normalisation(model: nn.Module) -> None:
    """Warn if a module at the top looks like a normalisation inside the model."""
    for name, module in model.named_modules():
        if name.count(".") > 0:
            continue
        own = {k for k, _ in module.named_buffers(recurse=False)} | set(vars(module))
        called = type(module).__name__ == "Normalize"
        if called or {"mean", "std"} <= own or {"mu", "sigma"} <= own:
            warnings.warn(
                f"the model seems to normalise its input itself ({name or 'its own'} "
                f"{type(module).__name__}) and would be normalised twice; pass "
                "normalize=False if so",
                stacklevel=5,
            )
            return
