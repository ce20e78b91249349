"""TTT: test-time training on the task of predicting how far an image was rotated.

Paper: Sun et al., "Test-Time Training with Self-Supervision for Generalization under Distribution
Shifts", ICML 2020, arXiv 1909.13231.

A step, for each image, in the paper's order
    draw copies of the image: cropped, mirrored, and rotated by multiples of 90 degrees
    predict the rotations with the rotation head on the trunk's features; take the gradient
    move the trunk (and the head) by steps of plain gradient descent
    predict the image itself with the updated trunk and the unchanged main head
    discard (standard) or keep (online) the updated trunk

Equation -> function
    2  min over theta_e of l_s(x; theta_s, theta_e), steps of SGD    -> `per_image.PerImage`
    l_s: 4-way cross-entropy of rotated crops and flips of one image -> `rotation_task`
    predict with the updated trunk and the unchanged main head       -> `PerImage._predict`
    standard: discard; online: keep, one step per image              -> `PerImage.keep`
    batch: the steps of standard, shared by the images of a batch    -> `per_batch.PerBatch`
    1  joint training of theta_e, theta_m, theta_s                   -> `train.joint`
    theta_s alone, on an unchanged classifier                        -> `ttt_head.fit_head`

Deviations from the released code, and why:
1. Views are drawn from the image's own bits and the seed (`views.image_keys`), so an image's
   prediction does not depend on its batch.
2. Images are padded by an eighth of their side before the crop: 4 pixels at 32, as released, and in
   proportion at other sizes (the released ImageNet code crops by area).
3. With ``params`` other than "all" the rotation head does not adapt by default, because those
   scopes are meant to avoid a copy of it for every image.
4. The bundled network's shortcuts put half of the zero channels before the others and half after;
   the released ones put all of them after (``zeros_last`` of the network; `train.released`
   converts the authors' files).
5. ``mode="batch"`` is not in the paper. It is what torch-ttt's engines do, one adaptation for the
   whole batch, but with plain gradient descent and the paper's views.
6. BatchNorm always uses the source's statistics (released: only with ``--fix_bn``; otherwise the
   copies' statistics in the steps, which also update the running ones).
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
from ..core.pictures import training_images
from ..core.registry import HEAD, Method, register
from ..core.views import crop_and_flip, quarter_turns, uniforms
from ..errors import ArtifactError, InputError
from ..utils.checks import check_choice, check_integer, check_number
from ..utils.precision import single
from .ttt_head import HeadRecipe, fit_head

__all__ = ["TTT"]


@dataclass(frozen=True)
class TTT:
    """Rotation test-time training, on each image, along a stream, or on a batch at once.

    Attributes:
        mode: ``"standard"`` discards the adapted parameters after each image; ``"online"`` takes
            the images one after the other and keeps them; ``"batch"`` shares the steps between the
            images of a batch and discards the parameters after it, which needs batches of one
            shift.
        lr: learning rate of plain SGD, at least 0 (1e-3 in the paper; 1e-2 with one step is almost
            as good as ten steps).
        steps: number of gradient steps per image, or per batch in batch mode; None for 1 in online
            mode and 10, as in the paper, in the others.
        copies: number of augmented copies in a step, at least 1 (in the paper 32 on CIFAR-10, 64 on
            ImageNet).
        split: where the trunk ends: a number of stages (``-1`` for all but the last, as in the
            paper), the name of a module, or ``"end"`` for a linear rotation head on pooled
            features.
        threshold: probability in [0, 1]; an image is predicted without adaptation if the rotation
            head gives its true rotation (none) more than this. At 1, the only value for batch mode,
            all images adapt. The paper's appendix suggests about 0.8.
        adapt_head: whether the rotation head's parameters adapt too, as in the released code; None
            for yes with ``params="all"`` and no otherwise.
        params: parameters of the trunk that adapt: ``"all"``, ``"norm"``, ``"lora"``, a regular
            expression, or names.
        rank: rank of the low-rank changes with ``params="lora"``, at least 1.
        chunk_size: number of images that adapt together, or ``"auto"``: one on a CPU, as many as
            fit into half of the free memory on an accelerator.
        guard: in online mode, whether the parameters return to the source, wholly or half of the
            way, if signals without labels say that they hurt or that the shift is another one
            (`ttt_plugins.core.guard`). The other modes keep no adapted parameters. The paper
            has no guard.
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
    guard: bool = False

    def __post_init__(self):
        check_choice(self, "mode", ("standard", "online", "batch"))
        check_number(self, "lr", 0)
        if self.steps is not None:
            check_integer(self, "steps", 1)
        check_integer(self, "copies", 1)
        check_number(self, "threshold", 0, 1)
        if self.mode == "batch" and self.threshold < 1:
            raise InputError(
                "threshold excludes single images, but mode='batch' adapts to all images of a "
                "batch at once: use threshold=1 or another mode"
            )
        check_choice(self, "adapt_head", (None, True, False))
        check_integer(self, "rank", 1)
        if self.chunk_size != "auto":
            check_integer(self, "chunk_size", 1)
        check_choice(self, "guard", (True, False))
        if self.guard and self.mode != "online":
            raise InputError(f"guard is for mode='online': mode={self.mode!r} keeps no parameters")


def rotation_views(images: Tensor, keys: Tensor, step: int, copies: int) -> tuple[Tensor, Tensor]:
    """Crops and flips of each image, each rotated by a random multiple of 90 degrees.

    Returns:
        views (B, copies, C, S, S), and the number of quarter turns of each (B, copies).

    Raises:
        InputError: the images are not square, or have a single pixel.
    """
    check_square(images, "rotation")
    u = uniforms(keys, (copies, 4), salt=step)
    quarters = (u[..., 3] * ROTATIONS).long()
    crops = crop_and_flip(images, u[..., :3], padding=images.shape[2] // 8)
    return quarter_turns(crops, quarters), quarters


def rotation_task(config: TTT, backbone: Backbone, head: Tensors) -> Task:
    """The rotation task; a tensor of the head that adapts is taken from ``params``."""

    def loss(params: Tensors, views: Tensor, quarters: Tensor) -> Tensor:
        own = {n: params.get(n, t) for n, t in head.items()}
        return F.cross_entropy(rotation_logits(backbone, params, own, views), quarters)

    def sure(params: Tensors, images: Tensor) -> Tensor:
        check_square(images, "rotation")  # even if no image has to adapt
        own = {n: params.get(n, t) for n, t in head.items()}
        return rotation_logits(backbone, params, own, images).softmax(1)[:, 0] > config.threshold

    draw = partial(rotation_views, copies=config.copies)
    return Task("rotation", draw, loss, sure if config.threshold < 1 else None)


def build(
    config: TTT, backbone: Backbone, source: Tensors, tensors: Tensors, seed: int
) -> PerImage | PerBatch:
    """The rotation task with the engine of the mode."""
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
    """Check the rotation head: a copy of the layers behind the split, and a linear map."""
    expected = {f"rest.{n}": t.shape for n, t in rest_tensors(backbone.model, config.split).items()}
    if not tensors:
        raise InputError(
            "TTT needs a trained rotation head, and this model has none; train one with "
            'wrap(model, "ttt", head="train", data=images), or train and save one with '
            "`ttt-plugins train ttt --freeze-trunk --model MODEL --data-dir DIR --out FOLDER` "
            "(the model is unchanged) or jointly with a model with `ttt-plugins train ttt --arch "
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
            "for another model; use the split of the training, or train a head for this one"
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
    """A rotation head trained on clean images: a tensor, a loader, or any other source."""
    METHOD.select(config, backbone)  # a config that does not fit the model fails before training
    found = training_images(images, backbone)
    size = max(1, min(128, len(found)))
    recipe = HeadRecipe(split=config.split, batch_size=size, seed=seed)
    return fit_head(backbone, found, recipe, progress)[0]


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
