"""Random views of image batches, as batched tensor operations on the images' device.

Every function takes (B, C, H, W) and draws from the ``torch.Generator`` it is given, so the
same seed gives the same views.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cutmix_", "cutout_", "random_crop", "random_flip"]


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
