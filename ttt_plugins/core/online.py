"""The one online adaptation loop: Tent, SAR and MGG differ in objective and update rule only.

A batch goes through once; its gradient moves the adapted parameters; the logits returned are
those from before the move (Tent, arXiv 2006.10726, section 3.2; the same in SAR and MGG).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from .objectives import all_finite
from .scope import call, flatten, no_recomputation
from .updates import Evaluation, Situation, Tensors, UpdateRule, choose

__all__ = ["Loss", "Online", "Outcome", "evaluate"]


class Loss(NamedTuple):
    """What an objective returns; ``kept`` as in `Evaluation`."""

    value: Tensor
    kept: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A loss on logits and, where ``needs_features``, on recorded features.

    ``loss(logits, features, first)`` gets the first pass's `Evaluation` in a second pass.
    """

    name: str
    loss: Callable[[Tensor, list, Evaluation | None], Loss]
    needs_features: bool = False


class Outcome(NamedTuple):
    """Result of adapting to one batch.

    ``skipped`` counts updates that could not be made (a number, or a tensor () that is not looked
    at before someone asks), ``forwards`` and ``backwards`` the images
    that passed through the model; ``loss`` is the mean self-supervised loss in front of the last
    update, a scalar, where there was one to compute.
    """

    logits: Tensor
    params: Tensors
    state: Tensors
    skipped: int | Tensor
    forwards: int
    backwards: int
    loss: Tensor | None = None


def evaluate(
    backbone: Backbone,
    objective: Objective,
    params: Tensors,
    images: Tensor,
    first: Evaluation | None = None,
) -> Evaluation:
    """One forward and backward pass at ``params``; the graph is freed."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad(), no_recomputation():
        if objective.needs_features:
            with backbone.recording() as features:
                logits = call(backbone, leaves, images)
        else:
            features = []
            logits = call(backbone, leaves, images)
        loss = objective.loss(logits, features, first)
        grads = torch.autograd.grad(
            loss.value, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return Evaluation(
        logits.detach(),
        loss.value.detach(),
        dict(zip(leaves, grads, strict=True)),
        loss.kept,
    )


@dataclass(frozen=True)
class Online:
    """Adapt to each batch and keep what was learned."""

    backbone: Backbone
    objective: Objective
    rule: UpdateRule
    source: Tensors

    def init(self) -> Tensors:
        return self.rule.init(self.source)

    def describe(self) -> list[str]:
        """Lines on what a step costs."""
        passes = self.rule.passes
        return [
            f"step: one update a batch, {passes} forward and {passes} backward "
            f"pass{'es' if passes > 1 else ''}; logits from before the update",
            f"objective: {self.objective.name}",
        ]

    def adapt(self, params: Tensors, state: Tensors, images: Tensor) -> Outcome:
        """Images (B, C, H, W) in [0, 1] -> logits from before the update, and what follows."""
        passes = 0

        def again(at: Tensors, first: Evaluation | None = None) -> Evaluation:
            nonlocal passes
            passes += 1
            return evaluate(self.backbone, self.objective, at, images, first)

        first = again(params)
        moved = self.rule.step(params, state, first, Situation(again, self.source))
        skipped: int | Tensor = 1
        if moved is not None:
            fine = first.finite & all_finite(flatten(moved[0]))
            params = choose(fine, moved[0], params)
            state = choose(fine, moved[1], state)
            skipped = (~fine).long()
        seen = passes * len(images)
        return Outcome(first.logits, params, state, skipped, seen, seen, first.loss)
