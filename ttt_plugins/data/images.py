"""Labelled images in memory, and the conversion of images and of loaders' batches to tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["LabelledImages", "batch_images", "gather_images", "to_float"]


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, 3, H, W) as uint8 and labels (N,) as int64.

    In training, `on_demand.ImagesOnDemand` may stand in for the tensor of images.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows) -> LabelledImages:
        return LabelledImages(self.images[rows], self.labels[rows])


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 images to floats in [0, 1]; floating-point images are returned unchanged.

    The values are the same on every device: CUDA multiplies by the reciprocal of a Python number,
    but divides by a tensor. That tensor is filled on the device, because copying it there would
    wait for the device.
    """
    if images.is_floating_point():
        return images
    return images.to(dtype).div_(torch.full((), 255.0, dtype=dtype, device=images.device))


def batch_images(batch: object) -> Tensor:
    """The images of a loader's batch: a tensor, or a tuple or list that begins with one.

    Raises:
        InputError: the batch has another form.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise InputError(
            "a loader must yield tensors of images, or tuples that begin with one; got "
            f"{type(batch).__name__}"
        )
    return images


def gather_images(data: Tensor | Iterable) -> Tensor:
    """Images as one tensor (N, C, H, W), from a tensor or from a loader's batches.

    Raises:
        InputError: the loader yields nothing, anything other than images, or batches of different
            types or sizes.
    """
    if isinstance(data, Tensor):
        return data
    if not isinstance(data, Iterable):
        raise InputError(f"data must be images or a loader of them, got {type(data).__name__}")
    batches = [batch_images(batch) for batch in data]
    if not batches:
        raise InputError("the loader yielded no images")
    kinds = {(batch.dtype, batch.device, batch.shape[1:]) for batch in batches}
    if len(kinds) > 1:
        a, b, *_ = (f"{dtype} {tuple(shape)} on {device}" for dtype, device, shape in kinds)
        raise InputError(f"the loader's batches cannot be joined into one tensor: {a} and {b}")
    return torch.cat(batches)
