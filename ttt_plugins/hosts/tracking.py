"""An adapter's batches in TensorBoard, trackio or wandb.

    >>> with tracker("tensorboard", "runs/tent") as track:
    ...     net.on_batch = track
    ...     for images in stream:
    ...         net(images)

trackio's calls are wandb's. Both are started as their own environment variables say: with
``WANDB_MODE=offline`` wandb writes to the folder alone, as trackio and TensorBoard always do.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..core.records import BatchRecord
from ..errors import InputError, MissingDependencyError

__all__ = ["TRACKERS", "Tracker", "tracker"]

#: Name -> the package to install.
TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
_PROJECT = "ttt_plugins"


class Tracker:
    """Writes every `BatchRecord` that it is called with; a context manager that ends the run.

    The scalars of a method are called ``<method>/loss``, ``<method>/entropy`` and so on, over the
    number of the method's batches so far.
    """

    def __init__(self):
        self._steps: Counter[str] = Counter()

    def __call__(self, record: BatchRecord) -> None:
        """Write the scalars of a batch."""
        step = self._steps[record.method]
        self._steps[record.method] += 1
        own = {f"{record.method}/{name}": value for name, value in record.scalars().items()}
        self._write(own, record, step)

    def _write(self, scalars: dict[str, float], record: BatchRecord, step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Write what is still waiting, and end the run."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _TensorBoard(Tracker):
    def __init__(self, module: Any, folder: Path):
        super().__init__()
        self._writer = module.SummaryWriter(str(folder))
        self._cells: dict[str, str] = {}

    def _write(self, scalars: dict[str, float], record: BatchRecord, step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        if record.cell and self._cells.get(record.method) != record.cell:
            self._cells[record.method] = record.cell
            self._writer.add_text(f"{record.method}/cell", record.cell, step)

    def close(self) -> None:
        self._writer.close()


class _Logged(Tracker):
    """trackio and wandb: ``init``, ``log`` and ``finish``."""

    def __init__(self, module: Any, run: str | None, config: Mapping[str, Any], **options: Any):
        super().__init__()
        self._module, self._step = module, 0
        module.init(project=_PROJECT, name=run, config=dict(config), **options)

    def _write(self, scalars: dict[str, float], record: BatchRecord, step: int) -> None:
        more: dict[str, Any] = {f"{record.method}/step": step}
        if record.cell:
            more[f"{record.method}/cell"] = record.cell
        self._module.log(scalars | more)

    def close(self) -> None:
        self._module.finish()


def tracker(
    name: str,
    folder: str | Path,
    *,
    run: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tracker:
    """Start a run of a tracker, for ``net.on_batch``.

    Args:
        name: ``"tensorboard"``, ``"trackio"`` or ``"wandb"``.
        folder: folder of TensorBoard's and wandb's files; trackio keeps its own in its cache.
        run: name of the run, for trackio and wandb.
        config: settings to record with the run, for trackio and wandb.

    Raises:
        InputError: there is no such tracker.
        MissingDependencyError: it is not installed.
    """
    if name not in TRACKERS:
        raise InputError(f"{name!r} is no tracker; there are {', '.join(TRACKERS)}")
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs {name}: pip install {TRACKERS[name]} ({error})"
        ) from error
    if name == "tensorboard":
        return _TensorBoard(library, Path(folder))
    options = {"dir": os.fspath(folder)} if name == "wandb" else {}
    if options:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return _Logged(library, run, config or {}, **options)
