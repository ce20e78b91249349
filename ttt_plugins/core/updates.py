"""Update rules: pure pairs of ``init(params) -> state`` and ``step(...) -> (params, state)``.

A rule sees the adapted parameters as a dict of tensors and returns new ones; nothing is written
in place, so the caller may drop the result at any moment. A state is a flat dict of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from . import gradient_memory
from .algorithm import Tensors
from .objectives import all_finite
from .scope import flatten, unflatten

__all__ = [
    "SGD",
    "Adam",
    "Evaluation",
    "GradientMemory",
    "SharpnessAware",
    "Situation",
    "UpdateRule",
    "choose",
]


class Evaluation(NamedTuple):
    """One forward and backward pass at some parameters.

    Attributes:
        logits: (B, classes), detached.
        loss: scalar, detached.
        grads: one tensor per adapted parameter.
        kept: which samples the loss counts, (B,) bool, where the objective selects.
    """

    logits: Tensor
    loss: Tensor
    grads: Tensors
    kept: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """Whether there is anything to learn from, a bool () on the device."""
        # The squares too: the rules' second moments hold them.
        return all_finite(self.loss, flatten(self.grads).square())


class Situation(NamedTuple):
    """What a rule may ask for beyond the gradients it is given.

    Attributes:
        evaluate: ``(params, first) -> evaluation``, another pass over the batch at other
            parameters, for rules with more than one of ``passes``.
        source: the parameters before anything adapted.
    """

    evaluate: Callable[[Tensors, Evaluation], Evaluation]
    source: Tensors


class UpdateRule(Protocol):
    """See the module's docstring.

    An update whose parameters are not finite is dropped together with its state, which lets a
    rule decide on the device: a look at a tensor's value (``if``, ``item``) makes an accelerator
    wait. A rule is called after a first pass that was not finite too, and what it makes of that
    is dropped.

    Attributes:
        passes: how many forward and backward passes over the batch a step needs.
    """

    passes: ClassVar[int]

    def init(self, params: Tensors, /) -> Tensors:
        """The state before the first step, a flat dict."""
        ...

    def step(
        self, params: Tensors, state: Tensors, first: Evaluation, situation: Situation, /
    ) -> tuple[Tensors, Tensors]:
        """Parameters, state and the first pass's result -> new parameters and state."""
        ...


def choose(which: Tensor, these: Tensors, those: Tensors) -> Tensors:
    """``these`` where a bool () on the device holds, else ``those``; nobody waits to know."""
    return {name: torch.where(which, t, those[name]) for name, t in these.items()}


def _move(params: Tensors, direction: Tensor, lr: float) -> Tensors:
    """New tensors ``params - lr * direction``."""
    parts = unflatten(direction, params)
    return {name: p.sub(parts[name].to(p.dtype), alpha=lr) for name, p in params.items()}


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with heavy-ball momentum, as ``torch.optim.SGD``."""

    passes: ClassVar[int] = 1

    lr: float
    momentum: float = 0.9

    def init(self, params: Tensors) -> Tensors:
        """The velocity, zero."""
        return {"velocity": torch.zeros_like(flatten(params))}

    def step(
        self, params: Tensors, state: Tensors, first: Evaluation, _: Situation
    ) -> tuple[Tensors, Tensors]:
        """One step along the velocity."""
        velocity = self.momentum * state["velocity"] + flatten(first.grads)
        return _move(params, velocity, self.lr), {"velocity": velocity}


@dataclass(frozen=True)
class Adam:
    """Adam with bias correction, as ``torch.optim.Adam`` (arXiv 1412.6980, algorithm 1)."""

    passes: ClassVar[int] = 1

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def init(self, params: Tensors) -> Tensors:
        """Both moments and the count of steps, zero."""
        flat = flatten(params)
        return {
            "m": torch.zeros_like(flat),
            "v": torch.zeros_like(flat),
            "t": torch.zeros((), dtype=torch.int64, device=flat.device),
        }

    def step(
        self, params: Tensors, state: Tensors, first: Evaluation, _: Situation
    ) -> tuple[Tensors, Tensors]:
        """One step along the first moment over the root of the second."""
        grad = flatten(first.grads)
        t = state["t"] + 1
        m = torch.lerp(state["m"], grad, 1 - self.beta1)
        v = self.beta2 * state["v"] + (1 - self.beta2) * grad.square()
        exponent = t.to(grad.dtype)
        root = (v / (1 - self.beta2**exponent)).sqrt() + self.eps
        direction = m / (1 - self.beta1**exponent) / root
        return _move(params, direction, self.lr), {"m": m, "v": v, "t": t}


@dataclass(frozen=True)
class SharpnessAware:
    """SAR's rule: the gradient is taken where a step of length ``radius`` uphill leads.

    Source: Niu et al., arXiv 2302.12400, algorithm 1. The second pass filters the samples again;
    when the moving average of the filtered entropy (weight 0.9) falls under ``recovery``, the
    model has collapsed and everything starts again from the source.

    Deviations from the released code:
    1. A batch in which no sample is reliable moves nothing (there the mean over no samples is not
       a number, and momentum still moves).
    2. The moving average starts over with the recovery (there it survives it).
    """

    passes: ClassVar[int] = 2

    lr: float
    momentum: float
    radius: float
    recovery: float

    def init(self, params: Tensors) -> Tensors:
        """The velocity and the moving average of the loss."""
        flat = flatten(params)
        # Not a number stands for an average that has not begun.
        return {"velocity": torch.zeros_like(flat), "level": flat.new_full((), torch.nan)}

    def step(
        self, params: Tensors, state: Tensors, first: Evaluation, situation: Situation
    ) -> tuple[Tensors, Tensors]:
        """The gradient of a second pass, uphill from here, moves the parameters."""
        grad = flatten(first.grads)
        direction = grad / (grad.norm() + 1e-12)
        second = situation.evaluate(_move(params, direction, -self.radius), first)
        assert second.kept is not None
        assert first.kept is not None, "the objective selects no samples"
        reliable, level = first.kept.any(), state["level"]
        broken = reliable & ~second.finite
        velocity = self.momentum * state["velocity"] + flatten(second.grads)
        level = torch.where(level.isnan(), second.loss, 0.9 * level + 0.1 * second.loss)
        moved = _move(params, velocity.masked_fill(broken, torch.nan), self.lr)
        moves = (reliable & second.kept.any()) | broken
        params = choose(moves, moved, params)
        state = choose(moves, {"velocity": velocity, "level": level}, state)
        collapsed = (state["level"] < self.recovery) & ~broken
        params = choose(collapsed, situation.source, params)
        return params, choose(collapsed, self.init(situation.source), state)


@dataclass(frozen=True)
class GradientMemory:
    """MGG's learned optimizer as an update rule; ``slow`` are its shared weights."""

    passes: ClassVar[int] = 1

    lr: float
    slow: Tensors

    def init(self, params: Tensors) -> Tensors:
        """The memory of every scalar at its learned start."""
        return gradient_memory.init_state(self.slow, sum(p.numel() for p in params.values()))

    def step(
        self, params: Tensors, state: Tensors, first: Evaluation, _: Situation
    ) -> tuple[Tensors, Tensors]:
        """One step along what the memory makes of the gradients."""
        update, state = gradient_memory.step(self.slow, state, flatten(first.grads))
        return _move(params, update, self.lr), state
