"""The four corruptions that MGG is meta-trained on, as batched tensor operations on any device.

They reproduce the benchmark's four extra corruptions as published by Hendrycks & Dietterich (arXiv
1903.12261), in the ImageNet and the CIFAR variant: the parameters and the distribution of the noise
are the same, and the same noise gives the same result. The operations of scikit-image and OpenCV
that they need, such as Canny's edges and the distance transform for drops of water, are
implemented here.
An image on which no drop falls is unchanged (the published function divides zero by zero there).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

__all__ = ["TENSOR_CORRUPTIONS", "VARIANTS", "corrupt"]

#: The parameters at severities 1 to 5, by variant and corruption. For noise: standard deviation.
#: For blur: standard deviation in pixels. For saturation: factor and shift. For spatter: mean and
#: standard deviation of the liquid layer, standard deviation of its blur in pixels, threshold,
#: strength of water or blur of mud in pixels, and whether it is mud.
_PARAMETERS = {
    "imagenet": {
        "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
        "gaussian_blur": (1.0, 2.0, 3.0, 4.0, 6.0),
        "saturate": ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2)),
        "spatter": (
            (0.65, 0.3, 4.0, 0.69, 0.6, False),
            (0.65, 0.3, 3.0, 0.68, 0.6, False),
            (0.65, 0.3, 2.0, 0.68, 0.5, False),
            (0.65, 0.3, 1.0, 0.65, 1.5, True),
            (0.67, 0.4, 1.0, 0.65, 1.5, True),
        ),
    },
    "cifar": {
        "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
        "saturate": ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)),
        "spatter": (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1.0, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    },
}
VARIANTS = tuple(_PARAMETERS)
TENSOR_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

#: Images up to this side, in pixels, are corrupted in the CIFAR variant unless one is given.
_SMALL = 64


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    variant: str | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Corrupt a batch of images on its device.

    Args:
        images: images (B, 3, H, W), uint8 or floats in [0, 1].
        name: one of `TENSOR_CORRUPTIONS`.
        severity: strength of the corruption, an integer from 1 to 5.
        variant: ``"imagenet"`` or ``"cifar"``, whose parameters are milder; by default ``"cifar"``
            for images of at most 64 x 64 pixels.
        generator: random generator for the noise; by default torch's global one for its device.
        noise: standard normal noise to use instead: (B, 3, H, W) for speckle noise, (B, H, W)
            for spatter.

    Returns:
        corrupted images (B, 3, H, W) of the type of ``images``; uint8 values are truncated, as in
        the published functions.

    Raises:
        InputError: an unknown name or variant, a severity out of range, or images of an
            unsupported shape or type.
    """
    parameters = _parameters(images, name, severity, variant)
    x = images.float()
    if images.dtype == torch.uint8:
        x = x / 255

    def normal(shape: tuple[int, ...]) -> Tensor:
        if noise is not None:
            return noise.to(x)
        device = images.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device).to(x)

    if name == "speckle_noise":
        x = x + x * parameters * normal(tuple(x.shape))
    elif name == "gaussian_blur":
        x = _gaussian(x, parameters)
    elif name == "saturate":
        x = _saturate(x, *parameters)
    else:
        x = _spatter(x, normal((len(x), *x.shape[2:])), *parameters)
    x = x.clamp(0, 1)
    if images.dtype == torch.uint8:
        # The fraction is truncated. The published functions compute in double precision, where an
        # unchanged value is again an integer; in single precision it may be slightly smaller.
        return (x * 255 + 1e-3).to(torch.uint8)
    return x.to(images.dtype)


def _parameters(images: Tensor, name: str, severity: int, variant: str | None) -> Any:
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images to corrupt must be (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputError(f"images to corrupt must be uint8 or floats in [0, 1], not {images.dtype}")
    variant = variant or ("cifar" if max(images.shape[2:]) <= _SMALL else "imagenet")
    if variant not in VARIANTS:
        raise InputError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if name not in TENSOR_CORRUPTIONS:
        raise InputError(f"unknown corruption {name!r}; known are {TENSOR_CORRUPTIONS}")
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise InputError(f"severity must be an integer from 1 to 5, got {severity!r}")
    return _PARAMETERS[variant][name][severity - 1]


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    """Blur (B, C, H, W) like scikit-image: truncated at four deviations, with edges repeated."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x)
    planes = x.reshape(-1, 1, *x.shape[2:])
    planes = F.conv2d(
        F.pad(planes, (0, 0, radius, radius), "replicate"), kernel[None, None, :, None]
    )
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), "replicate"), kernel[None, None, None])
    return planes.reshape(x.shape)


def _saturate(x: Tensor, factor: float, shift: float) -> Tensor:
    """Change the saturation of RGB images (B, 3, H, W); hue and value are unchanged.

    With saturation s = (max - min) / max, a channel is ``max - (max - channel) * new / s``. Grey
    pixels have no hue; as in scikit-image, theirs is taken to be red.
    """
    value = x.amax(1, keepdim=True)
    spread = value - x.amin(1, keepdim=True)
    old = spread / value.clamp(min=1e-12)
    new = (old * factor + shift).clamp(0, 1)
    coloured = value - (value - x) * new / old.clamp(min=1e-12)
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device)[:, None, None]
    return torch.where(spread > 0, coloured, value - value * new * red)


def _spatter(
    x: Tensor,
    noise: Tensor,
    mean: float,
    deviation: float,
    blur: float,
    threshold: float,
    strength: float,
    mud: bool,
) -> Tensor:
    """Drops of water or mud where a blurred layer of noise (B, H, W) is above a threshold."""
    liquid = _gaussian((mean + deviation * noise)[:, None], blur)
    if mud:
        cover = _gaussian((liquid > threshold).float(), strength)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return x * (1 - cover) + cover * _colour(63, 42, 20, x.device)
    liquid = torch.where(liquid < threshold, 0.0, liquid)
    layer = (liquid * 255).floor() % 256
    drops = layer * _relief(layer)
    highest = drops.amax((1, 2, 3), keepdim=True)
    drops = strength * drops / highest.clamp(min=1e-12)
    return x + drops * _colour(175, 238, 238, x.device)


def _colour(red: int, green: int, blue: int, device: torch.device) -> Tensor:
    return torch.tensor([red, green, blue], device=device).view(3, 1, 1) / 255


def _relief(layer: Tensor) -> Tensor:
    """Shading of drops: distances from their edges, equalised and lit from one side.

    Args:
        layer: liquid layer (B, 1, H, W), integers from 0 to 255.

    Returns:
        brightness (B, 1, H, W), integers from 0 to 255.
    """
    ones = torch.ones(1, 1, 3, 3, device=layer.device)
    light = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]], device=layer.device)[None, None]
    distances = _distances(_canny(layer, 50, 150), 20)
    # Fixed-point numbers below 2 ** 24: their sum is exact.
    mean = (F.conv2d(_reflected(distances), ones) / (9 * _ONE)).floor()
    lit = F.conv2d(_reflected(_equalised(mean, 20)), light).clamp(0, 255)
    return (F.conv2d(_reflected(lit), ones) / 9).round()


def _reflected(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), "reflect")


def _canny(layer: Tensor, low: int, high: int) -> Tensor:
    """Canny's edges as OpenCV finds them, with a 3 x 3 Sobel operator and the L1 norm."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=layer.device)
    padded = F.pad(layer, (1, 1, 1, 1), "replicate")
    dx = F.conv2d(padded, sobel[None, None])
    dy = F.conv2d(padded, sobel.T[None, None])
    size = dx.abs() + dy.abs()
    around = F.pad(size, (1, 1, 1, 1))
    height, width = size.shape[2:]

    def neighbour(down: int, right: int) -> Tensor:
        return around[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    # Non-maximum suppression: a pixel is kept if it is the largest along its gradient, in one of
    # four directions.
    tangent = 13573 / 32768  # tan(22.5 degrees), as OpenCV rounds it
    flat = dy.abs() < tangent * dx.abs()
    steep = dy.abs() > (tangent + 2) * dx.abs()
    falling = torch.sign(dx) * torch.sign(dy) < 0
    along_x = (size > neighbour(0, -1)) & (size >= neighbour(0, 1))
    along_y = (size > neighbour(-1, 0)) & (size >= neighbour(1, 0))
    down = (size > neighbour(-1, -1)) & (size > neighbour(1, 1))
    up = (size > neighbour(-1, 1)) & (size > neighbour(1, -1))
    largest = torch.where(
        flat, along_x, torch.where(steep, along_y, torch.where(falling, up, down))
    )
    weak = (largest & (size > low)).float()
    edges = weak * (size > high)
    while True:  # hysteresis: strong edges extend along weak ones
        grown = F.max_pool2d(edges, 3, 1, 1) * weak
        if torch.equal(grown, edges):
            return edges > 0
        edges = grown


#: OpenCV computes distances in fixed point, with 16 bits of fraction.
_ONE = 1 << 16
_STEPS = {(0, 1): _ONE, (1, 1): 91750, (1, 2): 143976}  # 1, 1.4 and 2.1969


def _distances(edges: Tensor, most: int) -> Tensor:
    """Distances to the nearest edge, at most ``most`` pixels, in units of 1 / 65536 pixel.

    As in OpenCV with a 5 x 5 mask, paths consist of straight, diagonal and knight's moves.
    """
    moves = {
        (down, right): cost
        for (a, b), cost in _STEPS.items()
        for i, j in {(a, b), (b, a)}
        for down in {i, -i}
        for right in {j, -j}
    }
    height, width = edges.shape[2:]
    distances = torch.where(edges, 0.0, float(most * _ONE))
    for _ in range(most):  # no path of this length has more moves
        around = F.pad(distances, (2, 2, 2, 2), value=float(most * _ONE))
        shorter = distances
        for (down, right), cost in moves.items():
            moved = around[..., 2 + down : 2 + down + height, 2 + right : 2 + right + width]
            shorter = torch.minimum(shorter, moved + cost)
        if torch.equal(shorter, distances):
            break
        distances = shorter
    return distances


def _equalised(x: Tensor, most: int) -> Tensor:
    """Equalise each image's histogram to 0..255, as OpenCV does; its values are 0..``most``."""
    counts = torch.stack([(x == value).sum((1, 2, 3)) for value in range(most + 1)], 1)
    first = (counts > 0).float().argmax(1, keepdim=True)
    lowest = counts.gather(1, first)
    total = x[0].numel()
    scale = 255 / (total - lowest).clamp(min=1)
    table = ((counts.cumsum(1) - lowest) * scale).round().clamp(0, 255)
    table = torch.where(lowest == total, first.to(table), table)  # constant images are unchanged
    return table.gather(1, x.long().flatten(1)).view_as(x)
