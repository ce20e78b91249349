"""Checks of a batch of images before it is processed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..errors import InputError, TTTError
from ..utils.failures import device_failed

__all__ = [
    "check_images",
    "check_pixels",
    "knows_normalisation",
    "pixels_of",
    "refuse_pixels",
    "refuse_tracing",
    "refused_sizes",
]

#: Largest distance of a pixel from [0, 1] that is accepted; resampling overshoots the range.
_RANGE_SLACK = 0.05


def check_images(backbone: Backbone, images: object) -> Tensor:
    """Check the type, shape and device of a batch, without waiting for the device.

    Raises:
        InputError: these are not floating-point images (B, C, H, W) on the backbone's device.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.ndim != 4:
        raise InputError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise InputError(
            f"images must be floating point in [0, 1], got {images.dtype}; "
            "for 8-bit images pass images.float() / 255"
        )
    if not images.numel():
        raise InputError(f"the batch is empty: images have shape {tuple(images.shape)}")
    channels = backbone.input_size[0]
    if images.shape[1] != channels:
        raise InputError(
            f"images have {images.shape[1]} channels (shape {tuple(images.shape)}), but the model "
            f"takes {channels}; the layout is (B, C, H, W)"
        )
    if images.device != backbone.device:
        raise InputError(
            f"images are on {images.device}, but the adapter is on {backbone.device}; move one"
        )
    return images


def check_pixels(images: Tensor) -> None:
    """Refuse images with pixels that are not finite or outside [0, 1]; this waits for the device.

    Raises:
        InputError: there are such pixels.
    """
    low, high = torch.aminmax(images.detach())
    refuse_pixels(low.item(), high.item())


def refuse_pixels(low: float, high: float, where: str = "") -> None:
    """Refuse images by their smallest and largest pixel.

    Args:
        low: the smallest pixel; NaN if a pixel is NaN.
        high: the largest pixel.
        where: which batch has them, unless it is the current one.

    Raises:
        InputError: one of them is outside [0, 1] or not finite.
    """
    if low != low or high != high or max(abs(low), abs(high)) == float("inf"):
        raise InputError(f"images contain NaN or infinite pixels{where or '; nothing was adapted'}")
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise InputError(
            f"images must lie in [0, 1], but these range from {low:.3g} to {high:.3g}{where}; the "
            "adapter normalises them itself, so pass 8-bit pixels divided by 255"
        )


def knows_normalisation(backbone: Backbone) -> bool:
    """Return True if the backbone has the mean and std by which its images are normalised.

    Raises:
        InputError: the backbone does not normalise.
    """
    if not backbone.normalize:
        raise InputError(
            "normalized_input=True declares that images are already normalised, but this adapter "
            "has no mean and std: give mean and std, or leave out normalized_input"
        )
    return True


def pixels_of(backbone: Backbone, images: Tensor) -> Tensor:
    """The pixels in [0, 1] of images that were normalised with the backbone's mean and std.

    Pixels that are within rounding of an 8-bit value become exactly that value, because the views
    of an image are drawn from its bits before normalisation.
    """
    pixels = images * backbone.std + backbone.mean
    eight_bit = (pixels * 255).round() / 255
    return torch.where((pixels - eight_bit).abs() < 1e-5, eight_bit, pixels)


def refuse_tracing() -> None:
    """Raise `InputError` if a program is being recorded, which could not hold gradient steps."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or torch.compiler.is_exporting():
        raise InputError(
            "an adapter cannot be traced or exported, because its forward pass takes gradient "
            "steps: call export() and trace or export the module that it returns"
        )


@contextmanager
def refused_sizes(
    backbone: Backbone, images: Tensor, last: tuple[int, ...] | None = None
) -> Iterator[None]:
    """Report an error inside the model as an error of the images' size if that is the likely cause.

    Args:
        backbone: the classifier.
        images: images (B, C, H, W) that are passed to the model in the block.
        last: size (C, H, W) of the last images that the model accepted, used if it declares none.

    Raises:
        InputError: the model failed, and images of another size are known to work.
    """
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        known = isinstance(error, TTTError) or device_failed(error)
        expected, why = backbone.input_size, "it was made for"
        if None in expected:
            expected, why = last, "the last images that it accepted had"
        if known or expected in (None, tuple(images.shape[1:])):
            raise
        raise InputError(
            f"the model cannot take images of shape {tuple(images.shape[1:])}; {why} "
            f"{expected} ({error})"
        ) from error
