"""Training of TTT's rotation head on an unchanged classifier.

Paper: Sun et al., ICML 2020, arXiv 1909.13231. There the head is trained together with the
classifier (`train.joint`); here the trunk is frozen, and only the copy of the layers behind the
split and the linear map to four rotations are trained.

Equation -> function
    l_s: 4-way cross-entropy of rotated crops and flips, over theta_s alone -> `fit_head`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.backbone import Backbone
from ..core.algorithm import Tensors
from ..core.heads import ROTATIONS, init_rotation, rotation_logits
from ..core.inputs import check_images, check_pixels, refused_sizes
from ..core.objectives import all_finite
from ..core.schedules import cosine
from ..core.views import quarter_turns, random_crop, random_flip
from ..data.images import to_float
from ..data.on_demand import ImagesOnDemand, read_batches, shuffled_rows
from ..errors import InputError
from ..utils.checks import check_integer, check_number
from ..utils.progress import progress_bar, write_entry

__all__ = ["HeadRecipe", "fit_head", "turned"]

#: Number of images whose pixels are checked at once.
_LOOKED_AT = 1024


@dataclass(frozen=True)
class HeadRecipe:
    """How a rotation head is trained on a frozen model.

    Attributes:
        split: where the trunk ends, as in `TTT`.
        epochs: number of passes over the images.
        batch_size: number of images in a step, each in a random rotation.
        lr: peak learning rate of Adam, which then falls along half a cosine.
        padding: zero padding before the random crop, in pixels.
        seed: seed for initialisation, image order and augmentation.
    """

    split: int | str = -1
    epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    padding: int = 4
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            check_integer(self, name, 1)
        check_integer(self, "padding", 0)
        check_number(self, "lr", 0)


def turned(images: Tensor, rotations: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, C, S, S) -> rotated ones and their quarter turns: B, or 4 B for "all"."""
    b = len(images)
    if rotations == "all":
        quarters = torch.arange(ROTATIONS, device=images.device).repeat_interleave(b)
        return quarter_turns(images.repeat(ROTATIONS, 1, 1, 1), quarters), quarters
    drawn = torch.randint(0, ROTATIONS, (b,), generator=generator, device=generator.device)
    quarters = drawn.to(images.device)
    return quarter_turns(images, quarters), quarters


def fit_head(
    backbone: Backbone,
    images: Tensor | ImagesOnDemand,
    recipe: HeadRecipe,
    progress: bool = True,
) -> tuple[Tensors, list[dict[str, Any]]]:
    """Train a rotation head on a classifier's features.

    Args:
        backbone: the classifier.
        images: clean images (N, C, S, S), uint8 or floating point in [0, 1], or read on demand.
        recipe: how the head is trained.
        progress: whether to show progress bars, and print a line for each epoch.

    Returns:
        the head's tensors in at least single precision, and the log with an entry for each epoch.

    Raises:
        InputError: images that are not square, of another type, range or size than the classifier
            accepts, or too few of them; a bad split; or training that diverges.
    """
    if not isinstance(images, (Tensor, ImagesOnDemand)) or len(images.shape) != 4:
        raise InputError("images must be a tensor of square images (N, C, S, S)")
    if images.shape[2] != images.shape[3]:
        raise InputError(f"images must be square, (N, C, S, S), got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise InputError(f"images must be uint8 or floating point in [0, 1], got {images.dtype}")
    if len(images) < recipe.batch_size:
        raise InputError(f"{len(images)} images do not fill one batch of {recipe.batch_size}")
    with torch.inference_mode(False), torch.enable_grad():
        if isinstance(images, Tensor):
            # Tensors created in inference mode cannot be part of a graph, but copies can.
            images = images.clone() if images.is_inference() else images.detach()
        _try_out(backbone, images)
        return _descend(backbone, images, recipe, progress)


def _try_out(backbone: Backbone, images: Tensor | ImagesOnDemand) -> None:
    """Refuse images that the classifier does not accept, before training starts."""
    # Every 8-bit value is in range.
    for part in [images[:1]] if images.dtype == torch.uint8 else images.split(_LOOKED_AT):
        shown = to_float(part).to(backbone.device, backbone.dtype)
        check_pixels(check_images(backbone, shown))
    first = to_float(images[:1]).to(backbone.device, backbone.dtype)
    with torch.no_grad(), refused_sizes(backbone, first):
        backbone(first, tensors={})


def _descend(
    backbone: Backbone, images: Tensor | ImagesOnDemand, recipe: HeadRecipe, progress: bool
) -> tuple[Tensors, list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(recipe.seed)
    start = init_rotation(backbone.model, recipe.split, generator)
    # In single precision at least, because Adam's steps are below the resolution of half precision.
    precision = torch.promote_types(backbone.dtype, torch.float32)
    head = {n: t.to(backbone.device, precision) for n, t in start.items()}
    learned = {n: t.requires_grad_() for n, t in head.items() if "running_" not in n}
    optimizer = torch.optim.Adam(learned.values(), lr=recipe.lr)
    per_epoch = len(images) // recipe.batch_size
    steps, log = per_epoch * recipe.epochs, []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, steps, 0.05))
    for epoch in range(recipe.epochs):
        # Summed where they are: a look at every step would wait for an accelerator.
        totals = torch.zeros(2, dtype=torch.float64, device=backbone.device)
        order = shuffled_rows(images, generator)
        rows = order[: per_epoch * recipe.batch_size].split(recipe.batch_size)
        name = f"rotation head, epoch {epoch + 1}/{recipe.epochs}"
        batches = read_batches(images, rows)
        for part in progress_bar(batches, name, len(rows), show=progress):
            x = random_flip(random_crop(part, recipe.padding, generator), generator)
            x = to_float(x).to(backbone.device, backbone.dtype)
            x, quarters = turned(x, "random", generator)
            cast = {n: t.to(backbone.dtype) for n, t in head.items()}
            logits = rotation_logits(backbone, {}, cast, x).to(precision)
            loss = F.cross_entropy(logits, quarters)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            right = (logits.detach().argmax(1) == quarters).sum()
            totals += torch.stack([loss.detach().double(), right.double()])
        loss_sum, right = totals.tolist()
        log.append(
            {
                "epoch": epoch + 1,
                "rotation_loss": loss_sum / per_epoch,
                "rotation_accuracy": right / (per_epoch * recipe.batch_size),
            }
        )
        if not all_finite(*learned.values()):
            raise InputError(
                f"the rotation head diverged in epoch {epoch + 1} (summed loss {loss_sum}): lower "
                f"lr, or use the model in a wider type than {backbone.dtype}"
            )
        if progress:
            write_entry(log[-1])
    return {n: t.detach() for n, t in head.items()}, log
