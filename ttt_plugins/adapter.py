"""The stateful shell: an ``nn.Module`` that adapts inside ``forward``.

Everything else in the package is a pure function or a frozen value; what changes from batch to
batch is here: the adapted parameters, the update rule's state, and the counters.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .backbones.backbone import Backbone
from .backbones.stages import describe_split
from .backbones.statistics import feature_sums
from .core import scope
from .core.pictures import image_batches, is_source
from .core.registry import Method, get_method
from .data.images import batch_images
from .errors import InputError, TTTError

__all__ = ["Adapter"]

#: How far outside [0, 1] a pixel may lie before it is taken for a mistake (resampling overshoots).
_RANGE_SLACK = 0.05
#: Batches between two looks, on an accelerator, at whether updates were skipped.
_LOOK_EVERY = 64


class Adapter(nn.Module):
    """A classifier that adapts itself to the images it classifies.

    Made by `ttt_plugins.wrap` and `ttt_plugins.from_pretrained`. It behaves the same in train and
    eval mode and under ``no_grad`` and ``inference_mode``; the wrapped model is never written.

    Attributes:
        method: the method's name.
        config: the method's fields, a frozen dataclass.
        forwards, backwards: images passed through the model so far, in either direction.
        batches: batches adapted to since the last reset.
        loss: the last batch's mean self-supervised loss in front of its last update, a scalar
            tensor; None where there was none.
        checks_pixels: whether every batch is refused that has pixels outside [0, 1] or not finite.
            On an accelerator that look waits for the device; False saves it where the images are
            known to be good. Type, shape and device are always checked.
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
    ):
        super().__init__()
        self.backbone = backbone
        self.method = method.name
        self.config = config
        self.origin = origin or {}
        self.seed = 0 if seed is None else seed
        self._record = method
        self._tensors = {n: t.detach().clone() for n, t in (tensors or {}).items()}
        self.names: list[str] = []
        if method.build is not None:
            eligible = method.eligible(config, backbone) if method.eligible else None
            self.names = scope.select(backbone, config.params, eligible)
        self.forwards = self.backwards = self.batches = 0
        self.checks_pixels = True
        self._skipped: int | Tensor = 0
        self._warned = False
        self.loss: Tensor | None = None
        self._params: dict[str, Tensor] | None = None
        self._state: dict[str, Tensor] | None = None
        self._algorithm: Any = None

    # -- inference -----------------------------------------------------------------------

    # A compiled program around an adapter calls it as it is: its steps are programs of their own.
    @torch.compiler.disable
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), floating point in [0, 1] -> logits (B, classes).

        Raises:
            InputError: images of another type, shape or range; the adapter stays as it was.
        """
        self.check_images(images)
        with self.backbone.lock, torch.inference_mode(False):
            # Tensors born in inference mode cannot be part of a graph; a copy can.
            images = images.clone() if images.is_inference() else images.detach()
            images = images.to(self.backbone.dtype)
            try:
                logits = self._predict(images)
                if len(images):
                    self.backbone.last_size = tuple(images.shape[1:])
                return logits
            except (RuntimeError, ValueError, AssertionError) as error:
                known = isinstance(error, (TTTError, torch.OutOfMemoryError))
                expected, why = self.backbone.input_size, "it was made for"
                if None in expected:
                    expected, why = self.backbone.last_size, "the last images it took had"
                if known or expected in (None, tuple(images.shape[1:])):
                    raise
                raise InputError(
                    f"the model cannot take images of shape {tuple(images.shape[1:])}; {why} "
                    f"{expected} ({error})"
                ) from error

    def _predict(self, images: Tensor) -> Tensor:
        algorithm = self._algorithm_now()
        if algorithm is None:
            with torch.no_grad():
                logits = self.backbone(images)
            self.forwards += len(images)
            return logits
        with torch.no_grad():
            params, state = self._now()
            outcome = algorithm.adapt(params, state, images)
        # Nothing above writes to the adapter: an error on the way leaves it as it was.
        self._params, self._state, self.loss = outcome.params, outcome.state, outcome.loss
        self.forwards += outcome.forwards
        self.backwards += outcome.backwards
        self.batches += 1
        self._skipped = self._skipped + outcome.skipped
        if not self._warned and self._may_look() and self.skipped_updates:
            self._warned = True
            warnings.warn(
                "the loss or its gradient was not finite: such updates are skipped, the "
                "prediction is returned; net.skipped_updates counts (warned once)",
                RuntimeWarning,
                stacklevel=5,
            )
        return outcome.logits

    def _may_look(self) -> bool:
        """Whether a look at a tensor's value is cheap now: an accelerator waits for it."""
        return self.backbone.device.type == "cpu" or self.batches % _LOOK_EVERY == 0

    @property
    def skipped_updates(self) -> int:
        """Updates that did not happen because the loss or its gradient was not finite.

        Batches, or images where each adapts on its own.
        """
        return int(self._skipped)

    def check_images(self, images: Tensor) -> None:
        """What every batch is checked for.

        Raises:
            InputError: no images (B, C, H, W) on the adapter's device, floating point in [0, 1].
        """
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a torch.Tensor, got {type(images).__name__}")
        if images.ndim != 4:
            raise InputError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputError(
                f"images must be floating point in [0, 1], got {images.dtype}; "
                "pass images.float() / 255 for 8-bit ones"
            )
        if not images.numel():
            raise InputError(f"an empty batch: images have shape {tuple(images.shape)}")
        channels = self.backbone.input_size[0]
        if images.shape[1] != channels:
            raise InputError(
                f"images have {images.shape[1]} channels (shape {tuple(images.shape)}), the model "
                f"takes {channels}; the layout is (B, C, H, W)"
            )
        if images.device != self.backbone.device:
            raise InputError(
                f"images are on {images.device}, the adapter on {self.backbone.device}; move one"
            )
        if not self.checks_pixels:
            return
        low, high = (bound.item() for bound in torch.aminmax(images.detach()))
        if low != low or high != high or max(abs(low), abs(high)) == float("inf"):
            raise InputError("images hold NaN or infinite pixels; nothing was adapted")
        if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
            raise InputError(
                f"images must lie in [0, 1], these span {low:.3g}..{high:.3g}; normalisation "
                "happens inside the adapter, so pass raw pixels divided by 255"
            )

    # -- state ---------------------------------------------------------------------------

    def algorithm(self, tensors: dict[str, Tensor] | None = None) -> Any:
        """The method's pure functions on this backbone, None for the unadapted model.

        Args:
            tensors: stand in for learned tensors of the same names; they may require gradients,
                which is how meta-training reaches them.
        """
        if self._record.build is None:
            return None
        rank = 0
        if self.config.params == "lora":
            rank = getattr(self.config, "rank", scope.LORA_RANK)
        source = scope.parameters(self.backbone, self.names, rank, self.seed)
        learned = self._tensors | (tensors or {})
        return self._record.build(self.config, self.backbone, source, learned, self.seed)

    def with_tensors(self, config: Any, tensors: dict[str, Tensor] | None = None) -> Adapter:
        """A new adapter on the same backbone with another config and some learned tensors."""
        return Adapter(
            self.backbone,
            self._record,
            config,
            tensors=self._tensors | (tensors or {}),
            origin=self.origin,
            seed=self.seed,
        )

    def _algorithm_now(self) -> Any:
        if self._algorithm is None:
            self._algorithm = self.algorithm()
        return self._algorithm

    def _now(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self._params is None:
            algorithm = self._algorithm_now()
            return dict(algorithm.source), algorithm.init()
        return self._params, self._state

    def _apply(self, fn, recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)
        for held in (self._tensors, self._params):
            if held is not None:
                held.update({name: fn(t) for name, t in held.items()})
        self._algorithm = None  # it holds the tensors from before the move
        if self._state is not None:
            # A rule chooses its own precision, whatever the model's is.
            start = self._algorithm_now().init()
            self._state = {n: t.to(start[n].device, start[n].dtype) for n, t in self._state.items()}
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Methods hold functions, which may be nobody's by name: a method is found by its own.
        return self.__dict__ | {"_algorithm": None, "_record": self.method}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_record": get_method(state["_record"])})

    def train(self, mode: bool = True) -> Adapter:
        """Accepted and without effect: an adapter behaves the same in both modes."""
        return super().train(False)

    def reset(self) -> None:
        """Back to the source, bit for bit; costs nothing but dropping the adapted tensors."""
        self._params = self._state = self.loss = None
        self.batches = 0

    def load_state_dict(self, *args, **kwargs):
        """Refused: the weights are shared with the wrapped model, which is never written."""
        raise InputError(
            "an adapter shares its model's weights: load them into the model before wrapping it, "
            "or use load_adaptation_state for what was adapted"
        )

    def adaptation_state(self) -> dict[str, Tensor]:
        """Everything that changed since the source, as a flat dict of tensors to save."""
        state = {"batches": torch.tensor(self.batches)}
        if self._record.build is None:
            return state
        with torch.inference_mode(False), torch.no_grad():
            params, rule = self._now()
            state |= {f"params.{n}": t.clone() for n, t in params.items()}
            state |= {f"rule.{n}": t.clone().contiguous() for n, t in rule.items()}
        return state

    def load_adaptation_state(self, state: dict[str, Tensor]) -> None:
        """Go on where `adaptation_state` was taken.

        Raises:
            InputError: made by another method, model or parameter choice, or its parameters are
                not finite; nothing is loaded.
        """
        expected = self.adaptation_state()
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise InputError("an adaptation state is a dict of tensors")
        if missing := sorted(expected.keys() ^ state.keys()):
            raise InputError(
                f"this adaptation state belongs to another adapter: {missing[0]!r} is "
                f"{'missing' if missing[0] in expected else 'unknown here'}"
            )
        for name, own in expected.items():
            given = state[name]
            if given.shape != own.shape or given.dtype != own.dtype:
                raise InputError(
                    f"this adaptation state belongs to another adapter: {name!r} is "
                    f"{given.dtype} {tuple(given.shape)}, expected {own.dtype} {tuple(own.shape)}"
                )
            if name.startswith("params.") and not torch.isfinite(given).all():
                raise InputError(f"this adaptation state is damaged: {name!r} is not finite")
        if state["batches"] < 0:
            raise InputError("this adaptation state is damaged: a negative number of batches")
        with torch.inference_mode(False):
            # In our own order: a rule's flat tensors follow the order of the parameters, and a
            # file may have sorted the names.
            moved = {n: state[n].detach().clone().to(own.device) for n, own in expected.items()}
        self.batches = int(moved.pop("batches"))
        if self._record.build is None:
            return
        split = {"params.": {}, "rule.": {}}
        for name, tensor in moved.items():
            for prefix, part in split.items():
                if name.startswith(prefix):
                    part[name.removeprefix(prefix)] = tensor
        self._params, self._state = split["params."], split["rule."]

    def fit_source_statistics(self, loader: Any, *, progress: bool = True) -> Adapter:
        """Measure the source's feature statistics on clean images, for MGG's discrepancy term.

        Args:
            loader: yields images (B, C, H, W) in [0, 1], or tuples that begin with them; or any
                source of images (a folder, files, ``hf://datasets/ORG/NAME``, a data set), which
                is resized and cropped as the model wants it.

        The deviation is the unbiased one over all images (methods.md, section 3). Adaptation
        starts anew afterwards.

        Raises:
            InputError: the loader yields nothing or something else, or the method compares no
                statistics.
        """
        if not hasattr(self.config, "discrepancy"):
            raise InputError(f"{self.method} compares no feature statistics; only mgg does")
        totals: tuple[Tensor, ...] | None = None
        if is_source(loader):
            loader = image_batches(loader, self.backbone)
        if not isinstance(loader, Iterable):
            raise InputError(f"a loader of clean images is needed, got {type(loader).__name__}")
        for batch in tqdm(loader, "source statistics", disable=not progress, leave=False):
            images = batch_images(batch).to(self.backbone.device)
            self.check_images(images)
            with torch.no_grad(), self.backbone.recording() as record:
                self.backbone(images.to(self.backbone.dtype))
            sums = feature_sums(record)
            totals = sums if totals is None else tuple(map(torch.add, totals, sums))
        if totals is None:
            raise InputError("the loader yielded no images")
        count, first, second = totals
        mean = first / count
        variance = (second - count * mean.square()) / (count - 1).clamp_min(1)
        dtype = self.backbone.dtype
        self._tensors["source.mean"] = mean.to(dtype)
        self._tensors["source.std"] = variance.clamp_min(0).sqrt().to(dtype)
        self._algorithm = None
        self.reset()
        return self

    # -- looking at it -------------------------------------------------------------------

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None while unknown (a bare module before its first batch)."""
        return self.backbone.num_classes

    @property
    def input_size(self) -> tuple[int, int | None, int | None]:
        """(C, H, W) the model was made for; None where a bare module does not say."""
        return self.backbone.input_size

    def describe(self) -> str:
        """What adapts, the split, statistics, preprocessing and size, and what a step costs."""
        model = self.backbone.model
        own = sum(p.numel() for p in model.parameters())
        lines = [f"{self.method} around {type(model).__name__} ({own:,} parameters)"]
        for field in dataclasses.fields(self.config):
            lines.append(f"  {field.name}: {getattr(self.config, field.name)!r}")
        lines += self.backbone.describe()
        if not self.names:
            lines.append("adapts: nothing; one forward pass a batch")
            return "\n".join(lines)
        algorithm = self._algorithm_now()
        scalars = sum(t.numel() for t in algorithm.source.values())
        state = sum(t.numel() * t.element_size() for t in algorithm.init().values())
        shown = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        lines.append(f"adapts: {scalars:,} scalars in {len(algorithm.source)} tensors ({shown})")
        if (split := getattr(self.config, "split", None)) is not None:
            lines.append(describe_split(model, split))
        lines += algorithm.describe()
        gradients = sum(t.numel() * t.element_size() for t in algorithm.source.values())
        lines.append(
            f"state: {state / 1e6:.2f} MB beside the adapted scalars, whose gradients take "
            f"{gradients / 1e6:.2f} MB during a step"
        )
        return "\n".join(lines)

    def export(self) -> nn.Module:
        """An independent module holding the adapted parameters: images in [0, 1] -> logits."""
        plain = copy.deepcopy(self.backbone)
        if self._params is not None:
            named = dict(plain.named_parameters())
            with torch.no_grad():
                for name, value in scope.materialise(plain, self._params).items():
                    named[name].copy_(value)
        return plain.requires_grad_(True)

    def save_pretrained(self, folder: str | Path, **records: Any) -> Path:
        """Write this adapter's artifact; see `ttt_plugins.wrapping.save_pretrained`."""
        from .artifacts.saving import save_pretrained  # below this room: it builds adapters

        return save_pretrained(self, folder, **records)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        **records: Any,
    ) -> str:
        """Publish this adapter on the Hugging Face Hub; unchanged files make no new commit.

        Args:
            repository: ``"org/name"``, created if there is none.
            private: whether a new repository is private (its owner's default unless given).
            token: access token that may write; unless given the one of ``hf auth login`` or
                HF_TOKEN.
            **records: ``training``, ``results`` and ``card`` of
                `ttt_plugins.wrapping.save_pretrained`.

        Returns:
            the commit that holds it now.

        Raises:
            InputError: the repository's name is no text.
            HubError: the Hub refuses or cannot be reached; nothing is published then.
            ArtifactError: the classifier is in a local folder that is gone.
        """
        from .artifacts.publish import publish

        if not isinstance(repository, str):
            raise InputError(f'repository is "org/name", got {type(repository).__name__}')
        with tempfile.TemporaryDirectory(prefix="ttt-plugins-") as work:
            folder = self.save_pretrained(Path(work) / repository.split("/")[-1], **records)
            return publish(folder, repository, private=private, token=token)[0]

    def learned_tensors(self) -> dict[str, Tensor]:
        """What was learned beforehand and belongs into an artifact (copies)."""
        return {name: t.detach().clone() for name, t in self._tensors.items()}
