"""The results folder, and the progress of an unfinished run in it.

``OUT/unfinished`` holds ``run.json`` (the settings), and for each job a folder with one file per
finished piece and ``state.safetensors``, the adapter's state after the last of them. Every file is
written atomically, so a process may be killed at any time; several processes may write
concurrently, because pieces are named by job and number. Every file records its run and a checksum,
so that files of another run and damaged files count as missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..artifacts.folder import CONFIG
from ..artifacts.tensor_files import fingerprint
from ..errors import DataError, InputError
from ..utils.files import nearest_path, replacing
from ..utils.locks import FileLock
from ..utils.processes import Worker
from ..utils.robustbench import version
from ..version import __version__
from .evaluate import Answers, Evaluation
from .results import Results, finite, read_results

__all__ = ["Progress", "begin_run", "begun", "check_out", "join_run", "machine", "versions"]
__all__ += ["write_files"]

#: Name of the folder in the results folder.
UNFINISHED = "unfinished"

State = dict[str, Tensor]

#: What reading a damaged piece may raise; a deeply nested description a RecursionError.
_DAMAGED = (
    OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
)  # fmt: skip


# -- the results folder ------------------------------------------------------------------


def check_out(out: str | Path) -> Path:
    """Check that a run may write into this folder, which need not exist yet.

    Raises:
        InputError: it cannot be a folder, or it is an artifact, whose ``results.json`` has another
            form.
    """
    out = Path(out)
    try:
        nearest, is_artifact = nearest_path(out), (out / CONFIG).exists()
        usable = nearest.is_dir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(out)[:200]!r}: cannot create this folder ({reason})") from error
    if not usable:
        raise InputError(f"{out}: cannot create this folder ({nearest} is not a folder)")
    if is_artifact:
        raise InputError(
            f"{out} holds a {CONFIG}: it is an artifact or a model, which a benchmark's files "
            "would damage; choose another folder"
        )
    return out


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write all files or none; the first of them appears last.

    Raises:
        DataError: the files cannot be written; existing files are unchanged.
    """
    try:
        with contextlib.ExitStack() as stack:
            for name, content in files.items():
                stack.enter_context(replacing(out / name)).write_bytes(content)
    except OSError as error:
        raise DataError(f"{out}: cannot write the results ({error.strerror})") from error


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of the packages that the figures depend on; None for those not installed."""
    names = ("torch", "torchvision", "timm", "robustbench", "numpy")
    installed = {name: version(name) for name in names}
    return {"ttt_plugins": __version__, "python": platform.python_version(), **installed}


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, its number of threads, and the accelerator if one is used."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = names[0] if names else processor
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": processor, "threads": torch.get_num_threads(), "gpu": gpu}


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if the file holds anything else."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that holds the results of other settings.

    Args:
        file: a JSON file with the existing ``settings``; if it is missing, the folder may be used.
        settings: settings of this run.

    Raises:
        InputError: the file has other settings, or was not written by this package.
    """
    if not file.exists():
        return
    stored = _read_object(file).get("settings")
    wanted = json.loads(json.dumps(finite(settings), default=str))
    if stored != wanted:
        known = stored if isinstance(stored, dict) else wanted
        other = next((k for k in wanted if known.get(k) != wanted[k]), "format")
        raise InputError(
            f"{file.parent} holds results of other settings ({other} differs); choose another "
            "folder or pass overwrite=True (--overwrite)"
        )


def begin_run(out: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> Results | None:
    """Prepare the results folder; return its results if ``resume`` finds a finished run.

    Raises:
        InputError: it holds another run, or an unfinished one that is not to be resumed.
        DataError: the folder cannot be written, or its results cannot be read.
    """
    finished, unfinished = out / "results.json", Progress(out / UNFINISHED)
    for stray in out.glob(".*.tmp"):  # left by a process that was killed while writing
        stray.unlink(missing_ok=True)
    if not overwrite:
        _check_settings(finished, settings)
        _check_settings(unfinished.header, settings)
        if unfinished.header.exists():
            if not resume:
                raise InputError(
                    f"{out} holds an unfinished run; resume it (--resume) or start over "
                    "(--overwrite)"
                )
            _check_versions(out, unfinished.header)
            return None
        if resume and finished.exists():
            return read_results(finished)
    unfinished.begin(settings)
    return None


def _check_versions(out: Path, header: Path) -> None:
    stored, now = _read_object(header).get("versions"), versions()
    stored = stored if isinstance(stored, dict) else {}
    if changes := [f"{n} {stored.get(n)}, now {now[n]}" for n in now if stored.get(n) != now[n]]:
        raise InputError(
            f"{out} was started with other versions ({'; '.join(changes)}), whose figures may "
            "differ; start over (--overwrite)"
        )


def join_run(out: Path, settings: dict[str, Any]) -> Results | None:
    """What `begin_run` returned in the process that started the run; errors are the same."""
    header = Progress(out / UNFINISHED).header
    if header.exists():
        _check_settings(header, settings)
        return None
    _check_settings(out / "results.json", settings)  # the others finished before this one joined
    return read_results(out / "results.json")


@contextlib.contextmanager
def begun(
    out: Path, settings: dict[str, Any], resume: bool, overwrite: bool, worker: Worker | None
) -> Iterator[Results | None]:
    """Lock the results folder against other runs and prepare it; yield finished results."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot create this folder ({error.strerror})") from error
    with FileLock(out) as lock, contextlib.ExitStack() as stack:
        leading = worker is None or stack.enter_context(worker.main_process_first())
        if leading:
            if not lock.take():
                raise InputError(f"{out}: another run is writing into this folder")
            stored = begin_run(out, settings, resume, overwrite)
        else:
            stored = join_run(out, settings)
        if worker is not None:
            lock.take(shared=True)
        stack.close()  # lets the other processes continue
        yield stored


# -- pieces ------------------------------------------------------------------------------


def _checksum(tensors: State, about: dict[str, Any]) -> str:
    text = fingerprint(tensors) + json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, tensors: State, about: dict[str, Any]) -> None:
    content = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps({**about, "sha256": _checksum(content, about)})
    # The description is stored as a tensor: safetensors gives access to a file's metadata only if
    # it is opened by name, and the name must then be valid Unicode.
    content["about"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(save(content))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error


def _read(path: Path, run: str) -> tuple[State, dict[str, Any]] | None:
    """Read tensors and description; None if the file is missing, damaged or of another run."""
    try:
        tensors = load(path.read_bytes())
        about = json.loads(bytes(tensors.pop("about").tolist()))
        checksum = about.pop("sha256")
        own = about.pop("run") == run and checksum == _checksum(tensors, {**about, "run": run})
    except _DAMAGED:
        return None
    return (tensors, about) if own else None


class Progress:
    """Storage of jobs' pieces by name and number.

    Args:
        folder: folder for the pieces; None keeps them in memory.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._pieces: dict[tuple[str, int], Evaluation] = {}
        self._values: dict[str, float] = {}

    def _file(self, *names: str) -> Path:
        assert self.folder is not None
        return self.folder.joinpath(*names)

    @property
    def header(self) -> Path:
        """The file that identifies the run; while it exists, the run is unfinished."""
        return self._file("run.json")

    @property
    def _run(self) -> str:
        """Identity of the run that the pieces belong to: a hash of settings, versions and start.

        Raises:
            DataError: the header no longer exists.
        """
        try:
            return hashlib.sha256(self.header.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"{self.header}: cannot be read ({error.strerror})") from error

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start an empty run.

        Raises:
            DataError: the header cannot be written.
        """
        self.discard()  # what a process left behind that was killed in `discard`
        # Pieces that could not be deleted do not match the new identity.
        header = {"settings": finite(settings), "versions": versions(), "id": uuid.uuid4().hex}
        try:
            self.header.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.header) as temporary:
                temporary.write_text(json.dumps(header, indent=1, default=str), encoding="utf-8")
        except OSError as error:
            self.discard()
            raise DataError(f"{self.header}: cannot be written ({error.strerror})") from error

    def save(self, name: str, piece: int, evaluation: Evaluation, state: State | None) -> None:
        """Store a finished piece, and the adapter's state after it if more pieces follow.

        Raises:
            DataError: a file cannot be written; existing files are unchanged.
        """
        if self.folder is None:
            self._pieces[name, piece] = evaluation
            return
        run, numbers = self._run, dict(vars(evaluation))
        answers = numbers.pop("answers")
        file = self._file(name, f"{piece:04d}.safetensors")
        _write(file, dict(vars(answers)), {**numbers, "run": run})
        if state is None:
            return
        # Kernels may depend on the memory layout, so it is part of the state.
        layout = torch.channels_last
        strided = [n for n, t in state.items() if t.ndim == 4 and not t.is_contiguous()]
        channels_last = [n for n in strided if state[n].is_contiguous(memory_format=layout)]
        # Written after the piece: a piece without its state is evaluated again.
        about = {"after": piece, "channels_last": channels_last, "run": run}
        _write(file.with_name("state.safetensors"), state, about)

    def evaluations(self, name: str, pieces: int) -> list[Evaluation]:
        """The finished pieces of a job, up to the first that is missing.

        Raises:
            DataError: the run is finished, and another process is deleting its pieces.
        """
        finished: list[Evaluation] = []
        run = "" if self.folder is None else self._run
        for piece in range(pieces):
            evaluation = self._pieces.get((name, piece))
            if self.folder is not None:
                stored = _read(self._file(name, f"{piece:04d}.safetensors"), run)
                if stored is not None:
                    evaluation = Evaluation(Answers(**stored[0]), **stored[1])
            if evaluation is None:
                break
            finished.append(evaluation)
        if self.folder is not None and run != self._run:
            raise DataError(f"{self.header}: another run has begun in this folder")
        return finished

    def state(self, name: str) -> tuple[int, State] | None:
        """A job's last piece and the adapter's state after it; None if none is stored."""
        if self.folder is None:
            return None
        stored = _read(self._file(name, "state.safetensors"), self._run)
        if stored is None:
            return None
        tensors, about = stored
        for tensor in about["channels_last"]:
            tensors[tensor] = tensors[tensor].contiguous(memory_format=torch.channels_last)
        return about["after"], tensors

    def save_value(self, name: str, value: float) -> None:
        """Store a number; errors as for `save`."""
        self._values[name] = value
        if self.folder is not None:
            tensors = {"value": torch.tensor(value, dtype=torch.float64)}
            _write(self._file(f"{name}.safetensors"), tensors, {"run": self._run})

    def value(self, name: str) -> float | None:
        """The number that `save_value` stored; None if there is none."""
        if self.folder is None:
            return self._values.get(name)
        stored = _read(self._file(f"{name}.safetensors"), self._run)
        return None if stored is None else stored[0]["value"].item()

    def discard(self) -> None:
        """Delete everything."""
        self._pieces.clear()
        self._values.clear()
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.header.unlink()  # first, so that the rest is not mistaken for a run
            shutil.rmtree(self.folder, ignore_errors=True)
