"""Images made anew: corrupted from clean ones, or flipped and cropped, reproducibly for each row.

The random numbers of a row depend only on its number, the corruption and ``repeat``, never on the
batch that it is made in: any part of a cell can be made again, on any device, and is the same.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from .corruptions import corrupt

__all__ = ["corrupt_rows", "flip_and_crop"]

#: Number of images that are corrupted together.
_TOGETHER = 64
#: Crops are shifted by at most the side of the image divided by this, as is usual for CIFAR.
_SHIFT = 8


def _generator(row: int, *what: object) -> torch.Generator:
    digest = hashlib.sha256(" ".join(map(str, (row, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def corrupt_rows(
    images: Tensor,
    rows: Tensor,
    name: str,
    severity: int,
    *,
    repeat: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Corrupt clean images with noise of their own.

    Args:
        images: uint8 images (N, 3, H, W).
        rows: their numbers (N,), which select the noise.
        name: one of `TENSOR_CORRUPTIONS`.
        severity: strength of the corruption, from 1 to 5.
        repeat: number of the noise; each gives other noise.
        device: device to compute on.

    Returns:
        uint8 images (N, 3, H, W) on the CPU.

    Raises:
        InputError: as for `corrupt`.
    """
    height, width = images.shape[2:]
    shape = {"speckle_noise": (3, height, width), "spatter": (height, width)}.get(name)
    made = []
    for part, chosen in zip(images.split(_TOGETHER), rows.split(_TOGETHER), strict=True):
        noise = None
        if shape is not None:
            generators = [_generator(row, name, severity, repeat) for row in chosen.tolist()]
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        made.append(corrupt(part.to(device), name, severity, noise=noise).cpu())
    return torch.cat(made)


def flip_and_crop(images: Tensor, rows: Tensor, repeat: int) -> Tensor:
    """Shift images by up to an eighth of their side and mirror half of them.

    Args:
        images: uint8 images (N, 3, H, W).
        rows: their numbers (N,), which select the shifts.
        repeat: number of the draw; each gives other shifts.

    Returns:
        uint8 images (N, 3, H, W), whose borders are filled by reflection.
    """
    height, width = images.shape[2:]
    down, right = height // _SHIFT, width // _SHIFT
    made = torch.empty_like(images)
    padded = F.pad(images.float(), (right, right, down, down), "reflect").to(images.dtype)
    for place, row in enumerate(rows.tolist()):
        generator = _generator(row, "crop", repeat)
        top = int(torch.randint(2 * down + 1, (), generator=generator))
        left = int(torch.randint(2 * right + 1, (), generator=generator))
        crop = padded[place, :, top : top + height, left : left + width]
        mirrored = bool(torch.randint(2, (), generator=generator))
        made[place] = crop.flip(-1) if mirrored else crop
    return made
