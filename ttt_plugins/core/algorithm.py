"""What the adapter and the authors of methods agree on."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Algorithm", "Chunked", "Outcome", "Tensors"]

#: Tensors by name. What is handed over is never written in place.
Tensors = dict[str, Tensor]


class Outcome(NamedTuple):
    """The result of adapting to one batch.

    Attributes:
        logits: (B, classes), without a graph.
        params: the adapted tensors from now on, under the names of `Algorithm.source`.
        state: the rule's state from now on, under the names of `Algorithm.init`.
        skipped: how many updates could not be made, as a number, or as a tensor () that is not
            looked at until someone asks.
        forwards: how many images passed forward through the model.
        backwards: how many images passed backward.
        loss: the mean self-supervised loss before the last update, a scalar; None where none was
            computed.
        chunk: how many images could adapt together, where that was fewer than planned.
    """

    logits: Tensor
    params: Tensors
    state: Tensors
    skipped: int | Tensor = 0
    forwards: int = 0
    backwards: int = 0
    loss: Tensor | None = None
    chunk: int | None = None


class Algorithm(Protocol):
    """A method on a backbone: pure functions of tensors.

    Nothing is kept from call to call but what `adapt` returns, so whoever calls it may drop a
    result at any moment.
    """

    @property
    def source(self) -> Tensors:
        """The tensors that adapt, at their start: what `Build` was given, or more."""
        ...

    def init(self) -> Tensors:
        """The state at the start, a flat dict; empty where nothing but parameters is kept."""
        ...

    def adapt(self, params: Tensors, state: Tensors, images: Tensor) -> Outcome:
        """Adapt to images (B, C, H, W) in [0, 1] and predict them.

        It is called without gradients; a loss needs ``torch.enable_grad()`` around it.
        """
        ...

    def describe(self) -> list[str]:
        """Lines on what a step costs and which loss it follows."""
        ...


@runtime_checkable
class Chunked(Algorithm, Protocol):
    """An `Algorithm` that adapts to several images at a time, as many as fit into memory."""

    def plan(self, image: Tensor) -> int:
        """How many images like this one (1, C, H, W) adapt together; takes as long as a step."""
        ...

    def with_chunk(self, chunk: int) -> Chunked:
        """The same algorithm, which adapts to that many images together."""
        ...

    def describe_memory(self, size: tuple[int | None, ...] | None) -> str:
        """A line on the memory that images of this size (C, H, W) take; None if it is unknown."""
        ...
