"""The processes started by torchrun, which share every meta-batch of a training."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from ..utils.processes import backend_for, place_from_environment

__all__ = ["Workers"]


class Workers:
    """The processes that share a meta-batch; only this one unless torchrun started several.

    As a context manager it leaves the process group when it exits.

    Attributes:
        count: number of processes.
        rank: rank of this process, from 0.

    Raises:
        DistributedError: torchrun's environment variables are inconsistent.
    """

    def __init__(self, device: torch.device):
        place = place_from_environment()
        self.count, self.rank = place.world_size, place.rank
        self._entered = self.count > 1 and not dist.is_initialized()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        if self._entered:
            dist.init_process_group(backend_for(device))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._entered:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process is the one that saves and prints."""
        return self.rank == 0

    def agree(self, epoch: int, checkpoint: Path) -> None:
        """Make sure that all processes resume after the same epoch.

        Raises:
            InputError: their checkpoints are of different epochs.
        """
        if self.count == 1:
            return
        epochs: list = [None] * self.count
        dist.all_gather_object(epochs, epoch)
        if len(set(epochs)) > 1:
            raise InputError(
                f"the processes have checkpoints of different epochs, {epochs}; all of them must "
                f"share {checkpoint}"
            )

    def share(self, tasks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """This process's share of a meta-batch."""
        return tuple(t[self.rank :: self.count] for t in tasks)

    def add_up(self, grads: dict[str, Tensor], record: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Sum gradients and the log's numbers over all processes."""
        if self.count == 1:
            return grads, record
        flat = torch.cat([*(g.reshape(-1) for g in grads.values()), record])
        dist.all_reduce(flat)
        sums = flat.split([*(g.numel() for g in grads.values()), len(record)])
        named = zip(grads.items(), sums, strict=False)
        return {n: total.view_as(g) for (n, g), total in named}, sums[-1]
