"""The processes started by torchrun."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import DistributedError

__all__ = [
    "Place",
    "Worker",
    "backend_for",
    "device_of_process",
    "place_from_environment",
    "worker_from_environment",
]

#: Seconds between two checks of the store while this process waits.
_POLL = 0.05
#: Longest time, in seconds, that process 0 waits until the others have read its last message.
_FAREWELL = 10.0


# -- torchrun ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """What torchrun's environment variables say about this process.

    Attributes:
        rank: rank of this process among all processes, from 0.
        world_size: number of processes.
        local_rank: rank of this process on its machine, from 0.
        restarts: number of times that torchrun has restarted all processes.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    restarts: int = 0


def place_from_environment() -> Place:
    """Read WORLD_SIZE, RANK, LOCAL_RANK and TORCHELASTIC_RESTART_COUNT.

    Returns:
        the place, which is that of a single process if WORLD_SIZE is not set or is 1.

    Raises:
        DistributedError: a value is not a whole number, or RANK is not less than WORLD_SIZE.
    """

    def number(name: str, default: int) -> int:
        text = os.environ.get(name, str(default))
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise DistributedError(
                f"cannot join the other processes: {name} must be a whole number, got "
                f"{text[:40]!r}; torchrun sets it, so leave it unset for a single process"
            )
        return int(text)

    world_size, restarts = number("WORLD_SIZE", 1), number("TORCHELASTIC_RESTART_COUNT", 0)
    if world_size < 2:
        return Place(restarts=restarts)
    place = Place(number("RANK", 0), world_size, number("LOCAL_RANK", 0), restarts)
    if place.rank >= world_size:
        raise DistributedError(
            f"cannot join the other processes: RANK {place.rank} must be less than WORLD_SIZE "
            f"{world_size}; torchrun sets both, so start the processes with torchrun"
        )
    return place


def device_of_process(device: str | torch.device, *, shared: bool = False) -> torch.device:
    """The device of this process; ``"cuda"`` under torchrun becomes the GPU of its local rank.

    Args:
        device: the device that the user requested; one with an index is returned unchanged.
        shared: whether processes may share a GPU if the machine has fewer GPUs than processes.

    Raises:
        DistributedError: there is no GPU for this process; or as for `place_from_environment`.
    """
    device, place = torch.device(device), place_from_environment()
    count = torch.cuda.device_count() if device == torch.device("cuda") else 0
    if place.world_size < 2 or not count:
        return device
    if place.local_rank >= count and not shared:
        raise DistributedError(
            f"process {place.local_rank} of this machine has no GPU, because there are only "
            f"{count}: start one process per GPU (torchrun --nproc-per-node {count})"
        )
    return torch.device("cuda", place.local_rank % count)


def backend_for(device: torch.device) -> str:
    """The backend of torch.distributed for tensors on a device: nccl on GPUs, gloo elsewhere."""
    return "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"


class Worker:
    """One of several processes that execute the same runs in the same order.

    Args:
        store: store of torch.distributed, the same for all processes.
        rank: rank of this process, from 0.
        world_size: number of processes.

    Raises:
        DistributedError: raised by every method if the store cannot be reached.
    """

    def __init__(self, store: Any, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        self._blocks = 0

    def _ask(self, call: str, *args: Any) -> Any:
        try:
            return getattr(self.store, call)(*args)
        except RuntimeError as error:  # the base class of torch.distributed's errors
            raise DistributedError(
                "the store of the processes cannot be reached (has process 0 ended?); finished "
                f"cells are on disk, resume with --resume ({str(error).splitlines()[0]})"
            ) from error

    @staticmethod
    def _wait(ready: Callable[[], bool], patience: float = float("inf")) -> None:
        # The store's own wait cannot be interrupted by Ctrl-C or SIGTERM.
        end = time.monotonic() + patience
        while not ready() and time.monotonic() < end:
            time.sleep(_POLL)

    def _count(self, what: str, more: int = 0) -> int:
        return self._ask("add", f"block{self._blocks}/{what}", more)

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[bool]:
        """Let process 0 run the block before the others, once all processes have reached it.

        Yields:
            whether this is process 0.

        Raises:
            DistributedError: process 0 failed in the block.
        """
        self._blocks += 1
        key = f"block{self._blocks}"
        self._count("arrived", 1)
        if self.rank:
            self._wait(lambda: self._ask("check", [key]))
            verdict = self._ask("get", key).decode()
            self._count("read", 1)
            if verdict != "ok":
                raise DistributedError(f"process 0 failed: {verdict}")
            yield False
            return
        self._wait(lambda: self._count("arrived") >= self.world_size)
        try:
            yield True
        except BaseException as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            with contextlib.suppress(DistributedError):  # the first error is the one to report
                self._ask("set", key, reason)
            raise
        self._ask("set", key, "ok")

    def leave(self) -> None:
        """Leave the group; process 0, which may host the store, waits until the others are done."""
        if self.rank or not self._blocks:
            return
        with contextlib.suppress(DistributedError):
            self._wait(lambda: self._count("read") >= self.world_size - 1, _FAREWELL)


def worker_from_environment() -> Worker | None:
    """This process as torchrun's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe it.

    Returns:
        the worker; None for a single process.

    Raises:
        DistributedError: the other processes cannot be reached.
    """
    place = place_from_environment()
    if place.world_size < 2:
        return None
    try:
        places = rendezvous("env://", timeout=timedelta(minutes=10))
        store, rank, world_size = next(iter(places))
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"cannot join the other processes ({error})") from error
    # The store may outlive processes that torchrun restarts.
    store = dist.PrefixStore(f"ttt_plugins/{place.restarts}", store)  # pyright: ignore[reportPrivateImportUsage]
    return Worker(store, rank, world_size)
