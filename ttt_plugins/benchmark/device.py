"""Use of the device in a run: asynchronous transfer, memory layout, precision, peak memory."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adaptive import AdaptiveModel
from ..data.images import LabelledImages, to_float
from ..errors import InputError
from .cells import Cell
from .protocols import Stretch

__all__ = [
    "Execution",
    "Loader",
    "accelerator",
    "batches",
    "gather",
    "peak_memory",
    "reset_peak_memory",
]

#: Where Linux describes this process.
_PROCESS = Path("/proc/self")
#: Cells, and the sorted rows wanted of each, by the cell's index; None for whole cells.
_Wanted = tuple[tuple[Cell, ...], tuple[tuple[int, tuple[int, ...]], ...] | None]

#: Images are moved to the GPU together if they take at most this fraction of its free memory.
_SHARE = 0.25


def gather(parts: Mapping[int, LabelledImages], picks: Tensor, field: str) -> Tensor:
    """The images or labels of the picked (part, row) pairs (B, 2), in their order."""
    chosen: list[int] = picks[:, 0].unique().tolist()
    sources = {part: getattr(parts[part], field) for part in chosen}
    like = next(iter(sources.values()))
    if len(chosen) == 1:
        return like[picks[:, 1].to(like.device)]
    gathered = like.new_empty((len(picks), *like.shape[1:]))
    for part, source in sources.items():
        in_part = picks[:, 0] == part
        gathered[in_part.to(like.device)] = source[picks[in_part, 1].to(like.device)]
    return gathered


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor to the GPU through pinned memory, so that the copy is asynchronous."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def batches(
    parts: Mapping[int, LabelledImages], rows: Tensor, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield uint8 batches (B, 3, H, W) on the device, of the picked (part, row) pairs (N, 2).

    On a GPU all images are moved together if they fit, and batches are picked there; otherwise
    each batch is sent while the previous one is processed.
    """
    picks = rows.split(batch_size)
    if device.type != "cuda":
        for pick in picks:
            yield gather(parts, pick, "images").to(device)
        return
    size = sum(part.images.numel() for part in parts.values())
    if size <= _SHARE * torch.cuda.mem_get_info(device)[0]:
        flat = torch.cat([_send(part.images, device) for part in parts.values()])
        lengths = torch.tensor([0, *(len(part) for part in parts.values())]).cumsum(0)
        starts = dict(zip(parts, lengths.tolist(), strict=False))
        table = torch.zeros(max(parts) + 1, dtype=torch.int64)
        for part, start in starts.items():
            table[part] = start
        indices = _send(table[rows[:, 0]] + rows[:, 1], device)
        for batch in indices.split(batch_size):
            yield flat[batch]
        return
    ahead: Tensor | None = None
    for pick in picks:
        sent = _send(gather(parts, pick, "images"), device)
        if ahead is not None:
            yield ahead
        ahead = sent
    if ahead is not None:
        yield ahead


class Loader:
    """Reads cells, keeps those that are in use, and prefetches the next ones in a thread.

    Args:
        load: reads one cell.
        load_rows: reads some rows of a cell; None if cells are read as a whole.
    """

    def __init__(
        self,
        load: Callable[[Cell], LabelledImages],
        load_rows: Callable[[Cell, Tensor], LabelledImages] | None = None,
    ):
        self._load, self._load_rows = load, load_rows
        self._thread = ThreadPoolExecutor(1, "ttt-plugins-load")
        self._read: dict[_Wanted, Future[dict[int, LabelledImages]]] = {}

    def _start(self, wanted: _Wanted) -> Future[dict[int, LabelledImages]]:
        if wanted not in self._read:
            self._read[wanted] = self._thread.submit(self._parts, wanted)
        return self._read[wanted]

    def _parts(self, wanted: _Wanted) -> dict[int, LabelledImages]:
        cells, rows = wanted
        if rows is None or self._load_rows is None:
            return {i: self._load(cell) for i, cell in enumerate(cells)}
        return {i: self._load_rows(cells[i], torch.tensor(chosen)) for i, chosen in rows}

    def __call__(
        self, cells: tuple[Cell, ...], following: tuple[Cell, ...] | None = None
    ) -> dict[int, LabelledImages]:
        """Return the images by position in ``cells``, and prefetch the cells in ``following``."""
        return self._get((cells, None), None if following is None else (following, None))

    def piece(
        self, stretch: Stretch, rows: Tensor, following: tuple[Stretch, Tensor] | None
    ) -> tuple[dict[int, LabelledImages], Tensor]:
        """Images for some rows (N, 2) of a stretch, and the pairs that pick them from these images.

        Only these rows are read if the data can be read by row. Those of ``following`` are
        prefetched.
        """
        ahead = None if following is None else self._wanted(*following)
        wanted = self._wanted(stretch, rows)
        parts = self._get(wanted, ahead)
        if wanted[1] is None:
            return parts, rows
        picks = rows.clone()
        for part, read in wanted[1]:
            in_part = rows[:, 0] == part
            picks[in_part, 1] = torch.searchsorted(
                torch.tensor(read), rows[in_part, 1].contiguous()
            )
        return parts, picks

    def _wanted(self, stretch: Stretch, rows: Tensor) -> _Wanted:
        if self._load_rows is None:
            return stretch.cells, None
        parts = rows[:, 0].unique().tolist()
        wanted = (tuple(rows[rows[:, 0] == part, 1].unique().tolist()) for part in parts)
        return stretch.cells, tuple(zip(parts, wanted, strict=True))

    def _get(self, wanted: _Wanted, following: _Wanted | None) -> dict[int, LabelledImages]:
        reading = self._start(wanted)
        # All others are dropped, so that at most two sets of images are in memory.
        for other in [w for w in self._read if w not in (wanted, following)]:
            del self._read[other]
        if following is not None:
            self._start(following)
        try:
            return reading.result()
        except BaseException:
            self._read.pop(wanted, None)
            raise

    def close(self) -> None:
        """End the thread and drop the cells that it has read."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._read.clear()


# -- precision and memory ----------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """How a run uses the machine, which its results record; the defaults change nothing.

    Attributes:
        channels_last: whether images and convolution weights use the NHWC memory layout. The
            model's own weights are converted; their values do not change.
        autocast: ``"bfloat16"`` or ``"float16"`` to run the model under ``torch.autocast``.
        compile: backend of ``torch.compile`` for the model, such as ``"inductor"``.

    Raises:
        InputError: the type or the compile backend is unknown.
    """

    channels_last: bool = False
    autocast: str | None = None
    compile: str | None = None

    def __post_init__(self):
        if self.autocast not in (None, "bfloat16", "float16"):
            raise InputError(f"autocast must be bfloat16 or float16, got {self.autocast!r}")
        if self.compile is not None:
            known = torch.compiler.list_backends(exclude_tags=())
            if self.compile not in known:
                raise InputError(f"no compile backend {self.compile!r}; known backends are {known}")

    def prepare(self, net: AdaptiveModel) -> None:
        """Apply these settings to an adapter, in place."""
        if self.channels_last:
            net.to(memory_format=torch.channels_last)
        if self.compile is not None:
            net.backbone.compile(backend=self.compile)

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context manager to run the model in."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, self.autocast))

    def unit(self, images: Tensor) -> Tensor:
        """Convert uint8 images on the device to float32 in [0, 1], in this memory layout."""
        scaled = to_float(images)
        if self.channels_last:
            return scaled.contiguous(memory_format=torch.channels_last)
        return scaled


def accelerator(device: torch.device) -> dict[str, Any] | None:
    """Facts that the last bits of a GPU's figures depend on; None for other devices."""
    if device.type != "cuda":
        return None
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        # "highest" means float32; convolutions use TF32 unless that is disabled separately.
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of `peak_memory`; on the CPU this is possible only under Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _PROCESS.joinpath("clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes since `reset_peak_memory`: of tensors on the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        peak = re.search(r"VmHWM:\s*(\d+) kB", _PROCESS.joinpath("status").read_text())
        if peak is not None:
            return int(peak[1]) * 1024
    try:
        import resource
    except ImportError:  # not available on Windows
        return 0
    # This peak is since the start of the process; macOS reports bytes, other systems kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
