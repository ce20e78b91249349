"""The wrapped classifier, as the methods use it.

`Backbone` normalises images in [0, 1] before a model, can return its pooled features, and can
record the features whose statistics MGG compares. It holds a structural copy of the user's model
that shares its weights: no parameter is duplicated, and nothing done here (eval mode, BatchNorm on
batch statistics, hooks, moving to a device) affects the user's model. See `HookedModel`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..utils.failures import device_failed
from .hooked import HookedModel
from .kinds import Output, Settings, attach, settings_of
from .norms import BATCH_NORMS, fixed_norms
from .outputs import are_probabilities, logits_of
from .preprocessing import input_size, preprocessing
from .quirks import recurrent
from .sharing import tied_parameters
from .stages import classifier_names, inner
from .statistics import NormStatistics

__all__ = ["Backbone"]

_SOURCE = NormStatistics()


class Backbone(HookedModel):
    """A classifier on images in [0, 1].

    Args:
        model: any module that maps normalised images (B, C, H, W) to logits (B, classes).
        mean, std: normalisation per channel; by default that of the model's ``pretrained_cfg``.
        normalize: False if the model normalises its input itself.
        statistics: the statistics that the BatchNorm layers normalise with.
        classes: indices of the logits to return, in this order; by default all.
        output: key, attribute or position of the logits in what the model returns, where it is no
            tensor and has no part called logits.
        settings: what is known about the model besides, such as its pictures; by default what its
            kind says (`ttt_plugins.backbones.kinds`).

    Attributes:
        num_classes: number of classes, None if unknown (for a plain module before its first batch).
        classes: indices of the logits to return, None for all.
        input_size: size (C, H, W) of the images that the model was made for; height and width are
            None if it declares none.
        fixed_size: whether the model accepts no images of another size.
        normalize: whether images are normalised here.
        fixed_norms: number of layers that always keep their source statistics, by the name of their
            class.
        one_by_one: whether images can adapt one at a time only, because a layer cannot be run on
            several parameter sets at once.
        tied: first name of each tied parameter -> its names in other modules.
        returns_probabilities: whether the first outputs were probabilities instead of logits.

    Raises:
        InputError: the model has no classifier (``num_classes=0``) or cannot be copied apart from
            its weights, or mean, std and normalize do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Any = None,
        std: Any = None,
        normalize: bool = True,
        statistics: NormStatistics = _SOURCE,
        classes: Sequence[int] | None = None,
        output: Output | None = None,
        settings: Settings | None = None,
    ):
        if getattr(model, "num_classes", None) == 0:
            raise InputError(
                f"{type(model).__name__} was made without a classifier (num_classes=0), so it "
                "has no logits; make it with num_classes=<number of classes>, or wrap a model "
                "with the head of your own on top"
            )
        super().__init__(model, statistics)
        self.output, self.settings = output, settings_of(model) if settings is None else settings
        if settings is not None:
            attach(self.model, settings)  # of the copy, for whoever wraps it again
        self.num_classes: int | None = getattr(model, "num_classes", self.settings.num_classes)
        self.restrict(classes)
        self.input_size = input_size(model, self.settings)
        _, network = inner(model)  # which has the input size
        described = getattr(network, "pretrained_cfg", None) or {}
        self.fixed_size = bool(described.get("fixed_input_size")) or self.settings.fixed_size
        normal = preprocessing(model, mean, std, normalize, self.input_size[0], self.settings)
        self.normalize = normal is not None
        self.mean: Tensor
        self.std: Tensor
        for name, value in (normal._asdict() if normal is not None else {}).items():
            self.register_buffer(name, value.to(self.device, self.dtype), persistent=False)
        self.fixed_norms = Counter(type(m).__name__ for m in fixed_norms(self.model).values())
        self._untracked = sum(
            isinstance(m, BATCH_NORMS) and m.running_mean is None for m in self.model.modules()
        )
        try:
            self._distilled = len(classifier_names(self.model)) > 1
        except InputError:
            self._distilled = False
        self.one_by_one = recurrent(self.model)
        self.returns_probabilities = False
        self.tied = tied_parameters(self)
        self._takes_channels_last: bool | None = None  # not known yet

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def forward(
        self,
        images: Tensor,
        pooled: bool = False,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, classes).

        Args:
            images: as above.
            pooled: whether to return the features (B, D) that the classifier sees instead.
            tensors: used in place of the model's parameters and buffers, named as here
                (``"model.…"``). Such a pass, also without any names, leaves `model` alone at every
                moment; other passes run `model` itself, which other threads must not use.

        Raises:
            InputError: the model returns something else.
        """
        out = self._run(self._normalised(images), pooled, tensors)
        if not pooled:
            out = logits_of(out, self.output, self._distilled)
        # By shapes, whose size of the batch an exporter may leave open; len() would fix it.
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != images.shape[0]:
            what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            wanted = "features (B, D)" if pooled else "logits (B, classes)"
            raise InputError(
                f"the model must return {wanted}, it returned {what} for {len(images)} images"
            )
        if not out.is_floating_point():
            raise InputError(f"the model must return floating-point numbers, not {out.dtype}")
        if not pooled:
            if self.classes is not None:
                out = self._restricted(out)
            self.num_classes = out.shape[1]
        return out

    def _look_at(self, out: Any) -> None:
        self.returns_probabilities = are_probabilities(logits_of(out, self.output, self._distilled))

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std if self.normalize else images

    def make_ready(self, images: Tensor) -> None:
        """Prepare for the first pass now, because that pass may run inside a function transform.

        Args:
            images: images (B, C, H, W) in [0, 1], used to determine what the model writes.
        """
        self._make_ready(self._normalised(images))

    def restrict(self, classes: Sequence[int] | None) -> None:
        """Return only some of the logits from now on, in a given order.

        Args:
            classes: indices of the logits, each at most once; None for all logits.

        Raises:
            InputError: these are not indices, one occurs twice, or one is beyond the model's
                classes.
        """
        self._positions: Tensor
        self.classes: tuple[int, ...] | None = None
        if classes is None:
            return
        wanted = tuple(classes)
        integers = all(isinstance(c, int) and not isinstance(c, bool) for c in wanted)
        if not wanted or not integers or len(set(wanted)) < len(wanted) or min(wanted) < 0:
            raise InputError("classes must be indices of the model's classes, each at most once")
        if self.num_classes is not None and max(wanted) >= self.num_classes:
            raise InputError(
                f"classes name position {max(wanted)}, but the model has {self.num_classes} classes"
            )
        self.classes, self.num_classes = wanted, len(wanted)
        positions = torch.tensor(wanted, device=self.device)
        self.register_buffer("_positions", positions, persistent=False)

    def _restricted(self, logits: Tensor) -> Tensor:
        assert self.classes is not None
        if max(self.classes) >= logits.shape[1]:
            raise InputError(
                f"classes name position {max(self.classes)}, but the model returned "
                f"{logits.shape[1]} logits"
            )
        return logits[:, self._positions]

    def faster_channels_last(self, images: Tensor) -> bool:
        """Whether the model accepts the channels-last layout, and is faster with it.

        Convolutions are faster with it on a CPU. A model that flattens its features with ``view``
        does not accept it, which is tested once with one of the images.

        Args:
            images: images (B, C, H, W) in [0, 1].
        """
        if images.device.type != "cpu":
            return False
        if self._takes_channels_last is None:
            try:
                with torch.no_grad():
                    one = images[:1].contiguous(memory_format=torch.channels_last)
                    self(one, tensors={})
                self._takes_channels_last = True
            except RuntimeError as error:
                if device_failed(error):
                    raise
                self._takes_channels_last = False
        return self._takes_channels_last

    def describe(self) -> list[str]:
        """Lines that describe preprocessing, input size, classes and norm statistics."""
        if self.normalize:
            rounded = [[round(v, 4) for v in t.flatten().tolist()] for t in (self.mean, self.std)]
            preprocessing = f"(image - {rounded[0]}) / {rounded[1]}, inside"
        else:
            preprocessing = "none here; the model gets images in [0, 1]"
        fixed = ", no other" if self.fixed_size else ""
        chosen = "" if self.classes is None else " of the model's, no others"
        statistics = "the model has no BatchNorm with running statistics"
        if self._batch_norms:
            statistics = f"{self.statistics.describe()}; {len(self._batch_norms)} layers"
        if self.fixed_norms:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.fixed_norms.items())
            statistics += f"; {kinds} keep the source's whatever is chosen"
        if self._untracked:
            statistics += f"; {self._untracked} BatchNorm without any always use the batch's"
        return [
            f"preprocessing: {preprocessing}",
            f"input: {self.input_size} (C, H, W){fixed}, classes: {self.num_classes}{chosen}",
            f"norm statistics: {statistics}",
        ]

    def source_state_dict(self) -> dict[str, Tensor]:
        """The ``state_dict`` of the wrapped model."""
        return self.model.state_dict()

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse: ``torch.jit.script`` cannot compile this module."""
        raise InputError(
            "torch.jit.script cannot compile an exported classifier: use torch.jit.trace or "
            "torch.export"
        )
