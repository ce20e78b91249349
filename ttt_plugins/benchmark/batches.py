"""From the images of cells to batches on the device, without making the device wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..data.images import LabelledImages
from .cells import Cell

__all__ = ["Loader", "batches", "gather"]

#: Images move to the GPU at once if they take at most this share of its free memory.
_SHARE = 0.25


def gather(parts: Mapping[int, LabelledImages], picks: Tensor, field: str) -> Tensor:
    """The images or labels of the picked (part, row) pairs (B, 2), in their order."""
    chosen = picks[:, 0].unique().tolist()
    sources = {part: getattr(parts[part], field) for part in chosen}
    like = next(iter(sources.values()))
    if len(chosen) == 1:
        return like[picks[:, 1].to(like.device)]
    gathered = like.new_empty((len(picks), *like.shape[1:]))
    for part, source in sources.items():
        places = picks[:, 0] == part
        gathered[places.to(like.device)] = source[picks[places, 1].to(like.device)]
    return gathered


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the GPU through pinned memory, so that the copy runs beside the host's work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def batches(
    parts: Mapping[int, LabelledImages], rows: Tensor, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """uint8 batches (B, 3, H, W) on the device, of the picked (part, row) pairs (N, 2).

    On a GPU all images are moved at once where they fit, and batches are picked there; else
    each batch is sent while the one before it is worked on.
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
        places = _send(table[rows[:, 0]] + rows[:, 1], device)
        for chosen in places.split(batch_size):
            yield flat[chosen]
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
    """Reads cells, keeps the last ones read, and reads those named next in a thread."""

    def __init__(self, load: Callable[[Cell], LabelledImages]):
        self._load = load
        self._thread = ThreadPoolExecutor(1, "ttt-plugins-load")
        self._read: dict[tuple[Cell, ...], Future] = {}

    def _start(self, cells: tuple[Cell, ...]) -> Future:
        if cells not in self._read:
            self._read[cells] = self._thread.submit(
                lambda: {i: self._load(cell) for i, cell in enumerate(cells)}
            )
        return self._read[cells]

    def __call__(
        self, cells: tuple[Cell, ...], following: tuple[Cell, ...] | None = None
    ) -> dict[int, LabelledImages]:
        """Position in ``cells`` -> images; ``following`` are read meanwhile."""
        found = self._start(cells)
        # All others go, so that at most two sets of cells are in memory.
        for other in [c for c in self._read if c not in (cells, following)]:
            del self._read[other]
        if following is not None:
            self._start(following)
        try:
            return found.result()
        except BaseException:
            self._read.pop(cells, None)
            raise

    def close(self) -> None:
        """End the thread; what it is reading is thrown away."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._read.clear()
