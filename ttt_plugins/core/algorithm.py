"""The interface between the adapter and the methods."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Algorithm", "Chunked", "Outcome", "Tensors"]

#: Tensors by name. A tensor that is passed on is never modified in place.
Tensors = dict[str, Tensor]


class Outcome(NamedTuple):
    """The result of adapting to one batch.

    Attributes:
        logits: logits (B, classes), without a graph.
        params: the new adapted tensors, under the names of `Algorithm.source`.
        state: the new state, under the names of `Algorithm.init`.
        skipped: number of updates that could not be made: an integer, or a tensor () that is read
            only when the number is requested.
        forwards: number of images passed forward through the model.
        backwards: number of images passed backward through it.
        loss: mean self-supervised loss before the last update, a tensor (); None if none was
            computed.
        chunk: number of images that could adapt together, if that was fewer than planned;
            otherwise None.
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
    """A method for a particular classifier, as pure functions of tensors.

    Nothing is kept between calls except what `adapt` returns, so the caller may discard any result.
    """

    @property
    def source(self) -> Tensors:
        """The initial values of the tensors that adapt: those passed to `Build`, or more."""
        ...

    def init(self) -> Tensors:
        """The initial state, a flat dict; empty if only parameters are kept."""
        ...

    def adapt(self, params: Tensors, state: Tensors, images: Tensor) -> Outcome:
        """Adapt to images (B, C, H, W) in [0, 1] and predict them.

        It is called with gradients disabled; a loss must be computed in ``torch.enable_grad()``.
        """
        ...

    def describe(self) -> list[str]:
        """Lines that describe the loss and the cost of a step."""
        ...


@runtime_checkable
class Chunked(Algorithm, Protocol):
    """An `Algorithm` that adapts to as many images at a time as fit into memory."""

    def plan(self, image: Tensor) -> int:
        """Number of images like this one (1, C, H, W) that adapt together; as slow as a step."""
        ...

    def with_chunk(self, chunk: int) -> Chunked:
        """The same algorithm with another number of images that adapt together."""
        ...

    def describe_memory(self, size: tuple[int | None, ...] | None) -> str:
        """A line on the memory that images take; ``size`` is (C, H, W), None if unknown."""
        ...
