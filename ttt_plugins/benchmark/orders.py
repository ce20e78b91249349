"""The order in which the images of a cell are met: as stored, shuffled, or by class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["correlated", "shuffled"]


def shuffled(count: int, seed: int | None) -> Tensor:
    """Rows 0..count-1, drawn by ``torch.Generator().manual_seed(seed)``; in order if None."""
    if seed is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def correlated(labels: Tensor, concentration: float, seed: int | None) -> Tensor:
    """Rows in an order in which neighbouring images tend to be of one class.

    There are as many slots in time as classes. The images of each class are spread over the slots
    in proportions drawn from a symmetric Dirichlet distribution; in a slot the classes follow one
    another in random order (the construction of NOTE, Gong et al., arXiv 2208.05117, and RoTTA,
    Yuan et al., arXiv 2303.13899).

    Args:
        labels: (N,) int64.
        concentration: of the Dirichlet distribution, above 0: 0.1 gives slots of one or two
            classes (the papers' setting), 100 nearly equal shares of all classes in every slot.
        seed: of ``numpy.random.RandomState``, whose draws no numpy version changes; None is 0.

    Raises:
        InputError: a concentration that is not positive and finite.
    """
    if not 0 < concentration < float("inf"):
        raise InputError(f"concentration must be a finite number above 0, got {concentration}")
    random = np.random.RandomState(0 if seed is None else seed)
    classes = np.unique(labels.numpy())
    slots: list[list[np.ndarray]] = [[] for _ in classes]
    for label in classes:
        rows = random.permutation(np.flatnonzero(labels.numpy() == label))
        shares = random.dirichlet([concentration] * len(classes))
        # A tiny concentration underflows to 0/0: the whole class in one slot is its limit.
        if not np.isfinite(shares).all():
            shares = np.eye(len(classes))[random.randint(len(classes))]
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for slot, part in zip(slots, np.split(rows, cuts), strict=True):
            slot.append(part)
    ordered = [slot[i] for slot in slots for i in random.permutation(len(slot))]
    return torch.from_numpy(np.concatenate(ordered))
