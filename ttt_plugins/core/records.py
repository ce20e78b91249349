"""What a callback is told after every batch of an adapter."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .guard import Event

__all__ = ["BatchRecord", "OnBatch", "in_cell", "watch"]


@dataclass(frozen=True)
class BatchRecord:
    """A batch that an adapter has predicted and adapted to.

    Attributes:
        method: name of the method.
        batch: number of the batch since the last reset, from 1; 0 for the unadapted model, which
            counts none.
        images: number of images in the batch.
        loss: the adapter's loss before its last update, None if it made none.
        entropy: mean entropy of the predictions in nats, at least 0.
        guard: what the guard did at this batch.
        health: the guard's signals (`ttt_plugins.core.guard.Guard.health`); empty for ``source``.
        seconds: wall time until the prediction was there, in seconds; an accelerator is waited for.
        cell: in a benchmark, the title of the stream that the batch is from; else empty.
    """

    method: str
    batch: int
    images: int
    loss: float | None
    entropy: float
    guard: tuple[Event, ...] = ()
    health: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cell: str = ""

    def scalars(self) -> dict[str, float]:
        """The numbers in it by name; ``guard`` is the number of the guard's actions."""
        own = {"entropy": self.entropy, "seconds": self.seconds, "guard": float(len(self.guard))}
        if self.loss is not None:
            own["loss"] = self.loss
        return own | {f"health/{name}": value for name, value in self.health.items()}


#: Called after every batch.
OnBatch = Callable[[BatchRecord], object]


def watch(net: Any) -> Callable[[Tensor], Tensor]:
    """Begin a batch of an adapter.

    Args:
        net: the adapter, whose ``on_batch`` is called if it has one. What it is told is read from
            the device, which is waited for; without one nothing is read.

    Returns:
        what is called with the batch's logits (B, classes) at its end, and returns them.
    """
    if net.on_batch is None:
        return _unwatched
    before, start = net.guard_events, time.perf_counter()

    def end(logits: Tensor) -> Tensor:
        if (on_batch := net.on_batch) is None:
            return logits
        shares = logits.detach().float().log_softmax(1)
        entropy = -(shares.exp() * shares).sum(1).mean().item()
        seconds = time.perf_counter() - start
        loss = None if net.loss is None else net.loss.item()
        events = tuple(event for event in net.guard_events if event not in before)
        on_batch(
            BatchRecord(
                net.method, net.batches, len(logits), loss, entropy, events, net.health(), seconds
            )
        )
        return logits

    return end


def _unwatched(logits: Tensor) -> Tensor:
    return logits


@contextmanager
def in_cell(net: Any, cell: str) -> Iterator[None]:
    """Tell an adapter's ``on_batch``, if it has one, which cell the batches in the block are of."""
    on_batch: OnBatch | None = getattr(net, "on_batch", None)
    if on_batch is None:
        yield
        return
    net.on_batch = lambda record: on_batch(dataclasses.replace(record, cell=cell))
    try:
        yield
    finally:
        net.on_batch = on_batch
