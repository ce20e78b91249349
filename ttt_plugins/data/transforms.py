"""A model's own resizing and cropping of pictures, without its normalisation."""

from __future__ import annotations

from typing import Any

from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms._presets import ImageClassification

from ..errors import InputError
from ..utils.pictures import Pictures
from .loading import Transform

__all__ = ["evaluation_transform"]


def evaluation_transform(model: Any, size: int | None = None) -> Transform | None:
    """The transform for evaluating a model, from a picture to uint8 pixels (3, S, S).

    The adapter normalises images itself, so the transform does not.

    Args:
        model: a timm model (its ``pretrained_cfg`` has size, crop and interpolation),
            torchvision's weights or their ``transforms()``, `Pictures`, or any other model.
        size: side of the images in pixels, at least 1, instead of the model's own. For a model
            without settings for pictures, the short side is resized bicubically to 8/7 of ``size``
            and the centre is cropped, as is usual for 224 pixels.

    Returns:
        The transform; None if neither the model nor ``size`` gives a size, so that pictures keep
        their own size.

    Raises:
        InputError: the size is out of range.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise InputError(f"the size of images must be an integer of at least 1, got {size!r}")
    if hasattr(model, "transforms") and not isinstance(model, nn.Module):
        model = model.transforms()
    if isinstance(model, ImageClassification):
        crop = (model.crop_size[0], model.crop_size[0])
        model = Pictures(model.resize_size[0], crop, model.interpolation.value)
    if isinstance(model, Pictures):
        return _resize_and_crop(model if size is None else model.at(size))
    settings = getattr(model, "pretrained_cfg", None)
    if settings:
        asked = {} if size is None else {"input_size": (3, size, size)}
        config = resolve_data_config(asked, model=model)
        return create_transform(  # pyright: ignore[reportReturnType]
            **config, is_training=False, normalize=False
        )
    if size is None:
        return None
    return _resize_and_crop(Pictures(round(size * 8 / 7), (size, size)))


def _resize_and_crop(pictures: Pictures) -> Transform:
    resize, crop = pictures.resize, pictures.crop
    size = resize if isinstance(resize, int) else list(resize)
    steps: list[Any] = [Resize(size, InterpolationMode(pictures.interpolation))]
    return Compose([*steps, *([] if crop is None else [CenterCrop(list(crop))]), PILToTensor()])
