"""Windows: the images of an update, which may be collected from several batches.

Every batch is predicted at once, whatever its size. An update is made on a window of images:

- A batch of at least ``size`` images is a complete window: there is one update on exactly that
  batch, as in the papers. Images that are waiting keep waiting.
- A smaller batch is predicted without gradients, with the current parameters, and its images wait
  in the order of their arrival. As soon as ``size`` images are waiting, there is one update on the
  oldest ``size`` of them; the others wait for the next update. The batch that completes a window is
  predicted as a whole before the update.
- If a batch has images of another size than those waiting, the latter are discarded.

Waiting images are part of an adapter's state, a flat dict of tensors that is empty if none wait.
It also holds the estimate of ``statistics="stream"``. With ``memory="balanced"`` the images of an
update are chosen by their predicted classes instead (`ttt_plugins.core.memory`).
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
from ..data.images import to_float
from ..errors import InputError
from ..utils.checks import check_choice, check_integer, check_number
from .algorithm import Outcome, Tensors
from .scope import call

__all__ = [
    "IMAGES",
    "WINDOW",
    "OnlineFields",
    "Window",
    "check_waiting",
    "decode",
    "encode",
    "joined",
]

#: Prefix of the names of waiting tensors.
WINDOW = "window."
#: Name of the waiting images.
IMAGES = WINDOW + "images"


@dataclass(frozen=True, kw_only=True)
class OnlineFields(StatisticsFields):
    """The fields that the configs of all online methods have.

    Attributes:
        window: number of images in an update, at least 1. Smaller batches are predicted at once and
            collected until there are that many; a larger batch is one update. The papers use
            batches of 64 on ImageNet.
        memory: which images an update is made on: ``"recent"``, the latest, or ``"balanced"``,
            those in a memory balanced by predicted class (`ttt_plugins.core.memory`).
        guard: whether updates are softened or reset if signals without labels say that they hurt
            (`ttt_plugins.core.guard`). The papers have no guard.
        pull: fraction of the way back to the source that the parameters go after every update, in
            [0, 1]; 0 in the papers.

    Raises:
        InputError: as for `NormStatistics`, or an invalid window, memory, guard or pull.
    """

    statistics: str = "stream"
    window: int = 64
    memory: str = "recent"
    guard: bool = True
    pull: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_integer(self, "window", 1)
        check_choice(self, "memory", ("recent", "balanced"))
        check_choice(self, "guard", (True, False))
        check_number(self, "pull", 0, 1)


@dataclass(frozen=True)
class Window:
    """The number of images in an update; see the module's docstring.

    Attributes:
        size: number of images in an update, at least 1; 1 for an update on every batch.

    Raises:
        InputError: the size is not a positive integer.
    """

    size: int = 1

    def __post_init__(self):
        check_integer(self, "size", 1)

    @classmethod
    def of(cls, config: Any) -> Window:
        """The window of a config's field ``window``, by default an update on every batch.

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
        """Predict a batch, and adapt if a window is complete.

        Args:
            adapt: the step of an algorithm, `Algorithm.adapt`.
            backbone: the classifier.
            params: adapted tensors.
            state: state of the algorithm.
            waiting: waiting images, as returned by the last call.
            images: images (B, C, H, W) in [0, 1].

        Returns:
            the outcome, with logits from before the update, and the waiting images.
        """
        if len(images) >= self.size:
            return adapt(params, state, images), waiting
        logits = call(backbone, params, images)
        gathered = joined(waiting.get(IMAGES), images)
        if len(gathered) < self.size:
            predicted = Outcome(logits, params, state, forwards=len(images))
            return predicted, {IMAGES: gathered}
        outcome = adapt(params, state, decode(gathered[: self.size], images.dtype))
        outcome = outcome._replace(logits=logits, forwards=outcome.forwards + len(images))
        rest = gathered[self.size :]
        return outcome, {IMAGES: encode(rest).clone()} if len(rest) else {}

    def check(self, name: str, images: Tensor, backbone: Backbone) -> None:
        """Check that a tensor of a saved state can wait in this window.

        Raises:
            InputError: the tensor cannot, or is damaged.
        """
        if name != IMAGES or self.size == 1:
            raise InputError(
                f"this adaptation state belongs to another adapter: {name!r} is unknown here"
            )
        check_waiting(images, backbone, self.size - 1)

    def describe(self) -> list[str]:
        """Lines that describe when updates are made, and their cost."""
        if self.size == 1:
            return []
        return [
            f"window: {self.size} images an update; a smaller batch is predicted at once, with one "
            "forward pass per image, and its images wait (in 8 bits where that is exact) for one "
            f"update on {self.size}, whose cost they share; a larger batch is one update"
        ]


def check_waiting(images: Tensor, backbone: Backbone, most: int) -> None:
    """Check that images of a saved state can wait for an update of a classifier.

    Raises:
        InputError: they cannot, they are damaged, or there are none or more than ``most``.
    """
    other = "this adaptation state belongs to another adapter"
    channels = backbone.input_size[0]
    fits = images.ndim == 4 and images.shape[1] == channels
    if not fits or images.dtype not in (torch.uint8, torch.float32, backbone.dtype):
        raise InputError(
            f"{other}: {IMAGES!r} is {images.dtype} {tuple(images.shape)}, expected "
            f"(N, {channels}, H, W) of {torch.uint8} or {backbone.dtype}"
        )
    if not 0 < len(images) <= most:
        raise InputError(f"{other}: {len(images)} images wait, but at most {most} can")
    if not torch.isfinite(images).all():
        raise InputError(f"this adaptation state is damaged: {IMAGES!r} is not finite")


def joined(waiting: Tensor | None, images: Tensor) -> Tensor:
    """The waiting images, then these, stored as 8-bit integers if that is exact for all."""
    if waiting is None or waiting.shape[1:] != images.shape[1:]:
        # Always a copy, because the caller may modify its images.
        stored = encode(images)
        return stored.clone() if stored is images else stored
    stored = encode(images)
    if stored.dtype != waiting.dtype:
        stored, waiting = images, decode(waiting, images.dtype)
    return torch.cat([waiting, stored])


def encode(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 if `decode` restores them exactly, otherwise unchanged.

    On an accelerator they always stay unchanged, because the comparison would wait for it.
    """
    if images.device.type != "cpu":
        return images
    levels = (images * 255).round()
    stored = levels.clamp(0, 255).to(torch.uint8)
    return stored if torch.equal(decode(stored, images.dtype), images) else images


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert stored images (N, C, H, W) back to images in [0, 1]."""
    return to_float(stored, dtype).to(dtype)
