"""What a run consists of, done by one process or by several, and put together at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.images import LabelledImages
from ..errors import DistributedError
from ..utils import robustbench as bridge
from .assembly import describe_run, records_of_methods
from .batches import Loader
from .cells import CorruptionData
from .evaluate import device_of
from .execution import Execution, to_unit
from .orders import shuffled
from .progress import Progress
from .protocols import plan, streams
from .results import Results
from .sharding import Worker
from .tasks import Task, run_task

__all__ = ["Work"]

#: Name of the last task of all, which puts the others together.
_MERGE = "merge"


class Work:
    """The tasks of a run.

    Args:
        nets: the adapter, and the unadapted model if it is to run too.
        settings: as in ``results.json``.

    Raises:
        InputError: a protocol that does not exist or does not fit the data.
    """

    def __init__(
        self,
        nets: list[nn.Module],
        data: CorruptionData,
        settings: dict[str, Any],
        execution: Execution,
        command: str | None,
    ):
        self.nets, self.data, self.settings = nets, data, settings
        self.execution, self.command = execution, command
        self.batch_size = settings["batch_size"]
        self.clean: LabelledImages | None = None
        self.tasks: list[Task] = []
        self._seeded: dict[tuple[int, int], nn.Module] = {}
        concentration = settings["concentration"] or 1.0
        for seed in settings["seeds"]:
            stretches = plan(settings["protocol"], data, seed, concentration)
            for number, stream in enumerate(streams(stretches)):
                for method in range(len(nets)):
                    name = f"method{method}-seed{seed}-stream{number:03d}"
                    self.tasks.append(Task(name, method, seed, number, tuple(stream)))

    def read_clean(self) -> None:
        """Read the uncorrupted images; they become the first tasks."""
        clean, seed = self.data.clean(), self.settings["seeds"][0]
        self.clean = clean[shuffled(len(clean), seed)]
        found = [Task(f"method{i}-clean", i, seed, 0) for i in range(len(self.nets))]
        self.tasks = found + self.tasks

    def _net(self, task: Task) -> nn.Module:
        """The method; of several seeds, a copy on the same model that draws from the task's."""
        net = self.nets[task.method]
        if len(self.settings["seeds"]) < 2 or not hasattr(net, "with_tensors"):
            return net
        key = (task.method, task.seed)
        if key not in self._seeded:
            self._seeded = {k: n for k, n in self._seeded.items() if k[1] == task.seed}
            self._seeded[key] = net.with_tensors(net.config)
            self._seeded[key].seed = task.seed
        return self._seeded[key]

    def _batches(self) -> int:
        clean = 0 if self.clean is None else -(-len(self.clean) // self.batch_size)
        return sum(task.batches(self.batch_size) or clean for task in self.tasks)

    def _clean_accuracy(self, net: nn.Module, advance: Callable[[int], object]) -> float:
        """On its own: a fresh adapter before, and none of it left after."""
        device = device_of(net)

        def model(images: Tensor) -> Tensor:
            advance(1)
            with self.execution.context(device):
                return net(images)

        net.reset()
        images = to_unit(self.clean.images)
        found = bridge.clean_accuracy(model, images, self.clean.labels, self.batch_size, device)
        net.reset()
        return found

    def _run(self, task: Task, loader, kept: Progress, advance, following: Task | None) -> None:
        net = self._net(task)
        if task.stretches:
            cells = following.stretches[0].cells if following and following.stretches else None
            run_task(task, net, loader, kept, self.batch_size, self.execution, advance, cells)
        elif kept.value(task.name) is None:
            kept.save_value(task.name, self._clean_accuracy(net, advance))
        else:
            advance(-(-len(self.clean) // self.batch_size))

    def alone(self, kept: Progress, progress: bool) -> Results:
        """Do all tasks in this process."""
        loader = Loader(self.data.load)
        try:
            with tqdm(
                total=self._batches(), unit="batch", disable=not progress, leave=False
            ) as bar:
                for task, following in zip(self.tasks, [*self.tasks[1:], None], strict=True):
                    bar.set_description(task.title)
                    self._run(task, loader, kept, bar.update, following)
        finally:
            loader.close()
        return self.results(kept)

    def together(
        self,
        kept: Progress,
        worker: Worker,
        run: str,
        finish: Callable[[], object],
        progress: bool,
    ) -> None:
        """Do tasks until there are none left in any process; one of them calls ``finish``."""
        # The longest first, so that nobody waits long for the last one.
        ordered = sorted(self.tasks, key=len, reverse=True)
        tasks = {task.name: task for task in ordered}
        loader, counter = Loader(self.data.load), f"{run}/batches"
        shown = progress and worker.rank == 0
        try:
            with tqdm(total=self._batches(), unit="batch", disable=not shown, leave=False) as bar:

                def advance(count: int) -> None:
                    bar.update(min(worker.count(counter, count), bar.total) - bar.n)

                def waiting() -> None:
                    advance(0)

                while (name := worker.take(run, list(tasks), waiting)) is not None:
                    bar.set_description(tasks[name].title)
                    self._claimed(
                        worker,
                        run,
                        name,
                        lambda: self._run(tasks[name], loader, kept, advance, None),
                    )
                while (name := worker.take(run, [_MERGE], waiting)) is not None:
                    self._claimed(worker, run, name, finish)
        finally:
            loader.close()

    @staticmethod
    def _claimed(worker: Worker, run: str, name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except BaseException:
            with contextlib.suppress(DistributedError):
                worker.release(run, name)  # another process may have what this one lacks
            raise
        worker.finish(run, name)

    def results(self, kept: Progress) -> Results:
        """Put the finished tasks together, in the order of the plan."""
        clean = None if self.clean is None else len(self.clean)
        name, device = self.settings["model"], device_of(self.nets[0])
        methods = records_of_methods(self.tasks, self.nets, kept, self.batch_size, name)
        said = describe_run(self.settings, self.data, methods, device, clean, self.command)
        return Results(self.settings, said, methods)
