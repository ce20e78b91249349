"""on_batch on adapters and in the benchmark, and what TensorBoard, trackio and wandb get of it."""

import copy
import csv
import pickle
import sys

import numpy as np
import pytest
import torch
from benchmark_fakes import FakeAdapter, memory_data

import ttt_plugins as tp
from ttt_plugins.benchmark import run_benchmark
from ttt_plugins.cli import main
from ttt_plugins.hosts.tracking import tracker


def test_a_callback_is_told_about_every_batch(make_model, images):
    net = tp.wrap(make_model("batchnorm"), "tent", window=4, lr=0.05)
    plain = tp.wrap(make_model("batchnorm"), "tent", window=4, lr=0.05)
    seen = []
    net.on_batch = seen.append
    for seed in range(3):
        logits = net(images(4, seed))
        assert torch.equal(logits, plain(images(4, seed)))  # nothing else changes
        shares = logits.softmax(1)
        entropy = -(shares * shares.log()).sum(1).mean().item()
        record = seen[seed]
        assert (record.method, record.batch, record.images) == ("tent", seed + 1, 4)
        assert record.entropy == pytest.approx(entropy, abs=1e-5)
        assert record.loss == net.loss.item()
        assert record.health == net.health()
        assert record.seconds > 0
    assert seen[0].scalars().keys() >= {"loss", "entropy", "seconds", "guard", "health/seen"}
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert copied.on_batch is None
    assert net.with_tensors(net.config).on_batch == net.on_batch
    net.on_batch = None
    net(images(4))
    assert len(seen) == 3
    with pytest.raises(tp.InputError):
        net(images(4) + 5)
    source = tp.wrap(make_model("batchnorm"), "source")
    source.on_batch = seen.append
    source(images(2))
    assert (seen[-1].loss, seen[-1].health, seen[-1].batch) == (None, {}, 0)


@pytest.mark.filterwarnings("ignore:the guard:RuntimeWarning")
def test_what_the_guard_does_is_told_at_its_batch(make_model, images):
    """One class for long: the record of a batch has the actions at that batch, and no others."""
    net = tp.wrap(make_model("batchnorm"), "tent", window=1, lr=0.3)
    seen = []
    net.on_batch = seen.append
    for seed in range(40):
        net(images(1, 3).expand(8, -1, -1, -1) if seed % 2 else images(8, seed))
    told = [event for record in seen for event in record.guard]
    assert told[-len(net.guard_events) :] == net.guard_events
    assert told


def test_the_benchmark_tells_the_cell():
    net, baseline = FakeAdapter(), FakeAdapter("source", lr=0.0)
    told = []
    net.on_batch = told.append
    run_benchmark(net, memory_data({("fog", 3): 8}), baseline=baseline, batch_size=4)
    assert told == []  # an adapter of another's, which calls nothing


def test_the_cells_of_a_run(make_model):
    net = tp.wrap(make_model("batchnorm"), "tent", window=4)
    baseline = tp.wrap(make_model("batchnorm"), "source")
    seen = []
    net.on_batch = baseline.on_batch = mine = seen.append
    data = memory_data({("fog", 3): 8, ("snow", 5): 4})
    run_benchmark(net, data, baseline=baseline, batch_size=4, progress=False)
    found = [(record.method, record.cell) for record in seen]
    for method in ("tent", "source"):
        cells = [cell for name, cell in found if name == method]
        assert cells == ["fog 3", "fog 3", "snow 5"]
    assert net.on_batch is mine


# -- trackers ----------------------------------------------------------------------------------


def test_tensorboard_has_the_scalars(make_model, images, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    net = tp.wrap(make_model("batchnorm"), "tent", window=4)
    seen = []
    with tracker("tensorboard", tmp_path / "tb") as track:
        net.on_batch = lambda record: (track(record), seen.append(record))
        for seed in range(3):
            net(images(4, seed))
    read = EventAccumulator(str(tmp_path / "tb")).Reload()
    for name, of in (("tent/loss", "loss"), ("tent/entropy", "entropy"), ("tent/seconds", None)):
        scalars = read.Scalars(name)
        assert [s.step for s in scalars] == [0, 1, 2]
        if of:
            wanted = [getattr(record, of) for record in seen]
            assert [s.value for s in scalars] == pytest.approx(wanted)


def test_the_command_line_tracks(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "images"
    data = memory_data({("x", 1): 6})
    folder.mkdir()
    cell = data.load(("x", 1))
    pixels = cell.images.permute(0, 2, 3, 1).numpy()
    np.savez(folder / "own.npz", images=pixels, labels=cell.labels.numpy())
    common = ["bundled:source-resnet26bn-cifar10", "--method", "tent", "--track", "tensorboard"]
    out = tmp_path / "run"
    arguments = ["--images", str(folder / "own.npz"), "--batch-size", "3", "--out", str(out)]
    assert main(["benchmark", *common, *arguments]) == 0, capsys.readouterr().err
    read = EventAccumulator(str(tmp_path / "run.track")).Reload()
    assert len(read.Scalars("tent/entropy")) == len(read.Scalars("source/entropy")) == 2
    rows = tmp_path / "rows.csv"
    assert main(["predict", *common, str(folder / "own.npz"), "--out", str(rows)]) == 0
    read = EventAccumulator(str(tmp_path / "rows.csv.track")).Reload()
    assert len(read.Scalars("tent/entropy")) == 1
    assert len(list(csv.reader(rows.open()))) == 7
    field = ["benchmark", common[0], "--field", "--track", "tensorboard", *arguments]
    assert main(field) == 2
    assert "--track follows one adapter" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackio_and_wandb_get_the_same(name, make_model, images, tmp_path, monkeypatch):
    """Offline, with the genuine package where it is installed."""
    library = pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    logged = []
    net = tp.wrap(make_model("batchnorm"), "tent", window=4)
    with tracker(name, tmp_path / "runs", run="mine", config={"lr": 1e-3}) as track:
        genuine = library.log  # wandb has its own from init on
        monkeypatch.setattr(library, "log", lambda *args: (logged.append(args[0]), genuine(*args)))
        net.on_batch = track
        for seed in range(2):
            net(images(4, seed))
    assert [row["tent/step"] for row in logged] == [0, 1]
    assert logged[0].keys() >= {"tent/loss", "tent/entropy", "tent/seconds", "tent/health/seen"}


def test_an_unknown_or_missing_tracker(tmp_path, monkeypatch):
    with pytest.raises(tp.InputError, match="tensorboard, trackio, wandb"):
        tracker("mlflow", tmp_path)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(tp.MissingDependencyError, match="pip install trackio"):
        tracker("trackio", tmp_path)
