"""Corruptions as tensor operations, against the public functions' operations.

``data/corruptions_<variant>.npz`` holds what scikit-image 0.26 and OpenCV 5.0 make of pictures
of the demo's sheet (its upper left corner, and two tiles of it): blur, saturation, and spatter
from the noise that is stored with it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ttt_plugins as tp
from ttt_plugins.data.corruptions import TENSOR_CORRUPTIONS, VARIANTS, corrupt
from ttt_plugins.errors import InputError

DATA = Path(__file__).parent / "data"
SPECKLE = {"imagenet": (0.15, 0.2, 0.35, 0.45, 0.6), "cifar": (0.06, 0.1, 0.12, 0.16, 0.2)}


def pictures(variant):
    file = Path(tp.__file__).parent / "assets" / "demo" / "clean.webp"
    with Image.open(file) as opened:
        sheet = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    if variant == "imagenet":
        return sheet[None, :, :64, :72]
    return torch.stack([sheet[:, :32, :32], sheet[:, 32:64, 96:128]])


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", ["gaussian_blur", "saturate", "spatter"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_agree_with_the_public_functions(variant, name, severity):
    with np.load(DATA / f"corruptions_{variant}.npz") as stored:
        expected = torch.from_numpy(stored[f"{name}_{severity}"]).permute(0, 3, 1, 2)
        noise = torch.from_numpy(stored["noise"]) if name == "spatter" else None
    clean = pictures(variant)
    # The variant is found by the size.
    found = corrupt(clean, name, severity, noise=noise)
    assert found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != clean).float().mean() > 0.02
    floats = corrupt(clean / 255, name, severity, variant=variant, noise=noise)
    assert floats.dtype == torch.float32
    assert (floats - expected / 255).abs().max() <= 2 / 255 + 1e-6
    one = noise if noise is None else noise[:1]
    assert torch.equal(corrupt(clean[:1], name, severity, noise=one), found[:1])


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("variant", VARIANTS)
def test_speckle_noise_has_the_moments_of_the_public_function(variant, severity):
    levels = torch.tensor([0.05, 0.35, 0.9])
    clean = levels.view(1, 3, 1, 1).expand(8, 3, 128, 128)
    found = corrupt(
        clean,
        "speckle_noise",
        severity,
        variant=variant,
        generator=torch.Generator().manual_seed(0),
    )
    deviation = SPECKLE[variant][severity - 1]
    normal = np.random.default_rng(0).normal(size=clean.shape, scale=deviation)
    theirs = torch.from_numpy(np.clip(clean.numpy() * (1 + normal), 0, 1))
    for i, level in enumerate(levels):
        ours, public = found[:, i].double(), theirs[:, i]
        assert (ours.mean() - public.mean()).abs() < 0.01 * level * deviation
        assert (ours.std() / public.std() - 1).abs() < 0.01
    # Independent of its neighbours, in the picture and in other channels.
    noise = found[:, 1] - found[:, 1].mean()
    other = found[:, 0] - found[:, 0].mean()
    for moved in (noise.roll(1, -1), noise.roll(1, -2), noise.roll(1, 0), other):
        assert ((noise * moved).mean() / noise.std() / moved.std()).abs() < 0.02


@pytest.mark.parametrize("name", ["speckle_noise", "spatter"])
def test_the_same_generator_gives_the_same_noise(name):
    clean = pictures("cifar")
    seeded = [
        corrupt(clean, name, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


def test_a_layer_without_drops_leaves_a_picture_as_it_is():
    clean = pictures("cifar")
    dry = torch.full((2, 32, 32), -3.0)
    for severity in range(1, 6):
        assert torch.equal(corrupt(clean, "spatter", severity, noise=dry), clean)


def test_extreme_pictures_stay_in_range():
    extreme = torch.stack([torch.zeros(3, 70, 65), torch.ones(3, 70, 65)])
    for name in TENSOR_CORRUPTIONS:
        for severity in (1, 5):
            found = corrupt(extreme, name, severity)
            assert found.min() >= 0
            assert found.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_keep_their_type(dtype):
    clean = pictures("cifar")
    found = corrupt((clean / 255).to(dtype), "gaussian_blur", 3)
    assert found.dtype == dtype
    assert (found.float() * 255 - corrupt(clean, "gaussian_blur", 3)).abs().max() < 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(3, 8, 8), "saturate", 1), r"must be \(B, 3, H, W\)"),
        ((torch.zeros(1, 3, 8, 8, dtype=torch.int64), "saturate", 1), "uint8 or floats"),
        ((torch.zeros(1, 3, 8, 8), "snow", 1), "unknown corruption 'snow'"),
        ((torch.zeros(1, 3, 8, 8), "saturate", 6), "severity"),
        ((torch.zeros(1, 3, 8, 8), "saturate", True), "severity"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        corrupt(*arguments)
    with pytest.raises(InputError, match="variant must be one of"):
        corrupt(torch.zeros(1, 3, 8, 8), "saturate", 1, variant="mnist")
