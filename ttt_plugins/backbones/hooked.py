"""A structural copy of the user's model, and forward passes that never visibly change it.

A forward pass changes a model: other parameters replace its own, BatchNorm layers temporarily get
other statistics, and some models write their own weights or buffers. None of this may affect the
user's model, or be seen by another thread that saves or copies the adapter at the same time, or
remain after an interrupt. So an adapter's passes run on a second structural copy, the `Runner`,
which is discarded unless its pass ends normally.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .norms import BATCH_NORMS, batch_norms, channel_axis, tapped_modules
from .quirks import avoid_fast_path, prepare
from .runner import Leftovers, Runner
from .sharing import forward_hooks, leave_inference_mode, share_structure
from .stages import inner, pooled_features
from .statistics import Feature, NormStatistics
from .stream import Stream

__all__ = ["HookedModel"]

_SOURCE = NormStatistics()
#: Attributes of `HookedModel` that are neither copied nor pickled.
_TRANSIENT = ("lock", "_now", "_idle", "_hook_dicts")


@dataclass
class _Pass:
    """What the hooks of a forward pass need to know, and what they record."""

    images: int = 0
    record: list[Feature] | None = None
    stream: Stream | None = None  # see `HookedModel.streaming`
    as_source: bool = False
    #: The own statistics of the layers that temporarily have others.
    at_rest: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


class HookedModel(nn.Module):
    """A model whose BatchNorm uses chosen statistics and whose features can be recorded.

    Args:
        model: the user's model, of which this holds a structural copy.
        statistics: what the BatchNorm layers normalise with.

    Attributes:
        model: the copy, which no pass of an adapter changes.
        statistics: as given.
        tapped: the layers whose features are recorded, by name.
        written: names of tensors that the model writes in a forward pass; None before the first.
        lock: held during a forward pass: what it records and its statistics are kept in this
            module, so threads have to take turns. A forked child gets a new lock.

    Raises:
        InputError: the model's structure cannot be copied.
    """

    def __init__(self, model: nn.Module, statistics: NormStatistics):
        super().__init__()
        self._begin()
        self.model = share_structure(model, HookedModel).eval()  # an adapter's has hooks
        self._model_hooks = self._hook_keys()
        prepare(self.model)
        self.written: tuple[str, ...] | None = None
        self._leftovers = Leftovers(self.model)
        self._compiled: tuple[tuple, dict] | None = None
        _, network = inner(model)
        # Register tokens alone, without a class token, are not features of the image.
        tokens = getattr(network, "num_prefix_tokens", 0)
        self._class_token = bool(tokens and getattr(network, "cls_token", None) is not None)
        self.statistics = statistics
        self._batch_norms = list(batch_norms(self.model).values())
        if statistics.kind != "source":
            for name, module in batch_norms(self.model).items():
                module.register_forward_pre_hook(partial(self._choose_statistics, name))
        self.tapped = tapped_modules(self.model)
        for module in self.tapped.values():
            if isinstance(module, BATCH_NORMS):
                module.register_forward_pre_hook(self._tap_input)
            else:
                module.register_forward_hook(self._tap_output)

    def _begin(self) -> None:
        """Create what is neither copied nor pickled."""
        self._now = _Pass()
        self._idle: list[Runner] = []  # in a list, so that it is not registered as a submodule
        self._hook_dicts: list[dict] | None = None
        self.lock = threading.RLock()
        _ALIVE.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()
        if torch.is_inference_mode_enabled():
            leave_inference_mode(self)

    def train(self, mode: bool = True) -> HookedModel:  # noqa: ARG002 - nn.Module's signature
        """Stay in eval mode, because an adapter behaves the same in both modes."""
        super().train(False)
        avoid_fast_path(self.model)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model for the passes of adapters, with the arguments of ``torch.compile``."""
        self._compiled, self._idle = (args, kwargs), []

    def _apply(self, fn, recurse: bool = True) -> HookedModel:
        super()._apply(fn, recurse)
        self._idle = []  # a runner has the tensors from before the move
        return self

    # -- forward passes ------------------------------------------------------------------

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep other threads out, and restore what an interrupted pass may have left changed."""
        with self.lock:
            self._rest()
            self._now = _Pass()
            yield

    def _run(self, x: Tensor, pooled: bool, tensors: Mapping[str, Tensor] | None) -> Any:
        """The model's output, or pooled features, for normalised images (B, C, H, W)."""
        self._now.images = x.shape[0]
        if tensors is None:
            try:
                return pooled_features(self.model, x) if pooled else self.model(x)
            finally:
                self._rest()
                self._leftovers.remove()
        self._make_ready(x)
        # Nothing else refers to the runner until the pass has ended, so an interrupt discards it.
        runner = self._idle.pop()
        try:
            out = functional_call(runner, dict(tensors), (x, pooled), tie_weights=False)
        finally:
            self._rest()
        self._idle = [runner]
        return out

    def _make_ready(self, x: Tensor) -> None:
        """Determine what the model writes, by a pass on two of the images, and create a runner."""
        if self.written is None:
            trial = Runner(share_structure(self.model), None)
            for hooks, key, _ in forward_hooks(trial.model):
                if key not in self._model_hooks:
                    del hooks[key]  # the user's hooks must not see this pass
            trial.model = getattr(trial.model, "_orig_mod", trial.model)  # before compiling
            try:
                with torch.no_grad():
                    self._look_at(trial(x[:2], False))
            except Exception:
                pass  # the real pass will raise the same error
            self.written, self._idle = trial.written, []
        if not self._idle or self._idle[0].hooks != self._hook_keys():
            self._idle = [self._new_runner()]

    def _look_at(self, out: Any) -> None:
        """See what the model returns for two images, before its first pass."""

    def _hook_keys(self) -> list[int]:
        """Keys of the hooks that the model has now; they are unique in the process."""
        if self._hook_dicts is None:
            self._hook_dicts = [
                hooks
                for module in self.model.modules()
                for hooks in (module._forward_pre_hooks, module._forward_hooks)
            ]
        return [key for hooks in self._hook_dicts for key in hooks]

    def _new_runner(self) -> Runner:
        runner = Runner(share_structure(self.model), self.written or ())
        runner.hooks = self._hook_keys()
        if self._compiled is not None:
            args, kwargs = self._compiled
            runner.model.compile(*args, **kwargs)
        return runner

    # -- BatchNorm statistics ------------------------------------------------------------

    @property
    def has_batch_norm(self) -> bool:
        """Whether there are BatchNorm layers with running statistics."""
        return bool(self._batch_norms)

    def _choose_statistics(
        self, name: str, module: nn.modules.batchnorm._BatchNorm, args: tuple[Tensor, ...]
    ) -> None:
        """Before a layer runs, give it the chosen statistics.

        Without running statistics PyTorch normalises with the batch's, even in eval mode, and
        writes none.
        """
        if self.statistics.kind == "source":
            return  # frozen since, and what is exported has no trace of the choice
        now = self._now
        if module not in now.at_rest:
            assert module.running_mean is not None
            assert module.running_var is not None
            now.at_rest[module] = module.running_mean, module.running_var
        own = now.at_rest[module]
        if now.as_source:
            chosen = own
            if now.stream is not None:
                now.stream.observe(name, args[0], now.images, own)
        elif self.statistics.kind == "stream":
            stream = now.stream or Stream({}, self.statistics.prior)
            chosen = stream.choose(name, args[0], now.images, own)
        else:
            chosen = self.statistics.moments(args[0], *own, now.images)
        module.running_mean, module.running_var = (None, None) if chosen is None else chosen

    @torch.no_grad()
    def source_logits(self, images: Tensor) -> Tensor:
        """The unadapted model's logits for images (B, C, H, W) in [0, 1], on its own statistics."""
        now = self._now
        now.as_source = True
        try:
            return self(images, tensors={})
        finally:
            now.as_source = False

    @contextmanager
    def streaming(
        self,
        estimate: Mapping[str, Tensor],
        images: Tensor,
        places: Collection[int] = (),
        watch: bool = False,
    ) -> Iterator[Stream]:
        """Normalise with an estimate over a stream, where ``"stream"`` is chosen.

        Outside such a block a batch joins no images at all, which makes ``"stream"`` ``"mix"``.

        Args:
            estimate: of the batches before, as `Stream.joined` returned it.
            images: the batch, (B, C, H, W) in [0, 1].
            places: positions of images whose logits by the source the caller needs too.
            watch: whether the caller needs to know of a change of the shift.

        Yields:
            the stream, which the batch may join once predicted, with the source's logits for some.
        """
        now, stream = self._now, Stream(estimate, self.statistics.prior)
        if self.statistics.kind == "stream" and self._batch_norms:
            now.stream, watch = stream, True
            places = {*places, *stream.places(len(images))}
        if watch:
            stream.watch(images)
        try:
            if places:
                stream.probe(sorted(places), self.source_logits(images[sorted(places)]))
            yield stream
        finally:
            now.stream = None

    @property
    def streamed(self) -> dict[str, int]:
        """Numbers of channels, by name, of the layers that a stream has statistics of."""
        if self.statistics.kind != "stream":
            return {}
        sizes = {n: m.running_mean for n, m in batch_norms(self.model).items()}
        return {n: len(t) for n, t in sizes.items() if isinstance(t, Tensor)}

    def freeze_statistics(self, estimate: Mapping[str, Tensor]) -> None:
        """Normalise with a stream's current estimate from now on."""
        if self.statistics.kind != "stream":
            return
        stream = Stream(estimate, self.statistics.prior)
        for name, module in batch_norms(self.model).items():
            mean, var = module.running_mean, module.running_var
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                module.running_mean, module.running_var = stream.at_rest(name, (mean, var))
        self.statistics = _SOURCE

    def _rest(self) -> None:
        """Give every layer its own statistics back."""
        for module, own in self._now.at_rest.items():
            module.running_mean, module.running_var = own
        self._now.at_rest.clear()

    # -- features ------------------------------------------------------------------------

    def _tap_input(self, module: nn.modules.batchnorm._BatchNorm, args: tuple[Tensor, ...]) -> None:
        if self._now.record is not None:
            axes = (0, *range(2, args[0].ndim))
            self._now.record.append(Feature(args[0], axes, module))

    def _tap_output(self, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if self._now.record is None:
            return
        x, axis = output, channel_axis(module, output)
        if self._class_token and x.ndim == 3 and axis == 2:
            x, axis = x[:, 0], 1
        self._now.record.append(Feature(x, tuple(i for i in range(x.ndim) if i != axis)))

    @contextmanager
    def recording(self) -> Iterator[list[Feature]]:
        """Record the tapped features of the forward passes inside the block."""
        now = self._now
        now.record = record = []
        try:
            yield record
        finally:
            now.record = None


_ALIVE: weakref.WeakSet[HookedModel] = weakref.WeakSet()


def _own_locks() -> None:
    """Replace the locks in a forked child, which may not have the thread that held one."""
    for model in list(_ALIVE):
        model.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_own_locks)
