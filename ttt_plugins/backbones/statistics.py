"""What BatchNorm layers normalise with, and the moments of features that MGG compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..utils.checks import check_choice, check_number
from ..utils.precision import single

__all__ = [
    "Feature",
    "NormStatistics",
    "StatisticsFields",
    "feature_statistics",
    "feature_sums",
]

_KINDS = ("source", "batch", "mix", "stream")


@dataclass(frozen=True)
class NormStatistics:
    """What the BatchNorm layers of a model normalise with.

    It has no effect on models without BatchNorm and on layers whose statistics are frozen. A
    single image has no batch statistics: with ``"batch"``, and with ``"mix"`` and a prior of 0, it
    is normalised with the source's.

    Attributes:
        kind: ``"source"`` (the running statistics), ``"batch"``, ``"mix"``, the two averaged
            (Schneider et al. 2020, arXiv 2006.16971, equation 1), or ``"stream"``, as ``"mix"``
            with an estimate over the stream in place of the batch (`backbones.stream`).
        prior: number of images that the source statistics count for in ``"mix"`` and ``"stream"``,
            at least 0; a batch counts for as many as it has.

    Raises:
        InputError: another kind, or a prior that is negative or not a number.
    """

    kind: str = "source"
    prior: float = 16.0

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise InputError(f"statistics must be one of {_KINDS}, got {self.kind!r}")
        check_number(self, "prior", 0)

    @classmethod
    def of(cls, config: Any) -> NormStatistics:
        """The choice in a config's fields ``statistics`` and ``prior``; without them, the source's.

        Raises:
            InputError: as for the class.
        """
        named = {field.name for field in dataclasses.fields(config)}
        chosen = {"kind": "statistics", "prior": "prior"}
        return cls(**{own: getattr(config, name) for own, name in chosen.items() if name in named})

    @torch.no_grad()
    def moments(
        self, x: Tensor, mean: Tensor, var: Tensor, images: int
    ) -> tuple[Tensor, Tensor] | None:
        """Mean and variance (C,) that a layer normalises with; None for the batch's own.

        They are constants to the gradient: a layer then costs what it costs on batch statistics.

        Args:
            x: the layer's input, (N, C, ...).
            mean: the layer's source mean, (C,).
            var: the layer's source variance, (C,).
            images: how many images the batch has; a layer may see each of them in several rows.
        """
        if self.kind == "source" or (images == 1 and (self.kind == "batch" or not self.prior)):
            return mean, var
        if self.kind == "batch":
            return None
        batch_mean, batch_var = _moments_of(x)
        share = self.prior / (self.prior + images)
        return (
            share * mean + (1 - share) * batch_mean,
            share * var + (1 - share) * batch_var,
        )

    def describe(self) -> str:
        """The choice in words."""
        if self.kind == "source":
            return "source, for batches of any size"
        if self.kind == "batch":
            return "batch (a batch of one image uses the source's)"
        if self.kind == "stream":
            return (
                f"stream (the source counts as {self.prior:g} images, an estimate over the stream, "
                "balanced by predicted class, as its own)"
            )
        alone = "" if self.prior else "; one image alone uses the source's"
        return f"mix (the source counts as {self.prior:g} images, a batch as its own){alone}"


@dataclass(frozen=True, kw_only=True)
class StatisticsFields:
    """The fields of a config whose method chooses what BatchNorm normalises with.

    Attributes:
        statistics: ``"batch"``, ``"source"``, ``"mix"`` or ``"stream"``, as `NormStatistics.kind`.
        prior: as `NormStatistics.prior`.

    Raises:
        InputError: as for `NormStatistics`.
    """

    statistics: str = "batch"
    prior: float = 16.0

    def __post_init__(self):
        check_choice(self, "statistics", _KINDS)
        check_number(self, "prior", 0)


def _moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of a layer's input (N, C, ...)."""
    # Sums of squares exceed float16's range.
    mean, squares = _mean_and_squares(single(x), (0, *range(2, x.ndim)))
    return mean.to(x.dtype), (squares * (len(mean) / x.numel())).to(x.dtype)


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
    def forward(
        ctx: Any, x: Tensor, axes: tuple[int, ...], correction: int
    ) -> tuple[Tensor, Tensor]:
        mean, squares = _mean_and_squares(x, axes)
        count = x.numel() // mean.numel()
        ctx.save_for_backward(x, mean)
        ctx.counts = count, max(count - correction, 1)
        ctx.shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        return squares / ctx.counts[1], mean

    @staticmethod
    def backward(ctx: Any, grad_var: Tensor, grad_mean: Tensor) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        count, free = ctx.counts
        slope = grad_var * (2 / free)
        level = grad_mean / count - slope * mean
        # In two steps: ``addcmul`` is not vectorised where it broadcasts.
        return (x * slope.view(ctx.shape)).add_(level.view(ctx.shape)), None, None


class Feature(NamedTuple):
    """What a compared layer put out, or took in, during a forward pass.

    Attributes:
        values: the tensor.
        axes: what its moments are taken over: the batch, and positions where it is a map.
        norm: the BatchNorm whose input it is and whose running statistics are its unit; None
            elsewhere.
    """

    values: Tensor
    axes: tuple[int, ...]
    norm: nn.modules.batchnorm._BatchNorm | None = None

    def unit(self, double: bool = False) -> tuple[Tensor, Tensor] | None:
        """The source's mean (C,) and the reciprocal of its deviation (C,), where there are any.

        Args:
            double: in double precision, whatever the model's is; otherwise at least single.
        """
        if self.norm is None or self.norm.running_mean is None or self.norm.running_var is None:
            return None
        mean, var = self.norm.running_mean, self.norm.running_var
        mean, var = (mean.double(), var.double()) if double else (single(mean), single(var))
        return mean, torch.rsqrt(var + self.norm.eps)


def feature_statistics(features: Sequence[Feature], correction: int = 1) -> tuple[Tensor, Tensor]:
    """Concatenated mean and standard deviation (D,) of recorded features.

    Over the batch for class tokens, over batch and positions for feature maps. BatchNorm inputs
    are measured in units of their source deviation, from their source mean.

    Args:
        features: what `Backbone.recording` recorded.
        correction: 1 for the unbiased variance, 0 for the mean squared deviation.
    """
    means, deviations = [], []
    for feature in features:
        # Sums of squares exceed float16's range.
        var, mean = _Moments.apply(single(feature.values), feature.axes, correction)
        # The square root's slope is infinite at zero (a dead channel, a batch of one).
        std = torch.sqrt(var + 1e-12)
        if (unit := feature.unit()) is not None:
            mean, std = (mean - unit[0]) * unit[1], std * unit[1]
        means.append(mean)
        deviations.append(std)
    return torch.cat(means), torch.cat(deviations)


def feature_sums(features: Sequence[Feature]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of squares (D,) in float64, to accumulate statistics over batches."""
    counts, firsts, seconds = [], [], []
    for feature in features:
        x = feature.values.double()
        if (unit := feature.unit(double=True)) is not None:
            mean, scale = (t.view(1, -1, *(1,) * (x.ndim - 2)) for t in unit)
            x = (x - mean) * scale
        first = x.sum(feature.axes)
        counts.append(torch.full_like(first, x.numel() / first.numel()))
        firsts.append(first)
        seconds.append(x.square().sum(feature.axes))
    return torch.cat(counts), torch.cat(firsts), torch.cat(seconds)
