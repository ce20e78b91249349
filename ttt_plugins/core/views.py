"""Random views of image batches, as batched tensor operations on the images' device.

There are two sources of randomness. Training draws from a ``torch.Generator``. Methods that adapt
to each image separately draw from the image: `image_keys` turns an image and a seed into a number,
and `uniforms` turns that into the uniform numbers for a view. The views of an image therefore
depend neither on its batch nor on the device, and no state has to be kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "byol_view",
    "colour_jitter",
    "crop_and_flip",
    "cutmix_",
    "cutout_",
    "image_keys",
    "quarter_turns",
    "random_crop",
    "random_flip",
    "resized_crops",
    "shared_augmentation",
    "to_grey",
    "uniforms",
]

# Constants of Steele, Lea & Flood's SplitMix64 (OOPSLA 2014), as signed 64-bit numbers.
_GAMMA, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _rand(shape, images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(images.device)


def _randint(low: int, high: int, shape, images: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(low, high, shape, generator=generator, device=generator.device)
    return drawn.to(images.device)


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Zero-pad each side by ``padding`` pixels, and crop the original size at a random place."""
    b, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = _randint(0, 2 * padding + 1, (2, b), images, generator)
    rows = top[:, None] + torch.arange(h, device=images.device)
    cols = left[:, None] + torch.arange(w, device=images.device)
    batch = torch.arange(b, device=images.device)
    cut = padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], cols[:, None, :]]
    return cut.permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image horizontally with probability one half."""
    flip = _rand((len(images),), images, generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def _boxes(images: Tensor, height: Tensor, width: Tensor, generator: torch.Generator) -> Tensor:
    """Masks (B, 1, H, W) of boxes of the given sizes, at uniform centres, clipped at the border."""
    b, _, h, w = images.shape
    cy, cx = _rand((2, b), images, generator)
    rows = torch.arange(h, device=images.device) + 0.5
    cols = torch.arange(w, device=images.device) + 0.5
    in_rows = (rows - (cy * h)[:, None]).abs() <= (height / 2)[:, None]
    in_cols = (cols - (cx * w)[:, None]).abs() <= (width / 2)[:, None]
    return (in_rows[:, :, None] & in_cols[:, None, :])[:, None]


def cutout_(images: Tensor, size: int, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Overwrite a square of ``size`` pixels in each image with ``fill`` (C,), in place.

    Source: DeVries & Taylor, "Cutout", arXiv 1708.04552.
    """
    side = torch.full((len(images),), float(size), device=images.device)
    mask = _boxes(images, side, side, generator)
    return images.copy_(torch.where(mask, fill[:, None, None].to(images), images))


def cutmix_(
    images: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a box from another image of the batch into each image, in place.

    The share of an image that is kept is drawn from Beta(alpha, alpha) once for the batch, and then
    computed from the area that was actually pasted. Source: Yun et al., "CutMix", arXiv 1905.04899.

    Returns:
        the mixed images, the index (B,) of each image's partner, and the weight (B,) of each
        image's own label, in [0, 1].
    """
    b, _, h, w = images.shape
    # A Beta variate from the generator, by two Gamma variates of equal shape.
    gammas = torch._standard_gamma(  # pyright: ignore[reportPrivateImportUsage]
        torch.full((2,), alpha, device=generator.device), generator=generator
    )
    share = (gammas[0] / gammas.sum()).to(images.device)
    side = (1 - share).sqrt().expand(b)
    mask = _boxes(images, side * h, side * w, generator)
    partner = torch.randperm(b, generator=generator, device=generator.device).to(images.device)
    mixed = torch.where(mask, images[partner], images)
    return images.copy_(mixed), partner, 1 - mask.float().mean((1, 2, 3))


# -- randomness from the image -------------------------------------------------------------


def _scramble(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors (products wrap, shifts are made logical)."""
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def image_keys(images: Tensor, seed: int) -> Tensor:
    """Images (B, C, H, W) -> int64 keys (B,), a hash of each image's bits and the seed."""
    # Always in single precision, so that the views do not depend on the type of the images.
    bits = images.float().contiguous().view(torch.int32).flatten(1).long()
    place = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _GAMMA
    return _scramble((_scramble(bits ^ place)).sum(1) + _scramble(torch.tensor(seed)).item())


def uniforms(keys: Tensor, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """Keys (B,) -> uniform numbers (B, *shape) in [0, 1), different for every ``salt``."""
    count = 1
    for size in shape:
        count *= size
    place = torch.arange(1, count + 1, device=keys.device) * _GAMMA
    salted = _scramble(keys ^ _scramble(torch.tensor(~salt)).item())
    mixed = _scramble(salted[:, None] + place)
    return (((mixed >> 40) & 0xFFFFFF).float() / (1 << 24)).view(-1, *shape)


def crop_and_flip(images: Tensor, u: Tensor, padding: int) -> Tensor:
    """K views of each image: zero-padded, cropped to the original size, and half of them mirrored.

    Args:
        images: images (B, C, H, W).
        u: uniform numbers (B, K, 3): row, column, mirror (horizontally if below one half).
        padding: zero padding on each side, in pixels.

    Returns:
        views (B, K, C, H, W).
    """
    b, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    top, left = (u[..., :2] * (2 * padding + 1)).long().unbind(-1)
    rows = top[..., None] + torch.arange(h, device=images.device)
    cols = torch.arange(w, device=images.device).expand(*u.shape[:2], w)
    cols = left[..., None] + torch.where(u[..., 2:] < 0.5, cols.flip(-1), cols)
    batch = torch.arange(b, device=images.device).view(b, 1, 1, 1)
    return padded[batch, rows[..., None], cols[..., None, :]].permute(0, 1, 4, 2, 3)


def quarter_turns(images: Tensor, quarters: Tensor) -> Tensor:
    """Rotate each square image by its number of quarter turns, as ``torch.rot90``.

    Args:
        images: images (..., C, S, S).
        quarters: numbers of counter-clockwise quarter turns (...), from 0 to 3.
    """
    k = quarters[..., None, None, None]
    turned = torch.where(k % 2 == 1, images.transpose(-1, -2), images)
    turned = torch.where((k == 1) | (k == 2), turned.flip(-2), turned)
    return torch.where((k == 2) | (k == 3), turned.flip(-1), turned)


# -- views of BYOL and MT3 -----------------------------------------------------------------

#: Number of uniform numbers that `byol_view` uses for a view.
BYOL_NUMBERS = 10
#: Number of uniform numbers that `shared_augmentation` uses for a task.
SHARED_NUMBERS = 5


def _resampling(start: Tensor, size: Tensor, length: int) -> Tensor:
    """Matrices (..., length, length) that stretch ``size`` pixels from ``start`` on to ``length``.

    The interpolation is bilinear with half-pixel centres and repeats the edge pixels of the crop,
    like cropping followed by ``interpolate(mode="bilinear")``.
    """
    place = torch.arange(length, device=start.device, dtype=torch.float32)
    start, size = start[..., None], size[..., None]
    source = start + ((place + 0.5) * size / length - 0.5).clamp_min(0)
    source = torch.minimum(source, start + size - 1)
    return (1 - (source[..., None] - place).abs()).clamp_min(0)


def resized_crops(images: Tensor, u: Tensor) -> Tensor:
    """K square crops of each image, resized to the image's size, half of them upside down.

    The side of a crop is an integer from 20/32 to 31/32 of the image's (20 to 31 pixels at 32).

    Args:
        images: images (B, C, S, S).
        u: uniform numbers (B, K, 4): side, row, column, upside down (if below one half).

    Returns:
        crops (B, K, C, S, S).
    """
    length = images.shape[-1]
    low, high = math.ceil(length * 20 / 32), max(length * 31 // 32, 1)
    size = low + (u[..., 0] * (high - low + 1)).floor()
    places = length - size + 1
    rows = _resampling((u[..., 1] * places).floor(), size, length)
    rows = torch.where(u[..., 3, None, None] < 0.5, rows.flip(-2), rows)
    cols = _resampling((u[..., 2] * places).floor(), size, length).transpose(-1, -2)
    return rows[:, :, None].to(images) @ images[:, None] @ cols[:, :, None].to(images)


def to_grey(images: Tensor) -> Tensor:
    """RGB images (..., 3, H, W) -> luma (..., 1, H, W) with the weights of ITU-R BT.601."""
    red, green, blue = images.unbind(-3)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(-3)


def colour_jitter(images: Tensor, u: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of RGB images.

    Brightness is shifted by U(-0.16, 0.16); contrast, about each channel's mean, and saturation are
    multiplied by U(0.84, 1.16); hue is shifted by U(-0.04, 0.04) of a turn. The result is clipped
    to [0, 1]. Source: MT3's released code (TensorFlow's image operations), which clips only at the
    end; here images are also clipped before saturation and hue change, which are defined for
    colours in [0, 1].

    Args:
        images: images (..., 3, H, W) in [0, 1].
        u: uniform numbers (..., 4): brightness, contrast, saturation, hue.
    """
    shift, contrast, saturation, hue = (2 * u - 1)[..., None, None, None].unbind(-4)
    x = images + 0.16 * shift
    mean = x.mean((-1, -2), keepdim=True)
    x = ((x - mean) * (1 + 0.16 * contrast) + mean).clamp(0, 1)
    # to hue, saturation and value
    value, least = x.amax(-3, keepdim=True), x.amin(-3, keepdim=True)
    spread = value - least
    safe = torch.where(spread > 0, spread, 1)
    red, green, blue = ((x - least) / safe).split(1, -3)
    red_most, green_most = x[..., :1, :, :] == value, x[..., 1:2, :, :] == value
    turn = torch.where(red_most, green - blue, torch.where(green_most, 2 + blue - red, 4))
    turn = torch.where(red_most | green_most, turn, 4 + red - green) + 6 * 0.04 * hue
    grey = spread / torch.where(value > 0, value, 1) * (1 + 0.16 * saturation)
    # back to RGB
    k = (torch.arange(5, 0, -2, device=x.device).view(3, 1, 1) + turn) % 6
    share = torch.minimum(torch.minimum(k, 4 - k), torch.ones_like(k)).clamp_min(0)
    return (value - value * grey.clamp(0, 1) * share).clamp(0, 1)


def byol_view(images: Tensor, u: Tensor) -> Tensor:
    """K views of each image as in MT3: cropped, upside down, with changed colours, or grey.

    Colours change with probability 0.8, and images become grey with probability 0.2; both only if
    the images are RGB.

    Args:
        images: images (B, C, S, S) in [0, 1].
        u: uniform numbers (B, K, `BYOL_NUMBERS`).

    Returns:
        views (B, K, C, S, S).
    """
    x = resized_crops(images, u[..., :4])
    if images.shape[1] != 3:
        return x
    jitter, grey = (u[..., i, None, None, None] for i in (4, 9))
    x = torch.where(jitter < 0.8, colour_jitter(x, u[..., 5:9].to(x)), x)
    return torch.where(grey < 0.2, to_grey(x).expand_as(x), x)


def shared_augmentation(images: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """MT3's batch augmentation of tasks, the same for all images of a task.

    Images are turned upside down and mirrored, each with probability 0.5, and blurred (3x3,
    standard deviation of 1 pixel) with probability 0.2. Brightness is shifted by U(-0.2, 0.2), and
    Gaussian noise with a standard deviation of U(0, 0.02) is added. The result is clipped to
    [0, 1].

    Args:
        images: images (T, N, C, H, W) in [0, 1] of T tasks.
        u: uniform numbers (T, `SHARED_NUMBERS`).
        noise: standard normal numbers of the images' shape.
    """
    down, mirror, blur, shift, deviation = u.view(*u.shape, 1, 1, 1, 1).unbind(1)
    x = torch.where(down < 0.5, images.flip(-2), images)
    x = torch.where(mirror < 0.5, x.flip(-1), x)
    x = torch.where(blur < 0.2, _blur(x), x)
    return (x + 0.4 * shift - 0.2 + 0.02 * deviation * noise).clamp(0, 1)


def _blur(images: Tensor) -> Tensor:
    """A 3x3 Gaussian blur with a standard deviation of 1 pixel, reflected at the border."""
    weights = torch.exp(-torch.arange(-1.0, 2, device=images.device).square() / 2).to(images)
    weights = weights / weights.sum()
    flat = images.flatten(0, -3)[:, None]
    flat = F.pad(flat, (1, 1, 1, 1), mode="reflect")
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, 3, 1)), weights.view(1, 1, 1, 3))
    return flat.view_as(images)
