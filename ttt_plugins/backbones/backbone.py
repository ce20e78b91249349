"""The wrapped classifier, as the methods use it.

`Backbone` normalises images in [0, 1] before a model, can return its pooled features, and can
record the features whose statistics MGG compares. It holds a structural copy of the user's model
that shares its weights: no parameter is duplicated, and nothing done here (eval mode, BatchNorm on
batch statistics, hooks, moving to a device) affects the user's model.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..utils.failures import device_failed
from .norms import BATCH_NORMS, batch_norms, channel_axis, fixed_norms, tapped_modules
from .preprocessing import input_size, preprocessing
from .quirks import caches, derived, prepare, recurrent
from .sharing import leave_inference_mode, share_structure, tied_parameters
from .stages import classifier_names, inner, pooled_features
from .statistics import Feature, NormStatistics
from .stream import Stream

__all__ = ["Backbone"]

_SOURCE = NormStatistics()


class Backbone(nn.Module):
    """A classifier on images in [0, 1].

    Args:
        model: any module that maps normalised images (B, C, H, W) to logits (B, classes).
        mean, std: normalisation per channel; by default that of the model's ``pretrained_cfg``.
        normalize: False if the model normalises its input itself.
        statistics: the statistics that the BatchNorm layers normalise with.
        classes: indices of the logits to return, in this order; by default all.

    Attributes:
        num_classes: number of classes, None if unknown (for a plain module before its first batch).
        classes: indices of the logits to return, None for all.
        input_size: size (C, H, W) of the images that the model was made for; height and width are
            None if it declares none.
        fixed_size: whether the model accepts no images of another size.
        normalize: whether images are normalised here.
        statistics: the statistics that the BatchNorm layers normalise with.
        fixed_norms: number of layers that always keep their source statistics, by the name of their
            class.
        tapped: the layers whose features are recorded, by name.
        one_by_one: whether images can adapt one at a time only, because a layer cannot be run on
            several parameter sets at once.
        tied: first name of each tied parameter -> its names in other modules.
        lock: held during a forward pass. What it records and which statistics it uses belong to
            this module, so threads have to take turns.

    Raises:
        InputError: the model has no classifier (``num_classes=0``), or mean, std and normalize do
            not fit.
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
    ):
        super().__init__()
        self.num_classes: int | None = getattr(model, "num_classes", None)
        if self.num_classes == 0:
            raise InputError(
                f"{type(model).__name__} was made without a classifier (num_classes=0), so it "
                "has no logits; make it with num_classes=<number of classes>, or wrap a model "
                "with the head of your own on top"
            )
        self.restrict(classes)
        self.model = share_structure(model, Backbone).eval()  # an adapter's has hooks
        self.input_size = input_size(model)
        _, network = inner(model)  # which has the input size and the tokens
        described = getattr(network, "pretrained_cfg", None) or {}
        self.fixed_size = bool(described.get("fixed_input_size"))
        normal = preprocessing(model, mean, std, normalize, self.input_size[0])
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
        # Register tokens without a class token do not count.
        tokens = getattr(network, "num_prefix_tokens", 0)
        self._class_token = bool(tokens and getattr(network, "cls_token", None) is not None)
        self.one_by_one = recurrent(self.model)
        self.tied = tied_parameters(self)
        self._caches, self._derived = caches(self.model), derived(self.model)
        prepare(self.model)
        self._hook(statistics)
        self._takes_channels_last: bool | None = None  # not known yet
        self.lock = threading.RLock()

    def _hook(self, statistics: NormStatistics) -> None:
        """Register the hooks that choose statistics and record compared features."""
        self.statistics, self._images = statistics, 0
        self._norm_names = {m: n for n, m in batch_norms(self.model).items()}
        self._batch_norms = list(self._norm_names)
        self._stream: Stream | None = None  # see `streaming`
        self._as_source = False
        self._at_rest: dict[nn.modules.batchnorm._BatchNorm, tuple[Tensor, Tensor]] = {}
        if statistics.kind != "source":
            for module in self._batch_norms:
                module.register_forward_pre_hook(self._choose_statistics)
        self._record: list[Feature] | None = None
        self.tapped = tapped_modules(self.model)
        for module in self.tapped.values():
            if isinstance(module, BATCH_NORMS):
                module.register_forward_pre_hook(self._tap_input)
            else:
                module.register_forward_hook(self._tap_output)

    @property
    def has_batch_norm(self) -> bool:
        """Whether there are BatchNorm layers with running statistics."""
        return bool(self._batch_norms)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def train(self, mode: bool = True) -> Backbone:  # noqa: ARG002 - nn.Module's signature
        """Stay in eval mode: an adapter behaves the same in both modes."""
        return super().train(False)

    def forward(self, images: Tensor, pooled: bool = False) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, classes).

        With ``pooled`` the features (B, D) that the classifier sees instead.

        Raises:
            InputError: the model returns something else.
        """
        self._images = images.shape[0]
        x = (images - self.mean) / self.std if self.normalize else images
        # Attention's fused inference path rounds otherwise than the one with a graph, and an
        # adapter that does not move has to be the plain model bit for bit.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            out = pooled_features(self.model, x) if pooled else self.model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            self._rest()
            for cache in self._caches:  # the next call comes with other parameters
                cache.clear()
            for module, name, tensor in self._derived:
                setattr(module, name, tensor)
        if self._distilled and isinstance(out, (tuple, list)) and len({o.shape for o in out}) == 1:
            out = sum(out) / len(out)  # the heads' average, as timm has it at inference
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
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

    def restrict(self, classes: Sequence[int] | None) -> None:
        """Return only some of the logits from now on, in a given order.

        Args:
            classes: indices of the logits, each at most once; None for all logits.

        Raises:
            InputError: these are no indices, one occurs twice, or one is beyond the model's
                classes.
        """
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

    def _restricted(self, logits: Tensor) -> Tensor:
        assert self.classes is not None
        if max(self.classes) >= logits.shape[1]:
            raise InputError(
                f"classes name position {max(self.classes)}, but the model returned "
                f"{logits.shape[1]} logits"
            )
        return logits[:, torch.tensor(self.classes, device=logits.device)]

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
                    self(images[:1].contiguous(memory_format=torch.channels_last))
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

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"lock": threading.RLock()})
        leave_inference_mode(self)  # where it was copied or loaded

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse: ``torch.jit.script`` cannot compile this module."""
        raise InputError(
            "torch.jit.script cannot compile an exported classifier: use torch.jit.trace or "
            "torch.export"
        )

    # -- BatchNorm statistics ------------------------------------------------------------

    def _choose_statistics(
        self, module: nn.modules.batchnorm._BatchNorm, args: tuple[Tensor, ...]
    ) -> None:
        """Set the chosen statistics in a layer before it runs.

        Without running statistics PyTorch normalises with the batch's, even in eval mode, and
        updates none.
        """
        if module not in self._at_rest:
            assert module.running_mean is not None
            assert module.running_var is not None
            self._at_rest[module] = module.running_mean, module.running_var
        own = self._at_rest[module]
        if self._as_source:
            chosen = own
        elif self.statistics.kind == "stream":
            stream = self._stream or Stream({}, self.statistics.prior)
            chosen = stream.choose(self._norm_names[module], args[0], self._images, own)
        else:
            chosen = self.statistics.moments(args[0], *own, self._images)
        module.running_mean, module.running_var = (None, None) if chosen is None else chosen

    @torch.no_grad()
    def source_logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> the unadapted model's logits, on its own statistics."""
        self._as_source = True
        try:
            return self(images)
        finally:
            self._as_source = False

    @contextmanager
    def streaming(self, estimate: Mapping[str, Tensor], images: Tensor) -> Iterator[Stream]:
        """Normalise with an estimate over a stream, where ``"stream"`` is chosen.

        Outside such a block a batch joins no images at all, which makes ``"stream"`` ``"mix"``.

        Args:
            estimate: of the batches before, as `Stream.joined` returned it.
            images: the batch, (B, C, H, W) in [0, 1].

        Yields:
            the stream, which the batch may join once it is predicted.
        """
        stream = Stream(estimate, self.statistics.prior)
        if self.statistics.kind == "stream" and self._batch_norms:
            if stream.needs_start(len(images)):
                stream.start(self.source_logits(images))
            self._stream = stream
        try:
            yield stream
        finally:
            self._stream = None

    @property
    def streamed(self) -> dict[str, int]:
        """Channels of the layers that a stream has statistics of, by name."""
        if self.statistics.kind != "stream":
            return {}
        sizes = {n: m.running_mean for m, n in self._norm_names.items()}
        return {n: len(t) for n, t in sizes.items() if isinstance(t, Tensor)}

    def freeze_statistics(self, estimate: Mapping[str, Tensor]) -> None:
        """Normalise with a stream's estimate as it is from now on, whatever comes."""
        if self.statistics.kind != "stream":
            return
        stream = Stream(estimate, self.statistics.prior)
        for module, name in self._norm_names.items():
            mean, var = module.running_mean, module.running_var
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                module.running_mean, module.running_var = stream.at_rest(name, (mean, var))
        self.statistics = _SOURCE

    def _rest(self) -> None:
        """Give every layer its own statistics back, for whoever looks at it."""
        while self._at_rest:
            module, own = self._at_rest.popitem()
            module.running_mean, module.running_var = own

    # -- features ------------------------------------------------------------------------

    def _tap_input(self, module: nn.modules.batchnorm._BatchNorm, args: tuple[Tensor, ...]) -> None:
        if self._record is not None:
            axes = (0, *range(2, args[0].ndim))
            self._record.append(Feature(args[0], axes, module))

    def _tap_output(self, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if self._record is None:
            return
        x, axis = output, channel_axis(module, output)
        if self._class_token and x.ndim == 3 and axis == 2:
            x, axis = x[:, 0], 1
        self._record.append(Feature(x, tuple(i for i in range(x.ndim) if i != axis)))

    @contextmanager
    def recording(self) -> Iterator[list[Feature]]:
        """Record the features of `tapped` layers in the forward passes of the block."""
        self._record = record = []
        try:
            yield record
        finally:
            self._record = None
