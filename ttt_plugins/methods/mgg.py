"""MGG: online entropy minimisation with a learned optimizer.

Paper: Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time
Training Layers", AAAI 2025, arXiv 2412.16901 (MGG is the optimizer, MGTTA the method).

A step, in the paper's order
    forward the batch and record the features that are compared
    take the mean entropy plus lambda/64 times the features' distance from the source's statistics
    feed each scalar's gradient and its running moments to the gradient memory layer, which updates
        its own fast weights by one step and returns an update in [-1, 1]
    move the norm layers' gamma and beta by alpha times the update
    return the logits from before the update

Equation -> function
    3  entropy + lambda/64 (||sigma - sigma_s||^2 + ||mu - mu_s||^2)
                                         -> `unlabelled_loss`, `objectives.feature_discrepancy`
    5  the gradient memory layer         -> `gradient_memory.step`
    theta <- theta - alpha * update      -> `updates.GradientMemory`

Deviations from the released code, and why:
1. In BatchNorm networks the inputs of the BatchNorms are compared, in units of the running
   statistics, because every such network stores those, so that no clean images are needed.
2. Statistics of feature maps are taken over batch and positions, those of class tokens over the
   batch as in the released code.
3. A batch of one image has no standard deviation, so only the means are compared. BatchNorm then
   normalises with the source's statistics.
4. In networks that are not block transformers, three evenly spaced layers are compared
   (`norms.tapped_modules`).
5. A standard deviation is ``sqrt(var + 1e-12)``, so that its gradient is finite if a feature does
   not vary.
6. An update that is not finite is discarded together with its state (`online.Online`).
7. Batches of fewer than ``window`` images are collected for one update (released: one update for
   every batch).
8. The guard softens or resets updates that hurt; ``guard=False`` disables it (`core.guard`).
9. BatchNorm uses an estimate over the stream; ``statistics="batch"`` for the batch's own, as
   released (`backbones.stream`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.norms import channels
from ..backbones.statistics import Feature, feature_statistics, feature_sums
from ..core import gradient_memory
from ..core.algorithm import Tensors
from ..core.inputs import check_images, check_pixels
from ..core.objectives import entropy, feature_discrepancy
from ..core.online import Loss, Objective, Online
from ..core.pictures import image_batches, is_source
from ..core.registry import SOURCE_STATISTICS, Method, register
from ..core.updates import SGD, Adam, GradientMemory, UpdateRule
from ..core.window import OnlineFields
from ..data.images import batch_images
from ..errors import ArtifactError, InputError
from ..utils.checks import check_choice, check_number
from ..utils.precision import single, single_dtype
from ..utils.progress import progress_bar

__all__ = ["MGG"]


@dataclass(frozen=True)
class MGG(OnlineFields):
    """A learned optimizer with a gradient memory layer on the norm layers' affine parameters.

    Statistics, window and guard are fields of `ttt_plugins.core.window.OnlineFields`.

    Attributes:
        lr: step size alpha, at least 0; an update moves a scalar by at most this much. The paper
            uses 1e-3 with batches of 64.
        lr_alone: upper bound on the step size if there are no source statistics and the objective
            is entropy alone, which restrains an optimizer trained with statistics less; None for
            ``lr`` itself. It has no effect if there are statistics, even if ``discrepancy`` is 0.
        discrepancy: weight lambda of the distance between the feature statistics and the source's,
            at least 0 (0.4 in the paper; 0.2 on ImageNet-R). Without source statistics the term is
            omitted.
        params: parameters that adapt, by default the norm layers'; see `ttt_plugins.wrap`.
        rule: optimizer: ``"memory"``, the learned one, or ``"adam"`` or ``"sgd"`` with step size
            ``lr`` and their usual momenta. The latter show what the objective and the statistics
            achieve without the learned optimizer.
    """

    lr: float = 1e-3
    lr_alone: float | None = None
    discrepancy: float = 0.4
    params: str | tuple[str, ...] = "norm"
    rule: str = "memory"

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "lr", 0)
        check_choice(self, "rule", ("memory", "adam", "sgd"))
        if self.lr_alone is not None:
            check_number(self, "lr_alone", 0)
        check_number(self, "discrepancy", 0)


def unlabelled_loss(config: MGG, source_statistics: tuple[Tensor, Tensor] | None) -> Objective:
    """Equation 3 as an objective; entropy alone if there are no source statistics."""

    def loss(logits: Tensor, features: list[Feature], *_: object) -> Loss:
        value = entropy(logits).mean()
        if features and source_statistics is not None:
            mean, std = feature_statistics(features, correction=min(1, len(logits) - 1))
            source_mean, source_std = source_statistics
            if len(logits) == 1:
                std = source_std
            distance = feature_discrepancy(mean, std, source_mean, source_std)
            value = value + config.discrepancy * distance
        return Loss(value)

    compares = bool(config.discrepancy) and source_statistics is not None
    name = "mean entropy"
    if compares:
        name += " + distance of the feature statistics"
    elif config.discrepancy:
        name += " alone: no source statistics, so discrepancy has no effect"
        if (bound := step_size(config, source_statistics)) < config.lr:
            name += f" and the step size is {bound:g}"
        name += "; call fit_source_statistics"
    elif source_statistics is not None and config.lr_alone is not None:
        name += " alone by choice (discrepancy=0), so lr_alone is without effect"
    return Objective(name, loss, compares)


def step_size(config: MGG, source_statistics: tuple[Tensor, Tensor] | None) -> float:
    """Alpha, which depends on whether the objective is entropy alone."""
    if source_statistics is not None or config.lr_alone is None:
        return config.lr
    return min(config.lr, config.lr_alone)


def build(config: MGG, backbone: Backbone, source: Tensors, tensors: Tensors, *_: object) -> Online:
    """Online adaptation with the learned optimizer, or with Adam or SGD."""
    slow = {
        n.removeprefix("memory."): single(t) for n, t in tensors.items() if n.startswith("memory.")
    }
    statistics = None
    if "source.mean" in tensors:
        statistics = tensors["source.mean"], tensors["source.std"]
        features = sum(channels(m) for m in backbone.tapped.values())
        if any(t.shape != (features,) for t in statistics):
            raise InputError(
                f"source statistics of another network: {tuple(statistics[0].shape)} features, "
                f"this one has {features}; use fit_source_statistics"
            )
    elif backbone.has_batch_norm:
        # One number for all features, because some networks have norms that are never run.
        zero = torch.zeros((), dtype=backbone.dtype, device=backbone.device)
        statistics = zero, zero + 1
    objective = unlabelled_loss(config, statistics)
    alpha = step_size(config, statistics)
    hand_made: dict[str, UpdateRule] = {"adam": Adam(alpha), "sgd": SGD(alpha)}
    rule = hand_made.get(config.rule) or GradientMemory(alpha, slow)
    return Online(backbone, objective, rule, source)


def check(_: MGG, __: Backbone, tensors: Tensors, where: str) -> Tensors:
    """Check the optimizer's slow weights and, if there are any, the source's statistics."""
    memory = {n.removeprefix("memory."): t for n, t in tensors.items() if n.startswith("memory.")}
    rest = {n: t for n, t in tensors.items() if not n.startswith("memory.")}
    if rest and rest.keys() != {"source.mean", "source.std"}:
        raise ArtifactError(f"{where}: unexpected tensors {sorted(rest)}")
    return {f"memory.{n}": t for n, t in gradient_memory.check_slow(memory).items()} | rest


def fits_any(_: MGG, tensors: Tensors) -> bool:
    """The optimizer fits any classifier; source statistics belong to one."""
    return "source.mean" not in tensors


def fit(
    _: MGG,
    backbone: Backbone,
    images: Any,
    __: int,
    progress: bool = True,
) -> Tensors:
    """Mean and unbiased standard deviation of the source's features over clean images.

    Raises:
        InputError: there are no images, or the loader yields something else.
    """
    batches = image_batches(images, backbone) if is_source(images) else images
    if not isinstance(batches, Iterable):
        raise InputError(f"a loader of clean images is needed, got {type(images).__name__}")
    totals: tuple[Tensor, ...] | None = None
    for batch in progress_bar(batches, "source statistics", show=progress):
        shown = check_images(backbone, batch_images(batch).to(backbone.device))
        check_pixels(shown)
        with torch.no_grad(), backbone.recording() as features:
            backbone(shown.to(backbone.dtype), tensors={})
        sums = feature_sums(features)
        totals = sums if totals is None else tuple(map(torch.add, totals, sums))
    if totals is None:
        raise InputError("the loader yielded no images")
    count, first, second = totals
    mean = first / count
    variance = (second - count * mean.square()) / (count - 1).clamp_min(1)
    std = variance.clamp_min(0).sqrt()
    precision = single_dtype(backbone.dtype)
    return {"source.mean": mean.to(precision), "source.std": std.to(precision)}


register(
    Method(
        "mgg",
        MGG,
        build,
        "Deng et al., Learning to Generate Gradients for Test-Time Adaptation via Test-Time "
        "Training Layers, AAAI 2025, arXiv:2412.16901",
        default_artifact="mgg-universal",
        check=check,
        fits_any=fits_any,
        fit=fit,
        fits=SOURCE_STATISTICS,
    )
)
