"""Random views of image batches, as batched tensor operations on the images' device.

Two sources of chance. Training draws from a ``torch.Generator``. Methods that adapt to each image
on its own draw from the image: `image_keys` turns an image and a seed into a number, `uniforms`
turns that into as many uniform numbers as a view needs. So an image's views do not depend on the
batch it came in, nor on the device, and no state has to be kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "crop_and_flip",
    "cutmix_",
    "cutout_",
    "image_keys",
    "quarter_turns",
    "random_crop",
    "random_flip",
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
    gammas = torch._standard_gamma(
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
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[images.element_size()]
    bits = images.contiguous().view(width).flatten(1).long()
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
        quarters: (...) integers in 0..3, counter-clockwise.
    """
    k = quarters[..., None, None, None]
    turned = torch.where(k % 2 == 1, images.transpose(-1, -2), images)
    turned = torch.where((k == 1) | (k == 2), turned.flip(-2), turned)
    return torch.where((k == 2) | (k == 3), turned.flip(-1), turned)
