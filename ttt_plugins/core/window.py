"""Prediction and adaptation have batches of their own.

Every batch is predicted at once, whatever its size. An update is made on a window of images:

- A batch of at least ``size`` images is a window of its own: one update on exactly that batch, as
  its papers have it. Images that are waiting go on waiting.
- A smaller batch is predicted without gradients by the parameters as they are, and its images wait
  in the order of their arrival. As soon as ``size`` of them have gathered, one update is made on
  the oldest ``size``; the others wait for the next one. A batch that crosses the boundary is
  predicted as a whole before that update.
- A batch of images of another size than those that wait drops them.

What waits is part of an adapter's state: a flat dict of tensors, empty where nothing waits. The
running estimate of ``statistics="stream"`` travels with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.statistics import StatisticsFields
from ..backbones.stream import STREAM
from ..errors import InputError
from ..utils.checks import check_choice, check_integer, check_number
from .algorithm import Outcome, Tensors
from .scope import call

__all__ = ["WINDOW", "OnlineFields", "Window", "decode", "encode"]

#: What the names of the tensors that wait begin with.
WINDOW = "window."
_IMAGES = WINDOW + "images"


@dataclass(frozen=True, kw_only=True)
class OnlineFields(StatisticsFields):
    """The fields that the configs of all online methods have.

    Attributes:
        window: images per update, at least 1. Smaller batches are predicted at once and gather
            until there are as many; a larger one is one update. The papers: 64 on ImageNet.
        guard: whether signals that need no label soften or reset updates that hurt
            (`ttt_plugins.core.guard`). The papers: no.
        pull: how far the adapted parameters go back to the source after every update, in [0, 1].
            The papers: 0.

    Raises:
        InputError: as for `NormStatistics`, a window that is no positive integer, or a guard or
            pull that is none.
    """

    window: int = 64
    guard: bool = True
    pull: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_integer(self, "window", 1)
        check_choice(self, "guard", (True, False))
        check_number(self, "pull", 0, 1)


@dataclass(frozen=True)
class Window:
    """How many images an update is made on; see the module's docstring.

    Attributes:
        size: images per update, at least 1; 1 for an update on every batch.

    Raises:
        InputError: a size that is no positive integer.
    """

    size: int = 1

    def __post_init__(self):
        check_integer(self, "size", 1)

    @classmethod
    def of(cls, config: Any) -> Window:
        """The choice in a config's field ``window``; without it, an update on every batch.

        Raises:
            InputError: as for the class.
        """
        named = {field.name for field in dataclasses.fields(config)}
        return cls(config.window) if "window" in named else cls()

    def step(
        self,
        adapt: Callable[[Tensors, Tensors, Tensor], Outcome],
        backbone: Backbone,
        params: Tensors,
        state: Tensors,
        waiting: Tensors,
        images: Tensor,
    ) -> tuple[Outcome, Tensors]:
        """Predict a batch, and adapt where a window is full.

        Args:
            adapt: an algorithm's step, as `Algorithm.adapt`.
            backbone: the classifier.
            params: the adapted tensors.
            state: the algorithm's state.
            waiting: the images that wait, as this returned them.
            images: (B, C, H, W) in [0, 1].

        Returns:
            the outcome, with logits from before the update, and what waits from now on.
        """
        with backbone.streaming(waiting, images) as stream:
            outcome, gathered = self._step(adapt, backbone, params, state, waiting, images)
        gathered = {n: t for n, t in gathered.items() if not n.startswith(STREAM)}
        return outcome, gathered | stream.joined(outcome.logits)

    def _step(
        self,
        adapt: Callable[[Tensors, Tensors, Tensor], Outcome],
        backbone: Backbone,
        params: Tensors,
        state: Tensors,
        waiting: Tensors,
        images: Tensor,
    ) -> tuple[Outcome, Tensors]:
        """As `step`, while the batch joins the stream's statistics."""
        if len(images) >= self.size:
            return adapt(params, state, images), waiting
        logits = call(backbone, params, images)
        gathered = _append(waiting.get(_IMAGES), images)
        if len(gathered) < self.size:
            predicted = Outcome(logits, params, state, forwards=len(images))
            return predicted, {_IMAGES: gathered}
        outcome = adapt(params, state, decode(gathered[: self.size], images.dtype))
        outcome = outcome._replace(logits=logits, forwards=outcome.forwards + len(images))
        rest = gathered[self.size :]
        return outcome, {_IMAGES: encode(rest).clone()} if len(rest) else {}

    def check(self, name: str, images: Tensor, backbone: Backbone) -> None:
        """Refuse a tensor that cannot wait in this window.

        Raises:
            InputError: it cannot.
        """
        other = "this adaptation state belongs to another adapter"
        channels = backbone.input_size[0]
        if name != _IMAGES or self.size == 1:
            raise InputError(f"{other}: {name!r} is unknown here")
        fits = images.ndim == 4 and images.shape[1] == channels
        if not fits or images.dtype not in (torch.uint8, backbone.dtype):
            raise InputError(
                f"{other}: {name!r} is {images.dtype} {tuple(images.shape)}, expected "
                f"(N, {channels}, H, W) of {torch.uint8} or {backbone.dtype}"
            )
        if not 0 < len(images) < self.size:
            raise InputError(f"{other}: {len(images)} images wait for an update on {self.size}")
        if not torch.isfinite(images).all():
            raise InputError(f"this adaptation state is damaged: {name!r} is not finite")

    def describe(self) -> list[str]:
        """Lines on when updates are made and what they cost."""
        if self.size == 1:
            return []
        return [
            f"window: {self.size} images an update; a smaller batch is predicted at once, one "
            "forward pass an image, and its images wait (8 bits a pixel where that is exact) for "
            f"one update on {self.size}, whose cost they share; a larger batch is one update"
        ]


def _append(waiting: Tensor | None, images: Tensor) -> Tensor:
    """The images that wait, and these; stored as 8-bit integers where all of them are."""
    if waiting is None or waiting.shape[1:] != images.shape[1:]:
        # Always a copy: the caller may write to its own images.
        stored = encode(images)
        return stored.clone() if stored is images else stored
    stored = encode(images)
    if stored.dtype != waiting.dtype:
        stored, waiting = images, decode(waiting, images.dtype)
    return torch.cat([waiting, stored])


def encode(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 where `decode` gives them back exactly, else as they are.

    An accelerator is waited for.
    """
    levels = (images * 255).round()
    stored = levels.clamp(0, 255).to(torch.uint8)
    return stored if torch.equal(decode(stored, images.dtype), images) else images


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The images (N, C, H, W) in [0, 1] that were stored."""
    return stored.to(dtype) / 255 if stored.dtype == torch.uint8 else stored.to(dtype)
