"""torchvision's classifiers, their weights' transforms, and the same transforms in a Compose."""

from __future__ import annotations

import difflib
from typing import Any

import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models
from torchvision.transforms import Compose, v2
from torchvision.transforms._presets import ImageClassification

from ...errors import InputError
from ...utils.pictures import Pictures
from . import attach
from .kind import ModelKind, Settings

#: Steps of a Compose that change no pixel's value or place.
_HARMLESS = ("ToTensor", "PILToTensor", "ToImage", "ToPureTensor", "ConvertImageDtype", "ToDtype")
#: Functions of open_clip's and timm's transforms that do the same.
_HARMLESS += ("_convert_to_rgb", "RGB", "ToRGB", "MaybeToTensor", "MaybePILToTensor", "ToRgb")


def _pair(size: Any) -> tuple[int, int]:
    both = [size, size] if isinstance(size, int) else list(size)
    return (int(both[0]), int(both[-1]))


def _preset(preset: ImageClassification) -> Settings:
    pictures = Pictures(preset.resize_size[0], _pair(preset.crop_size), preset.interpolation.value)
    return Settings(tuple(preset.mean), tuple(preset.std), pictures=pictures)


def _composed(steps: list[Any]) -> Settings:
    """The settings of a sequence of transforms, each of which must be one that is known."""
    resize: int | tuple[int, int] | None = None
    crop = mean = std = None
    interpolation = "bilinear"
    for step in steps:
        name = getattr(step, "__name__", type(step).__name__)
        if name == "Resize":
            size = step.size
            resize = int(size) if isinstance(size, int) else _pair(size)
            if isinstance(size, (list, tuple)) and len(size) == 1:
                resize = int(size[0])
            interpolation = getattr(step.interpolation, "value", str(step.interpolation))
        elif name == "CenterCrop":
            crop = _pair(step.size)
        elif name in ("Normalize", "MaskAwareNormalize"):
            mean, std = tuple(step.mean), tuple(step.std)
        elif name not in _HARMLESS:
            raise InputError(
                f"preprocess= has a step {name}, which an adapter cannot take over: give mean= "
                "and std=, and do this step to the images yourself"
            )
    if resize is None and crop is not None:
        raise InputError("preprocess= crops without a Resize before it: give mean= and std=")
    pictures = None if resize is None else Pictures(resize, crop, interpolation)
    return Settings(
        None if mean is None else tuple(map(float, mean)),
        None if std is None else tuple(map(float, std)),
        normalize=mean is not None,
        pictures=pictures,
    )


class _Torchvision(ModelKind):
    prefix = "torchvision"

    def owns(self, model: nn.Module) -> bool:
        return any(c.__module__.startswith("torchvision.models.") for c in type(model).__mro__)

    def settings(self, model: nn.Module) -> Settings:
        size = getattr(model, "image_size", None)
        known = isinstance(size, int)
        return Settings(input_size=(size, size) if known else None, fixed_size=known)

    def read(self, preprocess: Any) -> Settings | None:
        if isinstance(preprocess, WeightsEnum):
            preprocess = preprocess.transforms()
        if isinstance(preprocess, ImageClassification):
            return _preset(preprocess)
        if isinstance(preprocess, (Compose, v2.Compose)):
            return _composed(list(preprocess.transforms))
        return None

    def named(self, name: str, pretrained: bool) -> nn.Module:
        plain, _, tag = name.partition(".")
        known = list_models(module=torchvision.models)
        if plain not in known:
            close = difflib.get_close_matches(plain, known, 3)
            raise InputError(
                f"torchvision {torchvision.__version__} has no classifier {plain[:80]!r}"
                + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
            )
        enum = get_model_weights(plain)
        tags = [w.name for w in enum]
        if tag not in ("", "DEFAULT", *tags):
            raise InputError(f"torchvision's {plain} has no weights {tag[:80]!r}, but {tags}")
        weights = enum[tag or "DEFAULT"]
        try:
            model = get_model(plain, weights=weights if pretrained else None)
        except (OSError, RuntimeError) as error:  # no connection, or a damaged file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"torchvision could not load {name!r}: {reason}") from error
        own = self.settings(model)
        attach(model, own.with_preprocessing(_preset(weights.transforms())))
        return model.eval()


KIND = _Torchvision()
