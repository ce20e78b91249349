"""Several processes on one run: claims by locks, and two processes of which one is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import forked
import pytest
import torch
from benchmark_fakes import FakeAdapter, figures, memory_data, write_parquet
from torch import distributed
from torch.distributed import HashStore, TCPStore

from ttt_plugins.benchmark import Results, Worker, run_benchmark, worker_from_environment
from ttt_plugins.benchmark.resume import UNFINISHED
from ttt_plugins.cli import main
from ttt_plugins.errors import DataError, DistributedError, InputError
from ttt_plugins.utils.locks import FileLock
from ttt_plugins.utils.processes import (
    Place,
    backend_for,
    device_of_process,
    place_from_environment,
)


@pytest.fixture
def quick_plots(monkeypatch):
    monkeypatch.setattr("ttt_plugins.benchmark.plots.plot_results", lambda results: b"PNG")


def workers(count):
    """Processes of one run, in this one, on one store."""
    store = HashStore()
    return [Worker(store, rank, count) for rank in range(count)]


# -- locks -------------------------------------------------------------------------------


def test_a_lock_belongs_to_one(tmp_path):
    with FileLock(tmp_path / "lock") as first, FileLock(tmp_path / "lock") as second:
        assert first.take()
        assert not second.take()
        start = time.monotonic()
        assert not second.take(patience=0.2)
        assert time.monotonic() - start >= 0.2
    with FileLock(tmp_path / "lock") as third:
        assert third.take()


def test_a_folder_may_be_shared(tmp_path):
    with FileLock(tmp_path) as first, FileLock(tmp_path) as second, FileLock(tmp_path) as third:
        assert first.take()
        assert not second.take(shared=True)
        assert first.take(shared=True)
        assert second.take(shared=True)
        assert not third.take()
    assert not list(tmp_path.iterdir())


def _hold(folder):
    with FileLock(folder) as lock:
        print(lock.take(), flush=True)
        time.sleep(120)


def test_a_lock_ends_with_a_process_that_is_killed(tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    out.mkdir()
    said.touch()
    holder = forked.start(_hold, out, output=said)
    with FileLock(out) as lock:
        try:
            while holder.is_alive() and said.read_text() != "True\n":
                time.sleep(0.002)
            assert holder.is_alive()
            assert not lock.take()
            with pytest.raises(InputError, match="another run is writing"):
                _run(out)
        finally:
            holder.kill()
            holder.join()
        assert lock.take()


# -- process 0 first ---------------------------------------------------------------------


def test_process_0_comes_first_and_its_failure_is_everybodys():
    first, second = workers(2)
    order, errors = [], []

    def follow():
        with second.main_process_first() as leading:
            order.append(("second", leading))
        try:
            with second.main_process_first():
                order.append("second went on")
        except DistributedError as error:
            errors.append(str(error))

    thread = threading.Thread(target=follow)
    thread.start()
    with first.main_process_first() as leading:
        time.sleep(0.2)
        order.append(("first", leading))
    with pytest.raises(DataError), first.main_process_first():
        raise DataError("no such folder")
    thread.join()
    assert order == [("first", True), ("second", False)]
    assert errors == ["process 0 failed: no such folder"]


def test_process_0_begins_no_run_before_all_came_to_the_last():
    first, second = workers(2)
    order = []

    def follow():
        with second.main_process_first():
            time.sleep(0.3)
            order.append("second in its first block")
        with second.main_process_first():
            pass

    thread = threading.Thread(target=follow)
    thread.start()
    with first.main_process_first():
        pass
    with first.main_process_first():
        order.append("first in its second block")
    thread.join()
    assert order == ["second in its first block", "first in its second block"]


def test_process_0_leaves_when_its_last_word_was_read():
    first, second = workers(2)
    left = []

    def lead():
        with first.main_process_first():
            pass
        first.leave()
        left.append("first")

    thread = threading.Thread(target=lead)
    thread.start()
    second._blocks += 1  # it has arrived, and is slow to look
    second._count("arrived", 1)
    time.sleep(0.4)
    assert not left
    second._count("read", 1)
    thread.join()
    assert left == ["first"]
    second.leave()  # which waits for no other process


def test_a_store_that_is_gone():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = TCPStore(
        "127.0.0.1",
        server.port,
        is_master=False,
        timeout=timedelta(seconds=5),
        wait_for_workers=False,
    )
    worker = Worker(store, 1, 2)
    del server
    with pytest.raises(DistributedError, match="--resume"), worker.main_process_first():
        raise AssertionError
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "abc"),
        ("WORLD_SIZE", ""),
        ("WORLD_SIZE", "-2"),
        ("RANK", "1.5"),
        ("RANK", "7"),
        ("LOCAL_RANK", "9" * 5000),
        ("TORCHELASTIC_RESTART_COUNT", "\u0663"),
    ],
)
def test_an_environment_that_cannot_be(name, value, tmp_path, monkeypatch, capsys):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    assert place_from_environment() == Place()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=f"cannot join the other processes: {name}"):
        place_from_environment()
    monkeypatch.chdir(tmp_path)
    for words in (["benchmark", "m"], ["train", "mt3"]):
        assert main([*words, "--data-dir", "d", "--out", "o"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ttt-plugins: error: cannot join the other processes: {name}")
    assert not list(tmp_path.iterdir())


def test_a_gpu_for_each_process(monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_process("cuda") == torch.device("cuda")
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert device_of_process("cuda") == torch.device("cuda:1")
    assert device_of_process("cuda:0") == torch.device("cuda:0")
    assert device_of_process("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_process("cuda", shared=True) == torch.device("cuda:1")
    with pytest.raises(
        DistributedError, match="process 3 of this machine has no GPU, because there are only 2"
    ):
        device_of_process("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of_process("cuda") == torch.device("cuda")  # which then says why it cannot be


@pytest.mark.parametrize("nccl", [True, False])
def test_the_backend_for_a_device(nccl, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    assert backend_for(torch.device("cuda", 1)) == ("nccl" if nccl else "gloo")
    assert backend_for(torch.device("cpu")) == "gloo"


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
def test_threads_as_processes(protocol, tmp_path, quick_plots):
    found, nets = {}, [FakeAdapter(), FakeAdapter()]

    def go(worker):
        out = tmp_path / "out"
        # Twice, for a process may make several runs.
        _run(out, worker, protocol="continual")
        found[worker.rank] = _run(out, worker, nets[worker.rank], protocol=protocol, overwrite=True)

    threads = [threading.Thread(target=go, args=(w,)) for w in workers(2)]
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


def test_an_error_in_one_process_leaves_its_job_to_another(tmp_path, quick_plots):
    class Failing(FakeAdapter):
        def forward(self, images):
            raise MemoryError

    class Waiting(FakeAdapter):
        def forward(self, images):
            thread.join()
            return super().forward(images)

    first, second = workers(2)
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


def test_several_processes_need_a_folder():
    with pytest.raises(InputError, match="give out"):
        _run(None, workers(2)[0])


class Mortal(FakeAdapter):
    """One rank kills its process half-way; the others wait for that, so that it gets its share."""

    def __init__(self, store, dies):
        super().__init__()
        self.store, self.dies, self.seen = store, dies, 0

    def forward(self, images):
        self.seen += 1
        if self.dies and self.seen == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.dies and self.seen == 1:
            self.store.get("go")
        return super().forward(images)


def _work(rank, port, out, victim):
    patience = timedelta(seconds=60)
    options = {"is_master": False, "wait_for_workers": False, "timeout": patience}
    store = TCPStore("127.0.0.1", port, **options)
    gloo = distributed.PrefixStore("gloo", store)
    distributed.init_process_group("gloo", store=gloo, rank=rank, world_size=2)
    distributed.barrier()
    worker = Worker(store, rank, 2)
    _run(out, worker, Mortal(store, rank == victim), protocol="reset-per-corruption")
    worker.leave()


@pytest.mark.parametrize("victim", [0, 1])
def test_two_gloo_processes_one_killed_half_way(victim, tmp_path):
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = tmp_path / "out"
    running = [
        forked.start(
            _work, rank, server.port, out, victim, environment={"GLOO_SOCKET_IFNAME": "lo"}
        )
        for rank in (0, 1)
    ]
    try:
        running[victim].join(120)
        assert running[victim].exitcode == -signal.SIGKILL
        assert (out / UNFINISHED / "run.json").exists()
        server.set("go", "yes")
        running[1 - victim].join(120)
        assert running[1 - victim].exitcode == 0
    finally:
        for process in running:
            process.kill()
            process.join()
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


def test_torchruns_restarted_processes_resume(tmp_path, monkeypatch):
    asked, left = [], []

    class Fake:
        rank = 0

        def main_process_first(self):
            return contextlib.nullcontext(True)

        def leave(self):
            left.append(True)

    def run(*_, **options):
        asked.append(options["resume"])
        raise InputError("this is enough")

    data = memory_data({("fog", 5): 4})
    monkeypatch.setattr("ttt_plugins.cli.benchmark.worker_from_environment", Fake)
    monkeypatch.setattr("ttt_plugins.cli.benchmark.open_dataset", lambda *_, **__: data)
    monkeypatch.setattr("ttt_plugins.cli.benchmark.run_benchmark", run)
    argv = ["benchmark", "bundled:source-resnet26-cifar10", "--method", "source"]
    argv += ["--data-dir", "d", "--out", str(tmp_path / "o"), "--lease", "3"]
    assert main(argv) == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(argv) == 2
    assert asked == [False, True]
    assert left == [True, True]
