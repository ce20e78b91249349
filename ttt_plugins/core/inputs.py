"""What a batch of images is checked for before anything happens to it."""

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
    "refuse_tracing",
    "refused_sizes",
]

#: How far outside [0, 1] a pixel may lie before it is taken for a mistake (resampling overshoots).
_RANGE_SLACK = 0.05


def check_images(backbone: Backbone, images: object) -> Tensor:
    """Type, shape and device of a batch; it waits for no device.

    Raises:
        InputError: not images (B, C, H, W) on the backbone's device, in floating point.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.ndim != 4:
        raise InputError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise InputError(
            f"images must be floating point in [0, 1], got {images.dtype}; "
            "pass images.float() / 255 for 8-bit ones"
        )
    if not images.numel():
        raise InputError(f"an empty batch: images have shape {tuple(images.shape)}")
    channels = backbone.input_size[0]
    if images.shape[1] != channels:
        raise InputError(
            f"images have {images.shape[1]} channels (shape {tuple(images.shape)}), the model "
            f"takes {channels}; the layout is (B, C, H, W)"
        )
    if images.device != backbone.device:
        raise InputError(
            f"images are on {images.device}, the adapter on {backbone.device}; move one"
        )
    return images


def check_pixels(images: Tensor) -> None:
    """Refuse images with pixels outside [0, 1] or not finite; an accelerator is waited for.

    Raises:
        InputError: there are such pixels.
    """
    low, high = (bound.item() for bound in torch.aminmax(images.detach()))
    if low != low or high != high or max(abs(low), abs(high)) == float("inf"):
        raise InputError("images hold NaN or infinite pixels; nothing was adapted")
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise InputError(
            f"images must lie in [0, 1], these span {low:.3g}..{high:.3g}; normalisation "
            "happens inside the adapter, so pass raw pixels divided by 255"
        )


def knows_normalisation(backbone: Backbone) -> bool:
    """True, if it is known what images of a pipeline that normalises were normalised with.

    Raises:
        InputError: it is not.
    """
    if not backbone.normalize:
        raise InputError(
            "normalized_input=True says that images come with mean and std taken out, and this "
            "adapter knows neither: give mean and std, or leave normalized_input out"
        )
    return True


def pixels_of(backbone: Backbone, images: Tensor) -> Tensor:
    """The pixels in [0, 1] of images that were normalised with the backbone's mean and std.

    Pixels that lie within rounding of an 8-bit value become that value: an image's views are drawn
    from its bits, which are then those of the image before it was normalised.
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
    """Tell an error inside the model as one of the images' size, where they have another.

    Args:
        backbone: the classifier.
        images: (B, C, H, W), what the model gets.
        last: (C, H, W) of the last images it took, where it names no size.

    Raises:
        InputError: the model fails, and images of another size are known to work.
    """
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        known = isinstance(error, TTTError) or device_failed(error)
        expected, why = backbone.input_size, "it was made for"
        if None in expected:
            expected, why = last, "the last images it took had"
        if known or expected in (None, tuple(images.shape[1:])):
            raise
        raise InputError(
            f"the model cannot take images of shape {tuple(images.shape[1:])}; {why} "
            f"{expected} ({error})"
        ) from error
