"""Meta-training of MT3 (arXiv 2103.16201, algorithm 1).

A meta-batch holds a few tasks of a few labelled images each; `mt3_step` computes the gradient.

Under torchrun, several processes share the tasks of a meta-batch and sum their gradients: this is
the same meta-step as in one process, up to the order of summation.

Deviations from the released trainer:
1. Random weights follow He's initialisation in convolutions and PyTorch's default in linear layers
   (the released trainer uses Keras's default, Glorot's).
2. Where the resolution halves, convolutions pad all sides (the network's option ``pad_end`` pads as
   TensorFlow does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.backbone import Backbone
from ..core.heads import init_byol
from ..core.per_image import check_square, descend
from ..core.schedules import schedule_factor
from ..data.images import LabelledImages
from ..errors import InputError
from ..methods.mt3 import MT3, RATE, rate_names
from ..utils.processes import device_of_process
from .common import initial_model, read_start
from .epochs import Epoch, Training, check_convergence, checkpoint_file, train_epochs
from .gap import StepGap
from .mt3_step import MT3Recipe, clip_each, draw_tasks, meta_gradient
from .workers import Workers

__all__ = ["MT3Recipe", "train_mt3"]

#: Number of meta-steps between updates of the means in the progress bar.
_SHOW_EVERY = 20


def _means(totals: Tensor, tasks: int, task_images: int) -> dict[str, float]:
    """Log entries from the sums over ``tasks`` tasks."""
    outer, inner, cross_entropy, after, before = totals.tolist()
    images = tasks * task_images
    return {
        "outer_loss": outer / tasks,
        "inner_loss": inner / tasks,
        "cross_entropy": cross_entropy / tasks,
        "accuracy_before": before / images,
        "accuracy_after": after / images,
    }


class _MetaTraining(Training):
    """Meta-training of a model with its projector and predictor.

    Attributes:
        model: the network; its own parameters are set to the meta-parameters when the step is
            measured on validation images, and when training has ended.
        arch: name of its timm architecture.
        model_args: keyword arguments for its constructor.
        meta: the meta-parameters, ``"model.<name>"``, ``"projector…"`` and ``"predictor…"``, and
            ``"rate.<name>"`` if factors on the inner rate are learned.
        best: the meta-parameters with the highest accuracy after the step on the images of `gap`.
    """

    recipe: MT3Recipe
    title = "meta-epoch"

    def __init__(
        self,
        recipe: MT3Recipe,
        config: MT3,
        train: LabelledImages,
        device: torch.device,
        gap: StepGap | None,
        workers: Workers,
    ):
        super().__init__(recipe, device)
        self.workers, self.gap = workers, gap
        self.best: dict[str, Any] | None = None
        start, described, head = read_start(recipe.init), recipe, {}
        if start is not None:
            arch, model_args = start.config["architecture"], start.config["model_args"]
            described = replace(recipe, arch=arch, model_args=model_args)
            prefixes = ("projector.", "predictor.", RATE)
            head = {n: t for n, t in start.tensors.items() if n.startswith(prefixes)}
        self.arch, self.model_args = described.arch, described.model_args or {}
        self.model = initial_model(described, config, train, start)
        model = self.model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.backbone = Backbone(model)
        if self.backbone.has_batch_norm and not recipe.init:
            raise InputError(
                f"{self.arch} has BatchNorm, which keeps its source statistics: start from a "
                "trained model with --init"
            )
        if not head:
            head = init_byol(self.model, torch.Generator().manual_seed(recipe.seed))
        self.meta = {
            f"model.{n}": p.detach().clone() for n, p in self.backbone.model.named_parameters()
        }
        self.meta |= {n: t.to(device) for n, t in head.items()}
        if recipe.rate_lr and not any(n.startswith(RATE) for n in head):
            self.meta |= {n: torch.ones((), device=device) for n in rate_names(self.model)}
        self.velocity = {n: torch.zeros_like(p) for n, p in self.meta.items()}
        self.batch = recipe.tasks * recipe.task_images
        self.steps = recipe.steps_per_epoch or len(train) // self.batch
        if len(train) < self.batch:
            raise InputError(f"{len(train)} images do not fill one meta-batch of {self.batch}")
        self.images, self.labels = train.images.to(device), train.labels.to(device)

    def state(self) -> dict[str, Any]:
        state = {"meta": self.meta, "velocity": self.velocity}
        if self.best is not None:
            state |= {"best": self.best, "held": self._held()}
        return state

    def _held(self) -> str | None:
        return None if self.gap is None else self.gap.mark

    def load(self, saved: Mapping[str, Any]) -> None:
        # Checkpoints of earlier versions do not say which images chose their best epoch.
        if "best" in saved and saved.get("held", self._held()) != self._held():
            raise InputError(
                "the checkpoint's best epoch was chosen on other held-out images: resume with the "
                "same ones (--extras, --extras-images), or start again without --resume"
            )
        self.meta, self.velocity, self.best = self.on_device(
            (saved["meta"], saved["velocity"], saved.get("best"))
        )

    def run(self, epoch: Epoch) -> dict[str, float]:
        recipe = self.recipe
        totals = torch.zeros(5, device=self.images.device)
        bar = epoch.batches(self.images, self.batch, self.steps)
        for number, (rows, images) in enumerate(bar):
            step = epoch.number * self.steps + number
            totals += self._step(images, self.labels[rows], step, epoch.generator)
            if epoch.progress and number % _SHOW_EVERY == 0:
                shown = _means(totals, recipe.tasks * (number + 1), recipe.task_images)
                bar.set_postfix_str("  ".join(f"{k} {v:.3f}" for k, v in shown.items()))
        check_convergence(totals, epoch.number, "a smaller lr or inner_lr")
        entry = _means(totals, recipe.tasks * self.steps, recipe.task_images)
        # All processes would measure the same, so only the first one measures.
        return entry | self._measure_gap(epoch.number + 1) if self.workers.first else entry

    def _measure_gap(self, epoch: int) -> dict[str, float]:
        """Measure the step on the images of `gap`, if any, and keep the best meta-parameters."""
        if self.gap is None:
            return {}
        measured = self.gap.measure(*self.network(self.meta))
        after = measured["extras_after"]
        if self.best is None or after > self.best["extras_after"]:
            self.best = measured | {"epoch": epoch, "meta": self.meta}
        return measured

    def _step(
        self, images: Tensor, labels: Tensor, step: int, generator: torch.Generator
    ) -> Tensor:
        """Take one meta-step and return the sums over its tasks for the log."""
        recipe, workers = self.recipe, self.workers
        # Every process draws all tasks, so that the generators agree, and uses its share of them.
        tasks = draw_tasks(images, labels, recipe.task_images, generator, recipe.inner_steps)
        grads, record = meta_gradient(self.meta, workers.share(tasks), self.backbone, recipe)
        grads, record = workers.add_up(grads, record)
        grads = clip_each({n: g / recipe.tasks for n, g in grads.items()}, recipe.clip)
        steps = self.steps * recipe.epochs
        factor = schedule_factor(recipe.schedule, step, steps, 0.02)
        lr = {n: (recipe.rate_lr if n.startswith(RATE) else recipe.lr) * factor for n in self.meta}
        self.velocity = {n: 0.9 * v + grads[n] for n, v in self.velocity.items()}
        self.meta = descend(self.meta, self.velocity, lr)
        return record

    def network(self, meta: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model with these meta-parameters, in eval mode, and all other tensors."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(meta[f"model.{name}"])
        head = {n: t for n, t in meta.items() if not n.startswith("model.")}
        return self.model.eval(), head


def train_mt3(
    recipe: MT3Recipe,
    train: LabelledImages,
    out: str | Path,
    *,
    config: MT3 | None = None,
    gap: StepGap | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, Tensor], dict]:
    """Meta-train a model with its projector and predictor.

    After every epoch ``out/checkpoint.pt`` holds everything that is needed to resume.

    Args:
        recipe: the architecture and how it is trained.
        train: labelled images to train on.
        out: folder for the checkpoint; created if it is missing.
        config: config of the adapter that will use the model; checked before training starts.
        gap: measures the accuracy before and after the adapter's step at the end of every epoch;
            the epoch with the highest accuracy after the step is kept.
        device: device to train on; ``"cuda"`` means one GPU for each process.
        resume: whether to resume from the checkpoint, if there is one; the result is the same as
            that of an uninterrupted run.
        progress: whether to show progress bars and print the log.

    Returns:
        the model in eval mode, the tensors of the heads, and the log; ``log["architecture"]`` and
        ``log["model_args"]`` describe the model, and ``log["chosen"]`` is the epoch that was kept.

    Raises:
        InputError: the architecture is unknown, or has BatchNorm and there is no ``init`` (it would
            have no source statistics), the images are not square, do not suit it or are too few,
            the config selects no parameters, or the checkpoint is of another recipe.
        DataError: a checkpoint cannot be written.
    """
    check_square(train.images, "MT3")
    checkpoint, device = checkpoint_file(out), device_of_process(device)
    with Workers(device) as workers:
        training = _MetaTraining(recipe, config or MT3(), train, device, gap, workers)
        log = train_epochs(
            training, checkpoint, resume=resume, progress=progress, processes=workers
        )
    best = training.best
    model, head = training.network(best["meta"] if best else training.meta)
    record = {"epochs": log, "architecture": training.arch, "model_args": training.model_args}
    if best:
        record["chosen"] = {k: v for k, v in best.items() if k != "meta"}
    return model, head, record
