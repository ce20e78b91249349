"""Batches of pictures from any source, resized and cropped for a classifier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..backbones.backbone import Backbone
from ..backbones.stages import inner
from ..data.images import LabelledImages, gather_images, to_float
from ..data.loading import ImageLoader, Transform
from ..data.on_demand import ImagesOnDemand
from ..data.opening import open_images
from ..data.source import ImageSource, ImageStream
from ..data.transforms import evaluation_transform

__all__ = ["image_batches", "is_source", "picture_transform", "training_images"]


def picture_transform(backbone: Backbone, size: int | None = None) -> Transform | None:
    """How the pictures for a classifier are resized and cropped, see `evaluation_transform`.

    Args:
        backbone: the classifier.
        size: side of the images in pixels, instead of the model's own.

    Returns:
        the transform; None if the model declares no settings for pictures.
    """
    _, height, width = backbone.input_size
    if size is None and height == width:
        size = height
    _, network = inner(backbone.model)
    return evaluation_transform(backbone.settings.pictures or network, size)


def is_source(images: Any) -> bool:
    """Whether this is a source for `open_images`, and not a loader that yields batches."""
    kinds = (str, Path, Tensor, LabelledImages, ImageSource, ImageStream)
    if isinstance(images, Dataset):
        return not isinstance(images, IterableDataset)
    return isinstance(images, kinds)


def image_batches(
    source: Any, backbone: Backbone, batch_size: int = 64, limit: int | None = None
) -> Iterator[Tensor]:
    """Batches of a source's images in [0, 1], (B, C, H, W), on the classifier's device.

    Args:
        source: source of images, in any form that `open_images` accepts.
        backbone: the classifier, whose transform resizes and crops pictures.
        batch_size: number of images in a batch.
        limit: largest number of images, None for all.

    Raises:
        DataError, InputError: the source cannot be read.
    """
    transform = picture_transform(backbone)
    for batch in ImageLoader(
        open_images(source), transform=transform, batch_size=batch_size, limit=limit
    ):
        yield to_float(batch.images.to(backbone.device, non_blocking=True))


def training_images(images: Any, backbone: Backbone) -> Tensor | ImagesOnDemand:
    """Images to train on for a classifier: a tensor (N, C, S, S), or read when they are used.

    Args:
        images: a tensor, `ImagesOnDemand`, a loader of ready batches, or what `open_images` takes.
        backbone: the classifier, whose own transform resizes and crops pictures.

    Raises:
        DataError, InputError: the images cannot be read.
    """
    if isinstance(images, (Tensor, ImagesOnDemand)):
        return images
    if not is_source(images):
        return gather_images(images)
    source = open_images(images)
    if isinstance(source, ImageSource):
        return ImagesOnDemand(source, picture_transform(backbone))
    return gather_images(image_batches(source, backbone))
