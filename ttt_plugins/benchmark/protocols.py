"""Protocols: in which order images are met, and where the adapter is reset.

A protocol turns the cells of a data folder into stretches. An adapter that is reset where a
stretch says so, and shown the stretch's rows batch by batch, follows the protocol; batches
never cross from one stretch into the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .cells import Cell, CorruptionData
from .orders import correlated, shuffled

__all__ = ["CONCENTRATION", "PROTOCOLS", "Stretch", "describe_order", "plan", "streams"]

#: Of the Dirichlet distribution of class-correlated streams, as in NOTE and RoTTA.
CONCENTRATION = 0.1


@dataclass(frozen=True)
class Stretch:
    """Images met one after another.

    Attributes:
        reset: the adapter goes back to its source before the first image.
        cells: the cells that the images come from.
        rows: (N, 2) int64, position in ``cells`` and row of that cell, in the order met.
        visit: how many times its cells were met before.
    """

    reset: bool
    cells: tuple[Cell, ...]
    rows: Tensor
    visit: int = 0

    def __len__(self) -> int:
        return len(self.rows)


Order = Callable[[Cell, int], Tensor]


def _one_by_one(cells: Iterable[Cell], data, order: Order, resets) -> list[Stretch]:
    """One stretch for each cell named, in this order; ``resets(previous, cell)``."""
    stretches, previous, met = [], None, {}
    for cell in cells:
        rows = order(cell, data.counts[cell])
        pairs = torch.stack([torch.zeros_like(rows), rows], 1)
        stretches.append(Stretch(resets(previous, cell), (cell,), pairs, met.get(cell, 0)))
        met[cell] = met.get(cell, 0) + 1
        previous = cell
    return stretches


def _each(previous: Cell | None, cell: Cell) -> bool:
    return True


def _each_corruption(previous: Cell | None, cell: Cell) -> bool:
    return previous is None or previous[0] != cell[0]


def _at_the_start(previous: Cell | None, cell: Cell) -> bool:
    return previous is None


def _cells_as_given(resets) -> Callable[..., list[Stretch]]:
    return lambda data, seed, order: _one_by_one(data.counts, data, order, resets)


def _gradual(data: CorruptionData, seed: int | None, order: Order) -> list[Stretch]:
    cells: list[Cell] = []
    for name in dict.fromkeys(name for name, _ in data.counts):
        up = sorted(severity for n, severity in data.counts if n == name)
        cells += [(name, severity) for severity in [*up, *up[-2::-1]]]
    return _one_by_one(cells, data, order, _at_the_start)


def _mixed(data: CorruptionData, seed: int | None, order: Order) -> list[Stretch]:
    pairs = [
        torch.stack([torch.full((count,), position), torch.arange(count)], 1)
        for position, count in enumerate(data.counts.values())
    ]
    together = torch.cat(pairs)
    rows = shuffled(len(together), 0 if seed is None else seed)
    return [Stretch(True, tuple(data.counts), together[rows])]


PROTOCOLS = {
    "reset-per-cell": _cells_as_given(_each),
    "reset-per-corruption": _cells_as_given(_each_corruption),
    "continual": _cells_as_given(_at_the_start),
    "gradual": _gradual,
    "mixed": _mixed,
    "correlated": _cells_as_given(_each),
}


def plan(
    protocol: str,
    data: CorruptionData,
    seed: int | None,
    concentration: float = CONCENTRATION,
) -> list[Stretch]:
    """The stretches of a protocol over the cells of ``data``, in the cells' order.

    Args:
        protocol: ``reset-per-cell``; ``reset-per-corruption``, the severities of one corruption
            without a reset between them; ``continual``, one reset before the first cell only;
            ``gradual``, the same, with each corruption's severities going up and down again
            (1, 2, .., 5, .., 2, 1; CoTTA, arXiv 2203.13591), so that all but the highest are
            met twice; ``mixed``, the images of all cells shuffled together, one reset before
            them; ``correlated``, a reset before each cell, whose images come by class
            (`orders.correlated`).
        seed: of the order of the images in each cell (the same for cells of equal size and
            labels); None keeps the stored order, where ``mixed`` and ``correlated`` take seed 0.
        concentration: of the Dirichlet distribution of ``correlated``.

    Raises:
        InputError: no such protocol, no cells, or a concentration that is not positive.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if not data.counts:
        raise InputError("no cells to evaluate on")

    def order(cell: Cell, count: int) -> Tensor:
        if protocol == "correlated":
            return correlated(data.labels(cell), concentration, seed)
        return shuffled(count, seed)

    return PROTOCOLS[protocol](data, seed, order)


def streams(stretches: list[Stretch]) -> list[list[Stretch]]:
    """Stretches from one reset to the next; nothing passes from one stream to another."""
    found: list[list[Stretch]] = []
    for stretch in stretches:
        if stretch.reset or not found:
            found.append([])
        found[-1].append(stretch)
    return found


def describe_order(protocol: str, seeds: list[int | None], concentration: float) -> str:
    """The order of the images in words, for result files."""
    drawn = " and ".join(str(seed or 0) for seed in seeds)
    if protocol == "mixed":
        return f"all cells shuffled together by torch.Generator().manual_seed({drawn})"
    if protocol == "correlated":
        return (
            f"each cell by class, Dirichlet({concentration}) shares of as many slots as classes, "
            f"numpy.random.RandomState({drawn})"
        )
    if seeds == [None]:
        return "each cell as stored"
    return f"each cell shuffled by torch.Generator().manual_seed({drawn})"
