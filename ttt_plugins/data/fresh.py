"""Images generated from clean ones: corrupted, or flipped and cropped, reproducibly for each row.

The random numbers of a row depend only on its number, the corruption and ``repeat``, never on the
batch that it is generated in: any rows of a cell can be generated again, on any device, and are the
same.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from .corruptions import corrupt

__all__ = ["corrupt_rows", "flip_and_crop"]

#: Number of images that are corrupted together.
_BATCH_SIZE = 64
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
    """Corrupt clean images, each with its own noise.

    Args:
        images: uint8 images (N, 3, H, W).
        rows: the images' row numbers (N,), which select the noise.
        name: one of `TENSOR_CORRUPTIONS`.
        severity: strength of the corruption, an integer from 1 to 5.
        repeat: number of the draw; each gives different noise.
        device: device to compute on.

    Returns:
        uint8 images (N, 3, H, W) on the CPU.

    Raises:
        InputError: as for `corrupt`.
    """
    height, width = images.shape[2:]
    shape = {"speckle_noise": (3, height, width), "spatter": (height, width)}.get(name)
    corrupted = []
    for batch, numbers in zip(images.split(_BATCH_SIZE), rows.split(_BATCH_SIZE), strict=True):
        noise = None
        if shape is not None:
            generators = [_generator(row, name, severity, repeat) for row in numbers.tolist()]
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        corrupted.append(corrupt(batch.to(device), name, severity, noise=noise).cpu())
    return torch.cat(corrupted)


def flip_and_crop(images: Tensor, rows: Tensor, repeat: int) -> Tensor:
    """Shift images by up to an eighth of their side and mirror half of them.

    Args:
        images: uint8 images (N, 3, H, W).
        rows: the images' row numbers (N,), which select the shifts.
        repeat: number of the draw; each gives different shifts.

    Returns:
        uint8 images (N, 3, H, W), whose borders are filled by reflection.
    """
    height, width = images.shape[2:]
    down, right = height // _SHIFT, width // _SHIFT
    shifted = torch.empty_like(images)
    padded = F.pad(images.float(), (right, right, down, down), "reflect").to(images.dtype)
    for i, row in enumerate(rows.tolist()):
        generator = _generator(row, "crop", repeat)
        top = int(torch.randint(2 * down + 1, (), generator=generator))
        left = int(torch.randint(2 * right + 1, (), generator=generator))
        crop = padded[i, :, top : top + height, left : left + width]
        mirrored = bool(torch.randint(2, (), generator=generator))
        shifted[i] = crop.flip(-1) if mirrored else crop
    return shifted
