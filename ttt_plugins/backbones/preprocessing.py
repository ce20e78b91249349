"""The images a model takes: their size, and what they are normalised with."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..errors import InputError
from .stages import image_size, inner, input_channels

__all__ = ["InputSize", "Preprocessing", "input_size", "preprocessing"]

#: (C, H, W); height and width are None where a model does not say.
InputSize = tuple[int, int | None, int | None]


class Preprocessing(NamedTuple):
    """What images in [0, 1] are normalised with, each (C, 1, 1) or (1, 1, 1)."""

    mean: Tensor
    std: Tensor


def input_size(model: nn.Module) -> InputSize:
    """(C, H, W) of the images that a model was made for."""
    _, network = inner(model)
    if not getattr(network, "pretrained_cfg", None):
        return input_channels(model), *(image_size(network) or (None, None))
    size = resolve_model_data_config(network)["input_size"]
    height, width = image_size(network) or size[1:]
    return size[0], height, width


def preprocessing(
    model: nn.Module, mean: Any, std: Any, normalize: bool, channels: int
) -> Preprocessing | None:
    """What images are normalised with; None where they reach the model as they are.

    Args:
        model: its ``pretrained_cfg`` says what is not given.
        mean: a number, or one for each channel.
        std: a number, or one for each channel.
        normalize: False for a model that normalises its input itself.
        channels: how many channels the images have.

    Raises:
        InputError: mean, std and normalize contradict each other or hold something other than
            finite numbers, or std is not positive.
    """
    if not normalize:
        if mean is not None or std is not None:
            raise InputError("normalize=False and mean or std given: choose one of the two")
        return None
    configured = bool(getattr(model, "pretrained_cfg", None))
    settings = resolve_model_data_config(model) if configured else {}
    mean = settings.get("mean") if mean is None else mean
    std = settings.get("std") if std is None else std
    if (mean is None) != (std is None):
        raise InputError("mean and std belong together: give both or neither")
    if mean is None:
        warnings.warn(
            f"{type(model).__name__} does not say how its input is normalised (no timm "
            "pretrained_cfg): it gets images in [0, 1] unchanged. Pass mean= and std=, or "
            "normalize=False if it normalises by itself.",
            stacklevel=4,
        )
        return None
    _warn_of_double_normalisation(model)
    return Preprocessing(_numbers("mean", mean, channels), _numbers("std", std, channels))


def _numbers(name: str, value: Any, channels: int) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must hold numbers, got {value!r}") from error
    if len(numbers) not in (1, channels) or not torch.isfinite(numbers).all():
        raise InputError(f"{name} must hold 1 or {channels} numbers, got {numbers}")
    if name == "std" and (numbers <= 0).any():
        raise InputError(f"std must be positive, got {numbers.tolist()}")
    return numbers.view(-1, 1, 1)


def _warn_of_double_normalisation(model: nn.Module) -> None:
    """Say so once if a module near the top looks like a normalisation of the model's own."""
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
