"""TTT: test-time training on the task of telling how far an image was rotated.

Paper: Sun et al., "Test-Time Training with Self-Supervision for Generalization under Distribution
Shifts", ICML 2020, arXiv 1909.13231.

A step, for each image, in the paper's order
    draw copies of the image, cropped, mirrored, each turned by a multiple of 90 degrees
    tell the turns with the rotation head on the trunk's features; take the gradient
    move the trunk (and the head) by plain gradient descent, as often as asked
    predict the image itself with the updated trunk and the untouched main head
    forget (standard) or keep (online) the trunk

Equation -> function
    2  min over theta_e of l_s(x; theta_s, theta_e), steps of SGD    -> `per_image.PerImage`
    l_s: 4-way cross-entropy of rotated crops and flips of one image -> `rotation_task`
    predict with the updated trunk and the untouched main head       -> `PerImage._predict`
    standard: forget; online: keep, one step an image                -> `PerImage.keep`
    batch: the steps of standard, shared by the images of a batch    -> `per_batch.PerBatch`
    1  joint training of theta_e, theta_m, theta_s                   -> `train.joint`
    theta_s alone, on a classifier that stays as it is               -> `ttt_head.fit_head`

Deviations from the released code, and why:
1. Views are drawn from the image's own bits and the seed (`views.image_keys`), so that an image's
   prediction does not depend on the batch it came in.
2. Crops pad by an eighth of the image's side: 4 pixels at 32, as released, and in proportion
   elsewhere (the released ImageNet code crops by area).
3. With ``params`` other than "all" the rotation head stays put unless told otherwise; a copy of it
   for every image is what those scopes are meant to spare.
4. The bundled network's shortcuts put half of the zero channels before the others and half after;
   the released ones put all of them after (``zeros_last`` of the network; `train.released`
   converts the authors' files).
5. ``mode="batch"`` is not the paper's: it is what torch-ttt's engines do, one adaptation for the
   whole batch, here with plain gradient descent and the paper's views.
6. BatchNorm uses the source's statistics throughout (released: with ``--fix_bn`` only; else the
   copies' statistics in the steps, which also move the running ones).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.stages import describe_split, feature_width, trunk
from ..core.algorithm import Tensors
from ..core.heads import ROTATIONS, check_head, rest_tensors, rotation_logits
from ..core.per_batch import PerBatch
from ..core.per_image import SOURCE_ONLY, PerImage, Task, check_square
from ..core.registry import HEAD, Method, register
from ..core.views import crop_and_flip, quarter_turns, uniforms
from ..data.images import gather_images
from ..errors import ArtifactError, InputError
from ..utils.checks import check_choice, check_integer, check_number
from ..utils.precision import single
from .ttt_head import HeadRecipe, fit_head

__all__ = ["TTT"]


@dataclass(frozen=True)
class TTT:
    """Rotation test-time training, on each image, along a stream, or on a batch at once.

    Attributes:
        mode: ``"standard"`` (forget after each image), ``"online"`` (one image after the other,
            and what was learned is kept) or ``"batch"`` (the images of a batch share their steps,
            and what was learned is forgotten after it; needs batches of one shift).
        lr: learning rate of plain SGD (the paper: 1e-3; 1e-2 with one step is almost as good as
            ten steps).
        steps: gradient steps an image, or a batch in batch mode; None for 1 in online mode and the
            paper's 10 otherwise.
        copies: augmented copies a step (the paper: 32 on CIFAR-10, 64 on ImageNet).
        split: where the trunk ends: a number of stages (``-1``: all but the last, as the paper
            has it), a module's name, or ``"end"`` for a linear rotation head on pooled features.
        threshold: images whose rotation head gives the true rotation (none) more than this
            probability are predicted without adapting; 1 adapts all, and is all that batch mode
            knows. The paper's appendix suggests about 0.8.
        adapt_head: whether the rotation head's parameters move as well (the released code's do);
            None: yes with ``params="all"``, no otherwise.
        params: what adapts within the trunk: ``"all"``, ``"norm"``, ``"lora"``, a regular
            expression, or names.
        rank: of the low-rank changes with ``params="lora"``.
        chunk_size: images that adapt together, or ``"auto"``: one on a CPU, as many as fit into
            half of the free memory on an accelerator.
    """

    mode: str = "standard"
    lr: float = 1e-3
    steps: int | None = None
    copies: int = 32
    split: int | str = -1
    threshold: float = 1.0
    adapt_head: bool | None = None
    params: str | tuple[str, ...] = "all"
    rank: int = 4
    chunk_size: int | str = "auto"

    def __post_init__(self):
        check_choice(self, "mode", ("standard", "online", "batch"))
        check_number(self, "lr", 0)
        if self.steps is not None:
            check_integer(self, "steps", 1)
        check_integer(self, "copies", 1)
        check_number(self, "threshold", 0, 1)
        if self.mode == "batch" and self.threshold < 1:
            raise InputError(
                "threshold leaves single images out, and mode='batch' adapts to all images of a "
                "batch at once: use threshold=1 or another mode"
            )
        check_choice(self, "adapt_head", (None, True, False))
        check_integer(self, "rank", 1)
        if self.chunk_size != "auto":
            check_integer(self, "chunk_size", 1)


def rotation_views(images: Tensor, keys: Tensor, step: int, copies: int) -> tuple[Tensor, Tensor]:
    """Crops and flips of each image, each turned by a random multiple of 90 degrees.

    Returns:
        views (B, copies, C, S, S) and how many quarter turns each got (B, copies).

    Raises:
        InputError: the images are not square, or a single pixel.
    """
    check_square(images, "rotation")
    u = uniforms(keys, (copies, 4), salt=step)
    quarters = (u[..., 3] * ROTATIONS).long()
    crops = crop_and_flip(images, u[..., :3], padding=images.shape[2] // 8)
    return quarter_turns(crops, quarters), quarters


def rotation_task(config: TTT, backbone: Backbone, head: Tensors) -> Task:
    """The task; tensors of the head that adapt are found in ``params`` first."""

    def loss(params: Tensors, views: Tensor, quarters: Tensor) -> Tensor:
        own = {n: params.get(n, t) for n, t in head.items()}
        return F.cross_entropy(rotation_logits(backbone, params, own, views), quarters)

    def sure(params: Tensors, images: Tensor) -> Tensor:
        check_square(images, "rotation")  # also where no image is left to draw views of
        own = {n: params.get(n, t) for n, t in head.items()}
        return rotation_logits(backbone, params, own, images).softmax(1)[:, 0] > config.threshold

    draw = partial(rotation_views, copies=config.copies)
    return Task("rotation", draw, loss, sure if config.threshold < 1 else None)


def build(
    config: TTT, backbone: Backbone, source: Tensors, tensors: Tensors, seed: int
) -> PerImage | PerBatch:
    """The rotation task under the engine of the mode."""
    moves = config.params == "all" if config.adapt_head is None else config.adapt_head
    if moves:
        statistics = ("running_mean", "running_var")
        source = source | {n: single(t) for n, t in tensors.items() if not n.endswith(statistics)}
    online = config.mode == "online"
    steps = (1 if online else 10) if config.steps is None else config.steps
    task = rotation_task(config, backbone, tensors)
    step = config.lr, steps, config.copies, config.chunk_size
    if config.mode == "batch":
        return PerBatch(backbone, task, source, *step, seed=seed)
    return PerImage(backbone, task, source, *step, keep=online, seed=seed)


def check(config: TTT, backbone: Backbone, tensors: Tensors, where: str) -> Tensors:
    """The rotation head: a copy of the layers behind the split, and a linear map."""
    expected = {f"rest.{n}": t.shape for n, t in rest_tensors(backbone.model, config.split).items()}
    if not tensors:
        raise InputError(
            "TTT needs a trained rotation head, and this model has none; train one with "
            'wrap(model, "ttt", head="train", data=images), or keep one with '
            "`ttt-plugins train ttt --freeze-trunk --model MODEL --data-dir DIR --out FOLDER` "
            "(the model stays as it is) or jointly with a model, `ttt-plugins train ttt --arch "
            "ARCH …`, and load the folder with from_pretrained"
        )
    width = feature_width(backbone.model) or tensors.get("head.weight", torch.empty(0, 0)).shape[-1]
    expected |= {"head.weight": (ROTATIONS, width), "head.bias": (ROTATIONS,)}
    try:
        return check_head(expected, tensors, where)
    except ArtifactError as error:
        if expected.keys() == tensors.keys():
            raise
        raise ArtifactError(
            f"{error}: this rotation head was trained for another split than {config.split!r}, or "
            "for another model; leave the split as it was, or train a head for this one"
        ) from None


def eligible(config: TTT, backbone: Backbone) -> list[str]:
    """The trunk's parameters."""
    return trunk(backbone.model, config.split)[0]


def fit(
    config: TTT,
    backbone: Backbone,
    images: Any,
    seed: int,
    progress: bool = True,
) -> Tensors:
    """A rotation head trained on clean images."""
    METHOD.select(config, backbone)  # a config that does not fit the model fails before the work
    gathered = gather_images(images)
    size = max(1, min(128, len(gathered)))
    recipe = HeadRecipe(split=config.split, batch_size=size, seed=seed)
    return fit_head(backbone, gathered, recipe, progress)[0]


METHOD = register(
    Method(
        "ttt",
        TTT,
        build,
        "Sun et al., Test-Time Training with Self-Supervision for Generalization under "
        "Distribution Shifts, ICML 2020, arXiv:1909.13231",
        check=check,
        eligible=eligible,
        fit=fit,
        fits=HEAD,
        rank=lambda config: config.rank,
        describe=lambda config, backbone: [describe_split(backbone.model, config.split)],
        retired=SOURCE_ONLY,
    )
)
