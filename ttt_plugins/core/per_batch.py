"""Adapting once to a whole batch: its images share the gradient steps and are then predicted.

A gradient step lowers the mean loss of all views of all images, starting from the source; after
the steps the batch is predicted with the tensors they led to, which are then forgotten. An image
costs what it costs in `per_image`, but the tensors move once for the batch, so all predictions of
the batch run together and an image's prediction depends on the images beside it.

The views of a chunk of images pass through the network together; the gradients of several chunks
are added up, so the chunk decides on memory and speed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from .algorithm import Outcome, Tensors
from .chunks import chunk_size, image_bytes, memory_line
from .objectives import all_finite
from .per_image import Task, descend, loss_and_gradient
from .scope import call, flatten
from .views import image_keys

__all__ = ["PerBatch"]

#: Views that fill a CPU; more of them at once were not faster.
_CPU_VIEWS = 64


@dataclass(frozen=True)
class PerBatch:
    """The engine; see the module's docstring.

    Attributes:
        backbone: the classifier.
        task: the loss and its views.
        source: start of the tensors that adapt, by the names `scope.call` and the task know.
        lr: learning rate of the gradient steps.
        steps: how many there are.
        copies: views of an image that a step passes through the network.
        chunk: how many images' views pass together, or ``"auto"``.
        seed: of the views.
    """

    backbone: Backbone
    task: Task
    source: Tensors
    lr: float
    steps: int
    copies: int
    chunk: int | str
    seed: int = 0

    def init(self) -> Tensors:
        """Nothing is kept from batch to batch."""
        return {}

    def describe(self) -> list[str]:
        """Lines on what a step costs."""
        passes = self.steps * self.copies
        return [
            f"step: {self.steps} gradient step{'s' if self.steps > 1 else ''} on {self.task.name} "
            f"that the batch shares, {self.copies} views of each image; every batch from the start",
            f"cost: {passes + 1} forward and {passes} backward passes an image",
        ]

    def describe_memory(self, size: tuple[int | None, ...] | None) -> str:
        """A line on the memory that images of this size (C, H, W) take; None if it is unknown."""
        return memory_line(size, self.backbone, self._bytes_for, self.plan)

    def plan(self, image: Tensor) -> int:
        """How many images like this one (1, C, H, W) pass through the network together."""
        if self.chunk == "auto" and image.device.type == "cpu":
            return max(1, _CPU_VIEWS // self.copies)
        return chunk_size(self.chunk, lambda: self._bytes_for(image), image.device)

    def with_chunk(self, chunk: int) -> PerBatch:
        """The same engine, which passes that many images together."""
        return replace(self, chunk=chunk)

    def adapt(self, params: Tensors, state: Tensors, images: Tensor) -> Outcome:
        """Images (B, C, H, W) in [0, 1] -> logits from after the steps; nothing is kept."""
        moved, skipped, loss = params, False, None
        for number in range(self.steps):
            loss, grads = self._gradient(moved, images, number)
            if torch.isfinite(loss) & all_finite(flatten(grads)):
                moved = descend(moved, grads, self.lr)
            else:
                skipped = True
        passes = len(images) * self.steps * self.copies
        logits = call(self.backbone, moved, images)
        return Outcome(logits, params, state, int(skipped), passes + len(images), passes, loss)

    def _gradient(self, params: Tensors, images: Tensor, number: int) -> tuple[Tensor, Tensors]:
        """The mean loss of all images' views, and its gradient."""
        losses: list[Tensor] = []
        total: Tensors = {}
        for views in self._views(images, number):
            loss, grads = loss_and_gradient(
                lambda p, views=views: self.task.loss(p, *views), params
            )
            share = len(views[0]) / (len(images) * self.copies)
            losses.append(share * loss)
            total = {n: share * g + total[n] if total else share * g for n, g in grads.items()}
        return torch.stack(losses).sum(), total

    def _views(self, images: Tensor, number: int) -> Iterator[list[Tensor]]:
        """The views of a chunk of images, (images x copies, …) each, chunk by chunk."""
        size = self.chunk if isinstance(self.chunk, int) else self.plan(images[:1])
        keys = image_keys(images, self.seed)
        for few, their_keys in zip(images.split(size), keys.split(size), strict=True):
            # A caller's mixed precision is for the network, not for the pixels.
            with torch.autocast(images.device.type, enabled=False):
                drawn = self.task.draw(few, their_keys, number)
            yield [view.flatten(0, 1) for view in drawn]

    def _bytes_for(self, image: Tensor) -> int:
        """Estimated memory of a step on one image (1, C, H, W), in bytes, by a step's work."""
        views = next(self.with_chunk(1)._views(image, 0))
        return image_bytes(self.task.loss, self.source, tuple(views), self.steps)
