"""``benchmark --field``: the order and the cells of every stream, and resuming, by plain loops."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import threading
import time
from pathlib import Path

import forked
import pytest
import torch
from benchmark_fakes import FakeAdapter, memory_data
from test_benchmark_resume import Stopped, Stopping
from torch.distributed import HashStore

from ttt_plugins.benchmark import FIELD, FieldStream, Worker, run_field
from ttt_plugins.benchmark.device import peak_memory, reset_peak_memory
from ttt_plugins.benchmark.protocols import plan
from ttt_plugins.cli.models import adapter_from_args
from ttt_plugins.data.corruptions import corrupt
from ttt_plugins.data.fresh import corrupt_rows, flip_and_crop
from ttt_plugins.errors import InputError

COUNTS = {("spatter", 5): 30, ("saturate", 5): 24}


def field_data(**options):
    """Two cells and the clean images that they are, for the field's purposes, made from."""
    data = memory_data(COUNTS, clean=30)
    return dataclasses.replace(data, from_clean=True, **options)


def plain(parts):
    """The share of correct predictions of a fresh `FakeAdapter` on lists of batches, in order."""
    net, right, count = FakeAdapter(), 0, 0
    for batch in itertools.chain.from_iterable(parts):
        if batch is None:
            net.reset()
            continue
        right += int((net(batch.images.float() / 255).argmax(1) == batch.labels).sum())
        count += len(batch)
    return right / count


def in_batches(part, rows, size):
    return [part[torch.tensor(rows[i : i + size])] for i in range(0, len(rows), size)]


def shuffled(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def by_class(part, seed):
    rows = shuffled(len(part), seed)
    return [row for label in range(10) for row in rows if part.labels[row] == label]


def test_streams_against_plain_loops():
    data, size = field_data(), 7
    found = run_field({"a": FakeAdapter}, data, batch_size=size, long=100, seed=3).accuracies()
    assert list(found) == list(FIELD)
    cells = [data.load(cell) for cell in COUNTS]
    clean = data.clean()
    orders = {f"batch-{n}": n for n in (1, 4, 16, 64, 200)}
    for name, batch in orders.items():
        batches = [[None, *in_batches(c, shuffled(len(c), 3), batch)] for c in cells]
        assert found[name]["a"] == plain(batches)
    batches = [[None, *in_batches(c, by_class(c, 3), size)] for c in cells]
    assert found["sorted"]["a"] == plain(batches)
    batches = [in_batches(c, shuffled(len(c), 3), size) for c in cells]
    assert found["continual"]["a"] == plain(batches)
    assert found["clean"]["a"] == plain([in_batches(clean, shuffled(30, 3), size)])
    rows = shuffled(30, 3)
    around = [in_batches(clean, half, size) for half in (rows[:15], rows[15:])]
    batches = [[None, *around[0], *own, *around[1]] for own in batches]
    assert found["clean-corrupt-clean"]["a"] == plain(batches)
    # Dirichlet and mixed orders are restated with the protocols.
    assert {found["dirichlet-0.1"]["a"], found["dirichlet-0.01"]["a"]} != {found["sorted"]["a"]}


def test_gradual_and_long_cells_are_computed_from_the_clean_images():
    data = field_data()
    with_clean = data.with_clean()
    severities = with_clean.with_all_severities()
    shown = [stretch.cells[0] for stretch in plan("gradual", severities, None)]
    up_and_down = [1, 2, 3, 4, 5, 4, 3, 2, 1]
    assert shown == [(name, s) for name in ("spatter", "saturate") for s in up_and_down]
    clean = data.clean()
    blurred = severities.load(("saturate", 2))
    assert torch.equal(blurred.images, corrupt(clean.images, "saturate", 2))
    assert torch.equal(blurred.labels, clean.labels)
    assert torch.equal(severities.load(("spatter", 5)).images, data.load(("spatter", 5)).images)

    long = with_clean.repeated(150)
    names = ["spatter", "saturate", "spatter again 1", "saturate again 1", "spatter again 2"]
    names += ["saturate again 2"]
    assert list(long.counts) == [(name, 5) for name in names]
    assert torch.equal(long.load(("spatter", 5)).images, data.load(("spatter", 5)).images)
    first, second = (long.load((f"spatter again {i}", 5)) for i in (1, 2))
    assert not torch.equal(first.images, second.images)
    assert torch.equal(first.images, long.load(("spatter again 1", 5)).images)
    # Stored images whose corruption cannot be computed are flipped and cropped.
    stored = dataclasses.replace(data, from_clean=False).with_clean()
    assert stored.with_all_severities() is None
    part = data.load(("spatter", 5))
    again = stored.repeated(150).load(("spatter again 1", 5))
    assert torch.equal(again.images, flip_and_crop(part.images, torch.arange(30), 1))
    assert torch.equal(again.labels, part.labels)


def test_noise_belongs_to_the_row_and_not_to_the_batch():
    images = torch.randint(0, 256, (70, 3, 16, 16), dtype=torch.uint8)
    rows = torch.arange(70)
    for name in ("speckle_noise", "gaussian_blur", "spatter", "saturate"):
        whole = corrupt_rows(images, rows, name, 5)
        picks = torch.tensor([66, 3, 3, 40])
        assert torch.equal(corrupt_rows(images[picks], picks, name, 5), whole[picks])
    flipped = flip_and_crop(images, rows, 2)
    assert torch.equal(flip_and_crop(images[picks], picks, 2), flipped[picks])
    assert not torch.equal(flipped, images)
    # Pixels come from the neighbourhood: the mean of a constant image does not change.
    assert torch.equal(flip_and_crop(torch.full_like(images, 9), rows, 2), images * 0 + 9)


def stripped(results):
    cells = json.loads(results.to_json())["streams"]
    for row in cells.values():
        for cell in row.values():
            del cell["seconds"], cell["memory"]
    return cells


def test_a_stopped_field_ends_with_the_figures_of_an_unbroken_one(tmp_path):
    options = {"batch_size": 11, "long": 70, "seed": [0, 1]}
    streams = ["sorted", "clean-corrupt-clean", "long"]

    def run(out, fast, **more):
        methods = {"source": lambda: FakeAdapter("source", lr=0.0), "fast": fast}
        return run_field(methods, field_data(), out=out, streams=streams, **options, **more)

    unbroken = run(tmp_path / "whole", FakeAdapter)
    for after in (5, 15):
        with pytest.raises(Stopped):
            run(tmp_path / "out", Stopping(after), resume=True)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["runs"]
    again = Stopping()
    resumed = run(tmp_path / "out", again, resume=True)
    assert stripped(resumed) == stripped(unbroken)
    images = sum(row["fast"].images for row in unbroken.cells.values())
    assert 0 < again.forwards < 2 * images  # what was finished was not repeated
    with pytest.raises(InputError, match="--resume"):
        run(tmp_path / "out", FakeAdapter)
    # Finished runs are kept; another method is added to them.
    methods = {
        "source": Stopping(0, method="source", lr=0.0),
        "fast": Stopping(0),
        "slow, 1": lambda: FakeAdapter(lr=1.0),
    }
    more = run_field(
        methods, field_data(), out=tmp_path / "out", streams=streams, resume=True, **options
    )
    assert more.accuracies()["sorted"]["fast"] == resumed.accuracies()["sorted"]["fast"]
    assert more.methods == ["source", "fast", "slow, 1"]
    report = (tmp_path / "out" / "field.html").read_text()
    assert "Points above the source" in report
    assert report.count("<svg") == 2
    assert "slow, 1" in report


class Slow(FakeAdapter):
    def forward(self, images):
        time.sleep(0.02)
        return super().forward(images)


def test_a_field_that_is_killed_is_resumed(tmp_path):
    out, options = tmp_path / "out", {"streams": ["sorted", "long"], "batch_size": 9, "long": 90}
    process = forked.start(
        functools.partial(run_field, out=out, **options), {"a": Slow()}, field_data()
    )
    pieces = "runs/*/a/unfinished/*/*.safetensors"
    while process.is_alive() and len(list(out.glob(pieces))) < 3:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (out / "field.json").exists()
    resumed = run_field({"a": FakeAdapter}, field_data(), out=out, resume=True, **options)
    assert stripped(resumed) == stripped(run_field({"a": FakeAdapter}, field_data(), **options))
    assert (out / "field.json").exists()


def test_processes_share_the_runs_of_a_field(tmp_path):
    options = {"streams": ["batch-16", "sorted", "mixed", "clean"], "batch_size": 9}
    store, nets, found = HashStore(), [Slow(), Slow()], [None, None]

    def work(rank):
        worker = Worker(store, rank, 2)
        found[rank] = run_field(
            {"a": nets[rank]}, field_data(), out=tmp_path, worker=worker, **options
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = run_field({"a": FakeAdapter()}, field_data(), **options)
    assert [stripped(results) for results in found] == [stripped(alone)] * 2
    images = sum(row["a"].images for row in alone.cells.values())
    assert nets[0].forwards + nets[1].forwards == images
    assert min(net.forwards for net in nets) > 0
    with pytest.raises(InputError, match="give out"):
        run_field({"a": FakeAdapter()}, field_data(), worker=Worker(store, 0, 2))


def test_table_and_parts_by_hand():
    methods = {"source": FakeAdapter("source", lr=0.0), "fast": FakeAdapter()}
    results = run_field(
        methods,
        field_data(),
        streams=["sorted", "clean-corrupt-clean", "long"],
        batch_size=10,
        long=200,
    )
    row = results.cells["long"]
    assert list(row["fast"].parts) == [f"tenth {i}" for i in range(1, 11)]
    assert len(row["fast"].memory) == 10
    assert min(row["fast"].memory) > 0
    phases = results.cells["clean-corrupt-clean"]["fast"].parts
    total = 30 * phases["clean before"] + 54 * phases["corrupted"] + 30 * phases["clean after"]
    assert total / 114 == pytest.approx(results.accuracies()["clean-corrupt-clean"]["fast"])
    accuracies = results.accuracies()["sorted"]
    points = 100 * (accuracies["fast"] - accuracies["source"])
    assert results.differences()["sorted"] == {"fast": points}
    mark = "!" if points < -0.5 else ""
    cell = f"{100 * accuracies['fast']:.2f} ({points:+.2f}{mark})"
    assert cell in results.table()
    assert f"| {cell} |" in results.markdown()
    assert results.rows()[1][1] == "54"
    assert "extra corruptions (saturate, spatter)" in results.notes[0]


def test_what_a_field_refuses_and_leaves_out():
    cells = memory_data({("fog", 5): 12})
    fog = run_field({"a": FakeAdapter}, cells, streams=["gradual", "clean", "sorted"])
    assert list(fog.cells) == ["sorted"]
    assert "no setting may be chosen" in fog.notes[0]
    assert fog.notes[1:] == [
        "stream gradual left out: the data has no other severities",
        "stream clean left out: the data has no clean images",
    ]
    arrays = {("fog", 5): cells.load(("fog", 5))}
    own = run_field({"a": FakeAdapter}, arrays, streams={"mine": FieldStream("sorted", 64)})
    assert own.accuracies()["mine"] == fog.accuracies()["sorted"]
    assert own.notes == []
    for options, message in (
        ({"streams": ["sortd"]}, "unknown stream 'sortd'"),
        ({"streams": ["clean"]}, "nothing to measure"),
        ({"long": 0}, "at least 1 image"),
    ):
        with pytest.raises(InputError, match=message):
            run_field({"a": FakeAdapter}, cells, **options)
    with pytest.raises(InputError, match="no methods"):
        run_field({}, cells)


def test_peak_memory_is_measured_anew():
    cpu = torch.device("cpu")
    large = torch.ones(50_000_000)
    before = peak_memory(cpu)
    del large
    reset_peak_memory(cpu)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can")
    assert 10_000_000 < peak_memory(cpu) < before - 100_000_000


@pytest.mark.parametrize("method", ["source", "tent", "mgg", None])
def test_an_optimizer_is_compared_on_the_model_it_was_trained_for(method):
    """``benchmark bundled:mgg-… --field``: other methods adapt the model that it names."""
    own = {"model": "bundled:mgg-resnet26bn-cifar10", "method": method}
    rest = {"device": None, "seed": 0, "lr": None, "set": [], "pretrained": False}
    net = adapter_from_args(argparse.Namespace(**own, **rest, model_dir=Path("models")))
    assert net.method == method or (method is None and net.method == "mgg")
    assert net.origin["name"] == "bundled:source-resnet26bn-cifar10"
    assert net.backbone.normalize
