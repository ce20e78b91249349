"""The nineteen corruptions of Hendrycks & Dietterich (arXiv 1903.12261) as published.

They exist in two variants: for photographs (ImageNet-C) and, milder, for 32x32 images (CIFAR-10-C).
The four extra ones are `corruptions.corrupt`. The fifteen of the benchmark are functions of the
package `imagecorruptions` 1.1.2, patched here so that they run with current versions of numpy and
scikit-image and agree with the published functions:

1. ``multichannel=`` is now ``channel_axis=``, ``np.float_`` is ``np.float64``, and
   ``pkg_resources`` and ``scipy.ndimage.interpolation`` are not needed.
2. The variant for 32x32 images: the package has only the parameters for photographs.
3. Zoomed pictures are cropped at their centre, not at their upper left corner (zoom blur, snow).
4. Frost is pasted at its own size (a fifth of it on 32x32 images), not enlarged by a tenth.
5. The elastic transform has the published affine part and parameters, and is written here.
6. Glass blur is written here: the same result in a thirtieth of the time, because the shifts of a
   picture are drawn at once and applied to positions. The published exchange of two pixels in fact
   copies one of them, since both are views of the same array.
7. Random numbers come from a seed. The package draws from numpy's global state, and for impulse
   noise from the system.

Motion blur (also that in snow) is the package's own. It agrees up to rounding with the published
functions, which need ImageMagick for it.

The package `corrupt-tta` 0.1.7 runs without patches, but its motion blur, snow, fog, frost and
spatter differ from the published functions, and it has no variant for 32x32 images.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable, Collection, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import InputError, MissingDependencyError
from .corruptions import TENSOR_CORRUPTIONS, VARIANTS, corrupt
from .datasets import CORRUPTIONS

__all__ = ["PUBLISHED_CORRUPTIONS", "check_library", "corrupt_as_published"]

PUBLISHED_CORRUPTIONS = (*CORRUPTIONS, *TENSOR_CORRUPTIONS)

#: The parameters for 32x32 images at severities 1 to 5, in the order of the package's functions.
_CIFAR = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": tuple(np.arange(1, end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
}
#: Glass blur at severities 1 to 5: standard deviation of the blur and largest shift, both in
#: pixels, and number of rounds.
_GLASS = {
    "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
}
#: The elastic transform at severities 1 to 5: strength and smoothing of the displacements, and the
#: largest shift of the affine part, in units of ``_ELASTIC_SIDE`` pixels.
_ELASTIC = {
    "imagenet": (
        (2, 0.7, 0.1),
        (2, 0.08, 0.2),
        (0.05, 0.01, 0.02),
        (0.07, 0.01, 0.02),
        (0.12, 0.01, 0.02),
    ),
    "cifar": (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
}
_ELASTIC_SIDE = {"imagenet": 244, "cifar": 32}  # 244, not 224, as published
#: Smallest side of a picture that the package accepts, in pixels.
_SMALLEST = 32


def corrupt_as_published(
    pixels: np.ndarray, name: str, severity: int, *, variant: str, seed: Sequence[int]
) -> np.ndarray:
    """Corrupt one picture as the published functions do.

    Args:
        pixels: uint8 pixels (H, W, 3), at least 32 x 32.
        name: one of `PUBLISHED_CORRUPTIONS`.
        severity: strength of the corruption, an integer from 1 to 5.
        variant: ``"imagenet"`` or ``"cifar"``.
        seed: integers of at least 0; the same integers give the same result.

    Returns:
        uint8 pixels (H, W, 3).

    Raises:
        InputError: an unknown name or variant, a severity out of range, or unsuitable pixels.
        MissingDependencyError: `imagecorruptions` or a package that it needs is not installed.
    """
    if name not in PUBLISHED_CORRUPTIONS:
        raise InputError(f"unknown corruption {name!r}; known are {PUBLISHED_CORRUPTIONS}")
    if variant not in VARIANTS:
        raise InputError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise InputError(f"severity must be an integer from 1 to 5, got {severity!r}")
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,) or min(pixels.shape) < 3:
        raise InputError(f"pixels must be uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
    if min(pixels.shape[:2]) < _SMALLEST:
        raise InputError(
            f"pictures to corrupt must be at least {_SMALLEST} x {_SMALLEST} pixels, got "
            f"{pixels.shape[1]} x {pixels.shape[0]}"
        )
    sequence = np.random.SeedSequence(list(seed))
    if name in TENSOR_CORRUPTIONS:
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        corrupted = corrupt(images, name, severity, variant=variant, generator=generator)
        return corrupted[0].permute(1, 2, 0).numpy()
    return _library(variant).corrupt(pixels, name, severity, sequence)


def check_library() -> None:
    """Check that everything that the fifteen corruptions need is installed.

    Raises:
        MissingDependencyError: a package is missing.
    """
    _library(VARIANTS[0])


@functools.cache
def _library(variant: str) -> _Library:
    return _Library(variant)


def _changed(module: ModuleType, **changes: Any) -> Any:
    """A copy of a module with some members replaced; the module itself is unchanged."""
    copy = ModuleType(module.__name__)
    copy.__dict__.update(vars(module) | changes)
    return copy


class _Library:
    """The package's functions in one of the variants, with the patches of this file.

    Raises:
        MissingDependencyError: a package is not installed.
    """

    def __init__(self, variant: str):
        self._variant = variant
        package = importlib.util.find_spec("imagecorruptions")
        try:
            if package is None or not package.submodule_search_locations:
                raise ImportError("No module named 'imagecorruptions'")
            self._cv2 = importlib.import_module("cv2")
            self._skimage = importlib.import_module("skimage")
            self._gaussian = importlib.import_module("skimage.filters").gaussian
            interpolation = importlib.import_module("scipy.ndimage")
        except ImportError as error:
            raise MissingDependencyError(
                f'corruptions as published need more packages ({error}): pip install "ttt-plugins'
                '[corruptions]"'
            ) from error
        # Once OpenCV has started threads, processes forked later would hang.
        self._cv2.setNumThreads(1)
        folder = Path(package.submodule_search_locations[0])
        self._map_coordinates = interpolation.map_coordinates
        self._size = (0, 0)
        loader = _PatchedLoader("imagecorruptions.corruptions", str(folder / "corruptions.py"))
        loader.parameters = _CIFAR if variant == "cifar" else {}
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        self._space = vars(module)
        self._space |= {
            "_own": _CIFAR,
            "np": _changed(np, float_=np.float64),
            "sk": SimpleNamespace(util=SimpleNamespace(), color=self._skimage.color),
            "cv2": _changed(self._cv2, resize=self._resized_frost),
            "gaussian": self._blurred,
            "clipped_zoom": functools.partial(_centred_zoom, self._space["clipped_zoom"]),
            "resource_filename": lambda _, name: str(folder / name),
        }

    def corrupt(
        self, pixels: np.ndarray, name: str, severity: int, sequence: np.random.SeedSequence
    ) -> np.ndarray:
        """Corrupt uint8 pixels (H, W, 3)."""
        random = np.random.RandomState(np.random.MT19937(sequence))
        own = {"elastic_transform": self._elastic, "glass_blur": self._glass}.get(name)
        if own is not None:
            return (own(pixels, severity, random).clip(0, 1) * 255).astype(np.uint8)
        self._size = pixels.shape[:2]
        self._space["np"].random = random
        self._space["sk"].util.random_noise = functools.partial(
            self._skimage.util.random_noise, rng=np.random.default_rng(sequence)
        )
        return np.array(self._space[name](Image.fromarray(pixels), severity)).astype(np.uint8)

    def _blurred(self, image: np.ndarray, sigma: Any, **options: Any) -> np.ndarray:
        options["channel_axis"] = -1 if options.pop("multichannel", False) else None
        return self._gaussian(image, sigma, **options)

    def _resized_frost(self, frost: np.ndarray, **options: Any) -> np.ndarray:
        if self._variant == "cifar":
            frost = self._cv2.resize(frost, (0, 0), fx=0.2, fy=0.2)
            options["dsize"] = tuple(round(1.1 * max(side, 1)) for side in self._size[::-1])
        if all(have > need for have, need in zip(frost.shape, self._size, strict=False)):
            return frost
        return self._cv2.resize(frost, **options)

    def _elastic(
        self, pixels: np.ndarray, severity: int, random: np.random.RandomState
    ) -> np.ndarray:
        """Shift three points at random with the picture between them, then every pixel a little."""
        height, width = pixels.shape[:2]
        side = _ELASTIC_SIDE[self._variant]
        strength, smooth, shift = (side * c for c in _ELASTIC[self._variant][severity - 1])
        middle = np.array([height // 2, width // 2], np.float32)
        third = min(height, width) // 3
        corners = np.array([[1, 1], [1, -1], [-1, -1]], np.float32) * third + middle
        moved = corners + random.uniform(-shift, shift, corners.shape).astype(np.float32)
        image = self._cv2.warpAffine(
            pixels.astype(np.float32) / 255,
            self._cv2.getAffineTransform(corners, moved),
            (width, height),
            borderMode=self._cv2.BORDER_REFLECT_101,
        )
        right, down = (
            strength
            * self._gaussian(
                random.uniform(-1, 1, (height, width)), smooth, mode="reflect", truncate=3
            ).astype(np.float32)
            for _ in range(2)
        )
        rows, columns = np.mgrid[:height, :width]
        places = np.stack([rows + down, columns + right])
        channels = [
            self._map_coordinates(image[..., i], places, order=1, mode="reflect") for i in range(3)
        ]
        return np.stack(channels, -1)

    def _glass(
        self, pixels: np.ndarray, severity: int, random: np.random.RandomState
    ) -> np.ndarray:
        """Every pixel becomes one of its neighbours, in several rounds, between two blurs."""
        sigma, most, rounds = _GLASS[self._variant][severity - 1]
        image = self._gaussian(pixels / 255, sigma, channel_axis=-1)
        height, width = pixels.shape[:2]
        inside = np.arange(height * width).reshape(height, width)[most + 1 :, most + 1 :]
        inside = inside[: height - 2 * most, : width - 2 * most][::-1, ::-1]
        origins = list(range(height * width))
        for _ in range(rounds):
            right, down = np.moveaxis(random.randint(-most, most, (*inside.shape, 2)), -1, 0)
            neighbours = inside + down * width + right
            for place, neighbour in zip(inside.flat, neighbours.flat, strict=True):
                origins[place] = origins[neighbour]
        moved = np.uint8(image * 255).reshape(-1, 3)[origins].reshape(pixels.shape)
        return self._gaussian(moved / 255, sigma, channel_axis=-1)


def _centred_zoom(
    zoom: Callable[[np.ndarray, float], np.ndarray], image: np.ndarray, factor: float
) -> np.ndarray:
    """The package's zoom, cropped at the centre to the size of the image."""
    larger = zoom(image, factor)
    top, left = ((a - b) // 2 for a, b in zip(larger.shape[:2], image.shape[:2], strict=True))
    return larger[top:, left:][: image.shape[0], : image.shape[1]]


class _PatchedLoader(SourceFileLoader):
    """Loads the package's code without the imports that fail, and with a variant's parameters.

    Attributes:
        parameters: names of the functions whose parameters are looked up in a variable ``_own``.
    """

    parameters: Collection[str] = ()

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        """Compile the patched code, without reading or writing a cache."""
        tree = ast.parse(self.get_data(self.path))
        removed = ("pkg_resources", "scipy.ndimage.interpolation")
        tree.body = [
            statement
            for statement in tree.body
            if not (isinstance(statement, ast.ImportFrom) and statement.module in removed)
        ]
        missing = set(self.parameters)
        for function in tree.body:
            if not isinstance(function, ast.FunctionDef) or function.name not in missing:
                continue
            for statement in function.body:
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "c":
                    own = ast.parse(f"_own[{function.name!r}][severity - 1]", mode="eval").body
                    statement.value = ast.copy_location(own, statement.value)
                    missing.discard(function.name)
        if missing:
            raise MissingDependencyError(
                f"imagecorruptions has no parameters of {min(missing)}: install version 1.1.2"
            )
        return compile(ast.fix_missing_locations(tree), self.path, "exec")
