"""The loop over epochs that every kind of training shares: resuming, logging, saving, progress.

A `Training` defines what one epoch does and what must be saved so that another process can resume
after it; `train_epochs` does the rest.
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
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from ..data.on_demand import read_batches, shuffled_rows
from ..errors import DataError, InputError
from ..utils.files import can_write, replacing
from ..utils.progress import progress_bar, write_entry

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
    """The fields of a recipe, a frozen dataclass, that the loop reads."""

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        ...

    @property
    def seed(self) -> int:
        """Seed for everything that an epoch draws."""
        ...


@dataclass(frozen=True)
class Epoch:
    """One epoch.

    Attributes:
        number: number of the epoch, from 0.
        generator: random generator for everything that the epoch draws, so that a resumed run
            draws the same as an uninterrupted one.
        title: text shown before the progress bar.
        progress: whether to show a progress bar.
    """

    number: int
    generator: torch.Generator
    title: str
    progress: bool

    def bar(self, batches: Sequence) -> tqdm:
        """Iterate over batches with a progress bar."""
        return progress_bar(batches, self.title, show=self.progress)

    def batches(self, images: Any, batch_size: int, steps: int) -> tqdm:
        """Draw ``steps`` batches, with a progress bar, as pairs of row indices and images.

        All images are drawn once, in random order, before any is drawn again.

        Args:
            images: a tensor (N, C, H, W) or `ImagesOnDemand`.
            batch_size: number of images in a batch.
            steps: number of batches.
        """
        count = steps * batch_size
        orders = [shuffled_rows(images, self.generator) for _ in range(-(-count // len(images)))]
        rows = torch.cat(orders)[:count].split(batch_size)
        pairs = zip(rows, read_batches(images, rows), strict=True)
        return progress_bar(pairs, self.title, len(rows), show=self.progress)


class Training(ABC):
    """Base class for what `train_epochs` runs.

    Attributes:
        recipe: a frozen dataclass; a checkpoint made by a different recipe is refused.
        parts: objects whose ``state_dict`` a checkpoint holds, by their names in the checkpoint.
        device: device that holds the tensors.
        title: what the progress bar calls an epoch.
    """

    title = "epoch"

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.parts: dict[str, Any] = {}

    def generator(self, epoch: int) -> torch.Generator:
        """Random generator for everything that an epoch draws."""
        return epoch_generator(self.recipe.seed, epoch, self.device)

    @abstractmethod
    def run(self, epoch: Epoch) -> dict[str, Any]:
        """Train for one epoch and return its entry in the log.

        Raises:
            InputError: training diverged; the last good checkpoint is kept.
        """

    def made_by(self) -> dict[str, Any]:
        """The settings that a checkpoint must share with this training to be resumed from."""
        return {"recipe": asdict(self.recipe)}  # pyright: ignore[reportArgumentType]

    def state(self) -> dict[str, Any]:
        """Everything that changes from epoch to epoch, as tensors and Python values."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def on_device(self, saved: Any) -> Any:
        """A part of a saved `state` with its tensors on the training's device."""
        return tree_map_only(Tensor, lambda t: t.to(self.device), saved)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved `state`, whose tensors are on the CPU."""
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])


class Processes(Protocol):
    """Processes that train one model together; see `workers.Workers`."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that saves and prints."""
        ...

    def agree(self, epoch: int, checkpoint: Path) -> None:
        """Make sure that all processes resume after the same epoch."""
        ...


def train_epochs(
    training: Training,
    checkpoint: Path,
    *,
    resume: bool,
    progress: bool,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Run all epochs of a training and return its log, with one entry per epoch.

    Args:
        training: the training to run.
        checkpoint: file that holds everything needed to resume; replaced after every epoch.
        resume: whether to resume after the checkpoint's epoch, if there is a checkpoint; the
            result is the same as that of an uninterrupted run.
        progress: whether to show progress bars and print the log's entries.
        processes: the processes that train together; None for a single process.

    Raises:
        InputError: training diverged, or the checkpoint was made by another recipe.
        DataError: a checkpoint cannot be written.
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
    """Random generator for an epoch, the same whether or not the run was resumed."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


def check_convergence(sums: Tensor, epoch: int, remedy: str) -> None:
    """Raise `InputError` if an epoch's sums, for example of losses, are not all finite.

    Call this before the epoch's checkpoint is written, so that the last good one is kept.

    Args:
        sums: tensor of any shape.
        epoch: number of the epoch, from 0.
        remedy: what to change before resuming, for the message.
    """
    if not torch.isfinite(sums).all():
        raise InputError(
            f"training diverged in epoch {epoch + 1}; resume from the last checkpoint, if there is "
            f"one, with {remedy}"
        )


# -- checkpoints ---------------------------------------------------------------------------------


def checkpoint_file(folder: str | Path) -> Path:
    """Path of ``checkpoint.pt`` in a training folder; neither has to exist yet.

    Raises:
        InputError: something other than a folder, or than a file, has the name.
        DataError: the folder cannot be written to.
    """
    file = Path(folder) / "checkpoint.pt"
    try:
        if file.parent.exists() and not file.parent.is_dir():
            raise InputError(
                f"{folder} must hold the training's checkpoints, but is not a folder; move it away "
                "or train into another folder"
            )
        if file.exists() and not file.is_file():
            raise InputError(f"{file} is not a file; move it away or train into another folder")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from error
    try:
        writable = can_write(file.parent)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot hold the training's checkpoints ({error})") from error
    if not writable:
        raise DataError(
            f"{folder} cannot hold the training's checkpoints, because this process may not write "
            "there (a read-only disk, or another user's folder); train into another folder"
        )
    return file


def _make_folder(checkpoint: Path) -> None:
    """Create a checkpoint's folder, after all other checks have passed.

    Raises:
        DataError: the folder cannot be created.
    """
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{checkpoint.parent} cannot be created ({error})") from error


def save_checkpoint(file: Path, saved: dict[str, Any]) -> None:
    """Replace a checkpoint atomically.

    Raises:
        DataError: the file cannot be written; the earlier checkpoint is kept.
    """
    try:
        with replacing(file) as temporary:
            torch.save(saved, temporary)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{file} cannot be written ({reason}); the last checkpoint is kept"
        ) from error


def load_checkpoint(file: Path, training: Training) -> dict | None:
    """Load the checkpoint that training resumes from; None if there is none yet.

    Raises:
        InputError: the checkpoint is damaged, or was made by another recipe, config or model.
    """
    if not file.is_file():
        return None
    damage = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about files that are not archives
            # Loaded to the CPU, where Adam's step count has to stay, because every step reads it.
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # raised by the archive, the unpickler or the system
        saved, damage = None, error
    if not isinstance(saved, dict):
        raise InputError(
            f"{file} is damaged or not a training checkpoint; to start from the beginning, delete "
            "it or leave out --resume"
        ) from damage
    # A recipe field added after the checkpoint was written takes its default.
    defaults = asdict(type(training.recipe)())  # pyright: ignore[reportArgumentType]
    for key, expected in training.made_by().items():
        actual = saved.get(key)
        if isinstance(actual, dict):
            actual = {n: defaults[n] for n in expected if n in defaults} | actual
        if actual != expected:
            raise InputError(
                f"{file} was made by another recipe, config or model; resume with the same one, or "
                f"train into another folder: {actual}"
            )
    return saved
