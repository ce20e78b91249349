"""The independent jobs of a run: one method on one stream, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..utils.processes import FileLock
from .adaptive import AdaptiveModel
from .cells import Cell
from .device import Execution, Loader
from .evaluate import cell_records, classify, join
from .protocols import Stretch
from .results import CellRecord
from .resume import Progress

__all__ = ["Job", "claim", "job_records", "run_job"]

#: Images of a piece at most; longer stretches are stored in several. More than the 10,000 of a
#: CIFAR cell, so that a cell is one piece, and few enough that little is lost with one.
PIECE = 16_384


@dataclass(frozen=True)
class Job:
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

    @property
    def first_cells(self) -> tuple[Cell, ...] | None:
        """The cells to be read first, None if there are none."""
        return self.stretches[0].cells if self.stretches else None

    def batches(self, batch_size: int) -> int:
        """How many batches it takes."""
        return sum(-(-len(stretch) // batch_size) for stretch in self.stretches)

    def pieces(self, batch_size: int) -> list[tuple[Stretch, Tensor]]:
        """(stretch, rows of it), cut between batches."""
        size = max(1, PIECE // batch_size) * batch_size
        return [(stretch, rows) for stretch in self.stretches for rows in stretch.rows.split(size)]


def _restore(job: Job, net: AdaptiveModel, progress: Progress, count: int) -> int:
    """Bring a reset adapter to where the finished pieces end; returns how many can be kept."""
    done = len(progress.evaluations(job.name, count))
    if not 0 < done < count:
        return done
    stored = progress.state(job.name)
    if stored is None or stored[0] >= done:
        return 0  # no state, or one from after a piece that is lost
    net.load_adaptation_state(stored[1])
    return stored[0] + 1


def run_job(
    job: Job,
    net: AdaptiveModel,
    loader: Loader,
    progress: Progress,
    batch_size: int,
    execution: Execution,
    advance: Callable[[int], object],
    following: tuple[Cell, ...] | None = None,
) -> None:
    """Show an adapter a stream, and store each piece of it before the next begins.

    Resumes after the last piece that is stored, with the adapter's state stored there.

    Args:
        job: the stream.
        net: the adapter, which is reset.
        loader: reads the cells.
        progress: where pieces are stored.
        batch_size: images in a batch.
        execution: memory layout and precision.
        advance: called with 1 after every batch, and with the batches of pieces stored before.
        following: cells that the caller will ask for next; they are read meanwhile.
    """
    pieces = job.pieces(batch_size)
    net.reset()
    done = _restore(job, net, progress, len(pieces))
    if done:
        advance(sum(-(-len(rows) // batch_size) for _, rows in pieces[:done]))
    for number, (stretch, rows) in enumerate(pieces[done:], done):
        last = number + 1 == len(pieces)
        parts = loader(stretch.cells, following if last else pieces[number + 1][0].cells)
        evaluation = classify(net, parts, rows, batch_size, lambda: advance(1), execution)
        resumable = not last and progress.folder is not None
        state = net.adaptation_state() if resumable else None
        progress.save(job.name, number, evaluation, state)


def job_records(job: Job, progress: Progress, batch_size: int) -> tuple[list[CellRecord], int]:
    """Records of a finished job's cells, and its skipped updates.

    Raises:
        DataError: a piece has been lost or damaged since it was stored.
    """
    pieces = job.pieces(batch_size)
    evaluations = progress.evaluations(job.name, len(pieces))
    if len(evaluations) < len(pieces):
        raise DataError(
            f"{progress.folder}: piece {len(evaluations)} of {job.name} is missing or damaged; "
            "resume the run (--resume), which evaluates it again"
        )
    records: list[CellRecord] = []
    for stretch in job.stretches:
        own = [e for e, (s, _) in zip(evaluations, pieces, strict=True) if s is stretch]
        records += cell_records(stretch, join(own), batch_size, seed=job.seed, stream=job.stream)
    return records, sum(evaluation.skipped for evaluation in evaluations)


def claim(progress: Progress, name: str, do: Callable[..., object], *args: Any) -> bool:
    """Do something unless another process is at it; whether it is done now.

    The claim is a lock on a file, which the system drops when the process ends, however it ends.
    """
    try:
        with FileLock(progress.header.with_name(f"{name}.lock")) as lock:
            if not lock.take():
                return False
            if progress.header.exists():
                do(*args)
    except (DataError, FileNotFoundError):
        if progress.header.exists():
            raise
        # Another process has put the run together meanwhile.
    return True
