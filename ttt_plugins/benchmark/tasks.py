"""The independent parts of a run: one method on one stream, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .batches import Loader
from .cells import Cell
from .evaluate import cell_records as records_of
from .evaluate import classify, join
from .execution import Execution
from .progress import Progress
from .protocols import Stretch
from .records import CellRecord

__all__ = ["Task", "cell_records", "run_task"]

#: Images of a piece at most; longer stretches are stored in several. More than the 10,000 of a
#: CIFAR cell, so that a cell is one piece, and few enough that little is lost with one.
PIECE = 16_384


@dataclass(frozen=True)
class Task:
    """One method on the images between two resets.

    Attributes:
        name: unique in a run, and the same in every process of it.
        method: position of the method in the run.
        seed: of the order of the images.
        stream: position of the stream in the protocol's plan.
        stretches: what is met; empty for the clean images, which are not in a plan.
    """

    name: str
    method: int
    seed: int | None
    stream: int
    stretches: tuple[Stretch, ...] = ()

    def __len__(self) -> int:
        return sum(len(stretch) for stretch in self.stretches)

    @property
    def title(self) -> str:
        """What a progress bar says."""
        cells = self.stretches[0].cells if self.stretches else ()
        return "clean" if not cells else cells[0][0] if len(cells) == 1 else "mixed"

    def batches(self, batch_size: int) -> int:
        """How many batches it takes."""
        return sum(-(-len(stretch) // batch_size) for stretch in self.stretches)

    def pieces(self, batch_size: int) -> list[tuple[Stretch, Tensor]]:
        """(stretch, rows of it), cut between batches."""
        size = max(1, PIECE // batch_size) * batch_size
        return [(stretch, rows) for stretch in self.stretches for rows in stretch.rows.split(size)]


def run_task(
    task: Task,
    net: nn.Module,
    loader: Loader,
    progress: Progress,
    batch_size: int,
    execution: Execution,
    advance: Callable[[int], object],
    following: tuple[Cell, ...] | None = None,
) -> None:
    """Show an adapter a stream, and keep each piece of it before the next begins.

    Goes on behind the last piece kept, with the adapter's state stored there; an adapter without
    ``load_adaptation_state`` starts the stream anew.

    Args:
        advance: called with 1 after every batch, and with the batches of pieces kept before.
        following: cells that the caller will ask for next; they are read meanwhile.
    """
    pieces = task.pieces(batch_size)
    done = len(progress.outcomes(task.name, len(pieces)))
    stateful = hasattr(net, "load_adaptation_state")
    net.reset()
    if 0 < done < len(pieces):
        stored = progress.state(task.name) if stateful else None
        done = 0 if stored is None else min(done, stored[0] + 1)
        if done and stored[0] + 1 != done:
            done = 0  # a state from behind a piece that is lost
        if done:
            net.load_adaptation_state(stored[1])
    if done:
        advance(sum(-(-len(rows) // batch_size) for _, rows in pieces[:done]))
    for number, (stretch, rows) in enumerate(pieces[done:], done):
        last = number + 1 == len(pieces)
        parts = loader(stretch.cells, following if last else pieces[number + 1][0].cells)
        outcome = classify(net, parts, rows, batch_size, lambda: advance(1), execution)
        keep = stateful and not last and progress.folder is not None
        progress.save(task.name, number, outcome, net.adaptation_state() if keep else None)


def cell_records(task: Task, progress: Progress, batch_size: int) -> tuple[list[CellRecord], int]:
    """Records of a finished task's cells, and its skipped updates."""
    pieces = task.pieces(batch_size)
    outcomes = progress.outcomes(task.name, len(pieces))
    records: list[CellRecord] = []
    for stretch in task.stretches:
        mine = [o for o, (s, _) in zip(outcomes, pieces, strict=True) if s is stretch]
        records += records_of(stretch, join(mine), batch_size, seed=task.seed, stream=task.stream)
    return records, sum(outcome.skipped for outcome in outcomes)
