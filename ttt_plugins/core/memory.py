"""A balanced memory of the images for updates on imbalanced streams (``memory="balanced"``).

The latest images of a stream that is sorted by class are of one class, and an update on them moves
the model towards it. This memory keeps at most ``size`` images, balanced by predicted class, and
each update is made on all of them.

Every batch is predicted at once, whatever its size, and its images are then offered to the memory.
As soon as ``size`` images have been offered since the last update, there is one update, at most one
per batch. It costs one forward and backward pass for each image in the memory, in addition to the
forward pass that predicted the batch.

The rule is category-balanced sampling with timeliness and uncertainty (Yuan et al., RoTTA, CVPR
2023, arXiv 2303.13899, section 3.3):

    score of an image: ``1 / (1 + exp(-age / size)) + entropy / ln(classes)``, where its age is the
        number of images offered after it, and the entropy that of its prediction   -> `_score`
    a new image of a class with at least ``size / classes`` images replaces the image of that class
        with the highest score, if that score is higher than its own                -> `_place`
    a new image of another class takes a free place; if there is none, it replaces the image with
        the highest score among the largest classes, under the same condition       -> `_place`

Deviations from the released code:
1. An update is made on the memory once for every ``size`` images, at most once per batch (in the
   released code after every 64 images, on a teacher's predictions under strong augmentation, which
   is another method).
2. Images whose logits are not finite are not added.

NOTE (Gong et al., arXiv 2208.05117, section 3.2) also balances by predicted class, with a random
reservoir for each class. The rule here needs no random numbers, and old images are replaced.

The memory, with what is known about its images, is part of an adapter's state. Decisions depend on
predictions, so on an accelerator every batch waits for its predictions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..errors import InputError
from .algorithm import Outcome, Tensors
from .objectives import entropy
from .scope import call
from .window import IMAGES, WINDOW, Window, check_waiting, decode, joined

__all__ = ["WINDOW", "Balanced", "images_of"]

_CLASSES, _ENTROPIES = WINDOW + "classes", WINDOW + "entropies"
_AGES, _OFFERED = WINDOW + "ages", WINDOW + "offered"


class _Item(NamedTuple):
    """What is known about an image.

    Attributes:
        row: position of the image among those in the memory, which the batch's images follow.
        label: predicted class.
        entropy: entropy of its prediction, as a share of its largest value.
        born: number of images offered before it, counted from the first in the memory.
    """

    row: int
    label: int
    entropy: float
    born: int


@dataclass(frozen=True)
class Balanced:
    """The memory; see the module's docstring.

    Attributes:
        size: largest number of images, and number of images between two updates, at least 1.
    """

    size: int

    def step(
        self,
        adapt: Callable[[Tensors, Tensors, Tensor], Outcome],
        backbone: Backbone,
        params: Tensors,
        state: Tensors,
        waiting: Tensors,
        images: Tensor,
    ) -> tuple[Outcome, Tensors]:
        """Predict a batch, offer it to the memory, and adapt to the memory if an update is due.

        Arguments and results are those of `Window.step`.
        """
        logits = call(backbone, params, images)
        held = self.offer(waiting, images, logits)
        predicted = Outcome(logits, params, state, forwards=len(images))
        if int(held[_OFFERED]) < self.size or IMAGES not in held:
            return predicted, held
        outcome = adapt(params, state, decode(held[IMAGES], images.dtype))
        outcome = outcome._replace(logits=logits, forwards=outcome.forwards + len(images))
        return outcome, held | {_OFFERED: torch.zeros((), dtype=torch.int64)}

    def offer(self, held: Tensors, images: Tensor, logits: Tensor) -> Tensors:
        """The memory after a batch.

        Args:
            held: the memory so far; empty at the start of a stream.
            images: images (B, C, H, W) in [0, 1].
            logits: their logits (B, classes).
        """
        if IMAGES in held and held[IMAGES].shape[1:] != images.shape[1:]:
            held = {}
        items, now = [], len(held.get(IMAGES, ()))
        offered = int(held[_OFFERED]) if held else 0
        if IMAGES in held:
            known = (held[n].tolist() for n in (_CLASSES, _ENTROPIES, _AGES))
            items = [_Item(row, c, e, -a) for row, (c, e, a) in enumerate(zip(*known, strict=True))]
        classes = logits.shape[1]
        spread = (entropy(logits.nan_to_num()) / math.log(max(classes, 2))).tolist()
        fine = torch.isfinite(logits).all(1).tolist()
        for i, label in enumerate(logits.nan_to_num().argmax(1).tolist()):
            if fine[i]:
                self._place(items, _Item(now + i, label, spread[i], i), classes)
        after = {_OFFERED: torch.tensor(offered + len(images))}
        if not items:
            return after
        device = images.device
        rows = torch.tensor([item.row for item in items], device=device)
        return after | {
            IMAGES: joined(held.get(IMAGES), images)[rows],
            _CLASSES: torch.tensor([item.label for item in items], device=device),
            _ENTROPIES: torch.tensor(
                [item.entropy for item in items], dtype=torch.float32, device=device
            ),
            _AGES: torch.tensor([len(images) - item.born for item in items], device=device),
        }

    def _place(self, items: list[_Item], new: _Item, classes: int) -> None:
        """Add an image to the items, in place of another if there is no free place."""
        sizes = Counter(item.label for item in items)
        if sizes[new.label] >= self.size / classes:
            rivals = [new.label]
        elif len(items) < self.size:
            items.append(new)
            return
        else:
            largest = max(sizes.values())
            rivals = [label for label, count in sizes.items() if count == largest]
        worst = self._worst(items, rivals, new.born)
        if self._score(items[worst], new.born) > self._score(new, new.born):
            del items[worst]
            items.append(new)

    def _worst(self, items: Sequence[_Item], labels: Sequence[int], now: int) -> int:
        """Position of the image of these classes with the highest score, the first of equals."""
        positions = [i for i, item in enumerate(items) if item.label in labels]
        return max(positions, key=lambda i: self._score(items[i], now))

    def _score(self, item: _Item, now: int) -> float:
        """Score by which images are replaced: old and uncertain images have high scores."""
        return 1 / (1 + math.exp(-(now - item.born) / self.size)) + item.entropy

    def check(self, name: str, tensor: Tensor, backbone: Backbone) -> None:
        """Check that a tensor of a saved state can be part of this memory.

        Raises:
            InputError: the tensor cannot, or is damaged.
        """
        if name == IMAGES:
            check_waiting(tensor, backbone, self.size)
            return
        integers = name in (_CLASSES, _AGES, _OFFERED)
        fits = tensor.ndim == (name != _OFFERED) and tensor.is_floating_point() != integers
        if not fits or name not in (_CLASSES, _ENTROPIES, _AGES, _OFFERED):
            raise InputError(
                f"this adaptation state belongs to another adapter: {name!r} of shape "
                f"{tuple(tensor.shape)} is unknown here"
            )
        if not torch.isfinite(tensor).all() or (tensor < 0).any() or tensor.numel() > self.size:
            raise InputError(f"this adaptation state is damaged: {name!r} is out of range")

    def describe(self) -> list[str]:
        """Lines that describe when updates are made, and their cost."""
        return [
            f"memory: up to {self.size} images, balanced by predicted class; every batch is "
            f"predicted at once, with one forward pass per image, and after {self.size} images or "
            "more there is one update on the memory"
        ]


def images_of(config: Any) -> Window | Balanced:
    """What chooses an update's images, according to a config's fields ``window`` and ``memory``.

    Raises:
        InputError: as for `Window`.
    """
    window = Window.of(config)
    return Balanced(window.size) if getattr(config, "memory", "recent") == "balanced" else window
