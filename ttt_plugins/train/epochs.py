"""The loop over epochs that every training runs: resume, draw, log, save, show progress.

A `Training` says what one epoch does and what has to be saved for another process to resume after
it; `train_epochs` does the rest.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError, InputError
from ..utils.files import can_write, replacing
from ..utils.progress import write_entry

__all__ = [
    "Epoch",
    "Recipe",
    "Training",
    "check_convergence",
    "checkpoint_file",
    "epoch_generator",
    "load_checkpoint",
    "save_checkpoint",
    "train_epochs",
]


class Recipe(Protocol):
    """What the loop reads of a training's recipe, which is a frozen dataclass."""

    @property
    def epochs(self) -> int:
        """How many epochs there are."""
        ...

    @property
    def seed(self) -> int:
        """Of everything that an epoch draws."""
        ...


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training.

    Attributes:
        number: counts from 0.
        generator: for everything that the epoch draws, so that a resumed run draws what an
            unbroken one would have drawn.
        title: shown before the progress bar.
        progress: whether there is a bar.
    """

    number: int
    generator: torch.Generator
    title: str
    progress: bool

    def bar(self, batches: Sequence) -> tqdm:
        """Iterate over batches with a progress bar."""
        return tqdm(batches, self.title, disable=not self.progress, leave=False)

    def rows(self, images: int, batch_size: int, steps: int) -> tqdm:
        """Draw row numbers for ``steps`` batches, with a progress bar.

        All ``images`` are seen once, in random order, before any is seen again.
        """
        device, count = self.generator.device, steps * batch_size
        orders = [
            torch.randperm(images, generator=self.generator, device=device)
            for _ in range(-(-count // images))
        ]
        return self.bar(torch.cat(orders)[:count].split(batch_size))


class Training(ABC):
    """What `train_epochs` runs.

    Attributes:
        recipe: a frozen dataclass; a checkpoint made by another one is refused.
        parts: everything with a ``state_dict`` that a checkpoint holds, by its name there.
        device: where the training's tensors are.
        title: what the progress bar calls an epoch.
    """

    title = "epoch"

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.parts: dict[str, Any] = {}

    def generator(self, epoch: int) -> torch.Generator:
        """For everything that an epoch draws."""
        return epoch_generator(self.recipe.seed, epoch, self.device)

    @abstractmethod
    def run(self, epoch: Epoch) -> dict[str, Any]:
        """Train for one epoch and return its entry in the log.

        Raises:
            InputError: training diverged; the last good checkpoint stays.
        """

    def made_by(self) -> dict[str, Any]:
        """What a checkpoint must have been made by for this training to resume from it."""
        return {"recipe": asdict(self.recipe)}  # pyright: ignore[reportArgumentType]

    def state(self) -> dict[str, Any]:
        """Everything that changes from epoch to epoch, as tensors and plain values."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over a `state` that was saved."""
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])


class Processes(Protocol):
    """The processes that share a training; see `workers.Workers`."""

    @property
    def first(self) -> bool:
        """Whether this one saves and prints for all."""
        ...

    def agree(self, epoch: int, checkpoint: Path) -> None:
        """Make sure that all of them resume after the same epoch."""
        ...


def train_epochs(
    training: Training,
    checkpoint: Path,
    *,
    resume: bool,
    progress: bool,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Run a training to its end and return its log, an entry for every epoch.

    Args:
        training: what to run.
        checkpoint: the file that holds all that is needed to resume; replaced after every epoch.
        resume: resume after the checkpoint's epoch, if there is a checkpoint; the run ends as an
            unbroken one would.
        progress: whether to show progress bars and print the log's entries.
        processes: those that share the training, if several do.

    Raises:
        InputError: training diverged, or the checkpoint was made by another recipe.
        DataError: the disk refuses a checkpoint.
    """
    recipe, log, done = training.recipe, [], 0
    if resume and (saved := load_checkpoint(checkpoint, training)):
        training.load(saved)
        log, done = saved["log"], saved["epoch"]
    if processes:
        processes.agree(done, checkpoint)
    first = processes is None or processes.first
    if first:
        _make_folder(checkpoint)
    for number in range(done, recipe.epochs):
        title = f"{training.title} {number + 1}/{recipe.epochs}"
        entry = {"epoch": number + 1}
        entry |= training.run(Epoch(number, training.generator(number), title, progress and first))
        log.append(entry)
        if not first:
            continue
        if progress:
            write_entry(entry)
        saved = training.state() | training.made_by() | {"log": log, "epoch": number + 1}
        save_checkpoint(checkpoint, saved)
    return log


def epoch_generator(seed: int, epoch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """For everything that an epoch draws, whether the run was resumed or not."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


def check_convergence(sums: Tensor, epoch: int, remedy: str) -> None:
    """Raise `InputError` if an epoch's sums (of losses, say) are not all finite.

    To be called before the epoch's checkpoint is written, so that the last good one stays.

    Args:
        sums: of any shape.
        epoch: counts from 0.
        remedy: what to resume with.
    """
    if not torch.isfinite(sums).all():
        raise InputError(
            f"training diverged in epoch {epoch + 1}; resume from the last checkpoint, if there is "
            f"one, with {remedy}"
        )


# -- checkpoints ---------------------------------------------------------------------------------


def checkpoint_file(folder: str | Path) -> Path:
    """``checkpoint.pt`` in a training's folder; neither has to exist yet.

    Raises:
        InputError: something else is in the place of either.
        DataError: the folder cannot be written to.
    """
    file = Path(folder) / "checkpoint.pt"
    try:
        if file.parent.exists() and not file.parent.is_dir():
            raise InputError(
                f"{folder} is to hold the training's checkpoints and is no folder; move it away or "
                "train into another folder"
            )
        if file.exists() and not file.is_file():
            raise InputError(f"{file} is no file; move it away or train into another folder")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from error
    try:
        writable = can_write(file.parent)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot hold the training's checkpoints ({error})") from error
    if not writable:
        raise DataError(
            f"{folder} cannot hold the training's checkpoints: this process may not write there (a "
            "read-only disk, or another user's folder); train into another folder"
        )
    return file


def _make_folder(checkpoint: Path) -> None:
    """Make a checkpoint's folder, once there is nothing left that could be refused.

    Raises:
        DataError: the disk refuses.
    """
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{checkpoint.parent} cannot be made ({error})") from error


def save_checkpoint(file: Path, saved: dict[str, Any]) -> None:
    """Replace a checkpoint as a whole or not at all.

    Raises:
        DataError: the disk refuses.
    """
    try:
        with replacing(file) as temporary:
            torch.save(saved, temporary)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{file} cannot be written ({reason}); the last one stays") from error


def load_checkpoint(file: Path, training: Training) -> dict | None:
    """The checkpoint that a training resumes from, None if there is none yet.

    Raises:
        InputError: it is damaged, or was made by another recipe, config or model.
    """
    if not file.is_file():
        return None
    damage = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about a file that is no archive
            saved = torch.load(file, map_location=training.device, weights_only=True)
    except Exception as error:  # of the archive, the unpickler or the system
        saved, damage = None, error
    if not isinstance(saved, dict):
        raise InputError(
            f"{file} is damaged or no checkpoint of a training; delete it, or leave --resume out, "
            "to start from the beginning"
        ) from damage
    # A recipe's field that is younger than the checkpoint had no effect other than its default's.
    defaults = asdict(type(training.recipe)())  # pyright: ignore[reportArgumentType]
    for key, expected in training.made_by().items():
        maker = saved.get(key)
        if isinstance(maker, dict):
            maker = {n: defaults[n] for n in expected if n in defaults} | maker
        if maker != expected:
            raise InputError(f"{file} was made by another recipe, config or model: {maker}")
    return saved
