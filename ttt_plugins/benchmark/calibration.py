"""How far a model's confidence is from its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ECE_BINS", "calibration_error"]

#: Of equal width, as in the paper's experiments.
ECE_BINS = 15


def calibration_error(confidences: Tensor, right: Tensor) -> float:
    """Expected calibration error in [0, 1]: |accuracy - mean confidence|, bin by bin.

    Args:
        confidences: (N,) probabilities of the predicted classes.
        right: (N,) whether each prediction was right.

    Fifteen bins of equal width, each weighed by its share of the images (Guo et al. 2017, arXiv
    1706.04599, equation 3). NaN if a confidence is.
    """
    if confidences.isnan().any():
        return float("nan")
    places = (confidences * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
    gaps = right.double() - confidences.double()
    sums = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, places, gaps)
    return sums.abs().sum().item() / len(right)
