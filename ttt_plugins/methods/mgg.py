"""MGG: the online entropy adapter whose optimizer is learned.

Paper: Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time
Training Layers", AAAI 2025, arXiv 2412.16901 (MGG is the optimizer, MGTTA the method).

Equation -> function
    3  entropy + lambda/64 (||sigma - sigma_s||^2 + ||mu - mu_s||^2)
                                         -> `unlabelled_loss`, `objectives.feature_discrepancy`
    5  the gradient memory layer         -> `gradient_memory.step`
    theta <- theta - alpha * update      -> `updates.GradientMemory`

Deviations from the released code, and why:
1. BatchNorm networks are compared at the inputs of their BatchNorms, in units of the running
   statistics, because every such network carries those and no clean images are needed.
2. Feature maps are measured over batch and positions, class tokens over the batch as released.
3. A batch of one has no deviation: then only the means are compared. BatchNorm sees it with the
   source's statistics.
4. Outside block transformers three layers are compared, evenly spaced
   (`structure.tapped_modules`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones.norms import channels
from ..backbones.statistics import StatisticsFields, feature_statistics
from ..core import gradient_memory
from ..core.objectives import entropy, feature_discrepancy
from ..core.online import Loss, Objective, Online
from ..core.registry import Method, register
from ..core.updates import SGD, Adam, GradientMemory, UpdateRule
from ..errors import ArtifactError, InputError
from ..utils.checks import check_choice, check_number

__all__ = ["MGG"]


@dataclass(frozen=True)
class MGG(StatisticsFields):
    """A learned optimizer with a gradient memory layer on the norm layers' affine parameters.

    Attributes:
        lr: step size alpha; an update moves a scalar by at most this much. The paper: 1e-3 at
            batch 64.
        lr_alone: an upper bound on the step size while entropy is alone, since there are no source
            statistics to compare: nothing then holds an optimizer back that was trained with them.
            None for no other bound than ``lr``.
        discrepancy: weight lambda of the feature statistics' distance from the source's (the
            paper: 0.4; 0.2 on ImageNet-R). Without source statistics the term is left out.
        statistics: BatchNorm statistics, ``"batch"``, ``"source"`` or ``"mix"``.
        prior: number of images that the source statistics count for in ``"mix"``.
        params: what adapts unless `wrap` is told otherwise.
        rule: what turns a gradient into an update: ``"memory"``, the learned optimizer, or
            ``"adam"`` or ``"sgd"`` with step size ``lr`` and their usual momenta. The hand-made
            rules show what the objective and the statistics earn without the learned optimizer.
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


def unlabelled_loss(config: MGG, backbone, source_statistics) -> Objective:
    """Equation 3 as an objective; entropy alone where no source statistics are at hand."""

    def loss(logits, features, first) -> Loss:
        value = entropy(logits).mean()
        if features:
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
        name += " alone: no source statistics, so discrepancy is without effect"
        if (bound := step_size(config, source_statistics)) < config.lr:
            name += f" and the step size is {bound:g}"
        name += "; call fit_source_statistics"
    return Objective(name, loss, compares)


def step_size(config: MGG, source_statistics) -> float:
    """Alpha, which depends on whether there is more than entropy to go by."""
    if source_statistics is not None or config.lr_alone is None:
        return config.lr
    return min(config.lr, config.lr_alone)


def build(config: MGG, backbone, source, tensors, seed) -> Online:
    slow = {
        n.removeprefix("memory."): t.to(torch.promote_types(t.dtype, torch.float32))
        for n, t in tensors.items()
        if n.startswith("memory.")
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
        # One number for all: some networks have norms that never run, whose features are missing.
        zero = torch.zeros((), dtype=backbone.dtype, device=backbone.device)
        statistics = zero, zero + 1
    objective = unlabelled_loss(config, backbone, statistics)
    alpha = step_size(config, statistics)
    hand_made: dict[str, UpdateRule] = {"adam": Adam(alpha), "sgd": SGD(alpha)}
    rule = hand_made.get(config.rule) or GradientMemory(alpha, slow)
    return Online(backbone, objective, rule, source)


def check(config: MGG, backbone, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The optimizer's slow weights and, where there are any, the source's statistics."""
    memory = {n.removeprefix("memory."): t for n, t in tensors.items() if n.startswith("memory.")}
    rest = {n: t for n, t in tensors.items() if not n.startswith("memory.")}
    if rest and rest.keys() != {"source.mean", "source.std"}:
        raise ArtifactError(f"{where}: unexpected tensors {sorted(rest)}")
    return {f"memory.{n}": t for n, t in gradient_memory.check_slow(memory).items()} | rest


def fits_any(config: MGG, tensors: dict[str, Tensor]) -> bool:
    """Its input is a gradient, whatever network that came from; statistics have one source."""
    return "source.mean" not in tensors


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
    )
)
