"""The kinds of models whose input and output are known, one file each; see `kind.ModelKind`.

timm's models say everything in their ``pretrained_cfg`` and need no kind; neither do modules from
normalised images to logits.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from ...errors import InputError
from .kind import ModelKind, Output, Settings, check_output

__all__ = [
    "ModelKind",
    "Output",
    "Settings",
    "attach",
    "check_output",
    "classifier",
    "kinds",
    "named_kind",
    "read_preprocess",
    "repository_kind",
    "settings_of",
]

#: Attribute of a model that holds what is known about it beyond what it says itself.
_ATTACHED = "ttt_plugins_settings"


@cache
def kinds() -> tuple[ModelKind, ...]:
    """All kinds, in the order of their files' names."""
    files = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "kind")
    return tuple(importlib.import_module(f"{__name__}.{file}").KIND for file in files)


def attach(model: nn.Module, settings: Settings) -> None:
    """Have a model of ours say these settings about itself from now on."""
    setattr(model, _ATTACHED, settings)


def settings_of(model: nn.Module) -> Settings:
    """What is known about a model's input and output, of whatever kind it is."""
    if isinstance(attached := vars(model).get(_ATTACHED), Settings):
        return attached
    kind = next((kind for kind in kinds() if kind.owns(model)), None)
    return Settings() if kind is None else kind.settings(model)


def classifier(model: nn.Module, labels: Sequence[str] | None) -> nn.Module:
    """The classifier that a module is or can be made into.

    Args:
        model: any module.
        labels: names of the classes, for a model that compares images with texts.

    Raises:
        InputError: labels are missing, wrong, or of no use for this model.
    """
    if labels is not None:
        right = not isinstance(labels, str) and all(isinstance(n, str) for n in labels)
        if not right or len(labels) < 2 or len(set(labels)) < len(labels):
            raise InputError("labels are the names of the classes, at least two, each once")
    kind = next((kind for kind in kinds() if kind.owns(model)), None)
    return (kind or ModelKind()).classifier(model, labels)


def named_kind(name: str) -> tuple[ModelKind, str] | None:
    """The kind whose prefix a name has, and the rest of the name; None if there is none."""
    prefix, colon, rest = name.partition(":")
    kind = next((kind for kind in kinds() if colon and kind.prefix == prefix), None)
    return None if kind is None else (kind, rest)


def repository_kind(config: Mapping[str, Any]) -> ModelKind | None:
    """The kind of model that a Hub repository with this ``config.json`` holds."""
    return next((kind for kind in kinds() if kind.repository(config)), None)


def read_preprocess(preprocess: Any) -> Settings:
    """Mean, std and size of a preprocessing object: a processor, a transform, or a dict of these.

    Raises:
        InputError: no kind knows what this is, or what it does cannot be done by an adapter.
    """
    if isinstance(preprocess, Settings):
        return preprocess
    for kind in kinds():
        if (settings := kind.read(preprocess)) is not None:
            return settings
    raise InputError(
        f"preprocess= takes an image processor of transformers, weights.transforms() of "
        f"torchvision, or a Compose of Resize, CenterCrop, ToTensor and Normalize, not a "
        f"{type(preprocess).__name__}; give mean= and std= instead"
    )
