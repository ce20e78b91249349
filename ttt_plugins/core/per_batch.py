"""Adaptation to a whole batch: its images share the gradient steps and are then predicted.

The gradient steps start from the source and lower the mean loss of all views of all images. After
the steps the batch is predicted with the adapted tensors, which are then discarded. The cost of an
image is the same as in `per_image`, but all images of the batch are predicted together, and the
prediction of an image depends on the other images of its batch.

The views of a chunk of images pass through the network together, and the gradients of the chunks
are summed, so the size of the chunk only affects memory and speed.
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
from .updates import choose
from .views import image_keys

__all__ = ["PerBatch"]

#: Number of views that pass through the network together on a CPU; more were not faster.
_CPU_VIEWS = 64


@dataclass(frozen=True)
class PerBatch:
    """The engine; see the module's docstring.

    Attributes:
        backbone: the classifier.
        task: the loss and its views.
        source: initial values of the tensors that adapt, by the names that `scope.call` and the
            task use.
        lr: learning rate of the gradient steps.
        steps: number of gradient steps.
        copies: number of views of an image that pass through the network in a step.
        chunk: number of images whose views pass through the network together, or ``"auto"``.
        seed: seed for the views.
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
        """Return an empty state, because nothing is kept between batches."""
        return {}

    def describe(self) -> list[str]:
        """Lines that describe the cost of a step."""
        passes = self.steps * self.copies
        return [
            f"step: {self.steps} gradient step{'s' if self.steps > 1 else ''} on {self.task.name} "
            f"that the batch shares, {self.copies} views of each image; every batch from the start",
            f"cost: {passes + 1} forward and {passes} backward passes an image",
        ]

    def describe_memory(self, size: tuple[int | None, ...] | None) -> str:
        """A line on the memory that images take; ``size`` is (C, H, W), None if unknown."""
        return memory_line(size, self.backbone, self._bytes_for, self.plan)

    def plan(self, image: Tensor) -> int:
        """Number of images like this one (1, C, H, W) whose views pass through together."""
        if self.chunk == "auto" and image.device.type == "cpu":
            return max(1, _CPU_VIEWS // self.copies)
        return chunk_size(self.chunk, lambda: self._bytes_for(image), image.device)

    def with_chunk(self, chunk: int) -> PerBatch:
        """The same engine with another size of the chunks."""
        return replace(self, chunk=chunk)

    def adapt(self, params: Tensors, state: Tensors, images: Tensor) -> Outcome:
        """Images (B, C, H, W) in [0, 1] -> logits after the steps; nothing is kept."""
        moved, loss = params, None
        fine = torch.ones((), dtype=torch.bool, device=images.device)
        for number in range(self.steps):
            loss, grads = self._gradient(moved, images, number)
            good = all_finite(loss, flatten(grads))
            moved, fine = choose(good, descend(moved, grads, self.lr), moved), fine & good
        passes = len(images) * self.steps * self.copies
        logits = call(self.backbone, moved, images)
        return Outcome(logits, params, state, (~fine).long(), passes + len(images), passes, loss)

    def _gradient(self, params: Tensors, images: Tensor, number: int) -> tuple[Tensor, Tensors]:
        """The mean loss of the views of all images, and its gradient."""
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
        """The views (images x copies, …) of each chunk of images."""
        size = self.chunk if isinstance(self.chunk, int) else self.plan(images[:1])
        keys = image_keys(images, self.seed)
        for few, their_keys in zip(images.split(size), keys.split(size), strict=True):
            # A caller's mixed precision must not affect the pixels.
            with torch.autocast(images.device.type, enabled=False):
                drawn = self.task.draw(few, their_keys, number)
            yield [view.flatten(0, 1) for view in drawn]

    def _bytes_for(self, image: Tensor) -> int:
        """Memory in bytes of a step on one image (1, C, H, W), measured with one gradient."""
        views = next(self.with_chunk(1)._views(image, 0))
        self.backbone.make_ready(image)
        return image_bytes(self.task.loss, self.source, tuple(views), self.steps)
