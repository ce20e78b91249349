"""MT3: a meta-learned model that one self-supervised step improves, for each image separately.

Paper: Bartler et al., "MT3: Meta Test-Time Training for Self-Supervised Test-Time Adaption",
AISTATS 2022, arXiv 2103.16201; the loss is BYOL's (Grill et al., arXiv 2006.07733).

A step, for each image, in the paper's order
    draw pairs of views of the image: crop, flip, colours, grey
    project and predict both; take the gradient of the distance of each prediction to the other
        view's projection, which is held fixed
    move every parameter that has a gradient by one step of plain gradient descent
    predict the image itself with the moved parameters, then discard them

Equation -> function
    l(a, b) = 2 - 2 cos(a, b)                              -> `objectives.cosine_distance`
    L_ss(theta; x1, x2), both ways, stopped targets        -> `byol_loss`
    phi = theta - alpha grad L_ss(theta)                   -> `per_image.descend`, `PerImage`
    sum over tasks of CE(y, f_phi(x)) + gamma L_ss(phi)    -> `train.mt3_step.task_loss`

Deviations from the released code, and why:
1. Views are drawn from the image's own bits and the seed (`views.image_keys`), so an image's
   prediction does not depend on its batch.
2. With one step and ``params="all"``, projector and predictor do not move: they are not used after
   the step, so the prediction is the same. The classifier has no gradient.
3. With ``params`` other than "all" projector and predictor never move.
4. With more than one step, each step has its own views, and targets from the current parameters
   (released, at test time: all steps have the same views, and targets from the start). With one
   step, as in the paper, there is no difference.
5. Images are normalised with the model's own settings; the released network takes them in [0, 1],
   and so do weights converted from it.
6. In models other than the paper's network, h is the input of their classifier.
7. Colours are also clipped to [0, 1] before saturation and hue change (`views.colour_jitter`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.stages import feature_width, trunk
from ..core.algorithm import Tensors
from ..core.heads import byol_shapes, check_head, project
from ..core.objectives import cosine_distance
from ..core.per_image import SOURCE_ONLY, PerImage, Task, check_square
from ..core.registry import Method, register
from ..core.scope import call
from ..core.views import BYOL_NUMBERS, byol_view, uniforms
from ..errors import InputError
from ..utils.checks import check_choice, check_integer, check_number
from ..utils.precision import single

__all__ = ["MT3", "byol_loss", "features_loss", "rate_names"]

#: Prefix of the name of a learned factor () on a tensor's rate in the inner step (Meta-SGD, Li et
#: al., arXiv 1707.09835). An artifact has a factor for every tensor that moves, or for none.
RATE = "rate."


@dataclass(frozen=True)
class MT3:
    """A BYOL step from meta-learned parameters for each image, whose result is then discarded.

    Attributes:
        lr: step size of an inner step, at least 0 (0.1 in the paper, as in meta-training); learned
            factors multiply it.
        steps: number of inner steps, at least 1 (1 in the paper).
        copies: number of pairs of views in a step, at least 1 (32 in the paper).
        vote: whether to average the predictions of ``copies`` views, instead of predicting the
            image itself.
        params: parameters that adapt: ``"all"``, ``"norm"``, ``"lora"``, a regular expression, or
            names.
        rank: rank of the low-rank changes with ``params="lora"``, at least 1.
        chunk_size: number of images that adapt together, or ``"auto"``: one on a CPU, as many as
            fit into half of the free memory on an accelerator.
    """

    lr: float = 0.1
    steps: int = 1
    copies: int = 32
    vote: bool = False
    params: str | tuple[str, ...] = "all"
    rank: int = 4
    chunk_size: int | str = "auto"

    def __post_init__(self):
        check_number(self, "lr", 0)
        for name in ("steps", "copies", "rank"):
            check_integer(self, name, 1)
        check_choice(self, "vote", (True, False))
        if self.chunk_size != "auto":
            check_integer(self, "chunk_size", 1)


def byol_loss(
    backbone: Backbone,
    params: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    x1: Tensor,
    x2: Tensor,
) -> Tensor:
    """L_ss of two views (N, C, S, S) of each image, a scalar.

    The target is the same network's projection under a stopped gradient, without a moving average.
    """
    # One pass for both views: no layer mixes images, since BatchNorm uses source statistics.
    return features_loss(head, call(backbone, params, torch.cat([x1, x2]), pooled=True))


def features_loss(head: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """L_ss from pooled features (2 N, D): N images' first views, then their second views."""
    projected = project(head, "projector", features)
    predicted = project(head, "predictor", projected)
    target = projected.detach()
    n = len(features) // 2
    there = cosine_distance(predicted[:n], target[n:])
    back = cosine_distance(predicted[n:], target[:n])
    return (there + back).mean()


def _views(images: Tensor, keys: Tensor, step: int, copies: int) -> tuple[Tensor, Tensor]:
    """Two views (B, copies, C, S, S) of each image for each copy."""
    check_square(images, "MT3")
    drawn = uniforms(keys, (2, copies, BYOL_NUMBERS), salt=step)
    return byol_view(images, drawn[:, 0]), byol_view(images, drawn[:, 1])


def build(
    config: MT3, backbone: Backbone, source: Tensors, tensors: Tensors, seed: int
) -> PerImage:
    """The per-image engine on BYOL's task."""
    rates = {n.removeprefix(RATE): t for n, t in tensors.items() if n.startswith(RATE)}
    tensors = {n: t for n, t in tensors.items() if not n.startswith(RATE)}
    if config.params == "all" and config.steps > 1:
        source = source | {n: single(t) for n, t in tensors.items()}
    lr: float | dict[str, Tensor] = config.lr
    if rates:  # low-rank changes have no factors
        one = torch.ones((), device=backbone.device)
        lr = {n: config.lr * rates.get(n, one) for n in source}

    def loss(params: Tensors, x1: Tensor, x2: Tensor) -> Tensor:
        return byol_loss(
            backbone, params, {n: params.get(n, t) for n, t in tensors.items()}, x1, x2
        )

    def votes(images: Tensor, keys: Tensor) -> Tensor:
        return byol_view(images, uniforms(keys, (config.copies, BYOL_NUMBERS), salt=-1))

    return PerImage(
        backbone,
        Task("BYOL", partial(_views, copies=config.copies), loss),
        source,
        lr,
        config.steps,
        2 * config.copies,
        config.chunk_size,
        votes=votes if config.vote else None,
        looks=config.copies if config.vote else 1,
        seed=seed,
    )


def check(_: MT3, backbone: Backbone, tensors: Tensors, where: str) -> Tensors:
    """Check projector, predictor and the learned factors on the inner rate, if there are any."""
    if not tensors:
        raise InputError(
            "MT3 needs a meta-trained model with its projector and predictor, and this one has "
            "none; train one with `ttt-plugins train mt3 --init ARTIFACT --data-dir DIR "
            "--out FOLDER` and load the folder with from_pretrained"
        )
    given = tensors.get("projector.in.weight", torch.empty(0, 0))
    width = feature_width(backbone.model) or given.shape[-1]
    expected = byol_shapes(width)
    if any(name.startswith(RATE) for name in tensors):
        expected = expected | dict.fromkeys(rate_names(backbone.model), ())
    return check_head(expected, tensors, where)


def rate_names(model) -> list[str]:
    """Names of the factors on the inner rate, one for every tensor that the loss depends on."""
    heads = byol_shapes(feature_width(model) or 0)
    return [RATE + n for n in (*(f"model.{n}" for n in trunk(model, "end")[0]), *heads)]


def eligible(_: MT3, backbone: Backbone) -> list[str]:
    """All parameters except those of the classifier, which the loss does not depend on."""
    return trunk(backbone.model, "end")[0]


register(
    Method(
        "mt3",
        MT3,
        build,
        "Bartler et al., MT3: Meta Test-Time Training for Self-Supervised Test-Time Adaption, "
        "AISTATS 2022, arXiv:2103.16201",
        check=check,
        eligible=eligible,
        rank=lambda config: config.rank,
        retired=SOURCE_ONLY,
    )
)
