"""The command ``predict``: writes predicted classes of pictures to a CSV file."""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..adapter import Adapter
from ..core.pictures import picture_transform
from ..data.images import to_float
from ..data.labels import class_names, label_positions
from ..data.loading import ImageBatch, ImageLoader
from ..errors import DataError, InputError
from ..utils.checks import check_seed
from ..utils.files import replacing
from ..utils.progress import progress_bar
from ..utils.signals import raising_on_sigterm
from ..utils.text import printable
from .models import adapter_from_args, add_model_flags, add_track_flag, tracked
from .pictures import add_source_flags, open_source

__all__ = ["add_predict"]

_COLUMNS = ("file", "class", "name", "score")
#: Seconds between two checkpoints; a run that is resumed repeats at most about this much work.
_CHECKPOINT_SECONDS = 30.0


def add_predict(commands) -> None:
    """Add the command ``predict``."""
    add = commands.add_parser("predict", help="write predicted classes of pictures to a CSV file")
    add.set_defaults(run=_predict)
    add_model_flags(add)
    add.add_argument(
        "images", metavar="SOURCE", help="folder, parquet, npz, hf://datasets/ORG/NAME"
    )
    add_source_flags(add)
    add.add_argument("--out", type=Path, required=True, metavar="FILE", help="the CSV file")
    add.add_argument("--batch-size", type=int, default=64, metavar="B")
    add.add_argument("--seed", type=int, help="seed for the adapter's random draws (default: 0)")
    add.add_argument("--limit", type=int, metavar="N", help="use only the first N pictures")
    add.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    add.add_argument("--resume", action="store_true", help="resume an interrupted run")
    add_track_flag(add)


def _predict(args: argparse.Namespace) -> None:
    if args.seed is not None:
        check_seed(args.seed, "--seed")
    run = _Run(args.out, _settings(args))
    if run.finished(args.resume, args.overwrite):
        print(f"{printable(str(args.out))} is complete")
        return
    source = open_source(args, args.images)
    torch.manual_seed(args.seed or 0)
    net = adapter_from_args(args)
    start = run.begin(net, args.resume)
    loader = ImageLoader(
        source,
        transform=picture_transform(net.backbone, args.image_size),
        batch_size=args.batch_size,
        workers=args.workers,
        start=start,
        limit=args.limit,
        skip_damaged=args.skip_damaged,
    )
    advice = f"resume with --resume; rows so far are in {run.rows}"
    with raising_on_sigterm(advice), tracked(args, net):
        correct, labelled = _write(net, loader, run)
    run.end()
    if loader.skipped:
        print(f"skipped {len(loader.skipped)} damaged pictures, the first: {loader.skipped[0]}")
    if labelled:
        print(f"accuracy on the {labelled} pictures of this run: {100 * correct / labelled:.2f} %")
    print(f"the predictions are in {printable(str(args.out))}")


def _settings(args: argparse.Namespace) -> str:
    """The settings that a resumed run must share with the interrupted one."""
    names = ("model", "method", "set", "lr", "pretrained", "images", "image_size", "image_column")
    names += ("batch_size", "seed", "limit", "skip_damaged")
    return json.dumps({name: getattr(args, name) for name in names}, sort_keys=True)


def _write(net: Adapter, loader: ImageLoader, run: _Run) -> tuple[int, int]:
    """Predict and write every batch; return how many pictures are correct and how many labelled."""
    correct = labelled = 0
    source = loader.source
    try:
        total = len(loader)
    except TypeError:
        total = None
    with (
        run.rows.open("a", newline="", encoding="utf-8") as file,
        progress_bar(title=net.method, total=total, unit="image", leave=True) as bar,
    ):
        for batch in loader:
            logits = net(to_float(batch.images.to(net.backbone.device)))
            scores, classes = logits.float().softmax(1).max(1)
            classes = classes.cpu()
            _write_rows(file, batch, classes, scores.tolist(), source.classes, logits.shape[1])
            truth = label_positions(logits.shape[1], source.classes)
            if batch.labels is not None and truth is not None:
                correct += int((torch.tensor(truth)[batch.labels] == classes).sum())
                labelled += len(classes)
            run.checkpoint(net, file, batch.end)
            bar.update(len(batch.names))
    return correct, labelled


def _write_rows(
    file: TextIO,
    batch: ImageBatch,
    classes: torch.Tensor,
    scores: list[float],
    own: tuple[str, ...] | None,
    count: int,
) -> None:
    names = class_names(count, own)
    writer = csv.writer(file)
    for picture, number, score in zip(batch.names, classes.tolist(), scores, strict=True):
        writer.writerow([picture, number, names[number] if names else "", f"{score:.6f}"])


class _Run:
    """The output file of a run, and the files needed to resume it.

    Rows are written to ``FILE.part``, which is renamed to FILE at the end. At intervals the
    adapter's state is written to ``FILE.state`` together with the length of the rows written so
    far; a resumed run truncates the rows to that length.
    """

    def __init__(self, out: Path, settings: str):
        self._out, self._settings = out, settings
        self.rows = out.with_name(f"{out.name}.part")
        self._state = out.with_name(f"{out.name}.state")
        self._saved = time.monotonic()

    def finished(self, resume: bool, overwrite: bool) -> bool:
        """Whether the run to resume is already complete.

        Raises:
            InputError: FILE already exists.
            DataError: its folder is missing.
        """
        if not self._out.parent.is_dir():
            raise DataError(f"{self._out.parent}: no such folder")
        if not self._out.exists() or overwrite:
            return False
        if resume and not self.rows.exists():
            return True
        raise InputError(f"{self._out} already exists; give --overwrite or another name")

    def begin(self, net: Adapter, resume: bool) -> int:
        """Prepare the rows and the adapter; return the number of pictures already done.

        Raises:
            InputError: the interrupted run had other settings, or its state is damaged.
        """
        if resume and self._state.exists() and self.rows.exists():
            facts, state = self._read()
            net.load_adaptation_state(state)
            os.truncate(self.rows, int(facts["bytes"]))
            return int(facts["pictures"])
        self._state.unlink(missing_ok=True)
        with self.rows.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_COLUMNS)
        return 0

    def _read(self) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        try:
            with safe_open(str(self._state), "pt") as opened:
                facts: dict[str, Any] = opened.metadata() or {}
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self._state} is damaged ({error}); delete it to start over"
            ) from error
        if facts.get("settings") != self._settings:
            raise InputError(
                f"{self._state} belongs to a run with other settings: {facts.get('settings')}; "
                "give the same settings, or leave out --resume to start over"
            )
        return facts, state

    def checkpoint(self, net: Adapter, rows: TextIO, pictures: int) -> None:
        """Write the adapter's state if enough time has passed since it was last written."""
        if time.monotonic() - self._saved < _CHECKPOINT_SECONDS:
            return
        rows.flush()
        os.fsync(rows.fileno())
        facts = {"pictures": str(pictures), "bytes": str(self.rows.stat().st_size)}
        state = {name: t.contiguous().cpu() for name, t in net.adaptation_state().items()}
        with replacing(self._state) as temporary:
            save_file(state, temporary, facts | {"settings": self._settings})
        self._saved = time.monotonic()

    def end(self) -> None:
        """Rename the finished rows to FILE."""
        os.replace(self.rows, self._out)
        self._state.unlink(missing_ok=True)
