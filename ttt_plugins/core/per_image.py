"""Adaptation to each image separately, for many images at a time.

TTT and MT3 are this engine with different self-supervised tasks: it draws views of an image, takes
a few gradient steps on the task from the initial parameters, predicts the image itself, and
discards the parameters. The images of a chunk take their steps together, each with parameters of
its own (``vmap`` over ``functional_call``); the first step starts from shared parameters without
copying them. With ``keep`` images are taken one after the other, and the parameters are kept.

A chunk of one image runs without ``vmap``. This is the fast way on a CPU, where the views of one
image use all of it, and convolutions with separate weights for every image are 1.4 times slower.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ..backbones.backbone import Backbone
from ..errors import InputError
from ..utils.attention import plain_attention
from ..utils.failures import device_failed, out_of_memory
from .algorithm import Outcome, Tensors
from .chunks import chunk_size, image_bytes, memory_line
from .scope import call, gradients, no_recomputation
from .updates import choose
from .views import image_keys

__all__ = ["SOURCE_ONLY", "PerImage", "Task", "check_square", "descend", "loss_and_gradient"]


#: Fields that the configs of both methods had in earlier versions, with checks of their values. A
#: batch is one image here, so BatchNorm always used the source's statistics.
SOURCE_ONLY: dict[str, Callable[[Any], bool]] = {
    "statistics": lambda value: value == "source",
    "prior": lambda value: isinstance(value, (int, float)) and value >= 0,
}


@dataclass(frozen=True)
class Task:
    """A self-supervised task.

    Attributes:
        name: name for descriptions.
        draw: ``(images (B, C, H, W), keys (B,), step) -> views``, a tuple of tensors whose first
            dimension is B.
        loss: ``(params, *views of one image) -> scalar``.
        sure: ``(params, images) -> bool (B,)``, whether images need no adaptation; None if all
            images adapt.
    """

    name: str
    draw: Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    sure: Callable[[Tensors, Tensor], Tensor] | None = None


def check_square(images: Tensor, why: str) -> None:
    """Refuse images (B, C, H, W) from which no views can be drawn.

    Args:
        images: the images.
        why: what needs them to be square, for the message.

    Raises:
        InputError: the images are not square, or have a single pixel.
    """
    height, width = images.shape[2:]
    if height != width:
        raise InputError(f"{why} needs square images, these are {height} x {width}")
    if height < 2:
        raise InputError(f"{why} needs images of at least 2 x 2 pixels, these are 1 x 1")


def descend(
    params: Tensors, grads: Tensors, lr: float | Mapping[str, float] | Mapping[str, Tensor]
) -> Tensors:
    """Plain gradient descent, ``params - lr * grads``; ``lr`` may be a rate for each tensor."""
    rates = lr if isinstance(lr, Mapping) else dict.fromkeys(params, lr)
    return {name: p - rates[name] * grads[name] for name, p in params.items()}


def loss_and_gradient(
    loss: Callable[[Tensors], Tensor], params: Tensors, keep_graph: bool = False
) -> tuple[Tensor, Tensors]:
    """A scalar loss and its gradient, without ``torch.func``, which is a third slower on a CPU.

    With ``keep_graph`` both remain differentiable in ``params``, so that a step can be
    differentiated; otherwise both are constants.
    """
    if not keep_graph:
        params = {n: p.detach().requires_grad_() for n, p in params.items()}
    with torch.enable_grad(), no_recomputation():
        value = loss(params)
        grads = gradients(value, params, keep_graph)
    return value if keep_graph else value.detach(), grads


def _finite(loss: Tensor, grads: Tensors) -> Tensor:
    """Whether losses and their gradients are finite, bool of the shape of ``loss``."""
    # The largest magnitude is NaN if any value is.
    largest = [
        torch.linalg.vector_norm(t[..., None], torch.inf, tuple(range(loss.ndim, t.ndim + 1)))
        for t in (loss, *grads.values())
    ]
    return torch.stack(largest).amax(0) < torch.inf


@dataclass(frozen=True)
class PerImage:
    """The engine; see the module's docstring.

    Attributes:
        backbone: the classifier.
        task: the loss and its views.
        source: initial values of the tensors that adapt, by the names that `scope.call` and the
            task use.
        lr: learning rate of the gradient steps, for all tensors or for each by name.
        steps: number of gradient steps.
        copies: number of views of an image that pass through the network in a step.
        chunk: number of images that adapt together, or ``"auto"`` (`chunks.chunk_size`).
        keep: whether to continue from the parameters of the last image (online) instead of
            discarding them.
        votes: ``(image (1, C, H, W), its key) -> views (1, K, C, H, W)`` whose predictions are
            averaged; None to predict the image itself.
        looks: number of images that pass through the network in a prediction.
        seed: seed for the views.
    """

    backbone: Backbone
    task: Task
    source: Tensors
    lr: float | Tensors
    steps: int
    copies: int
    chunk: int | str
    keep: bool = False
    votes: Callable[[Tensor, Tensor], Tensor] | None = None
    looks: int = 1
    seed: int = 0

    def init(self) -> Tensors:
        """The number of images seen so far if parameters are kept, otherwise an empty state."""
        if not self.keep:
            return {}
        device = next(iter(self.source.values())).device
        return {"seen": torch.zeros((), dtype=torch.int64, device=device)}

    def describe(self) -> list[str]:
        """Lines that describe the cost of a step."""
        each = "one image after the other, kept" if self.keep else "every image from the start"
        passes = self.steps * self.copies
        lines = [
            f"step: {self.steps} gradient step{'s' if self.steps > 1 else ''} on {self.task.name}, "
            f"{self.copies} views each; {each}",
            f"cost: {passes + self.looks} forward and {passes} backward passes an image",
        ]
        if self.task.sure is not None:
            more = 1 if self.keep else 2
            lines[1] += f" that adapts, {more} more forward to see whether it must"
        return lines

    def describe_memory(self, size: tuple[int | None, ...] | None) -> str:
        """A line on the memory that images take; ``size`` is (C, H, W), None if unknown."""
        return memory_line(size, self.backbone, self.bytes_for, self.plan)

    def bytes_for(self, image: Tensor) -> int:
        """Memory in bytes of adapting to one image (1, C, H, W), measured with one gradient."""
        views = [v[0] for v in self._draw(image, image_keys(image, self.seed), 0)]
        self.backbone.make_ready(image)
        return image_bytes(self.task.loss, self.source, tuple(views), self.steps)

    def plan(self, image: Tensor) -> int:
        """Number of images like this one (1, C, H, W) that adapt together."""
        if self.keep or self.backbone.one_by_one:
            return 1
        return chunk_size(self.chunk, lambda: self.bytes_for(image), image.device)

    def with_chunk(self, chunk: int) -> PerImage:
        """The same engine with another number of images that adapt together."""
        return replace(self, chunk=chunk)

    def _draw(self, images: Tensor, keys: Tensor, step: int) -> tuple[Tensor, ...]:
        # A caller's mixed precision must not affect the pixels.
        with torch.autocast(images.device.type, enabled=False):
            return self.task.draw(images, keys, step)

    def adapt(self, params: Tensors, state: Tensors, images: Tensor) -> Outcome:
        """Images (B, C, H, W) in [0, 1] -> logits after the steps, and what is kept."""
        keys = image_keys(images, self.seed)
        if self.keep:
            return self._stream(params, state, images, keys)
        rows = torch.arange(len(images), device=images.device)
        logits, forwards = None, 0
        if self.task.sure is not None:
            sure = self.task.sure(params, images)
            logits = call(self.backbone, params, images)
            rows, forwards = rows[~sure], 2 * len(images)
        loss, skipped, fitting = None, 0, None
        if len(rows):
            predicted, fine, losses, fitting = self._episodes(params, images[rows], keys[rows])
            loss, skipped = losses.mean(), (~fine).sum()
            logits = (
                predicted
                if logits is None
                else logits.index_copy(0, rows, predicted.to(logits.dtype))
            )
        assert logits is not None, "a batch without images"
        passes = len(rows) * self.steps * self.copies
        seen = forwards + passes + len(rows) * self.looks
        return Outcome(logits, params, state, skipped, seen, passes, loss, fitting)

    def _episodes(
        self, params: Tensors, images: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, int | None]:
        """Adapt to images and predict them, chunk by chunk.

        Returns:
            logits (n, classes), whether each image's updates were finite (n,), the last losses
            (n,), and the number of images that could adapt together if that was fewer than
            planned, otherwise None.
        """
        chunk = self.chunk if isinstance(self.chunk, int) else self.plan(images[:1])
        parts, start, fitting, reason = [], 0, None, ""
        while start < len(images):
            size = min(chunk, len(images) - start)
            try:
                there = slice(start, start + size)
                parts.append(self._episode(params, images[there], keys[there]))
                start += size
                continue
            except RuntimeError as error:
                short = out_of_memory(error)
                if size == 1 or (device_failed(error) and not short):
                    raise
                if short:
                    fitting = -(-size // 2)  # the estimate was too low
                else:
                    fitting, reason = 1, (str(error).splitlines() or [""])[0]
            # Outside the except clause, which keeps the tensors of the failed attempt alive.
            chunk = fitting
        if reason:
            # It works image by image, so torch.func cannot transform a layer: it contains an
            # autograd.Function of the old form, reads a tensor's value, or assigns to part of a new
            # tensor.
            warnings.warn(
                "this model's images adapt one at a time, which is slower on an accelerator: "
                f"torch.func cannot run it on several ({reason})",
                RuntimeWarning,
                stacklevel=2,
            )
        logits, fine, losses = (torch.cat(column) for column in zip(*parts, strict=True))
        return logits, fine, losses, fitting

    def _episode(
        self, params: Tensors, images: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, finiteness and last losses of a chunk of images; see `_episodes`."""
        if len(images) > 1:
            return self._episode_of_many(params, images, keys)
        params, fine, loss = self._steps(params, images, keys)
        return self._predict(params, images, keys), fine[None], loss[None]

    def _episode_of_many(
        self, params: Tensors, images: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_episode` for several images, with ``vmap``."""
        own = None  # whether each image has parameters of its own yet
        fine = torch.ones(len(images), dtype=torch.bool, device=images.device)
        self.backbone.make_ready(images)
        with plain_attention():
            step = grad_and_value(self.task.loss)
            for number in range(self.steps):
                views = self._draw(images, keys, number)
                in_dims = (own, *(0 for _ in views))
                grads, loss = vmap(step, in_dims, randomness="error")(params, *views)
                good = _finite(loss, grads)
                grads = {
                    n: torch.where(good.view(-1, *[1] * (g.ndim - 1)), g, 0)
                    for n, g in grads.items()
                }
                params, own, fine = descend(params, grads, self.lr), 0, fine & good
            predict = vmap(lambda p, x, k: self._predict(p, x[None], k[None])[0])
            return predict(params, images, keys), fine, loss.detach()

    def _steps(
        self, params: Tensors, images: Tensor, keys: Tensor
    ) -> tuple[Tensors, Tensor, Tensor]:
        """Parameters after the steps of one image, whether all were finite, and the last loss."""
        fine = torch.ones((), dtype=torch.bool, device=images.device)
        for number in range(self.steps):
            views = [v[0] for v in self._draw(images, keys, number)]
            if self.backbone.faster_channels_last(images):
                views = [_channels_last(v) for v in views]
            loss, grads = loss_and_gradient(
                lambda p, views=views: self.task.loss(p, *views), params
            )
            good = _finite(loss, grads)
            moved, fine = descend(params, grads, self.lr), fine & good
            if good.device.type == "cpu":  # without the copy that a choice makes
                params = moved if good else params
            else:
                params = choose(good, moved, params)
        return params, fine, loss

    def _predict(self, params: Tensors, images: Tensor, keys: Tensor) -> Tensor:
        """Logits (1, classes) of one image (1, C, H, W)."""
        if self.votes is None:
            return call(self.backbone, params, images)
        with torch.autocast(images.device.type, enabled=False):
            views = self.votes(images, keys)[0]
        votes = call(self.backbone, params, views).log_softmax(1)
        return votes.logsumexp(0, keepdim=True) - math.log(len(views))

    def _stream(self, params: Tensors, state: Tensors, images: Tensor, keys: Tensor) -> Outcome:
        """Adapt to images in order, each from the parameters of the last, and predict them."""
        logits, losses, checked = [], [], 0
        first = state["seen"]
        skipped = torch.zeros_like(first)
        for i in range(len(images)):
            image = images[i : i + 1]
            if self.task.sure is not None:
                checked += 1
            if self.task.sure is None or not self.task.sure(params, image).item():
                # The position in the stream is added, so that a repeated image gets other views.
                params, fine, loss = self._steps(params, image, keys[i : i + 1] + (first + i))
                skipped = skipped + ~fine
                losses.append(loss)
            logits.append(self._predict(params, image, keys[i : i + 1]))
        passes = len(losses) * self.steps * self.copies
        seen = passes + checked + len(images) * self.looks
        new = {"seen": first + len(images)}
        loss = torch.stack(losses).mean() if losses else None
        return Outcome(torch.cat(logits), params, new, skipped, seen, passes, loss)


def _channels_last(views: Tensor) -> Tensor:
    """Images (K, C, H, W) in channels-last memory layout; other tensors unchanged."""
    return views.contiguous(memory_format=torch.channels_last) if views.ndim == 4 else views
