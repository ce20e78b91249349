"""One meta-step of MT3: the tasks, their outer loss, and its gradient (arXiv 2103.16201).

Each task takes BYOL steps from the meta-parameters (one by default), with the same loss that
adaptation uses. Its outer loss is the cross-entropy at the resulting parameters, differentiated
through the steps (second order), for all tasks at once (``vmap``) or one after the other where that
is faster (on a CPU).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from ..backbones.backbone import Backbone
from ..backbones.networks import MT3_NETWORK
from ..core.per_image import descend, loss_and_gradient
from ..core.scope import call
from ..core.views import BYOL_NUMBERS, SHARED_NUMBERS, byol_view, random_crop, shared_augmentation
from ..data.images import to_float
from ..methods.mt3 import RATE, byol_loss
from ..utils.attention import plain_attention
from ..utils.checks import check_choice, check_integer, check_number, check_seed
from ..utils.precision import single

__all__ = ["MT3Recipe", "clip_each", "draw_tasks", "meta_gradient", "task_loss"]


def default_model_args(arch: str) -> dict[str, Any]:
    """Constructor arguments of the paper's network for ``ttt_resnet26``; none for others."""
    return dict(MT3_NETWORK) if arch == "ttt_resnet26" else {}


@dataclass(frozen=True)
class MT3Recipe:
    """How a meta-model is trained; the defaults are the paper's.

    Attributes:
        arch: name of the timm architecture.
        model_args: keyword arguments for its constructor; by default those of the paper's network
            for ttt_resnet26 (width 32, groups 16, norm_eps 0.001, conv_bias, activate_shortcut and
            hidden 256), and none for any other architecture.
        init: artifact whose model training starts from (its architecture, arguments and
            preprocessing replace ``arch`` and ``model_args``); by default the weights are
            initialised at random. An artifact's own projector, predictor and factors on the inner
            rate are used too.
        epochs: number of epochs.
        tasks: number of tasks in a meta-batch.
        task_images: number of different images in a task.
        steps_per_epoch: number of meta-steps in an epoch; 0 for as many as the images fill.
        inner_lr: step size of the inner steps.
        inner_steps: number of inner steps, each on newly drawn views.
        rate_lr: learning rate of one factor on ``inner_lr`` for every tensor (Meta-SGD, arXiv
            1707.09835); 0 learns no factors.
        lr: learning rate of the outer SGD with momentum 0.9, at its peak.
        schedule: schedule of the outer rates: ``"constant"``, ``"cosine"`` (after a warm-up over a
            fiftieth of training), or ``"constant-then-decay"`` (half a cosine down to 0 in the
            last quarter).
        self_supervised: weight of L_ss(phi) in the outer loss.
        clip: largest norm of each tensor's gradient, inner and outer; 0 for no limit.
        first_order: whether the inner gradient is treated as a constant.
        autocast: whether to compute in bfloat16 where the device supports it.
        together: number of tasks that run at once; 0 for the number that suits the device.
        seed: seed for initialisation, image order and augmentation.
    """

    arch: str = "ttt_resnet26"
    model_args: dict | None = None
    init: str = ""
    epochs: int = 200
    tasks: int = 4
    task_images: int = 8
    steps_per_epoch: int = 0
    inner_lr: float = 0.1
    inner_steps: int = 1
    rate_lr: float = 0.0
    lr: float = 0.01
    schedule: str = "constant"
    self_supervised: float = 0.1
    clip: float = 10.0
    first_order: bool = False
    autocast: bool = False
    together: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.model_args is None:
            object.__setattr__(self, "model_args", default_model_args(self.arch))
        for name in ("epochs", "tasks", "task_images", "inner_steps"):
            check_integer(self, name, 1)
        for name in ("steps_per_epoch", "together"):
            check_integer(self, name, 0)
        for name in ("inner_lr", "rate_lr", "lr", "self_supervised", "clip"):
            check_number(self, name, 0)
        check_choice(self, "schedule", ("constant", "cosine", "constant-then-decay"))
        check_seed(self.seed, "MT3Recipe.seed")


def clip_each(grads: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
    """Scale each tensor down to a norm of at most ``norm``; also differentiable at zero.

    Args:
        grads: gradients by parameter name.
        norm: the largest Euclidean norm, at least 0; 0 leaves the gradients unchanged.
    """
    if not norm:
        return dict(grads)
    clipped = {}
    for name, g in grads.items():
        squared = g.square().sum()
        exceeds = squared > norm**2
        # The square root's derivative is infinite at zero, so zero must not reach it.
        length = torch.where(exceeds, squared, norm**2).sqrt()
        clipped[name] = g * (norm / length)
    return clipped


def task_loss(
    meta: Mapping[str, Tensor],
    x1: Tensor,
    x2: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    backbone: Backbone,
    recipe: MT3Recipe,
    transforms: bool = True,
) -> tuple[Tensor, Tensor]:
    """The outer loss of one task, algorithm 1, lines 4 to 8.

    Args:
        meta: tensors of model and heads, ``"model.<name>"``, ``"projector…"`` and
            ``"predictor…"``, and scalar factors on the inner rate, ``"rate.<name>"``, if they are
            learned.
        x1: first views (K * N, C, S, S) of the task's images, N for each of K inner steps.
        x2: second views of the same images, of the same shape.
        images: images to classify (N, C, S, S).
        labels: their classes (N,).
        backbone: the network.
        recipe: recipe of the training.
        transforms: whether to differentiate with ``torch.func``, which ``vmap`` needs, rather
            than with autograd.

    Returns:
        the loss, and four numbers for the log: the inner loss before the first step, the
        cross-entropy, and the numbers of correct predictions after the steps and before them.
    """

    def inner(params, first, second):
        with _precision(first, recipe):
            return single(byol_loss(backbone, params, params, first, second))

    start = {n: p for n, p in meta.items() if not n.startswith(RATE)}
    rates = _inner_rates(meta, start, recipe.inner_lr)
    adapted, inner_losses, views = start, [], ()
    for views in zip(x1.chunk(recipe.inner_steps), x2.chunk(recipe.inner_steps), strict=True):
        loss = partial(inner, first=views[0], second=views[1])
        if transforms:
            grads, value = grad_and_value(loss)(dict(adapted))
        else:
            value, grads = loss_and_gradient(loss, dict(adapted), not recipe.first_order)
        if recipe.first_order:
            grads = {n: g.detach() for n, g in grads.items()}
        adapted = descend(adapted, clip_each(grads, recipe.clip), rates)
        inner_losses.append(value.detach())
    with _precision(x1, recipe):
        logits = single(call(backbone, adapted, images))
        cross_entropy = F.cross_entropy(logits, labels)
        with torch.no_grad():  # only for the log: 4 % of the work
            before = call(backbone, start, images)
    counts = [(each.argmax(1) == labels).sum().to(cross_entropy) for each in (logits, before)]
    record = torch.stack([inner_losses[0], cross_entropy.detach(), *counts])
    if not recipe.self_supervised:
        return cross_entropy, record
    return cross_entropy + recipe.self_supervised * inner(adapted, *views), record


def _inner_rates(
    meta: Mapping[str, Tensor], params: Mapping[str, Tensor], lr: float
) -> float | dict[str, Tensor]:
    """The inner rate of every tensor; the classification layer has no factor and no gradient."""
    if not any(name.startswith(RATE) for name in meta):
        return lr
    return {n: lr * meta.get(RATE + n, p.new_ones(())) for n, p in params.items()}


def _precision(images: Tensor, recipe: MT3Recipe):
    if not recipe.autocast:
        return nullcontext()
    return torch.autocast(images.device.type, torch.bfloat16)


def draw_tasks(
    images: Tensor,
    labels: Tensor,
    task_images: int,
    generator: torch.Generator,
    steps: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Augment the images of T tasks.

    One corruption is drawn per task and applied to all views and to the images to classify; the
    latter are also padded by two pixels and cropped at random.

    Args:
        images: uint8 images (T * N, C, S, S).
        labels: their classes (T * N,).
        task_images: N, the number of images in a task.
        generator: random generator for everything that is drawn.
        steps: K, the number of pairs of views of each image.

    Returns:
        first and second views (T, K * N, C, S, S), images to classify (T, N, C, S, S) in [0, 1],
        and labels (T, N).
    """
    count, n = len(images), task_images
    t, x, device = count // n, to_float(images), generator.device
    u = torch.rand(2, count, steps, BYOL_NUMBERS, generator=generator, device=device).to(x.device)
    shared = torch.rand(t, SHARED_NUMBERS, generator=generator, device=device).to(x.device)
    drawn = [byol_view(x, each).unflatten(0, (t, n)).transpose(1, 2).flatten(1, 2) for each in u]
    drawn.append(random_crop(x, 2, generator).unflatten(0, (t, n)))
    for i, batch in enumerate(drawn):
        noise = torch.randn(batch.shape, generator=generator, device=device).to(x.device)
        drawn[i] = shared_augmentation(batch, shared, noise)
    return drawn[0], drawn[1], drawn[2], labels.view(t, n)


def meta_gradient(
    meta: dict[str, Tensor],
    tasks: tuple[Tensor, ...],
    backbone: Backbone,
    recipe: MT3Recipe,
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over the tasks of the outer loss's gradients, and of the loss and the log's numbers."""

    def loss(params, *task, transforms=True):
        value, record = task_loss(
            params, *task, backbone=backbone, recipe=recipe, transforms=transforms
        )
        return value, torch.cat([value.detach()[None], record])

    outer = vmap(grad(loss, has_aux=True), (None, 0, 0, 0, 0))
    count = len(tasks[0])
    together = recipe.together or (
        1 if tasks[0].device.type == "cpu" or backbone.one_by_one else count
    )
    total: dict[str, Tensor] | None = None
    record = tasks[0].new_zeros(5)
    if together > 1:
        backbone.make_ready(tasks[0][0])
    with plain_attention():
        for chunk in zip(*(t.split(together) for t in tasks if count), strict=True):
            if len(chunk[0]) == 1:
                leaves = {n: p.detach().requires_grad_() for n, p in meta.items()}
                value, aux = loss(leaves, *(t[0] for t in chunk), transforms=False)
                gradients = torch.autograd.grad(
                    value, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
                grads = dict(zip(leaves, gradients, strict=True))
            else:
                grads, aux = outer(meta, *chunk)
                grads, aux = {n: g.sum(0) for n, g in grads.items()}, aux.sum(0)
            record = record + aux
            total = grads if total is None else {n: t + grads[n] for n, t in total.items()}
    if total is None:  # this process has no task, because there are more processes than tasks
        total = {n: torch.zeros_like(p) for n, p in meta.items()}
    return total, record
