"""Protocols: in which order images are met, and where the adapter is reset.

A protocol turns the cells of a data folder into stretches. An adapter that is reset where a
stretch says so, and shown the stretch's rows batch by batch, follows the protocol; batches
never cross from one stretch into the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .cells import Cell

__all__ = ["PROTOCOLS", "Stretch", "describe_order", "plan", "shuffled"]


@dataclass(frozen=True)
class Stretch:
    """Images met one after another.

    Attributes:
        reset: the adapter goes back to its source before the first image.
        cells: the cells that the images come from.
        rows: (N, 2) int64, position in ``cells`` and row of that cell, in the order met.
    """

    reset: bool
    cells: tuple[Cell, ...]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def shuffled(count: int, seed: int | None) -> Tensor:
    """Rows 0..count-1, drawn by ``torch.Generator().manual_seed(seed)``; in order if None."""
    if seed is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _cell_by_cell(counts: Mapping[Cell, int], seed: int | None, resets) -> list[Stretch]:
    stretches, previous = [], None
    for cell, count in counts.items():
        rows = shuffled(count, seed)
        pairs = torch.stack([torch.zeros_like(rows), rows], 1)
        stretches.append(Stretch(resets(previous, cell), (cell,), pairs))
        previous = cell
    return stretches


def _reset_per_cell(counts: Mapping[Cell, int], seed: int | None) -> list[Stretch]:
    return _cell_by_cell(counts, seed, lambda previous, cell: True)


def _reset_per_corruption(counts: Mapping[Cell, int], seed: int | None) -> list[Stretch]:
    return _cell_by_cell(
        counts, seed, lambda previous, cell: previous is None or previous[0] != cell[0]
    )


def _continual(counts: Mapping[Cell, int], seed: int | None) -> list[Stretch]:
    return _cell_by_cell(counts, seed, lambda previous, cell: previous is None)


def _mixed(counts: Mapping[Cell, int], seed: int | None) -> list[Stretch]:
    pairs = [
        torch.stack([torch.full((count,), position), torch.arange(count)], 1)
        for position, count in enumerate(counts.values())
    ]
    together = torch.cat(pairs)
    order = shuffled(len(together), 0 if seed is None else seed)
    return [Stretch(True, tuple(counts), together[order])]


PROTOCOLS = {
    "reset-per-cell": _reset_per_cell,
    "reset-per-corruption": _reset_per_corruption,
    "continual": _continual,
    "mixed": _mixed,
}


def plan(protocol: str, counts: Mapping[Cell, int], seed: int | None) -> list[Stretch]:
    """The stretches of a protocol over ``counts`` (images of each cell, in the cells' order).

    Args:
        protocol: ``reset-per-cell``; ``reset-per-corruption``, the severities of one corruption
            without a reset between them; ``continual``, one reset before the first cell only;
            ``mixed``, the images of all cells shuffled together, one reset before them.
        seed: of the order of the images in each cell (the same for cells of equal size); None
            keeps the stored order, where ``mixed`` takes seed 0.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if not counts:
        raise InputError("no cells to evaluate on")
    return PROTOCOLS[protocol](counts, seed)


def describe_order(protocol: str, seed: int | None) -> str:
    """The order of the images in words, for result files."""
    if protocol == "mixed":
        return f"all cells shuffled together by torch.Generator().manual_seed({seed or 0})"
    if seed is None:
        return "each cell as stored"
    return f"each cell shuffled by torch.Generator().manual_seed({seed})"
