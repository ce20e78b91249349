"""The adapter: an ``nn.Module`` that adapts inside ``forward``.

Other parts of the package are pure functions or frozen values. Everything that changes from batch
to batch is kept here: the adapted parameters, the state of the update rule, and counters.
"""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .artifacts.publish import publish
from .artifacts.saving import save_pretrained
from .backbones.backbone import Backbone
from .backbones.sharing import deep_copy, ordinary
from .backbones.shell import Shell
from .backbones.stream import STREAM, check_stream
from .core import chunks, scope
from .core.adaptation_state import describe_tensors, parts, resumed, saved
from .core.algorithm import Algorithm, Chunked, Tensors
from .core.guard import GUARD, GUARDED, Event, Guard
from .core.inputs import (
    check_images,
    check_pixels,
    knows_normalisation,
    pixels_of,
    refuse_tracing,
    refused_sizes,
)
from .core.memory import WINDOW, images_of
from .core.notices import PROBABILITIES, SKIPPED, Notices, may_look
from .core.pictures import is_source
from .core.records import OnBatch, watch
from .core.registry import SOURCE_STATISTICS, Method, get_method
from .data.images import batch_images
from .errors import InputError

__all__ = ["Adapter"]


class Adapter(Shell):
    """A classifier that adapts itself to the images it classifies.

    `ttt_plugins.wrap` and `ttt_plugins.from_pretrained` create it. It behaves the same in train and
    eval mode, under ``no_grad`` and ``inference_mode``, and never changes the wrapped model.

    Attributes:
        method: name of the method.
        config: the method's config, a frozen dataclass.
        normalized_input: whether images are already normalised with mean and std, which the adapter
            reverses, because views and checks need pixels in [0, 1]. Artifacts do not store it.
        names: names of the parameters that adapt, relative to the wrapped model.
        origin: where the classifier came from, as recorded in artifacts.
        seed: seed for everything random.
        forwards: number of images passed forward through the model so far.
        backwards: number of images passed backward through it so far.
        batches: number of batches since the last reset.
        loss: mean loss of the last batch before its last update, a tensor (); None without one.
        checks_pixels: whether to refuse batches with pixels that are not finite or outside [0, 1].
            On an accelerator they are checked after the first batch and then once in 64
            (`ttt_plugins.core.notices`). Type, shape and device are always checked.
        on_batch: called with a `BatchRecord` after every batch, unless None; copies have none.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        config: Any,
        *,
        tensors: dict[str, Tensor] | None = None,
        origin: dict[str, Any] | None = None,
        seed: int | None = None,
        normalized_input: bool = False,
    ):
        super().__init__()
        self.normalized_input = normalized_input and knows_normalisation(backbone)
        self.backbone = backbone
        self.method = method.name
        self.config = config
        self.origin = origin or {}
        self.seed = 0 if seed is None else seed
        self._record = method
        self._tensors = {n: t.detach().clone() for n, t in (tensors or {}).items()}
        self.names = method.select(config, backbone)
        self.forwards = self.backwards = self.batches = 0
        self.checks_pixels = True
        self.on_batch: OnBatch | None = None
        self._skipped = torch.zeros((), dtype=torch.int64)
        self._notices = Notices()
        self.loss: Tensor | None = None
        self._params: Tensors | None = None
        self._state: Tensors | None = None
        self._algorithm: Algorithm | None = None
        self._window, self._guard = images_of(config), Guard.of(config)
        self._waiting: Tensors = {}
        # How many images adapt together, by what determines it; and the size of the last images.
        self._chunks: dict[tuple, int] = {}
        self._last_size: tuple[int, ...] | None = None

    # -- inference -----------------------------------------------------------------------

    # Compiled code calls an adapter uncompiled; its steps may be compiled separately.
    @torch.compiler.disable
    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W), floating point in [0, 1], to logits (B, classes).

        Raises:
            InputError: the images have another type, shape or range; the adapter is unchanged.
        """
        pixels, told = self._pixels(images), watch(self)
        if self.checks_pixels:
            self._notices.check_pixels(pixels)
        with self.backbone.turn(), torch.inference_mode(False):
            # Tensors created in inference mode cannot be part of a graph, but copies can.
            images = pixels.clone() if pixels.is_inference() else pixels.detach()
            images = images.to(self.backbone.dtype)
            with refused_sizes(self.backbone, images, self._last_size):
                logits = self._predict(images)
            self._last_size = tuple(images.shape[1:])
        return told(logits)

    def _predict(self, images: Tensor) -> Tensor:
        if self._record.build is None:
            with torch.no_grad(), self.backbone.streaming(self._waiting, images) as stream:
                logits = scope.call(self.backbone, {}, images)
            vars(self).update(_waiting=stream.joined(logits), forwards=self.forwards + len(images))
            return logits
        with torch.no_grad():
            now, algorithm = self._now(), self._algorithm_now()
            adapt = partial(chunks.adapt, algorithm, self._chunks)
            start = algorithm.source, algorithm.init
            outcome, waiting = self._guard.step(
                self._window, adapt, self.backbone, start, now, self._waiting, images
            )
        # All state changes in this one call: an error or interrupt comes before or after it.
        vars(self).update(
            _params=outcome.params,
            _state=outcome.state,
            _waiting=waiting,
            _skipped=self._skipped + outcome.skipped,
            loss=outcome.loss,
            forwards=self.forwards + outcome.forwards,
            backwards=self.backwards + outcome.backwards,
            batches=self.batches + 1,
        )
        if may_look(self.backbone.device, self.batches):
            self._notices.warn(self.skipped_updates, SKIPPED)
            self._notices.warn(self._guard.harmful(self._waiting), GUARDED)
            self._notices.warn(self.backbone.returns_probabilities, PROBABILITIES)
        return outcome.logits

    @property
    def skipped_updates(self) -> int:
        """Number of batches, or images where each adapts alone, whose loss was not finite."""
        return int(self._skipped)

    @property
    def guard_events(self) -> list[Event]:
        """What the guard did since the last reset, the oldest first (`ttt_plugins.core.guard`)."""
        return self._guard.events(self._waiting)

    def health(self) -> dict[str, float]:
        """The guard's signals: see `ttt_plugins.core.guard.Guard.health`."""
        if self._record.build is None:
            return {}
        source = self._algorithm_now().source
        return self._guard.health(self._waiting, self._params, source)

    def check_images(self, images: Tensor) -> None:
        """Check images as ``forward`` does, with the same `InputError`."""
        pixels = self._pixels(images)
        if self.checks_pixels:
            check_pixels(pixels)

    def _pixels(self, images: Tensor) -> Tensor:
        """Check a batch, and return its pixels in [0, 1], with any normalisation reversed."""
        if self.names:
            refuse_tracing()
        check_images(self.backbone, images)
        if self.normalized_input:
            images = pixels_of(self.backbone, images)
        return images

    # -- state ---------------------------------------------------------------------------

    def algorithm(self, tensors: Tensors | None = None) -> Any:
        """The method's `Algorithm` for this backbone; None for the unadapted model.

        Args:
            tensors: tensors that replace learned tensors of the same names; they may require
                gradients, as in meta-training.
        """
        build = self._record.build
        if build is None:
            return None
        source = self._record.source(self.config, self.backbone, self.names, self.seed)
        learned = self._tensors | (tensors or {})
        return build(self.config, self.backbone, source, learned, self.seed)

    def with_tensors(self, config: Any, tensors: dict[str, Tensor] | None = None) -> Adapter:
        """A new adapter with the same backbone, another config and some other learned tensors."""
        tensors = self._tensors | (tensors or {})
        own = {"origin": self.origin, "seed": self.seed, "normalized_input": self.normalized_input}
        made = Adapter(self.backbone, self._record, config, tensors=tensors, **own)
        made.on_batch = self.on_batch
        return made

    def _algorithm_now(self) -> Algorithm:
        if self._algorithm is None:
            self._algorithm = self.algorithm()
        assert self._algorithm is not None, "an unadapted model has no algorithm"
        return self._algorithm

    def _now(self) -> tuple[Tensors, Tensors]:
        if self._params is None or self._state is None:
            algorithm = self._algorithm_now()
            return dict(algorithm.source), algorithm.init()
        return self._params, self._state

    @torch.inference_mode(False)
    def _apply(self, fn, recurse: bool = True) -> Adapter:
        with self.backbone.turn():
            super()._apply(fn, recurse)
            self._waiting = scope.moved(self._waiting, fn)
            self._tensors = scope.moved(self._tensors, fn)
            self._skipped = fn(self._skipped)
            self._notices.moved(fn)
            self._params = self._params and scope.moved(self._params, fn)
            self._algorithm = None  # it holds the tensors from before the move
            if self._state is not None:  # the rule chooses its precision, not the model
                like = self._algorithm_now().init()
                self._state = {n: t.to(like[n]) for n, t in self._state.items()}
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A method contains functions that cannot be pickled, so it is stored by name; all at once,
        # because another thread may be adapting.
        own = {"_algorithm": None, "on_batch": None, "_record": self.method}
        return self.__dict__ | own | {"_chunks": self._chunks.copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Tensors copied or loaded in inference mode could not adapt.
        state = tree_map_only(Tensor, ordinary, state)
        super().__setstate__(state | {"_record": get_method(state["_record"])})

    def reset(self) -> None:
        """Return to the source, bit for bit; this only drops the adapted tensors."""
        with self.backbone.lock:
            vars(self).update(_params=None, _state=None, _waiting={}, loss=None, batches=0)

    def adaptation_state(self) -> dict[str, Tensor]:
        """Everything that adaptation has changed, as a flat dict of tensors to save.

        Raises:
            InputError: recent images were not in [0, 1] (`ttt_plugins.core.notices`).
        """
        self._notices.look_at_pixels()
        with self.backbone.lock:
            params, rule = (None, None) if self._record.build is None else self._now()
            return saved(self.batches, self._waiting, params, rule)

    def load_adaptation_state(self, state: dict[str, Tensor]) -> None:
        """Resume from a state that `adaptation_state` returned.

        Raises:
            InputError: the state belongs to another adapter or is damaged; nothing is loaded.
        """
        checks = {
            WINDOW: partial(self._window.check, backbone=self.backbone),
            STREAM: partial(check_stream, channels=self.backbone.streamed),
            GUARD: partial(self._guard.check, classes=self.num_classes),
        }
        with self.backbone.lock:
            rest, waiting = parts(state, checks, self.backbone.device)
            own = {n: t for n, t in self.adaptation_state().items() if n not in self._waiting}
            batches, params, rule = resumed(own, rest)
            adapted = {} if self._record.build is None else {"_params": params, "_state": rule}
            vars(self).update(adapted, _waiting=waiting, batches=batches)

    def fit_source_statistics(self, loader: Any, *, progress: bool = True) -> Adapter:
        """Measure the source's feature statistics on clean images, for MGG's discrepancy term.

        The standard deviation is the unbiased one over all images. The adapter is reset.

        Args:
            loader: loader that yields images (B, C, H, W) in [0, 1], or tuples that begin with
                them; or any source of images (a folder, files, ``hf://datasets/ORG/NAME``, a data
                set), which are resized and cropped for the model.
            progress: whether to show a progress bar.

        Returns:
            the adapter.

        Raises:
            InputError: the loader yields nothing, or something other than images, or the method
                compares no statistics.
        """
        fit = self._record.fit
        if fit is None or self._record.fits != SOURCE_STATISTICS:
            raise InputError(f"{self.method} compares no feature statistics; only mgg does")
        if self.normalized_input and not is_source(loader):
            loader = (
                self._pixels(batch_images(batch).to(self.backbone.device)) for batch in loader
            )
        with self.backbone.turn():
            measured = fit(self.config, self.backbone, loader, self.seed, progress)
            vars(self).update(_tensors=self._tensors | measured, _algorithm=None)
            self.reset()
        return self

    # -- inspection and export -----------------------------------------------------------

    def describe(self) -> str:
        """Describe what adapts, split, statistics, preprocessing, sizes, and the cost of a step."""
        own = sum(p.numel() for p in self.backbone.model.parameters())
        lines = [f"{self.method} around {type(self.backbone.model).__name__} ({own:,} parameters)"]
        lines += [f"  {n}: {value!r}" for n, value in dataclasses.asdict(self.config).items()]
        lines += self.backbone.describe()
        if not self.names:
            return "\n".join([*lines, "adapts: nothing; one forward pass a batch"])
        algorithm = self._algorithm_now()
        *adapted, memory = describe_tensors(self.names, algorithm.source, algorithm.init())
        lines += adapted
        if self._record.describe is not None:
            lines += self._record.describe(self.config, self.backbone)
        lines += algorithm.describe() + self._window.describe() + self._guard.describe()
        if isinstance(algorithm, Chunked):
            size = self._last_size if None in self.input_size else self.input_size
            for chunk in [c for key, c in self._chunks.items() if key[0] == size]:
                algorithm = algorithm.with_chunk(chunk)
            with self.backbone.turn():
                lines.append(algorithm.describe_memory(size))
        return "\n".join([*lines, memory])

    @torch.inference_mode(False)
    def export(self) -> nn.Module:
        """An independent module with the adapted parameters, from images in [0, 1] to logits.

        Raises:
            InputError: recent images were not in [0, 1] (`ttt_plugins.core.notices`).
        """
        self._notices.look_at_pixels()
        with self.backbone.lock, torch.no_grad():
            plain = deep_copy(self.backbone, {})
            plain.freeze_statistics(self._waiting)
            named = dict(plain.named_parameters())
            for name, value in scope.materialise(plain, self._params or {}).items():
                named[name].copy_(value)
        return plain.requires_grad_(True)

    def save_pretrained(self, folder: str | Path, **records: Any) -> Path:
        """Write this adapter as an artifact; see `ttt_plugins.artifacts.saving.save_pretrained`."""
        return save_pretrained(self, folder, **records)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        tag: str | None = None,
        **records: Any,
    ) -> str:
        """Publish this adapter on the Hugging Face Hub; unchanged files make no new commit.

        Args:
            repository: ``"org/name"``; created if it does not exist.
            private: whether a new repository is private; None for its owner's default.
            token: access token that may write; None for that of ``hf auth login`` or HF_TOKEN.
            revision: branch to publish on, created if missing; None for the default branch.
            tag: name for the commit.
            **records: ``training``, ``results`` and ``card`` of `save_pretrained`.

        Returns:
            the commit that holds the adapter.

        Raises:
            InputError, HubError: no such name, or the Hub refuses or cannot be reached.
            ArtifactError: the local folder of the classifier is missing.
        """
        if not isinstance(repository, str):
            raise InputError(f'repository must be "org/name", got {type(repository).__name__}')
        with tempfile.TemporaryDirectory(prefix="ttt-plugins-") as work:
            folder = self.save_pretrained(Path(work) / repository.split("/")[-1], **records)
            own = {"private": private, "token": token, "revision": revision, "tag": tag}
            return publish(folder, repository, **own)[0]

    def learned_tensors(self) -> dict[str, Tensor]:
        """Copies of the tensors that the method learned beforehand, which artifacts store."""
        return {name: t.detach().clone() for name, t in self._tensors.items()}
