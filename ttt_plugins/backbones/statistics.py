"""The statistics that BatchNorm layers normalise with, and the moments of compared features."""

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
    """The statistics that the BatchNorm layers of a model normalise with.

    They have no effect on models without BatchNorm, or on layers whose statistics are frozen. A
    single image has no batch statistics, so with ``"batch"``, and with ``"mix"`` and a prior of 0,
    it is normalised with the source's.

    Attributes:
        kind: ``"source"`` for the running statistics of training, ``"batch"``, ``"mix"`` for an
            average of both (Schneider et al. 2020, arXiv 2006.16971, equation 1), or ``"stream"``,
            which averages the source's with an estimate over the stream (`backbones.stream`).
        prior: number of images that the source statistics count for in ``"mix"`` and ``"stream"``,
            at least 0; a batch counts for its number of images.

    Raises:
        InputError: the kind is unknown, or the prior is negative or not a number.
    """

    kind: str = "source"
    prior: float = 16.0

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise InputError(f"statistics must be one of {_KINDS}, got {self.kind!r}")
        check_number(self, "prior", 0)

    @classmethod
    def of(cls, config: Any) -> NormStatistics:
        """The statistics in a config's ``statistics`` and ``prior``, by default the source's.

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
        """Mean and variance (C,) that a layer normalises with, None for those of its input.

        No gradient flows through them, so that a layer costs no more than with batch statistics.

        Args:
            x: input (N, C, ...) of the layer.
            mean: source mean (C,) of the layer.
            var: source variance (C,) of the layer.
            images: number of images in the batch, of which a layer may see several rows each.
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
    """The fields of a config that choose the statistics that BatchNorm normalises with.

    Attributes:
        statistics: ``"batch"``, as in the papers of the online methods, ``"source"``, ``"mix"`` or
            ``"stream"``; see `NormStatistics.kind`.
        prior: number of images that the source statistics count for; see `NormStatistics.prior`.

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
    # Sums of squares exceed the range of float16.
    mean, squares = _mean_and_squares(single(x), (0, *range(2, x.ndim)))
    return mean.to(x.dtype), (squares * (len(mean) / x.numel())).to(x.dtype)


def _mean_and_squares(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations over ``axes``, both 1-dimensional.

    On a CPU ``var_mean`` over (0, 2, 3) takes twenty times as long as reading the tensor. Instead
    the sums of values and of squares are computed row by row and combined in double precision,
    because of cancellation in their difference.
    """
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, axes, correction=0)
        return mean, var * count
    if x.ndim == 4 and axes == (0, 2, 3) and x.is_contiguous():
        rows = x.flatten(2)
        sums, norms = rows.sum(2), torch.linalg.vector_norm(rows, dim=2)
        mean = sums.double().sum(0) / count
        squares = (norms.double().square().sum(0) - count * mean.square()).clamp_min(0)
        return mean.to(x.dtype), squares.to(x.dtype)
    mean = x.mean(axes, keepdim=True)
    return mean.flatten(), (x - mean).square().sum(axes)


class _Moments(torch.autograd.Function):
    """Variance and mean over ``axes``, as ``torch.var_mean``, but limited only by memory speed.

    A step of MGG should cost no more than a step of Tent. The gradient is an affine function of the
    input.
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
        # In two steps, because ``addcmul`` is not vectorised if it broadcasts.
        return (x * slope.view(ctx.shape)).add_(level.view(ctx.shape)), None, None


class Feature(NamedTuple):
    """The output, or for BatchNorm the input, of a compared layer in a forward pass.

    Attributes:
        values: the tensor.
        axes: axes over which its moments are taken: the batch and, for maps, the positions.
        norm: the BatchNorm whose input it is, in units of whose running statistics it is measured;
            None for the output of another layer.
    """

    values: Tensor
    axes: tuple[int, ...]
    norm: nn.modules.batchnorm._BatchNorm | None = None

    def unit(self, double: bool = False) -> tuple[Tensor, Tensor] | None:
        """The source's mean (C,) and reciprocal standard deviation (C,), None if it has none.

        Args:
            double: whether to return them in double precision; otherwise in at least single.
        """
        if self.norm is None or self.norm.running_mean is None or self.norm.running_var is None:
            return None
        mean, var = self.norm.running_mean, self.norm.running_var
        mean, var = (mean.double(), var.double()) if double else (single(mean), single(var))
        return mean, torch.rsqrt(var + self.norm.eps)


def feature_statistics(features: Sequence[Feature], correction: int = 1) -> tuple[Tensor, Tensor]:
    """Concatenated means and standard deviations (D,) of recorded features.

    They are taken over the batch for class tokens, and over batch and positions for feature maps.
    Inputs of BatchNorms are measured relative to their source mean, in units of their source
    standard deviation.

    Args:
        features: features recorded by `Backbone.recording`.
        correction: 1 for the unbiased variance, 0 for the mean squared deviation.
    """
    means, deviations = [], []
    for feature in features:
        # Sums of squares exceed the range of float16.
        var, mean = _Moments.apply(single(feature.values), feature.axes, correction)
        # The square root has an infinite slope at zero: a dead channel, or a batch of one.
        std = torch.sqrt(var + 1e-12)
        if (unit := feature.unit()) is not None:
            mean, std = (mean - unit[0]) * unit[1], std * unit[1]
        means.append(mean)
        deviations.append(std)
    return torch.cat(means), torch.cat(deviations)


def feature_sums(features: Sequence[Feature]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of squares (D,) of features in float64, to be added up over batches."""
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
