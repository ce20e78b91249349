"""A classifier as the methods see it.

``Backbone`` puts the normalisation in front of a model (images in [0, 1] in, logits out), can
return its pooled features, and can record the features whose statistics MGG compares. It holds a
structural copy of the user's model that shares its weights: no tensor is duplicated, and nothing
done here (eval mode, BatchNorm on batch statistics, hooks, moving to a device) reaches the user's
model.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..errors import InputError
from .norms import BATCH_NORMS, batch_norms, channel_axis, fixed_norms, tapped_modules
from .quirks import biased_attention, caches, recurrent
from .sharing import share_structure, tied_parameters
from .stages import classifier_names, image_size, inner, input_channels, pooled_features

__all__ = ["Backbone"]


def _mean_and_squares(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and summed squared deviations over ``axes``, each as long as what is left.

    On CPU ``var_mean`` over (0, 2, 3) takes twenty times what reading the tensor takes. Two plain
    reads do: sums of values and of squares, a row at a time, put together in double precision,
    because their difference cancels.
    """
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    if x.ndim == 4 and axes == (0, 2, 3) and x.is_contiguous():
        rows = x.flatten(2)
        sums, norms = rows.sum(2), torch.linalg.vector_norm(rows, dim=2)
        mean = sums.double().sum(0) / count
        squares = (norms.double().square().sum(0) - count * mean.square()).clamp_min(0)
        return mean.to(x.dtype), squares.to(x.dtype)
    mean = x.mean(axes, keepdim=True)
    return mean.flatten(), (x - mean).square().sum(axes)


class _Moments(torch.autograd.Function):
    """Mean and variance over ``axes``, as ``torch.var_mean``, at memory speed.

    A step of MGG has to cost what a step of Tent does. The gradient is an affine function of the
    input, one streaming operation.
    """

    @staticmethod
    def forward(ctx, x: Tensor, axes: tuple[int, ...], correction: int) -> tuple[Tensor, Tensor]:
        mean, squares = _mean_and_squares(x, axes)
        count = x.numel() // mean.numel()
        ctx.save_for_backward(x, mean)
        ctx.counts = count, max(count - correction, 1)
        ctx.shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        return squares / ctx.counts[1], mean

    @staticmethod
    def backward(ctx, grad_var: Tensor, grad_mean: Tensor):
        x, mean = ctx.saved_tensors
        count, free = ctx.counts
        slope = grad_var * (2 / free)
        level = grad_mean / count - slope * mean
        # In two steps: ``addcmul`` is not vectorised where it broadcasts.
        return (x * slope.view(ctx.shape)).add_(level.view(ctx.shape)), None, None


def _names_or_none(model: nn.Module) -> list[str]:
    try:
        return classifier_names(model)
    except InputError:
        return []


class Backbone(nn.Module):
    """A classifier on images in [0, 1].

    Args:
        model: any module that maps normalised images (B, C, H, W) to logits (B, classes).
        mean, std: per-channel normalisation; from the model's ``pretrained_cfg`` unless given.
        normalize: False when the model normalises its input itself.
        statistics: what BatchNorm layers use: ``"source"`` (running statistics), ``"batch"``, or
            ``"mix"``, the running statistics counted as ``prior`` images (Schneider et al. 2020,
            arXiv 2006.16971, equation 1). Without effect on models without BatchNorm, and on
            layers whose statistics are frozen. One image alone has no batch statistics: with
            ``"batch"``, and with ``"mix"`` and ``prior=0``, it is seen with the source's.
        prior: images that the source statistics count for in ``"mix"``.

    Raises:
        InputError: the model has no classifier (``num_classes=0``), or mean, std, normalize or
            statistics do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean=None,
        std=None,
        normalize: bool = True,
        statistics: str = "source",
        prior: float = 16.0,
    ):
        super().__init__()
        if statistics not in ("source", "batch", "mix"):
            raise InputError(f"statistics must be source, batch or mix, got {statistics!r}")
        configured = bool(getattr(model, "pretrained_cfg", None))
        _, network = inner(model)  # a wrapper's input size and tokens are this one's
        self.num_classes: int | None = getattr(model, "num_classes", None)
        if self.num_classes == 0:
            raise InputError(
                f"{type(model).__name__} was made without a classifier (num_classes=0), so it "
                "has no logits; make it with num_classes=<number of classes>, or wrap a model "
                "with the head of your own on top"
            )
        self.model = share_structure(model).eval()
        settings = timm.data.resolve_model_data_config(model) if configured else {}
        described = getattr(network, "pretrained_cfg", None)
        if described:
            size = timm.data.resolve_model_data_config(network)["input_size"]
            self.input_size = (size[0], *(image_size(network) or size[1:]))
        else:
            self.input_size = (input_channels(model), None, None)
        #: Whether the model takes no images of another size.
        self.fixed_size = bool((described or {}).get("fixed_input_size"))
        if not normalize and (mean is not None or std is not None):
            raise InputError("normalize=False and mean or std given: choose one of the two")
        mean = settings.get("mean") if mean is None else mean
        std = settings.get("std") if std is None else std
        if normalize and (mean is None) != (std is None):
            raise InputError("mean and std belong together: give both or neither")
        if normalize and mean is None:
            warnings.warn(
                f"{type(model).__name__} does not say how its input is normalised (no timm "
                "pretrained_cfg): it gets images in [0, 1] unchanged. Pass mean= and std=, or "
                "normalize=False if it normalises by itself.",
                stacklevel=3,
            )
        self.normalize = bool(normalize and mean is not None)
        if self.normalize:
            self._check_double_normalisation(model)
            for name, value in (("mean", mean), ("std", std)):
                try:
                    value = torch.as_tensor(value, dtype=torch.float32).flatten()
                except (TypeError, ValueError, RuntimeError) as error:
                    raise InputError(f"{name} must hold numbers, got {value!r}") from error
                channels = self.input_size[0]
                if len(value) not in (1, channels) or not torch.isfinite(value).all():
                    raise InputError(f"{name} must hold 1 or {channels} numbers, got {value}")
                if name == "std" and (value <= 0).any():
                    raise InputError(f"std must be positive, got {value.tolist()}")
                value = value.view(-1, 1, 1).to(self.device, self.dtype)
                self.register_buffer(name, value, persistent=False)
        self.statistics, self.prior = statistics, float(prior)
        self._batch_norms = list(batch_norms(self.model).values())
        for module in self._batch_norms:
            # Under the names of our own the source statistics survive "batch", which hides them.
            module.register_buffer("source_mean", module.running_mean, persistent=False)
            module.register_buffer("source_var", module.running_var, persistent=False)
            if statistics == "mix":
                module.register_forward_pre_hook(self._mix_statistics)
        #: Norms that keep their source statistics whatever is chosen, by the name of their kind.
        self.fixed_norms = Counter(type(m).__name__ for m in fixed_norms(self.model).values())
        self._untracked = sum(
            isinstance(m, BATCH_NORMS) and m.running_mean is None for m in self.model.modules()
        )
        self._distilled = len(_names_or_none(self.model)) > 1
        self.tapped = tapped_modules(self.model)
        # Registers alone, without a class token, stand for nothing.
        self._class_token = bool(
            getattr(network, "num_prefix_tokens", 0)
            and getattr(network, "cls_token", None) is not None
        )
        self._record: list[tuple[Tensor, tuple[int, ...], nn.Module | None]] | None = None
        for module in self.tapped.values():
            if isinstance(module, BATCH_NORMS):
                # In front of the mixing hook, which rewrites the input.
                module.register_forward_pre_hook(self._tap_input, prepend=True)
            else:
                module.register_forward_hook(self._tap_output)
        self._caches = caches(self.model)
        for module in biased_attention(self.model):
            module.fused_attn = False  # the same arithmetic with gradients and without
        for module in self.model.modules():
            if getattr(module, "grad_checkpointing", False):
                # Made for `backward()`; it refuses gradients that are asked for by name.
                module.grad_checkpointing = False
        #: (C, H, W) of the last images an adapter got, for models that name no size.
        self.last_size: tuple[int, ...] | None = None
        #: Whether images can adapt one at a time only.
        self.one_by_one = recurrent(self.model)
        #: Parameter -> the other modules' parameters that are the same one (tied weights).
        self.tied = tied_parameters(self)
        self._batch_size = 0
        #: Held during a forward pass: what it records and which statistics it uses are this
        #: module's, so that threads have to take turns.
        self.lock = threading.RLock()

    @staticmethod
    def _check_double_normalisation(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name.count(".") > 0:
                continue
            own = {k for k, _ in module.named_buffers(recurse=False)} | set(vars(module))
            if (
                type(module).__name__ == "Normalize"
                or {"mean", "std"} <= own
                or {
                    "mu",
                    "sigma",
                }
                <= own
            ):
                warnings.warn(
                    f"the model seems to normalise its input itself ({name or 'its own'} "
                    f"{type(module).__name__}) and would be normalised twice; pass "
                    "normalize=False if so",
                    stacklevel=4,
                )
                return

    @property
    def has_batch_norm(self) -> bool:
        return bool(self._batch_norms)

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def train(self, mode: bool = True) -> Backbone:
        """Keep eval mode whatever is asked: an adapter means the same in both modes."""
        return super().train(False)

    def forward(self, images: Tensor, pooled: bool = False) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, classes).

        With ``pooled`` the features (B, D) in front of the classifier instead.
        """
        self._batch_size = len(images)
        # One image has no batch statistics to speak of: it is seen with the source's.
        if self.statistics == "batch" and len(images) > 1:
            self._use("batch")
        x = (images - self.mean) / self.std if self.normalize else images
        # Attention's fused inference path rounds otherwise than the one with a graph, and an
        # adapter that does not move has to be the plain model bit for bit.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            out = pooled_features(self.model, x) if pooled else self.model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            if self.statistics != "source":
                self._use("source")  # what anybody finds who looks at the module
            for cache in self._caches:  # the next call comes with other parameters
                cache.clear()
        if self._distilled and isinstance(out, (tuple, list)) and len({o.shape for o in out}) == 1:
            out = sum(out) / len(out)  # the heads' average, as timm has it at inference
        if not isinstance(out, Tensor) or out.ndim != 2:
            what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            wanted = "features (B, D)" if pooled else "logits (B, classes)"
            raise InputError(f"the model must return {wanted}, it returned {what}")
        if not out.is_floating_point():
            raise InputError(f"the model must return floating-point numbers, not {out.dtype}")
        if not pooled:
            self.num_classes = out.shape[1]
        return out

    def describe(self) -> list[str]:
        """Lines on preprocessing, input size, classes, and which statistics the norms use."""
        if self.normalize:
            rounded = [[round(v, 4) for v in t.flatten().tolist()] for t in (self.mean, self.std)]
            preprocessing = f"(image - {rounded[0]}) / {rounded[1]}, inside"
        else:
            preprocessing = "none here; the model gets images in [0, 1]"
        fixed = ", no other" if self.fixed_size else ""
        if not self._batch_norms:
            statistics = "the model has no BatchNorm with running statistics"
        else:
            statistics = {
                "source": "source, for batches of any size",
                "batch": "batch (a batch of one image uses the source's)",
                "mix": f"mix (the source counts as {self.prior:g} images, a batch as its own)",
            }[self.statistics]
            if self.statistics == "mix" and not self.prior:
                statistics += "; one image alone uses the source's"
            statistics += f"; {len(self._batch_norms)} layers"
        if self.fixed_norms:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.fixed_norms.items())
            statistics += f"; {kinds} keep the source's whatever is chosen"
        if self._untracked:
            statistics += f"; {self._untracked} BatchNorm without any always use the batch's"
        return [
            f"preprocessing: {preprocessing}",
            f"input: {self.input_size} (C, H, W){fixed}, classes: {self.num_classes}",
            f"norm statistics: {statistics}",
        ]

    # -- BatchNorm statistics ------------------------------------------------------------

    def _use(self, statistics: str) -> None:
        for module in self._batch_norms:
            batch = statistics == "batch"
            # Without running statistics PyTorch normalises with the batch's, in eval mode too,
            # and writes none.
            module.running_mean = None if batch else module.source_mean
            module.running_var = None if batch else module.source_var

    @torch.no_grad()
    def _mix_statistics(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Let the layer normalise with source and batch statistics mixed.

        They are constants to the gradient: then a layer costs what it costs on batch statistics.
        """
        x = args[0]
        axes = (0, *range(2, x.ndim))
        if not self.prior and self._batch_size == 1:
            # One image has nothing else to go by.
            module.running_mean, module.running_var = module.source_mean, module.source_var
            return
        mean, squares = _mean_and_squares(x, axes)
        var = squares * (len(mean) / x.numel())
        share = self.prior / (self.prior + self._batch_size)
        module.running_mean = share * module.source_mean + (1 - share) * mean
        module.running_var = share * module.source_var + (1 - share) * var

    def source_state_dict(self) -> dict[str, Tensor]:
        """The wrapped model's ``state_dict``."""
        return self.model.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"lock": threading.RLock()})

    # -- features and their statistics ---------------------------------------------------

    def _tap_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._record is not None:
            self._record.append((args[0], (0, *range(2, args[0].ndim)), module))

    def _tap_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._record is None:
            return
        x, axis = output, channel_axis(module, output)
        if self._class_token and x.ndim == 3 and axis == 2:
            x, axis = x[:, 0], 1
        self._record.append((x, tuple(i for i in range(x.ndim) if i != axis), None))

    @contextmanager
    def recording(self) -> Iterator[list]:
        """Record the tapped features of the forward passes inside the block."""
        self._record = record = []
        try:
            yield record
        finally:
            self._record = None

    @staticmethod
    def feature_statistics(record: list, correction: int = 1) -> tuple[Tensor, Tensor]:
        """Concatenated mean and standard deviation (D,) of recorded features.

        Over the batch for class tokens, over batch and positions for feature maps. BatchNorm
        inputs are measured in units of their source deviation, from their source mean.
        """
        means, deviations = [], []
        for x, axes, norm in record:
            var, mean = _Moments.apply(x, axes, correction)
            # The square root's slope is infinite at zero (a dead channel, a batch of one).
            std = torch.sqrt(var + 1e-12)
            if norm is not None:
                scale = torch.rsqrt(norm.source_var + norm.eps)
                mean, std = (mean - norm.source_mean) * scale, std * scale
            means.append(mean)
            deviations.append(std)
        return torch.cat(means), torch.cat(deviations)

    @staticmethod
    def feature_sums(record: list) -> tuple[Tensor, Tensor, Tensor]:
        """Count, sum and sum of squares (D,) in float64, to accumulate statistics over batches."""
        counts, firsts, seconds = [], [], []
        for x, axes, norm in record:
            x = x.double()
            if norm is not None:
                shape = (1, -1) + (1,) * (x.ndim - 2)
                scale = torch.rsqrt(norm.source_var.double() + norm.eps)
                x = (x - norm.source_mean.view(shape)) * scale.view(shape)
            first = x.sum(axes)
            counts.append(torch.full_like(first, x.numel() / first.numel()))
            firsts.append(first)
            seconds.append(x.square().sum(axes))
        return torch.cat(counts), torch.cat(firsts), torch.cat(seconds)
