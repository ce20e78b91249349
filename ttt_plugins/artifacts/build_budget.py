"""Limits on memory, operations and time for building the model that an artifact describes.

`BuildBudget` counts what torch is asked to create. It cannot see what a constructor does outside
torch (in lists or numpy), so on Linux `rehearse` first builds the model in a child process, for
which the system enforces the limits.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArtifactError

__all__ = ["TOO_LARGE", "BuildBudget", "rehearse"]

TOO_LARGE = "the model described is far larger than the weights beside it"
#: Memory in bytes and processor time in seconds that a child process may take: a constant, and an
#: amount for each number in the weights. The amounts are four times the memory of the model, and
#: ten times the time of its random initialisation.
_BYTES, _BYTES_EACH = 1 << 30, 16
_SECONDS, _SECONDS_EACH = 15.0, 1e-7


class BuildBudget(TorchDispatchMode):
    """Stops a constructor that asks for much more memory than the given weights would fill.

    Every tensor operation is checked before it runs, so nothing is allocated for a refused one.

    Args:
        elements: number of elements of all tensors in the weights file.
        tensors: number of tensors in it.

    Raises:
        ArtifactError: raised inside the block if the operations create more than 16 times
            ``elements`` plus 16 million elements, or if there are more than 100 operations for
            each tensor plus 20,000.
    """

    def __init__(self, elements: int, tensors: int):
        super().__init__()
        self._elements = 16 * elements + (16 << 20)
        self._calls = 100 * tensors + 20_000

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._calls -= 1
        if not func.is_view and not func._schema.is_mutable:
            self._elements -= _asked_for(args)
        if self._calls < 0 or self._elements < 0:
            raise ArtifactError(TOO_LARGE)
        return func(*args, **(kwargs or {}))


def _asked_for(args: tuple) -> int:
    """An upper bound on the number of elements that an operation creates, from its arguments."""
    given = [a.numel() for a in args if isinstance(a, torch.Tensor)]
    sizes = [a for a in args if isinstance(a, (list, tuple))]
    for members in sizes:
        given += [a.numel() for a in members if isinstance(a, torch.Tensor)]
    shapes = [a.shape for a in args if isinstance(a, torch.Tensor)]
    if len(shapes) > 1:
        try:
            given.append(math.prod(torch.broadcast_shapes(*shapes)))
        except RuntimeError:
            given.append(sum(given))
    counts = [math.prod(p) for p in sizes if p and all(type(n) is int and n >= 0 for n in p)]
    if not given:  # arange and linspace take numbers
        counts += [int(abs(a)) for a in args if isinstance(a, (int, float)) and math.isfinite(a)]
    return max(given, default=1) * max(counts, default=1) if counts else max(given, default=1)


def rehearse(build: Callable[[], object], elements: int, where: str) -> None:
    """Run ``build`` in a child process to see whether it stays within the limits.

    The child is a forked copy of this process, like a worker of torch's data loader. On systems
    other than Linux nothing is run.

    Args:
        build: builds the model on the CPU.
        elements: number of elements of the weights that the model is for.
        where: name of the artifact in error messages.

    Raises:
        ArtifactError: ``build`` raised it, or exceeded the limit on memory or on time.
    """
    if sys.platform != "linux":
        return
    memory, seconds = _BYTES + _BYTES_EACH * elements, int(_SECONDS + _SECONDS_EACH * elements)
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        _in_child(build, send, memory, seconds)
    os.close(send)
    try:
        with open(receive, "rb") as stream:
            # Wall time stops a child that only waits, which takes no processor time.
            ready, _, _ = select.select([stream], [], [], 5 * seconds)
            answer = stream.read() if ready else b""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not answer:
        raise ArtifactError(
            f"{where}: {TOO_LARGE}: building it takes more than {memory >> 20:,} MB or {seconds} "
            "seconds"
        )
    if answer != b"built":
        raise ArtifactError(answer.decode("utf-8", "replace"))


def _in_child(build: Callable[[], object], send: int, memory: int, seconds: int) -> None:
    """Build, report the outcome, and end the process in any case."""
    import resource  # absent on Windows

    answer = b""
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for kind, limit in (
            (resource.RLIMIT_AS, taken + memory),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (limit, hard))
        torch.set_num_threads(1)  # a forked process has no other threads
        build()
        answer = b"built"
    except ArtifactError as error:
        answer = str(error).encode("utf-8", "replace")
    finally:
        with contextlib.suppress(OSError):
            os.write(send, answer[:4096])
        os._exit(0)
