"""Update rules: pure functions ``init(params) -> state`` and ``step(...) -> (params, state)``.

A rule gets the adapted parameters as a dict of tensors and returns new ones. Nothing is modified in
place, so the caller may discard the result. A state is a flat dict of tensors.
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
from .scope import are_few, flatten, unflatten

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
        logits: logits (B, classes), detached.
        loss: the loss, a detached scalar.
        grads: gradients by the names of the adapted parameters.
        kept: whether each sample counts in the loss, bool (B,); None if the objective does not
            select samples.
    """

    logits: Tensor
    loss: Tensor
    grads: Tensors
    kept: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """Whether loss and gradients are finite, a bool tensor () on the device."""
        # The largest gradient's square must be finite too, because second moments hold squares.
        largest = torch.linalg.vector_norm(flatten(self.grads), torch.inf)
        return all_finite(self.loss, largest.square())


class Situation(NamedTuple):
    """What a rule can use besides the gradients.

    Attributes:
        evaluate: ``(params, first) -> evaluation``, a further pass over the batch at other
            parameters, for rules whose ``passes`` is above 1.
        source: the parameters before adaptation.
    """

    evaluate: Callable[[Tensors, Evaluation], Evaluation]
    source: Tensors


class UpdateRule(Protocol):
    """An update rule; see the module's docstring.

    An update with parameters that are not finite is discarded together with its state. A rule can
    use this to reject an update without reading a tensor's value (``if``, ``item``), for which it
    would have to wait for the device. A rule is also called if the first pass was not finite, but
    the result is discarded.

    Attributes:
        passes: number of forward and backward passes over the batch in a step.
    """

    passes: ClassVar[int]

    def init(self, params: Tensors, /) -> Tensors:
        """The initial state, a flat dict."""
        ...

    def step(
        self, params: Tensors, state: Tensors, first: Evaluation, situation: Situation, /
    ) -> tuple[Tensors, Tensors]:
        """Parameters, state and the result of the first pass -> new parameters and state."""
        ...


def choose(which: Tensor, these: Tensors, those: Tensors) -> Tensors:
    """``these`` if a bool tensor () is true, else ``those``, without waiting for the device."""
    if are_few(these) and are_few(those):
        return unflatten(torch.where(which, flatten(these), flatten(those)), those)
    return {name: torch.where(which, t, those[name]) for name, t in these.items()}


def _move(params: Tensors, direction: Tensor, lr: float) -> Tensors:
    """New tensors ``params - lr * direction``."""
    if are_few(params):
        start = flatten(params)
        return unflatten(start.sub(direction.to(start.dtype), alpha=lr), params)
    parts = unflatten(direction, params)
    return {name: p.sub(parts[name].to(p.dtype), alpha=lr) for name, p in params.items()}


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with heavy-ball momentum, as ``torch.optim.SGD``."""

    passes: ClassVar[int] = 1

    lr: float
    momentum: float = 0.9

    def init(self, params: Tensors) -> Tensors:
        """A velocity of zero."""
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
        """Both moments and the number of steps, all zero."""
        flat = flatten(params)
        return {
            "m": torch.zeros_like(flat),
            "v": torch.zeros_like(flat),
            "t": torch.zeros((), dtype=torch.int64, device=flat.device),
        }

    def step(
        self, params: Tensors, state: Tensors, first: Evaluation, _: Situation
    ) -> tuple[Tensors, Tensors]:
        """One step along the first moment, divided by the root of the second."""
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
    """SAR's rule: the gradient is taken after an ascent step of length ``radius``.

    Source: Niu et al., arXiv 2302.12400, algorithm 1. The second pass filters the samples again.
    If the moving average of the filtered entropy (weight 0.9) falls below ``recovery``, the model
    has collapsed, and parameters and state return to their initial values.

    Deviations from the released code:
    1. A batch without reliable samples changes nothing (released: the mean over no samples is NaN,
       and momentum still moves the parameters).
    2. Recovery resets the moving average (released: it is kept).
    """

    passes: ClassVar[int] = 2

    lr: float
    momentum: float
    radius: float
    recovery: float

    def init(self, params: Tensors) -> Tensors:
        """The velocity and the moving average of the loss."""
        flat = flatten(params)
        # NaN stands for an average of nothing so far.
        return {"velocity": torch.zeros_like(flat), "level": flat.new_full((), torch.nan)}

    def step(
        self, params: Tensors, state: Tensors, first: Evaluation, situation: Situation
    ) -> tuple[Tensors, Tensors]:
        """One step of SGD with the gradient of a second pass, after the ascent."""
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
    """MGG's learned optimizer as an update rule; ``slow`` holds its shared weights."""

    passes: ClassVar[int] = 1

    lr: float
    slow: Tensors

    def init(self, params: Tensors) -> Tensors:
        """The learned initial memory of every scalar."""
        return gradient_memory.init_state(self.slow, sum(p.numel() for p in params.values()))

    def step(
        self, params: Tensors, state: Tensors, first: Evaluation, _: Situation
    ) -> tuple[Tensors, Tensors]:
        """One step along the update that the memory layer computes from the gradients."""
        update, state = gradient_memory.step(self.slow, state, flatten(first.grads))
        return _move(params, update, self.lr), state
