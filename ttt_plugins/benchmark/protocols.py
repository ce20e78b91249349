"""Protocols: the order of the images, and where the adapter is reset.

A protocol converts the cells of a data folder into stretches. To follow it, reset the adapter where
a stretch requires it, and pass the stretch's rows to the adapter batch by batch; a batch never
contains images of two stretches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .cells import CLEAN, Cell, CorruptionData

__all__ = [
    "CONCENTRATION",
    "PROTOCOLS",
    "WITH_CLEAN",
    "StreamProtocol",
    "Stretch",
    "correlated",
    "describe_order",
    "plan",
    "shuffled",
    "streams",
]

#: Concentration of the Dirichlet distribution for class-correlated streams, as in NOTE and RoTTA.
CONCENTRATION = 0.1


@dataclass(frozen=True)
class Stretch:
    """A sequence of consecutive images.

    Attributes:
        reset: whether the adapter is reset to its source before the first image.
        cells: the cells that the images come from.
        rows: int64 pairs (N, 2) of an index in ``cells`` and a row of that cell, in order.
        visit: number of times that its cells occurred before in the stream.
    """

    reset: bool
    cells: tuple[Cell, ...]
    rows: Tensor
    visit: int = 0

    def __len__(self) -> int:
        return len(self.rows)


# -- the order of the images in a cell ---------------------------------------------------


def shuffled(count: int, seed: int | None) -> Tensor:
    """Rows 0..count-1, shuffled with ``torch.Generator().manual_seed(seed)``; in order if None."""
    if seed is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def correlated(labels: Tensor, concentration: float, seed: int | None) -> Tensor:
    """Rows in an order in which neighbouring images tend to be of the same class.

    There are as many time slots as classes. The images of each class are distributed over the slots
    in proportions drawn from a symmetric Dirichlet distribution; within a slot the classes follow
    one another in random order (the construction of NOTE, Gong et al., arXiv 2208.05117, and RoTTA,
    Yuan et al., arXiv 2303.13899).

    Args:
        labels: int64 classes (N,).
        concentration: concentration of the Dirichlet distribution, above 0: 0.1 gives slots of one
            or two classes (the papers' setting), 100 nearly equal shares of all classes per slot.
        seed: seed of ``numpy.random.RandomState``, which is stable across numpy versions; None
            means 0.

    Returns:
        every row once, int64 (N,).

    Raises:
        InputError: the concentration is not positive and finite.
    """
    if not 0 < concentration < float("inf"):
        raise InputError(f"concentration must be a finite number above 0, got {concentration}")
    random = np.random.RandomState(0 if seed is None else seed)
    classes = np.unique(labels.numpy())
    slots: list[list[np.ndarray]] = [[] for _ in classes]
    for label in classes:
        rows = random.permutation(np.flatnonzero(labels.numpy() == label))
        shares = random.dirichlet([concentration] * len(classes))
        # A tiny concentration underflows to 0/0; its limit is the whole class in one slot.
        if not np.isfinite(shares).all():
            shares = np.eye(len(classes))[random.randint(len(classes))]
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for slot, share in zip(slots, np.split(rows, cuts), strict=True):
            slot.append(share)
    ordered = [slot[i] for slot in slots for i in random.permutation(len(slot))]
    return torch.from_numpy(np.concatenate(ordered))


# -- protocols ---------------------------------------------------------------------------

Order = Callable[[Cell, int], Tensor]
Resets = Callable[[Cell | None, Cell], bool]
Planner = Callable[[CorruptionData, int | None, Order], list[Stretch]]


def _one_by_one(
    cells: Iterable[Cell], data: CorruptionData, order: Order, resets: Resets
) -> list[Stretch]:
    """One stretch per cell, in this order, reset where ``resets(previous, cell)`` is true."""
    stretches: list[Stretch] = []
    previous: Cell | None = None
    visits: dict[Cell, int] = {}
    for cell in cells:
        rows = order(cell, data.counts[cell])
        pairs = torch.stack([torch.zeros_like(rows), rows], 1)
        stretches.append(Stretch(resets(previous, cell), (cell,), pairs, visits.get(cell, 0)))
        visits[cell] = visits.get(cell, 0) + 1
        previous = cell
    return stretches


def _each_cell(*_: object) -> bool:
    return True


def _each_corruption(previous: Cell | None, cell: Cell) -> bool:
    return previous is None or previous[0] != cell[0]


def _at_the_start(previous: Cell | None, _: Cell) -> bool:
    return previous is None


def _cells_in_order(resets: Resets) -> Planner:
    return lambda data, _, order: _one_by_one(data.counts, data, order, resets)


def _gradual(data: CorruptionData, _: int | None, order: Order) -> list[Stretch]:
    cells: list[Cell] = []
    for name in dict.fromkeys(name for name, _ in data.counts):
        rising = sorted(severity for n, severity in data.counts if n == name)
        cells += [(name, severity) for severity in [*rising, *rising[-2::-1]]]
    return _one_by_one(cells, data, order, _at_the_start)


def _clean_around(data: CorruptionData, _: int | None, order: Order) -> list[Stretch]:
    """For each cell, one half of the clean images, the cell, and the other half."""
    clean = order(CLEAN, data.counts[CLEAN]).tensor_split(2)
    stretches = []
    for cell in data.counts:
        if cell == CLEAN:
            continue
        parts = [(CLEAN, clean[0]), (cell, order(cell, data.counts[cell])), (CLEAN, clean[1])]
        for position, (source, rows) in enumerate(parts):
            pairs = torch.stack([torch.zeros_like(rows), rows], 1)
            stretches.append(Stretch(position == 0, (source,), pairs, visit=position // 2))
    return stretches


def _mixed(data: CorruptionData, seed: int | None, _: Order) -> list[Stretch]:
    pairs = [
        torch.stack([torch.full((count,), position), torch.arange(count)], 1)
        for position, count in enumerate(data.counts.values())
    ]
    together = torch.cat(pairs)
    rows = shuffled(len(together), 0 if seed is None else seed)
    return [Stretch(True, tuple(data.counts), together[rows])]


@dataclass(frozen=True)
class StreamProtocol:
    """The order of a protocol's images and its resets.

    Attributes:
        stretches: creates the plan from the cells, the seed and the order of a cell's rows.
        resets: where the adapter is reset, in words.
        interleaved: whether a batch may hold images of several cells.
        by_class: whether the images of a cell are in the order of `correlated`.
        sorted: whether the images of a cell are sorted by class.
        with_clean: whether the clean images are a cell of the stream.
    """

    stretches: Planner
    resets: str
    interleaved: bool = False
    by_class: bool = False
    sorted: bool = False
    with_clean: bool = False


#: ``reset-per-cell``: a reset before each cell. ``reset-per-corruption``: a reset before each
#: corruption, but none between its severities. ``continual``: a single reset before the first cell.
#: ``gradual``: like ``continual``, but the severities of each corruption rise and fall again (1, 2,
#: .., 5, .., 2, 1; CoTTA, arXiv 2203.13591), so that all but the highest occur twice. ``mixed``:
#: the images of all cells shuffled together, with a single reset before them. ``correlated``: a
#: reset before each cell, in which neighbouring images tend to be of the same class. ``sorted``:
#: the same, but all images of a class come together. ``clean-corrupt-clean``: for each cell a
#: reset, one half of the clean images, the cell, and the other half.
PROTOCOLS = {
    "reset-per-cell": StreamProtocol(_cells_in_order(_each_cell), "before each cell"),
    "reset-per-corruption": StreamProtocol(
        _cells_in_order(_each_corruption), "before each corruption"
    ),
    "continual": StreamProtocol(_cells_in_order(_at_the_start), "before the first cell only"),
    "gradual": StreamProtocol(
        _gradual, "before the first cell only; severities go up and down again"
    ),
    "mixed": StreamProtocol(_mixed, "before the first image only", interleaved=True),
    "correlated": StreamProtocol(_cells_in_order(_each_cell), "before each cell", by_class=True),
    "sorted": StreamProtocol(_cells_in_order(_each_cell), "before each cell", sorted=True),
    "clean-corrupt-clean": StreamProtocol(
        _clean_around, "before the clean images that precede each cell", with_clean=True
    ),
}
#: Protocols whose streams have the clean images as a cell.
WITH_CLEAN = [name for name, protocol in PROTOCOLS.items() if protocol.with_clean]


def plan(
    protocol: str,
    data: CorruptionData,
    seed: int | None,
    concentration: float = CONCENTRATION,
) -> list[Stretch]:
    """The stretches of a protocol over the cells of ``data``, in the cells' order.

    Args:
        protocol: a key of `PROTOCOLS`.
        data: the cells.
        seed: seed for the order of the images in each cell (cells of equal size and labels have the
            same order); None keeps the stored order, except that ``mixed`` and ``correlated`` use
            seed 0.
        concentration: concentration of the Dirichlet distribution for ``correlated``, above 0.

    Returns:
        stretches that together cover every cell.

    Raises:
        InputError: there is no such protocol, there are no cells, the protocol needs clean images
            and there are none, or the concentration is not positive.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if not data.counts:
        raise InputError("there are no cells to evaluate on; name at least one corruption")
    chosen = PROTOCOLS[protocol]
    if chosen.with_clean:
        data = data.with_clean()

    def order(cell: Cell, count: int) -> Tensor:
        if chosen.by_class:
            return correlated(data.labels(cell), concentration, seed)
        rows = shuffled(count, seed)
        return rows[data.labels(cell)[rows].argsort(stable=True)] if chosen.sorted else rows

    return chosen.stretches(data, seed, order)


def streams(stretches: list[Stretch]) -> list[list[Stretch]]:
    """Group stretches into streams, from one reset to the next, which are independent."""
    grouped: list[list[Stretch]] = []
    for stretch in stretches:
        if stretch.reset or not grouped:
            grouped.append([])
        grouped[-1].append(stretch)
    return grouped


def describe_order(protocol: str, seeds: list[int | None], concentration: float | None) -> str:
    """A description of the order of the images, for result files."""
    chosen, drawn = PROTOCOLS[protocol], " and ".join(str(seed or 0) for seed in seeds)
    if chosen.interleaved:
        return f"all cells shuffled together by torch.Generator().manual_seed({drawn})"
    if chosen.by_class:
        return (
            f"each cell by class, Dirichlet({concentration}) shares of as many slots as classes, "
            f"numpy.random.RandomState({drawn})"
        )
    by_class = ", then sorted by class" if chosen.sorted else ""
    if seeds == [None]:
        return f"each cell as stored{by_class}"
    return f"each cell shuffled by torch.Generator().manual_seed({drawn}){by_class}"
