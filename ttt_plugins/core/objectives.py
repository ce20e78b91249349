"""Losses without labels, as pure functions."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.precision import single

__all__ = ["all_finite", "cosine_distance", "entropy", "feature_discrepancy", "reliable"]


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax of logits (B, classes), in nats; returns (B,).

    Source: Wang et al., Tent, arXiv 2006.10726, section 3.1.
    """
    log_p = single(logits).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def reliable(entropies: Tensor, classes: int, margin: float) -> Tensor:
    """Whether each sample's entropy (B,) is below ``margin`` times ln(classes); returns bool (B,).

    Source: Niu et al., SAR, arXiv 2302.12400, equation 2.
    """
    return entropies < margin * math.log(classes)


def feature_discrepancy(
    mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor
) -> Tensor:
    """Squared distance between a batch's feature statistics (D,) and the source's, a scalar.

    ``(||std - source_std||^2 + ||mean - source_mean||^2) / 64``; the 64 is the released code's
    constant, not the batch size. Source: Deng et al., MGTTA, arXiv 2412.16901, equation 3.
    """
    squared = (std - source_std).square().sum() + (mean - source_mean).square().sum()
    return squared / 64


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """``2 - 2 cos(a, b)`` of each pair of rows of two tensors (N, D); returns (N,) in [0, 4].

    Source: BYOL, Grill et al., arXiv 2006.07733, equation 2; MT3's loss (arXiv 2103.16201).
    """
    return 2 - 2 * (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all values of all tensors are finite, a bool tensor () on their device."""
    # The largest magnitude is NaN if any value is, so that each tensor is read only once.
    largest = [torch.linalg.vector_norm(t, torch.inf) < torch.inf for t in tensors]
    return functools.reduce(torch.Tensor.logical_and, largest)
