"""The online adaptation loop of Tent, SAR and MGG, which differ only in objective and update rule.

The gradient of a batch moves the adapted parameters, and the logits from before that move are
returned (Tent, arXiv 2006.10726, section 3.2; likewise SAR and MGG).
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
    """The result of an objective.

    Attributes:
        value: the loss, a scalar with a graph.
        kept: whether each sample counts, bool (B,); None if the objective does not select samples.
    """

    value: Tensor
    kept: Tensor | None = None


class ObjectiveLoss(Protocol):
    """``loss(logits, features, first)``; ``first`` is the first pass's result in a second pass."""

    def __call__(
        self, logits: Tensor, features: list[Feature], first: Evaluation | None, /
    ) -> Loss:
        """Logits (B, classes) and, if they are needed, recorded features -> the loss."""
        ...


@dataclass(frozen=True)
class Objective:
    """A loss of logits and, with ``needs_features``, of recorded features.

    Attributes:
        name: name for descriptions.
        loss: the function.
        needs_features: whether features must be recorded.
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
        params: adapted tensors, by the names that `scope.call` uses.
        images: images (B, C, H, W) in [0, 1].
        first: the result of the first pass, if this is the second.
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
    """Adaptation to each batch, with parameters and state kept for the next.

    Attributes:
        backbone: the classifier.
        objective: the loss whose gradient is taken.
        rule: update rule, which turns the gradient into new parameters.
        source: initial values of the tensors that adapt.
    """

    backbone: Backbone
    objective: Objective
    rule: UpdateRule
    source: Tensors

    def init(self) -> Tensors:
        """The initial state of the rule."""
        return self.rule.init(self.source)

    def describe(self) -> list[str]:
        """Lines that describe the loss and the cost of a step."""
        passes = self.rule.passes
        return [
            f"step: one update a batch or window, {passes} forward and {passes} backward "
            f"pass{'es' if passes > 1 else ''}; logits from before the update",
            f"objective: {self.objective.name}",
        ]

    def situation(self, images: Tensor) -> Situation:
        """What the rule can use, besides the gradients, in an update on these images."""

        def again(at: Tensors, first: Evaluation) -> Evaluation:
            return evaluate(self.backbone, self.objective, at, images, first)

        return Situation(again, self.source)

    def adapt(self, params: Tensors, state: Tensors, images: Tensor) -> Outcome:
        """Images (B, C, H, W) in [0, 1] -> logits before the update, and what it results in."""
        first = evaluate(self.backbone, self.objective, params, images)
        moved = self.rule.step(params, state, first, self.situation(images))
        fine = first.finite & all_finite(flatten(moved[0]))
        params, state = choose(fine, moved[0], params), choose(fine, moved[1], state)
        seen = self.rule.passes * len(images)
        return Outcome(first.logits, params, state, (~fine).long(), seen, seen, first.loss)
