"""Several processes on one run: a work queue on torch.distributed's store.

A task belongs to the process that writes its name under the task's key first (`compare_set` is
atomic). Every process counts up a key of its own as long as it lives; the tasks of one that has
not counted for the length of a lease are taken over by another, which goes on where the stream's
last finished piece lies on disk. No process waits for a particular other one, except at the start
for process 0.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

from torch import distributed

from ..errors import DistributedError

__all__ = ["Worker", "worker_from_environment"]

_FREE, _DONE = "", "done"


class Worker:
    """One process among several.

    Args:
        store: of torch.distributed, the same for all.
        rank, world_size: which process this is, of how many.
        lease: seconds without a sign of life after which a process counts as dead. Clocks are
            not compared: each process measures on its own how long another was silent.

    Raises:
        DistributedError: from every method, if the store is gone.
    """

    def __init__(self, store, rank: int, world_size: int, lease: float = 60.0):
        self.store, self.rank, self.world_size, self.lease = store, rank, world_size, lease
        self._runs, self._block = 0, ""
        self._beats: dict[str, tuple[int, float]] = {}
        self._done: set[str] = set()
        # A process that torchrun started again is another one with the same rank.
        self.name = f"{rank}.{self._ask('add', 'processes', 1)}"
        self._ask("set", f"process/{rank}", self.name)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True, name="ttt-plugins-beat")
        self._thread.start()

    def _ask(self, call: str, *args):
        try:
            return getattr(self.store, call)(*args)
        except RuntimeError as error:  # of torch.distributed, whichever it is
            raise DistributedError(
                "the store of the processes cannot be reached (has process 0 ended?); finished "
                f"cells are on disk, go on with --resume ({str(error).splitlines()[0]})"
            ) from error

    def _swap(self, key: str, expected: str, desired: str) -> str:
        return self._ask("compare_set", key, expected, desired).decode()

    def _live(self) -> None:
        with contextlib.suppress(DistributedError):
            while not self._stop.wait(self.lease / 5):
                self._ask("add", f"beat/{self.name}", 1)

    def _is_dead(self, name: str) -> bool:
        beat, now = self._ask("add", f"beat/{name}", 0), time.monotonic()
        if self._beats.get(name, (-1, 0))[0] != beat:
            self._beats[name] = (beat, now)
        return now - self._beats[name][1] > self.lease

    def next_run(self) -> str:
        """A prefix for this run's keys; every process makes the same runs in the same order."""
        self._runs += 1
        self._done.clear()
        return f"run{self._runs}"

    @contextlib.contextmanager
    def leader_first(self, key: str) -> Iterator[bool]:
        """Process 0 goes through the block before any other; yields whether this is process 0.

        It first waits until all living processes have gone through its block before this one: a
        process that finds another's tasks all done can be a whole run ahead.

        Raises:
            DistributedError: process 0 failed there, or died.
        """
        if self.rank:
            while not self._ask("check", [key]):
                known = self._ask("check", ["process/0"])
                if known and self._is_dead(self._ask("get", "process/0").decode()):
                    raise DistributedError("process 0 ended before the run began")
                time.sleep(min(0.1, self.lease / 5))
            if (verdict := self._ask("get", key).decode()) != "ok":
                raise DistributedError(f"process 0 failed: {verdict}")
        elif self._block:
            self._wait_for_others(f"{self._block}/through")
        self._block = key
        try:
            yield self.rank == 0
        except BaseException as error:
            if not self.rank:
                self._ask("set", key, " ".join(str(error).split()) or type(error).__name__)
            raise
        finally:
            if self.rank:
                self._ask("set", f"{key}/through/{self.name}", "yes")
        if not self.rank:
            self._ask("set", key, "ok")

    def take(
        self, prefix: str, names: Sequence[str], idle: Callable[[], object] = lambda: None
    ) -> str | None:
        """A task that nobody has, or whose process is dead; None once all are done.

        Waits while all that is left is with living processes, and calls ``idle`` meanwhile.
        """
        while True:
            busy = False
            for name in names:
                key = f"{prefix}/{name}"
                if key in self._done:
                    continue
                holder = self._swap(key, _FREE, self.name)
                if holder not in (self.name, _DONE) and self._is_dead(holder):
                    holder = self._swap(key, holder, self.name)
                if holder == self.name:
                    return name
                if holder == _DONE:
                    self._done.add(key)
                busy |= holder != _DONE
            if not busy:
                return None
            idle()
            time.sleep(min(0.2, self.lease / 5))

    def finish(self, prefix: str, name: str) -> None:
        """Say that a task is done, unless another process has it by now."""
        self._swap(f"{prefix}/{name}", self.name, _DONE)

    def release(self, prefix: str, name: str) -> None:
        """Give a task back undone."""
        self._swap(f"{prefix}/{name}", self.name, _FREE)

    def count(self, key: str, more: int = 0) -> int:
        """A number that all processes add to."""
        return self._ask("add", key, more)

    def leave(self) -> None:
        """The end: process 0, in which the store may live, waits for all that are alive."""
        with contextlib.suppress(DistributedError):
            self._ask("set", f"left/{self.name}", "yes")
            if not self.rank:
                self._wait_for_others("left")
        self._stop.set()
        self._thread.join()

    def _wait_for_others(self, key: str) -> None:
        """Until every other process has written its name under the key, or is dead."""
        while not all(self._wrote(key, rank) for rank in range(1, self.world_size)):
            time.sleep(min(0.1, self.lease / 5))

    def _wrote(self, key: str, rank: int) -> bool:
        if not self._ask("check", [f"process/{rank}"]):
            return self._is_dead(f"never.{rank}")
        name = self._ask("get", f"process/{rank}").decode()
        known = self._ask("check", [f"{key}/{name}"]) or self._ask("check", [f"left/{name}"])
        return known or self._is_dead(name)


def worker_from_environment(lease: float = 60.0) -> Worker | None:
    """The process that torchrun (or RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says this is.

    None if it was started alone.

    Raises:
        DistributedError: the other processes cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        found = distributed.rendezvous("env://", timeout=timedelta(minutes=10))
        store, rank, world_size = next(iter(found))
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"cannot join the other processes ({error})") from error
    # The store may outlive processes that torchrun starts anew.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"ttt_plugins/{attempt}", store)
    return Worker(store, rank, world_size, lease)
