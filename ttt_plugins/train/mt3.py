"""Meta-training of MT3 (arXiv 2103.16201, algorithm 1).

A meta-batch holds a few tasks, a task a few labelled images. Each task takes one BYOL step from the
meta-parameters, with the very loss that adaptation uses, and is judged by the cross-entropy at
the parameters it arrives at. The judgement is differentiated through the step, second order, for
all tasks at once (``vmap``) or one after the other where that is faster (a CPU).

Started by torchrun, several processes share the tasks of a meta-batch and add up their gradients:
the same meta-step as one process takes, up to the order of the sums.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ..backbones.backbone import Backbone
from ..backbones.networks import MT3_NETWORK
from ..core.heads import init_byol
from ..core.per_image import descend, loss_and_gradient
from ..core.scope import call
from ..core.views import BYOL_NUMBERS, SHARED_NUMBERS, byol_view, random_crop, shared_augmentation
from ..data.images import LabelledImages, to_float
from ..errors import InputError
from ..methods.mt3 import MT3, byol_loss
from ..utils.checks import check_choice, check_integer, check_number, check_seed
from .common import (
    check_convergence,
    check_outcome,
    checkpoint_file,
    create_model,
    epoch_generator,
    load_checkpoint,
    make_folder,
    rate,
    read_start,
    save_checkpoint,
    write_entry,
)

#: Meta-steps from one showing of the means so far to the next.
_SHOW_EVERY = 20

__all__ = ["MT3Recipe", "clip_each", "task_loss", "train_mt3"]


@dataclass(frozen=True)
class MT3Recipe:
    """How a meta-model is trained; the defaults are the paper's.

    Attributes:
        arch: a timm architecture.
        model_args: keyword arguments of its constructor; unless given those of the paper's network
            for ttt_resnet26 (width 32, groups 16, norm_eps 0.001, conv_bias, activate_shortcut and
            hidden 256), and none for any other architecture.
        init: artifact whose model training starts from (its architecture, arguments and
            preprocessing replace ``arch`` and ``model_args``); fresh weights unless given. An
            artifact's own projector and predictor are taken over.
        epochs: passes over the training images.
        tasks: tasks a meta-batch.
        task_images: different images a task.
        steps_per_epoch: meta-steps an epoch, 0 for as many as the images fill.
        inner_lr: step size of the inner step.
        lr: learning rate of the outer SGD with momentum 0.9.
        schedule: of the outer rate, ``"constant"`` or ``"cosine"``.
        self_supervised: weight of L_ss(phi) in the outer loss.
        clip: largest norm of each tensor's gradient, inner and outer; 0 for none.
        first_order: take the inner gradient for a constant.
        autocast: compute in bfloat16 where the device does so.
        together: tasks that run at once, 0 for what the device does best.
        seed: of initialisation, order and augmentation.
    """

    arch: str = "ttt_resnet26"
    model_args: dict | None = None
    init: str = ""
    epochs: int = 200
    tasks: int = 4
    task_images: int = 8
    steps_per_epoch: int = 0
    inner_lr: float = 0.1
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
            default = MT3_NETWORK if self.arch == MT3Recipe.arch else {}
            object.__setattr__(self, "model_args", dict(default))
        for name in ("epochs", "tasks", "task_images"):
            check_integer(self, name, 1)
        for name in ("steps_per_epoch", "together"):
            check_integer(self, name, 0)
        for name in ("inner_lr", "lr", "self_supervised", "clip"):
            check_number(self, name, 0)
        check_choice(self, "schedule", ("constant", "cosine"))
        check_seed(self.seed, "MT3Recipe.seed")


def clip_each(grads: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
    """Scale each tensor down to at most ``norm``; differentiable at zero too."""
    if not norm:
        return dict(grads)
    clipped = {}
    for name, g in grads.items():
        squared = g.square().sum()
        long = squared > norm**2
        # The root's slope is infinite at zero; a gradient of zeros has no length to differentiate.
        length = torch.where(long, squared, norm**2).sqrt()
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
        meta: model and heads, ``"model.<name>"`` and ``"projector…"``, ``"predictor…"``.
        x1, x2: two views (N, C, S, S) of each of the task's images.
        images, labels: the images to classify (N, C, S, S), (N,).
        transforms: differentiate by ``torch.func``, as ``vmap`` needs it, or by plain autograd.

    Returns:
        the loss, and for the log (inner loss, cross-entropy, images right after the step, right
        before it).
    """

    def inner(params):
        with _precision(x1, recipe):
            return _at_least_single(byol_loss(backbone, params, params, x1, x2))

    if transforms:
        grads, inner_loss = grad_and_value(inner)(dict(meta))
    else:
        inner_loss, grads = loss_and_gradient(inner, dict(meta), not recipe.first_order)
    if recipe.first_order:
        grads = {n: g.detach() for n, g in grads.items()}
    moved = descend(dict(meta), clip_each(grads, recipe.clip), recipe.inner_lr)
    with _precision(x1, recipe):
        logits = _at_least_single(call(backbone, moved, images))
        judged = F.cross_entropy(logits, labels)
        with torch.no_grad():  # for the log alone: 4 % of the work
            before = call(backbone, meta, images)
    counts = [(each.argmax(1) == labels).sum().to(judged) for each in (logits, before)]
    record = torch.stack([inner_loss.detach(), judged.detach(), *counts])
    if not recipe.self_supervised:
        return judged, record
    return judged + recipe.self_supervised * inner(moved), record


def _precision(images: Tensor, recipe: MT3Recipe):
    if not recipe.autocast:
        return nullcontext()
    return torch.autocast(images.device.type, torch.bfloat16)


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def draw_tasks(
    images: Tensor, labels: Tensor, recipe: MT3Recipe, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """uint8 images (T * N, C, S, S) -> x1, x2, images (T, N, C, S, S) and labels (T, N).

    One corruption is drawn for a task and put on both views and on the images to classify; those
    are padded by two pixels and cut at random.
    """
    t, n = recipe.tasks, recipe.task_images
    x = to_float(images)
    device = generator.device
    u = torch.rand(2, t * n, 1, BYOL_NUMBERS, generator=generator, device=device).to(x.device)
    shared = torch.rand(t, SHARED_NUMBERS, generator=generator, device=device).to(x.device)
    parts = [byol_view(x, u[0])[:, 0], byol_view(x, u[1])[:, 0], random_crop(x, 2, generator)]
    for i, part in enumerate(parts):
        part = part.reshape(t, n, *part.shape[1:])
        noise = torch.randn(part.shape, generator=generator, device=device).to(x.device)
        parts[i] = shared_augmentation(part, shared, noise)
    return (*parts, labels.view(t, n))


def meta_gradient(
    meta: dict[str, Tensor],
    tasks: tuple[Tensor, ...],
    backbone: Backbone,
    recipe: MT3Recipe,
) -> tuple[dict[str, Tensor], Tensor]:
    """Sum over tasks of the outer loss's gradient, and of the log's entries with the loss first."""

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
    total, record = None, tasks[0].new_zeros(5)
    if not count:  # more processes than tasks
        return {n: torch.zeros_like(p) for n, p in meta.items()}, record
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for part in zip(*(t.split(together) for t in tasks), strict=True):
            if len(part[0]) == 1:
                leaves = {n: p.detach().requires_grad_() for n, p in meta.items()}
                value, aux = loss(leaves, *(t[0] for t in part), transforms=False)
                found = torch.autograd.grad(
                    value, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
                grads = dict(zip(leaves, found, strict=True))
            else:
                grads, aux = outer(meta, *part)
                grads, aux = {n: g.sum(0) for n, g in grads.items()}, aux.sum(0)
            record = record + aux
            total = grads if total is None else {n: t + grads[n] for n, t in total.items()}
    return total, record


class _Workers:
    """The processes that share a meta-batch; one, unless torchrun started several."""

    def __init__(self, device: torch.device):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.entered = self.count > 1 and not dist.is_initialized()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        if self.entered:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, epoch: int, checkpoint: Path) -> None:
        """All processes must go on from the same epoch."""
        if self.count == 1:
            return
        epochs: list = [None] * self.count
        dist.all_gather_object(epochs, epoch)
        if len(set(epochs)) > 1:
            raise InputError(
                f"the processes have checkpoints of epochs {epochs}; all of them must see "
                f"{checkpoint}"
            )

    def close(self) -> None:
        """Leave the group that was entered here."""
        if self.entered:
            dist.destroy_process_group()

    def mine(self, tasks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t[self.rank :: self.count] for t in tasks)

    def add_up(self, grads: dict[str, Tensor], record: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if self.count == 1:
            return grads, record
        flat = torch.cat([*(g.reshape(-1) for g in grads.values()), record])
        dist.all_reduce(flat)
        parts = flat.split([*(g.numel() for g in grads.values()), len(record)])
        named = zip(grads.items(), parts, strict=False)
        return {n: part.view_as(g) for (n, g), part in named}, parts[-1]


def _means(totals: Tensor, tasks: int, task_images: int) -> dict[str, float]:
    """Log entries of the sums over ``tasks`` tasks."""
    outer, inner, judged, after, before = totals.tolist()
    images = tasks * task_images
    return {
        "outer_loss": outer / tasks,
        "inner_loss": inner / tasks,
        "cross_entropy": judged / tasks,
        "accuracy_before": before / images,
        "accuracy_after": after / images,
    }


def _start(recipe: MT3Recipe, classes: int) -> tuple[nn.Module, str, dict, dict[str, Tensor]]:
    """The model to start from, its architecture and arguments, and its heads."""
    arch, model_args, tensors, start = recipe.arch, recipe.model_args, {}, None
    if recipe.init:
        start = read_start(recipe.init)
        arch, model_args = start.config["architecture"], start.config["model_args"]
        tensors = {n: t for n, t in start.tensors.items() if n.startswith(("proj", "pred"))}
    torch.manual_seed(recipe.seed)
    return create_model(arch, classes, model_args, start), arch, model_args, tensors


def train_mt3(
    recipe: MT3Recipe,
    train: LabelledImages,
    out: str | Path,
    *,
    config: MT3 | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, Tensor], dict]:
    """Meta-train a model with its projector and predictor.

    After every epoch ``out/checkpoint.pt`` holds all that is needed to go on; with ``resume`` the
    run continues there and ends as an unbroken one would.

    Args:
        config: of the adapter to make of it; checked against the model before anything is trained.

    Returns:
        the model (eval mode), the heads' tensors, and the log; ``log["architecture"]`` and
        ``log["model_args"]`` say what the model is.

    Raises:
        InputError: an unknown architecture, images that are not square or that it does not take,
            a BatchNorm model without ``init`` (its statistics would be nobody's), too few images,
            a config that selects nothing, or another recipe's checkpoint.
        DataError: the disk refuses a checkpoint.
    """
    if train.images.shape[2] != train.images.shape[3]:
        raise InputError(f"MT3 needs square images, got {tuple(train.images.shape[2:])}")
    checkpoint, device = checkpoint_file(out), torch.device(device)
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    workers = _Workers(device)
    model, arch, model_args, head = _start(recipe, int(train.labels.max()) + 1)
    check_outcome(config or MT3(), model, arch, model_args, train.images)
    backbone = Backbone(model.to(device, memory_format=torch.channels_last))
    if backbone.has_batch_norm and not recipe.init:
        raise InputError(
            f"{arch} has BatchNorm, which stays on its source statistics: start from a trained "
            "model with --init"
        )
    if not head:
        head = init_byol(model, torch.Generator().manual_seed(recipe.seed))
    meta = {f"model.{n}": p.detach().clone() for n, p in backbone.model.named_parameters()}
    meta |= {n: t.to(device) for n, t in head.items()}
    velocity = {n: torch.zeros_like(p) for n, p in meta.items()}
    per_batch = recipe.tasks * recipe.task_images
    per_epoch = recipe.steps_per_epoch or len(train) // per_batch
    if len(train) < per_batch:
        raise InputError(f"{len(train)} images do not fill one meta-batch of {per_batch}")
    steps, log, first = per_epoch * recipe.epochs, [], 0
    if resume and (saved := load_checkpoint(checkpoint, asdict(recipe), device, "recipe")):
        meta, velocity = saved["meta"], saved["velocity"]
        log, first = saved["log"], saved["epoch"]
    workers.agree(first, checkpoint)
    if workers.first:
        make_folder(checkpoint)
    images, labels = train.images.to(device), train.labels.to(device)
    for epoch in range(first, recipe.epochs):
        generator = epoch_generator(recipe.seed, epoch, device)
        orders = [
            torch.randperm(len(train), generator=generator, device=device)
            for _ in range(-(-per_epoch * per_batch // len(train)))
        ]
        totals = torch.zeros(5, device=device)
        bar = tqdm(
            torch.cat(orders)[: per_epoch * per_batch].split(per_batch),
            f"meta-epoch {epoch + 1}/{recipe.epochs}",
            disable=not progress or not workers.first,
            leave=False,
        )
        for number, rows in enumerate(bar):
            # Every process draws all tasks, so that they draw alike, and takes its share.
            tasks = draw_tasks(images[rows], labels[rows], recipe, generator)
            grads, record = meta_gradient(meta, workers.mine(tasks), backbone, recipe)
            grads, record = workers.add_up(grads, record)
            grads = clip_each({n: g / recipe.tasks for n, g in grads.items()}, recipe.clip)
            lr = recipe.lr
            if recipe.schedule == "cosine":
                lr *= rate(epoch * per_epoch + number, steps, 0.02)
            velocity = {n: 0.9 * v + grads[n] for n, v in velocity.items()}
            meta = descend(meta, velocity, lr)
            totals += record
            if progress and number % _SHOW_EVERY == 0:
                shown = _means(totals, recipe.tasks * (number + 1), recipe.task_images)
                bar.set_postfix_str("  ".join(f"{k} {v:.3f}" for k, v in shown.items()))
        check_convergence(totals, epoch + 1, "a smaller lr or inner_lr")
        entry = {"epoch": epoch + 1}
        entry |= _means(totals, recipe.tasks * per_epoch, recipe.task_images)
        log.append(entry)
        if workers.first:
            if progress:
                write_entry(entry)
            saved = {"meta": meta, "velocity": velocity, "recipe": asdict(recipe), "log": log}
            save_checkpoint(checkpoint, saved | {"epoch": epoch + 1})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(meta[f"model.{name}"])
    workers.close()
    head = {n: t for n, t in meta.items() if not n.startswith("model.")}
    return model.eval(), head, {"epochs": log, "architecture": arch, "model_args": model_args}
