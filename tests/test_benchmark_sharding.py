"""Several processes on one run: the queue, and two processes of which one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from benchmark_fakes import FakeAdapter, figures, memory_data, write_parquet
from torch.distributed import HashStore, TCPStore

from ttt_plugins.benchmark import Results, Worker, run_benchmark, worker_from_environment
from ttt_plugins.benchmark.progress import UNFINISHED
from ttt_plugins.cli import main
from ttt_plugins.errors import DataError, DistributedError, InputError

LEASE = 0.4


@pytest.fixture
def quick_plots(monkeypatch):
    monkeypatch.setattr("ttt_plugins.benchmark.plots.plot_results", lambda results: b"PNG")


@pytest.fixture
def workers():
    """``workers(n)``: processes of one run, in this one, on one store."""
    made = []

    def make(count, lease=LEASE):
        store = HashStore()
        made.extend(Worker(store, rank, count, lease) for rank in range(count))
        return made

    yield make
    for worker in made:
        worker._stop.set()


def die(worker):
    """Stop counting, as a dead process does."""
    worker._stop.set()
    worker._thread.join()


# -- the queue ---------------------------------------------------------------------------


def test_everything_is_handed_out_once(workers):
    first, second = workers(2)
    names = [f"task{i}" for i in range(40)]
    got = {first: [], second: []}

    def take(worker):
        while (name := worker.take("run", names)) is not None:
            got[worker].append(name)
            time.sleep(0.001)
            worker.finish("run", name)

    threads = [threading.Thread(target=take, args=(w,)) for w in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got[first] + got[second]) == sorted(names)
    assert got[first]
    assert got[second]


def test_a_dead_processs_task_is_taken_over_and_a_living_ones_is_not(workers):
    first, second = workers(2)
    assert first.take("run", ["a", "b"]) == "a"
    assert second.take("run", ["a", "b"]) == "b"
    second.finish("run", "b")
    waited = []
    start = time.monotonic()

    def idle():
        waited.append(time.monotonic() - start)
        if len(waited) == 20:  # far more than a lease: the first one is alive all the while
            die(first)

    assert second.take("run", ["a", "b"], idle) == "a"
    assert waited[19] > LEASE
    # it was not dead after all, and says that it is done: that is not its business any more
    first.finish("run", "a")
    assert first._swap("run/a", "nobody", "nobody") == second.name
    second.finish("run", "a")
    assert second.take("run", ["a", "b"]) is None


def test_a_task_given_back_goes_to_whoever_asks(workers):
    first, second = workers(2)
    assert first.take("run", ["a"]) == "a"
    first.release("run", "a")
    assert second.take("run", ["a"]) == "a"


def test_process_0_comes_first_and_its_failure_is_everybodys(workers):
    first, second = workers(2)
    order = []

    def follow():
        with second.leader_first("data") as leading:
            order.append(("second", leading))

    thread = threading.Thread(target=follow)
    thread.start()
    with first.leader_first("data") as leading:
        time.sleep(0.1)
        order.append(("first", leading))
    thread.join()
    assert order == [("first", True), ("second", False)]
    with pytest.raises(DataError), first.leader_first("more"):
        raise DataError("no such folder")
    failed = pytest.raises(DistributedError, match="process 0 failed: no such folder")
    with failed, second.leader_first("more"):
        raise AssertionError
    die(first)
    with pytest.raises(DistributedError, match="process 0 ended"), second.leader_first("last"):
        raise AssertionError


def test_process_0_begins_no_run_before_all_came_to_the_last(workers):
    first, second = workers(2, lease=5)
    order = []

    def follow():
        with second.leader_first("run1"):
            time.sleep(0.3)
            order.append("second in run1")

    thread = threading.Thread(target=follow)
    with first.leader_first("run1"):
        thread.start()
    with first.leader_first("run2"):
        order.append("first in run2")
    thread.join()
    assert order == ["second in run1", "first in run2"]


def test_process_0_goes_on_without_the_dead(workers):
    first, second, third = workers(3)
    die(second)
    with first.leader_first("run1"):
        pass
    with third.leader_first("run1"):
        pass
    with first.leader_first("run2") as leading:
        assert leading


def test_process_0_leaves_last(workers):
    first, second, third = workers(3)
    die(third)
    left = []

    def leave():
        first.leave()
        left.append("first")

    thread = threading.Thread(target=leave)
    thread.start()
    time.sleep(1.5 * LEASE)
    assert not left
    second.leave()
    thread.join(20 * LEASE)
    assert left == ["first"]


def test_a_store_that_is_gone():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = TCPStore(
        "127.0.0.1",
        server.port,
        is_master=False,
        timeout=timedelta(seconds=5),
        wait_for_workers=False,
    )
    worker = Worker(store, 1, 2, LEASE)
    del server
    with pytest.raises(DistributedError, match="--resume"):
        worker.take("run", ["a"])
    worker.leave()  # and leaving is no error


def test_started_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert worker_from_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert worker_from_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "nonsense")
    with pytest.raises(DistributedError, match="cannot join"):
        worker_from_environment()


# -- runs --------------------------------------------------------------------------------

COUNTS = {("fog", 1): 20, ("fog", 5): 30, ("snow", 1): 20, ("snow", 5): 9, ("frost", 5): 16}


def _run(out, worker=None, net=None, **options):
    options = {"batch_size": 7, "progress": False, "model_name": "a/b", "seed": [0, 3], **options}
    source = FakeAdapter("source", lr=0.0)
    return run_benchmark(
        net or FakeAdapter(),
        memory_data(COUNTS),
        baseline=source,
        out=out,
        worker=worker,
        **options,
    )


@pytest.mark.parametrize("protocol", ["reset-per-cell", "reset-per-corruption", "gradual"])
def test_threads_as_processes(protocol, workers, tmp_path, quick_plots):
    found, nets = {}, [FakeAdapter(), FakeAdapter()]

    def go(worker):
        out = tmp_path / "out"
        # Twice, for a process may make several runs.
        _run(out, worker, protocol="continual")
        found[worker.rank] = _run(out, worker, nets[worker.rank], protocol=protocol, overwrite=True)

    threads = [threading.Thread(target=go, args=(w,)) for w in workers(2, lease=5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = _run(tmp_path / "alone", protocol=protocol)
    assert figures(found[0]) == figures(found[1]) == figures(alone)
    for name in ("unaggregated_results.csv", "b_fake.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "alone" / name).read_text()
    # nothing was done twice
    assert sum(net.forwards for net in nets) == sum(c.forwards for c in alone.methods[0].cells)


def test_an_error_in_one_process_leaves_its_task_to_another(workers, tmp_path, quick_plots):
    class Failing(FakeAdapter):
        def forward(self, images):
            raise MemoryError

    class Waiting(FakeAdapter):
        def forward(self, images):
            thread.join()
            return super().forward(images)

    first, second = workers(2, lease=60)
    errors = []

    def fail():
        try:
            _run(tmp_path / "out", second, Failing())
        except MemoryError as error:
            errors.append(error)

    thread = threading.Thread(target=fail)
    thread.start()
    found = _run(tmp_path / "out", first, Waiting())
    assert len(errors) == 1
    assert figures(found) == figures(_run(None))


def test_several_processes_need_a_folder(workers):
    with pytest.raises(InputError, match="give out"):
        _run(None, workers(2)[0])


VICTIM = """
import os, signal, sys
from datetime import timedelta
import torch
from torch import distributed
torch.set_num_threads(1)
from benchmark_fakes import FakeAdapter, memory_data
from ttt_plugins.benchmark import Worker, run_benchmark

rank, port, out, victim = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
store = distributed.TCPStore(
    "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
)
gloo = distributed.PrefixStore("gloo", store)
distributed.init_process_group("gloo", store=gloo, rank=rank, world_size=2)
distributed.barrier()

class Mortal(FakeAdapter):
    seen = 0
    def forward(self, images):
        self.seen += 1
        if rank == victim and self.seen == 6:
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if rank != victim and self.seen == 1:
            store.get("go")  # until the victim is dead: it gets its share for certain
        return super().forward(images)

counts = eval(sys.argv[5])
worker = Worker(store, rank, 2, lease=1.0)
results = run_benchmark(
    Mortal(), memory_data(counts), baseline=FakeAdapter("source", lr=0.0), out=out, worker=worker,
    batch_size=7, progress=False, model_name="a/b", seed=[0, 3], protocol="reset-per-corruption",
)
worker.leave()
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_two_gloo_processes_one_killed_half_way(victim, tmp_path):
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    argv = [sys.executable, "-W", "ignore", "-c", VICTIM]
    rest = [str(server.port), str(out), str(victim), repr(COUNTS)]
    running = [
        subprocess.Popen([*argv, str(rank), *rest], env=environment, stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        assert running[victim].wait(120) == -signal.SIGKILL
        assert (out / UNFINISHED / "run.json").exists()
        server.set("go", "yes")
        assert running[1 - victim].wait(120) == 0
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stdout.close()
    found = Results.from_json((out / "results.json").read_text())
    alone = _run(tmp_path / "alone", protocol="reset-per-corruption")
    assert figures(found) == figures(alone)  # nothing lost, nothing twice
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "alone").iterdir()
    )
    for name in ("unaggregated_results.csv", "b_fake.json"):
        assert (out / name).read_text() == (tmp_path / "alone" / name).read_text()


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_torchrun_gives_the_figures_of_one_process(tmp_path, capsys):
    import numpy as np
    from benchmark_fakes import random_cell

    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "test.parquet", 12, 3)
    rng = np.random.default_rng(0)
    for name in ("fog", "snow"):
        images = random_cell(rng, 12)[0]
        np.savez(folder / f"{name}.npz", severity_1=images[:6], severity_5=images)
    argv = ["benchmark", "bundled:mgg-resnet26bn-cifar10", "--data-dir", str(folder)]
    argv += ["--corruption", "fog", "snow", "--batch-size", "6", "--seed", "1", "--threads", "1"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(_free_port()), "-m", "ttt_plugins"]
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launch, *argv, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results.json, RobustBench's files") == 1
    assert main([*argv, "--out", str(tmp_path / "alone")]) == 0
    found, alone = (
        Results.from_json((tmp_path / name / "results.json").read_text())
        for name in ("out", "alone")
    )
    assert figures(found) == figures(alone)
    assert found.settings == alone.settings
    assert json.dumps(found.methods[0].config) == json.dumps(alone.methods[0].config)


def test_torchruns_restarted_processes_go_on(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("ttt_plugins.cli.benchmark._run", lambda args, w: asked.update(vars(args)))
    left = []

    class Fake:
        rank = 0

        def leave(self):
            left.append(True)

    monkeypatch.setattr("ttt_plugins.cli.benchmark.worker_from_environment", lambda lease: Fake())
    argv = ["benchmark", "m", "--data-dir", "d", "--out", "o"]
    assert main(argv) == 0
    assert not asked["resume"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(argv) == 0
    assert asked["resume"]
    assert left == [True, True]
