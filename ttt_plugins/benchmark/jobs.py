"""The independent jobs of a run: one method on one stream, evaluated in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.adaptive import AdaptiveModel
from ..core.records import in_cell
from ..errors import DataError
from ..utils.locks import FileLock
from .cells import CorruptionData
from .device import Execution, Loader
from .evaluate import cell_records, classify, join
from .protocols import CONCENTRATION, Stretch, plan, streams
from .results import CellRecord
from .resume import Progress

__all__ = ["Job", "claim", "job_records", "planned", "run_job"]

#: A stretch, and some of its rows.
Piece = tuple[Stretch, Tensor]

#: Largest number of images in a piece; longer stretches are stored in several. It exceeds the
#: 10,000 of a CIFAR cell, so that a cell is one piece, and is small enough to be cheap to lose.
PIECE = 16_384


@dataclass(frozen=True)
class Job:
    """One method on the images between two resets.

    Attributes:
        name: name that is unique in a run and the same in all its processes.
        method: index of the method in the run.
        seed: seed for the order of the images.
        stream: index of the stream in the protocol's plan.
        stretches: stretches of the stream; empty for the clean images, which are not in a plan.
        piece: largest number of images in a piece; None for `PIECE`.
    """

    name: str
    method: int
    seed: int | None
    stream: int
    stretches: tuple[Stretch, ...] = ()
    piece: int | None = None

    def __len__(self) -> int:
        return sum(len(stretch) for stretch in self.stretches)

    @property
    def title(self) -> str:
        """Text for the progress bar."""
        cells = self.stretches[0].cells if self.stretches else ()
        return "clean" if not cells else cells[0][0] if len(cells) == 1 else "mixed"

    def batches(self, batch_size: int) -> int:
        """Number of batches."""
        return sum(-(-len(stretch) // batch_size) for stretch in self.stretches)

    def pieces(self, batch_size: int) -> list[Piece]:
        """The pieces as (stretch, rows in it); no batch is divided between two pieces."""
        size = max(1, (self.piece or PIECE) // batch_size) * batch_size
        return [(stretch, rows) for stretch in self.stretches for rows in stretch.rows.split(size)]

    def first_piece(self, batch_size: int) -> Piece | None:
        """The first of the `pieces`; None if there are none."""
        return next(iter(self.pieces(batch_size)), None)


def planned(settings: dict[str, Any], data: CorruptionData, methods: int) -> list[Job]:
    """The jobs on the cells of a run, in the order of seeds, streams and methods.

    Args:
        settings: settings of the run, as in ``results.json``.
        data: the cells.
        methods: number of methods.

    Raises:
        InputError: the protocol does not exist or does not fit the data.
    """
    jobs = []
    concentration = settings["concentration"] or CONCENTRATION
    for seed in settings["seeds"]:
        stretches = plan(settings["protocol"], data, seed, concentration)
        for number, stream in enumerate(streams(stretches)):
            for method in range(methods):
                name = f"method{method}-seed{seed}-stream{number:03d}"
                jobs.append(Job(name, method, seed, number, tuple(stream), data.piece))
    return jobs


def _restore(job: Job, net: AdaptiveModel, progress: Progress, count: int) -> int:
    """Restore a reset adapter's state after the finished pieces; return how many are usable."""
    done = len(progress.evaluations(job.name, count))
    if not 0 < done < count:
        return done
    stored = progress.state(job.name)
    if stored is None or stored[0] >= done:
        return 0  # there is no state, or it belongs to a piece that has been lost
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
    following: Piece | None = None,
) -> None:
    """Evaluate an adapter on a stream, and store each piece before the next begins.

    The job resumes after the last stored piece, from the adapter's state that was stored with it.

    Args:
        job: the job.
        net: the adapter, which is reset.
        loader: reads the cells.
        progress: stores the pieces.
        batch_size: number of images in a batch.
        execution: memory layout and precision.
        advance: called with 1 after every batch, and with the number of batches in stored pieces.
        following: the piece that the caller will request next, which is prefetched.
    """
    pieces = job.pieces(batch_size)
    net.reset()
    done = _restore(job, net, progress, len(pieces))
    if done:
        advance(sum(-(-len(rows) // batch_size) for _, rows in pieces[:done]))
    for number, (stretch, rows) in enumerate(pieces[done:], done):
        last = number + 1 == len(pieces)
        parts, picks = loader.piece(stretch, rows, following if last else pieces[number + 1])
        cells = stretch.cells
        with in_cell(net, " ".join(map(str, cells[0])) if len(cells) == 1 else "mixed"):
            evaluation = classify(net, parts, picks, batch_size, lambda: advance(1), execution)
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
        joined = join([e for e, (s, _) in zip(evaluations, pieces, strict=True) if s is stretch])
        records += cell_records(stretch, joined, batch_size, seed=job.seed, stream=job.stream)
    return records, sum(evaluation.skipped for evaluation in evaluations)


def claim(progress: Progress, name: str, do: Callable[..., object], *args: Any) -> bool:
    """Call ``do`` unless another process is calling it; return whether the work is done.

    The claim is a lock on a file, which the system releases whenever the process ends.
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
        # Otherwise another process has assembled the results in the meantime.
    return True
