"""What an unfinished run has done so far, on disk from piece to piece.

``OUT/unfinished`` holds ``run.json`` (the settings), and for each stream a folder with one file
for each finished piece and ``state.safetensors``, the adapter after the last of them. Every file
appears whole or not at all, so that a process may be killed at any moment; several processes may
write beside each other, for pieces are named by what they are.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import DataError
from .evaluate import Outcome
from .output import write_file

__all__ = ["UNFINISHED", "Progress"]

#: Name of the folder in the results folder.
UNFINISHED = "unfinished"

State = dict[str, Tensor]
_TENSORS = ("predictions", "right", "losses", "confidences")
_NUMBERS = ("seconds", "forwards", "backwards", "skipped", "peak_memory")


def _read(path: Path) -> tuple[State, dict] | None:
    """Tensors and metadata of a file; None if it is not there or not whole."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
            return found, json.loads(file.metadata()["json"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, tensors: Mapping[str, Tensor], extra: dict) -> None:
    content = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_file(path, save(content, {"json": json.dumps(extra)}))


class Progress:
    """Pieces of streams by name and number; in memory only if ``folder`` is None."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._kept: dict[tuple[str, int], Outcome] = {}
        self._values: dict[str, float] = {}

    @property
    def header(self) -> Path:
        """The file that says which run this is; while it is there, the run is unfinished."""
        return self.folder / "run.json"

    def begin(self, header: dict) -> None:
        """Start from nothing; errors as for `save`."""
        self.discard()  # what a process left that was killed while discarding
        content = json.dumps(header, indent=1, default=str).encode()
        try:
            write_file(self._made(self.folder) / self.header.name, content)
        except DataError:
            self.discard()
            raise

    def save(self, name: str, piece: int, outcome: Outcome, state: State | None) -> None:
        """Keep a finished piece, and the adapter's state behind it where more is to come.

        Raises:
            DataError: the disk refuses; what was there before stays.
        """
        if self.folder is None:
            self._kept[name, piece] = outcome
            return
        folder = self._made(self.folder / name)
        numbers = {n: getattr(outcome, n) for n in _NUMBERS}
        tensors = {n: getattr(outcome, n) for n in _TENSORS}
        _write(folder / f"{piece:04d}.safetensors", tensors, numbers)
        if state is None:
            return
        # A kernel may depend on the memory layout, so that it belongs to the state.
        layout = torch.channels_last
        moved = [n for n, t in state.items() if t.ndim == 4 and not t.is_contiguous()]
        moved = [n for n in moved if state[n].is_contiguous(memory_format=layout)]
        # After the piece: if only the piece is there, it is done again.
        _write(folder / "state.safetensors", state, {"after": piece, "channels_last": moved})

    def outcomes(self, name: str, pieces: int) -> list[Outcome]:
        """The finished pieces of a stream, from its first to the first that is missing."""
        found = []
        for piece in range(pieces):
            outcome = self._kept.get((name, piece))
            if self.folder is not None:
                stored = _read(self.folder / name / f"{piece:04d}.safetensors")
                if stored is not None:
                    outcome = Outcome(**stored[0], **stored[1])
            if outcome is None:
                break
            found.append(outcome)
        return found

    def state(self, name: str) -> tuple[int, State] | None:
        """(number of the piece before it, state of the adapter) of a stream, if there is one."""
        found = None if self.folder is None else _read(self.folder / name / "state.safetensors")
        if found is None:
            return None
        tensors, extra = found
        for tensor in extra["channels_last"]:
            tensors[tensor] = tensors[tensor].contiguous(memory_format=torch.channels_last)
        return extra["after"], tensors

    def save_value(self, name: str, value: float) -> None:
        """Keep a number; errors as for `save`."""
        self._values[name] = value
        if self.folder is not None:
            write_file(self._made(self.folder) / f"{name}.json", json.dumps(value).encode())

    def value(self, name: str) -> float | None:
        """What `save_value` kept, None if nothing."""
        if self.folder is None:
            return self._values.get(name)
        try:
            return float(json.loads((self.folder / f"{name}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def discard(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._values.clear()
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.header.unlink()  # first, so that nobody takes the rest for a run
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _made(folder: Path) -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made ({error.strerror})") from error
        return folder
