"""Random views of image batches, as batched tensor operations on the images' device.

Two sources of chance. Training draws from a ``torch.Generator``. Methods that adapt to each image
on its own draw from the image: `image_keys` turns an image and a seed into a number, `uniforms`
turns that into as many uniform numbers as a view needs. So an image's views do not depend on the
batch it came in, nor on the device, and no state has to be kept.
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
    """Zero-pad each side by ``padding`` pixels and cut the original size at a random place."""
    b, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = _randint(0, 2 * padding + 1, (2, b), images, generator)
    rows = top[:, None] + torch.arange(h, device=images.device)
    cols = left[:, None] + torch.arange(w, device=images.device)
    batch = torch.arange(b, device=images.device)
    cut = padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], cols[:, None, :]]
    return cut.permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left-right with probability one half."""
    flip = _rand((len(images),), images, generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def _boxes(images: Tensor, height: Tensor, width: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1, H, W) masks of boxes of the given sizes, centred uniformly, cut at the border."""
    b, _, h, w = images.shape
    cy, cx = _rand((2, b), images, generator)
    rows = torch.arange(h, device=images.device) + 0.5
    cols = torch.arange(w, device=images.device) + 0.5
    in_rows = (rows - (cy * h)[:, None]).abs() <= (height / 2)[:, None]
    in_cols = (cols - (cx * w)[:, None]).abs() <= (width / 2)[:, None]
    return (in_rows[:, :, None] & in_cols[:, None, :])[:, None]


def cutout_(images: Tensor, size: int, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Overwrite one ``size`` x ``size`` square of each image with ``fill`` (C,).

    Source: DeVries & Taylor, "Cutout", arXiv 1708.04552.
    """
    side = torch.full((len(images),), float(size), device=images.device)
    mask = _boxes(images, side, side, generator)
    return images.copy_(torch.where(mask, fill[:, None, None].to(images), images))


def cutmix_(
    images: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a box of another image of the batch into each image.

    The kept share is drawn from Beta(alpha, alpha) once a batch and corrected to the area
    really pasted. Source: Yun et al., "CutMix", arXiv 1905.04899.

    Returns:
        the mixed images, the partner of each image (B,), and the share (B,) of the image's own
        label.
    """
    b, _, h, w = images.shape
    # A Beta variate from the generator: the two Gammas of equal shape, one per side.
    gammas = torch._standard_gamma(  # pyright: ignore[reportPrivateImportUsage]
        torch.full((2,), alpha, device=generator.device), generator=generator
    )
    share = (gammas[0] / gammas.sum()).to(images.device)
    side = (1 - share).sqrt().expand(b)
    mask = _boxes(images, side * h, side * w, generator)
    partner = torch.randperm(b, generator=generator, device=generator.device).to(images.device)
    mixed = torch.where(mask, images[partner], images)
    return images.copy_(mixed), partner, 1 - mask.float().mean((1, 2, 3))


# -- chance from the image -----------------------------------------------------------------


def _scramble(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors (products wrap, shifts are made logical)."""
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def image_keys(images: Tensor, seed: int) -> Tensor:
    """(B, C, H, W) -> (B,) int64: a number for each image's bits and the seed."""
    # In single precision, whatever the images come in, so that a move to another keeps the views.
    bits = images.float().contiguous().view(torch.int32).flatten(1).long()
    place = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _GAMMA
    return _scramble((_scramble(bits ^ place)).sum(1) + _scramble(torch.tensor(seed)).item())


def uniforms(keys: Tensor, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """(B,) keys -> (B, *shape) numbers in [0, 1), other ones for every ``salt``."""
    count = 1
    for size in shape:
        count *= size
    place = torch.arange(1, count + 1, device=keys.device) * _GAMMA
    salted = _scramble(keys ^ _scramble(torch.tensor(~salt)).item())
    mixed = _scramble(salted[:, None] + place)
    return (((mixed >> 40) & 0xFFFFFF).float() / (1 << 24)).view(-1, *shape)


def crop_and_flip(images: Tensor, u: Tensor, padding: int) -> Tensor:
    """K views of each image: zero-pad by ``padding``, cut the original size, maybe mirror.

    Args:
        images: (B, C, H, W).
        u: (B, K, 3) uniform numbers: row, column, mirror (left-right below one half).
        padding: pixels on each side.

    Returns:
        (B, K, C, H, W).
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
    """Rotate each square image (..., C, S, S) by its number of quarter turns, as ``torch.rot90``.

    Args:
        images: (..., C, S, S).
        quarters: (...) integers in 0..3, counter-clockwise.
    """
    k = quarters[..., None, None, None]
    turned = torch.where(k % 2 == 1, images.transpose(-1, -2), images)
    turned = torch.where((k == 1) | (k == 2), turned.flip(-2), turned)
    return torch.where((k == 2) | (k == 3), turned.flip(-1), turned)


# -- views of BYOL and MT3 -----------------------------------------------------------------

#: Uniform numbers that `byol_view` takes for a view.
BYOL_NUMBERS = 10
#: Uniform numbers that `shared_augmentation` takes for a task.
SHARED_NUMBERS = 5


def _resampling(start: Tensor, size: Tensor, length: int) -> Tensor:
    """(..., length, length) matrices that stretch ``size`` pixels from ``start`` to ``length``.

    Bilinear with half-pixel centres, the edge pixels of the cut repeated: what cutting and
    ``interpolate(mode="bilinear")`` give.
    """
    place = torch.arange(length, device=start.device, dtype=torch.float32)
    start, size = start[..., None], size[..., None]
    source = start + ((place + 0.5) * size / length - 0.5).clamp_min(0)
    source = torch.minimum(source, start + size - 1)
    return (1 - (source[..., None] - place).abs()).clamp_min(0)


def resized_crops(images: Tensor, u: Tensor) -> Tensor:
    """K square crops of each image, resized to the image's size, some upside down.

    The side is an integer from 20/32 to 31/32 of the image's (20 to 31 pixels at 32).

    Args:
        images: (B, C, S, S).
        u: (B, K, 4) uniform numbers: side, row, column, upside down (below one half).

    Returns:
        (B, K, C, S, S).
    """
    length = images.shape[-1]
    low, high = math.ceil(length * 20 / 32), max(length * 31 // 32, 1)
    size = low + (u[..., 0] * (high - low + 1)).floor()
    room = length - size + 1
    rows = _resampling((u[..., 1] * room).floor(), size, length)
    rows = torch.where(u[..., 3, None, None] < 0.5, rows.flip(-2), rows)
    cols = _resampling((u[..., 2] * room).floor(), size, length).transpose(-1, -2)
    return rows[:, :, None].to(images) @ images[:, None] @ cols[:, :, None].to(images)


def to_grey(images: Tensor) -> Tensor:
    """RGB (..., 3, H, W) -> luma (..., 1, H, W) with the weights of ITU-R BT.601."""
    red, green, blue = images.unbind(-3)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(-3)


def colour_jitter(images: Tensor, u: Tensor) -> Tensor:
    """Shift brightness, scale contrast and saturation, turn the hue of RGB images.

    Ranges: brightness + U(-0.16, 0.16); contrast, about each channel's mean, and saturation times
    U(0.84, 1.16); hue + U(-0.04, 0.04) of a turn; clipped to [0, 1]. Source: MT3's released code
    (TensorFlow's image operations), which clips once, at the end; here also before the colours
    are turned, because hue and saturation are defined there.

    Args:
        images: (..., 3, H, W) in [0, 1].
        u: (..., 4) uniform numbers: brightness, contrast, saturation, hue.
    """
    shift, contrast, saturation, hue = (2 * u - 1)[..., None, None, None].unbind(-4)
    x = images + 0.16 * shift
    mean = x.mean((-1, -2), keepdim=True)
    x = ((x - mean) * (1 + 0.16 * contrast) + mean).clamp(0, 1)
    # hue, saturation, value
    value, least = x.amax(-3, keepdim=True), x.amin(-3, keepdim=True)
    spread = value - least
    safe = torch.where(spread > 0, spread, 1)
    red, green, blue = ((x - least) / safe).split(1, -3)
    red_most, green_most = x[..., :1, :, :] == value, x[..., 1:2, :, :] == value
    turn = torch.where(red_most, green - blue, torch.where(green_most, 2 + blue - red, 4))
    turn = torch.where(red_most | green_most, turn, 4 + red - green) + 6 * 0.04 * hue
    grey = spread / torch.where(value > 0, value, 1) * (1 + 0.16 * saturation)
    # and back
    k = (torch.tensor([5, 3, 1], device=x.device).view(3, 1, 1) + turn) % 6
    share = torch.minimum(torch.minimum(k, 4 - k), torch.ones_like(k)).clamp_min(0)
    return (value - value * grey.clamp(0, 1) * share).clamp(0, 1)


def byol_view(images: Tensor, u: Tensor) -> Tensor:
    """K views of each image as MT3 draws them: crop, upside down, colours, grey.

    Colours are jittered with probability 0.8, images turned grey with 0.2; both only for RGB.

    Args:
        images: (B, C, S, S) in [0, 1].
        u: (B, K, `BYOL_NUMBERS`) uniform numbers.

    Returns:
        (B, K, C, S, S).
    """
    x = resized_crops(images, u[..., :4])
    if images.shape[1] != 3:
        return x
    jitter, grey = (u[..., i, None, None, None] for i in (4, 9))
    x = torch.where(jitter < 0.8, colour_jitter(x, u[..., 5:9].to(x)), x)
    return torch.where(grey < 0.2, to_grey(x).expand_as(x), x)


def shared_augmentation(images: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """MT3's corruption of a whole task, the same for all of its images.

    Upside down and mirrored with probability 0.5 each, blurred (3x3, deviation 1) with 0.2,
    brightness + U(-0.2, 0.2), Gaussian noise of deviation U(0, 0.02), clipped to [0, 1].

    Args:
        images: (T, N, C, H, W) in [0, 1], T tasks.
        u: (T, `SHARED_NUMBERS`) uniform numbers.
        noise: standard normal, of the images' shape.
    """
    down, mirror, blur, shift, deviation = u.view(*u.shape, 1, 1, 1, 1).unbind(1)
    x = torch.where(down < 0.5, images.flip(-2), images)
    x = torch.where(mirror < 0.5, x.flip(-1), x)
    x = torch.where(blur < 0.2, _blur(x), x)
    return (x + 0.4 * shift - 0.2 + 0.02 * deviation * noise).clamp(0, 1)


def _blur(images: Tensor) -> Tensor:
    """3x3 Gaussian of deviation 1, the border reflected."""
    weights = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / 2).to(images)
    weights = weights / weights.sum()
    flat = images.flatten(0, -3)[:, None]
    flat = F.pad(flat, (1, 1, 1, 1), mode="reflect")
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, 3, 1)), weights.view(1, 1, 1, 3))
    return flat.view_as(images)
