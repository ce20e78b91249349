"""The benchmark's example scripts at tiny size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_fakes import random_cell, write_parquet

from ttt_plugins.benchmark import Execution
from ttt_plugins.cli import main
from ttt_plugins.errors import MissingDependencyError
from ttt_plugins.utils import robustbench as bridge

EXAMPLES = Path(__file__).parent.parent / "examples"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data_dir(tmp_path):
    write_parquet(tmp_path / "test.parquet", 12, 3)
    for i, name in enumerate(("fog", "snow")):
        images = random_cell(np.random.default_rng(i), 12)[0]
        np.savez(tmp_path / f"{name}.npz", severity_5=images)
    return tmp_path


@pytest.fixture
def robustbench():
    try:
        return bridge.import_robustbench()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def test_robustbench_loop(robustbench, make_net, make_model, tmp_path, capsys):
    loop = _load("robustbench_loop")
    streams = list(loop.from_sample(10))
    net = make_net("tent", make_model("batchnorm"))
    found = loop.evaluate(net, streams, 4)
    for name, x, y in streams:
        fresh, right = make_net("tent", make_model("batchnorm")), 0
        for rows in torch.arange(10).split(4):
            right += int((fresh(x[rows]).argmax(1) == y[rows]).sum())
        assert found[name] == pytest.approx(right / 10)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.arange(10_000) % 10)
    shape = (50_000, 32, 32, 3)
    first = robustbench.data.CORRUPTIONS[0]
    np.lib.format.open_memmap(folder / f"{first}.npy", "w+", np.uint8, shape).flush()
    name, x, y = next(iter(loop.from_folder(tmp_path, 3, 5)))
    assert (name, len(x), y.tolist()) == (first, 3, [0, 1, 2])
    loop.main(["--n-examples", "4"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(streams)


def test_overhead(make_net, make_model, data_dir):
    speed = _load("benchmark_speed")
    net = make_net("tent", make_model("batchnorm"))
    found = speed.overhead(net, data_dir, 4, 1, corruptions=["fog", "snow"], severities=[5])
    assert found["bare_s"] > 0
    assert found["outside"] > 0
    assert found["overhead"] == pytest.approx(found["benchmark_s"] / found["bare_s"] - 1)


def test_processes(data_dir, monkeypatch):
    """The commands parse and agree; that torchrun shares them out is tested elsewhere."""
    speed, cores = _load("benchmark_speed"), []

    def seconds(command, held):
        cores.append(held)
        shared = "torch.distributed.run" in command
        assert shared == (len(cores) == 2)
        assert main(command[command.index("ttt_plugins") + 1 :]) == 0
        return 1.0 if shared else 1.5

    monkeypatch.setattr(speed, "_seconds", seconds)
    arguments = ["ttt_resnet26_bn", "--method", "source", "--data-dir", str(data_dir)]
    arguments += ["--corruption", "fog", "--batch-size", "6"]
    found = speed.processes(arguments)
    assert found == {"one_s": 1.5, "shared_s": 1.0, "speedup": 1.5}
    assert len(cores[0]) == 1
    assert cores[1] is None


def test_full_run_and_profile(make_net, make_model, tmp_path):
    speed = _load("benchmark_speed")
    data = speed.synthetic(6, 9)
    assert list(data.counts.values()) == [9] * 6
    nets = [make_net(name, make_model("batchnorm")) for name in ("mgg", "source")]
    execution = Execution(channels_last=True, compile="eager")
    found = speed.full(*nets, 2, 8, 4, execution)
    assert len(found) == 6
    assert all(value > 0 for value in found.values())
    assert found["adapting_images_per_s_in_all"] < found["adapting_images_per_s"]
    trace = tmp_path / "trace.json"
    net = make_net("mgg", make_model("batchnorm"))
    share = speed.profile(net, 4, 2, trace=trace)
    assert 0 < share["busy"] <= 1
    assert trace.stat().st_size


def test_robustbenchs_own_benchmark_cannot_serve(robustbench, make_net, make_model, monkeypatch):
    """What the docstring of `robustbench_loop` says of it, whatever its data are."""
    clean = (torch.rand(4, 3, 32, 32), torch.arange(4))
    cifar10 = robustbench.model_zoo.enums.BenchmarkDataset("cifar10")
    loaders = {cifar10: lambda *_: clean}
    monkeypatch.setattr(robustbench.data, "_clean_dataset_loaders", loaders)
    net = make_net("tent", make_model("batchnorm"))
    with pytest.raises(TypeError, match="prepr"):
        robustbench.eval.benchmark(net, dataset="cifar10", threat_model="corruptions")
