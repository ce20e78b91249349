"""Checks and warnings about an adapter's batches that do not wait for the device.

An accelerator runs behind Python, and reading a tensor's value waits until it has caught up. So
values to be checked are accumulated on the device, and read after the first batch and then once in
`LOOK_EVERY` batches. On a CPU they are read after every batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .inputs import check_pixels, refuse_pixels

__all__ = ["LOOK_EVERY", "PROBABILITIES", "SKIPPED", "Notices", "may_look"]

#: Number of batches between two reads on an accelerator.
LOOK_EVERY = 64

SKIPPED = (
    "the loss or its gradient was not finite, so the update was skipped and only the prediction "
    "returned; net.skipped_updates counts such updates (this warning is given once)"
)

PROBABILITIES = (
    "the model returns probabilities (each row adds up to 1), which every method takes for logits, "
    "so that it learns little: wrap the model without its last softmax"
)


def may_look(device: torch.device, batches: int) -> bool:
    """Whether values may be read after this many batches: on an accelerator only now and then."""
    return device.type == "cpu" or batches % LOOK_EVERY == 0


class Notices:
    """The range of the pixels since the last read, and the warnings that were given."""

    def __init__(self):
        self._warned: set[str] = set()
        self._batches = self._unseen = 0
        self._span: tuple[Tensor, Tensor] | None = None

    def moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a move or cast of the adapter, ``fn``, to the stored tensors."""
        if self._span is not None:
            self._span = fn(self._span[0]), fn(self._span[1])

    def warn(self, happened: int, message: str) -> None:
        """Warn with this message if ``happened`` is not 0 and the warning was not given before."""
        if happened and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=8)

    def check_pixels(self, images: Tensor) -> None:
        """Refuse pixels outside [0, 1] or not finite: at once, or on an accelerator later.

        Raises:
            InputError: there are such pixels, in this batch or in one since the last read.
        """
        if images.device.type == "cpu":
            check_pixels(images)
            return
        low, high = torch.aminmax(images.detach())
        if self._span is not None:
            low = torch.minimum(low.to(self._span[0]), self._span[0])
            high = torch.maximum(high.to(self._span[1]), self._span[1])
        self._span = low, high
        self._batches, self._unseen = self._batches + 1, self._unseen + 1
        if self._batches == 1 or self._unseen == LOOK_EVERY:
            self.look_at_pixels()

    def look_at_pixels(self) -> None:
        """Read the range of the pixels since the last read, which waits for the device.

        Raises:
            InputError: some pixels were outside [0, 1] or not finite.
        """
        if self._span is None:
            return
        (low, high), first, last = self._span, self._batches - self._unseen + 1, self._batches
        self._span, self._unseen = None, 0
        where = (
            f", in one of the batches {first} to {last}; reset() undoes what was learned from them"
        )
        refuse_pixels(low.item(), high.item(), "" if last == 1 else where)
