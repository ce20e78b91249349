"""The one online adaptation loop: Tent, SAR and MGG differ in objective and update rule only.

A batch goes through once; its gradient moves the adapted parameters; the logits returned are
those from before the move (Tent, arXiv 2006.10726, section 3.2; the same in SAR and MGG).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.statistics import Feature
from .algorithm import Outcome, Tensors
from .objectives import all_finite
from .scope import call, flatten, gradients, no_recomputation
from .updates import Evaluation, Situation, UpdateRule, choose

__all__ = ["Loss", "Objective", "ObjectiveLoss", "Online", "evaluate"]


class Loss(NamedTuple):
    """What an objective returns.

    Attributes:
        value: a scalar with a graph.
        kept: which samples it counts, (B,) bool, where it selects.
    """

    value: Tensor
    kept: Tensor | None = None


class ObjectiveLoss(Protocol):
    """``loss(logits, features, first)``; ``first`` is the first pass's result in a second pass."""

    def __call__(
        self, logits: Tensor, features: list[Feature], first: Evaluation | None, /
    ) -> Loss:
        """Logits (B, classes) and, where they were asked for, recorded features -> a loss."""
        ...


@dataclass(frozen=True)
class Objective:
    """A loss on logits and, where ``needs_features``, on recorded features.

    Attributes:
        name: in words, for `describe`.
        loss: the function.
        needs_features: whether features are recorded for it.
    """

    name: str
    loss: ObjectiveLoss
    needs_features: bool = False


def evaluate(
    backbone: Backbone,
    objective: Objective,
    params: Tensors,
    images: Tensor,
    first: Evaluation | None = None,
) -> Evaluation:
    """One forward and backward pass at ``params``; the graph is freed.

    Args:
        backbone: the classifier.
        objective: the loss.
        params: the adapted tensors, by the names `scope.call` knows.
        images: (B, C, H, W) in [0, 1].
        first: the result of the first pass, in a second one.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad(), no_recomputation():
        if objective.needs_features:
            with backbone.recording() as features:
                logits = call(backbone, leaves, images)
        else:
            features = []
            logits = call(backbone, leaves, images)
        loss = objective.loss(logits, features, first)
        grads = gradients(loss.value, leaves)
    return Evaluation(logits.detach(), loss.value.detach(), grads, loss.kept)


@dataclass(frozen=True)
class Online:
    """Adapt to each batch and keep what was learned.

    Attributes:
        backbone: the classifier.
        objective: the loss whose gradient is taken.
        rule: what turns the gradient into new parameters.
        source: the tensors that adapt, at their start.
    """

    backbone: Backbone
    objective: Objective
    rule: UpdateRule
    source: Tensors

    def init(self) -> Tensors:
        """The rule's state at the start."""
        return self.rule.init(self.source)

    def describe(self) -> list[str]:
        """Lines on what a step costs."""
        passes = self.rule.passes
        return [
            f"step: one update a batch or window, {passes} forward and {passes} backward "
            f"pass{'es' if passes > 1 else ''}; logits from before the update",
            f"objective: {self.objective.name}",
        ]

    def situation(self, images: Tensor) -> Situation:
        """What the rule may ask for while it makes an update on these images."""

        def again(at: Tensors, first: Evaluation) -> Evaluation:
            return evaluate(self.backbone, self.objective, at, images, first)

        return Situation(again, self.source)

    def adapt(self, params: Tensors, state: Tensors, images: Tensor) -> Outcome:
        """Images (B, C, H, W) in [0, 1] -> logits from before the update, and what follows."""
        first = evaluate(self.backbone, self.objective, params, images)
        moved = self.rule.step(params, state, first, self.situation(images))
        fine = first.finite & all_finite(flatten(moved[0]))
        params, state = choose(fine, moved[0], params), choose(fine, moved[1], state)
        seen = self.rule.passes * len(images)
        return Outcome(first.logits, params, state, (~fine).long(), seen, seen, first.loss)
