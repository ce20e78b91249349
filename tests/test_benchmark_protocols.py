"""Protocols, figures and options of the benchmark against hand-computed ones."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from benchmark_fakes import FakeAdapter, figures, memory_data
from PIL import Image

from ttt_plugins.benchmark import (
    CORRUPTIONS,
    CellRecord,
    Execution,
    MethodRecord,
    Results,
    open_dataset,
    run_benchmark,
)
from ttt_plugins.benchmark.device import Loader, batches, gather
from ttt_plugins.benchmark.evaluate import calibration_error
from ttt_plugins.benchmark.leaderboard import (
    leaderboard_files,
    mean_corruption_error,
    model_info,
)
from ttt_plugins.benchmark.protocols import correlated, plan, streams
from ttt_plugins.cli import main
from ttt_plugins.data.datasets import CORRUPTIONS_3D, DATASETS
from ttt_plugins.errors import DataError, InputError, MissingDependencyError
from ttt_plugins.utils import robustbench as bridge

ALEXNET_ERRORS = DATASETS["imagenet"].reference_errors


def run(data, net=None, **options):
    return run_benchmark(net or FakeAdapter(), data, progress=False, **options)


# -- gradual -----------------------------------------------------------------------------


def test_gradual_goes_up_and_down_without_a_reset():
    counts = {("fog", 5): 6, ("fog", 1): 4, ("fog", 3): 5, ("snow", 2): 3}
    data = memory_data(counts)
    stretches = plan("gradual", data, None)
    met = [(s.cells[0], s.visit) for s in stretches]
    up_and_down = [(1, 0), (3, 0), (5, 0), (3, 1), (1, 1)]
    assert met == [(("fog", s), v) for s, v in up_and_down] + [(("snow", 2), 0)]
    assert [s.reset for s in stretches] == [True] + [False] * 5
    assert len(streams(stretches)) == 1
    results = run(data, protocol="gradual", batch_size=4)
    plain, expected = FakeAdapter(), []
    for (name, severity), _ in met:
        part = data.load((name, severity))
        right = 0
        for rows in torch.arange(len(part)).split(4):
            chosen = part[rows]
            right += int((plain(chosen.images.float() / 255).argmax(1) == chosen.labels).sum())
        expected.append(right / len(part))
    record = results.methods[0]
    assert [c.accuracy for c in record.cells] == expected
    # A cell's accuracy is the mean of its visits, and each cell counts the same.
    one, three, five = (expected[0] + expected[4]) / 2, (expected[1] + expected[3]) / 2, expected[2]
    assert record.accuracies()["fog", 1] == one
    assert record.mean() == pytest.approx((one + three + five + expected[5]) / 4, abs=1e-15)
    assert record.by("corruption")["fog"] == pytest.approx((one + three + five) / 3, abs=1e-15)


# -- class-correlated streams ------------------------------------------------------------


def test_correlated_meets_every_image_once_and_is_seeded():
    labels = torch.arange(10).repeat(30)
    order = correlated(labels, 0.1, 3)
    assert sorted(order.tolist()) == list(range(300))
    assert order.tolist() == correlated(labels, 0.1, 3).tolist()
    assert order.tolist() != correlated(labels, 0.1, 4).tolist()
    assert correlated(labels, 0.1, None).tolist() == correlated(labels, 0.1, 0).tolist()
    assert correlated(torch.tensor([4, 4, 4]), 0.1, 0).sort().values.tolist() == [0, 1, 2]
    for concentration in (0, -1.0, math.nan):
        with pytest.raises(InputError, match="concentration"):
            correlated(labels, concentration, 0)
    assert sorted(correlated(labels, 1e-300, 0).tolist()) == list(range(300))


def _shares(labels, order, classes):
    """Share of each class in each slot, read off the stream alone.

    A class's images come slot by slot; within a slot they are together. Slots have been cut at
    cumulative shares, so that runs of a class are its shares, in slot order.
    """
    met = labels[order]
    changes = (met[1:] != met[:-1]).nonzero().flatten() + 1
    runs = torch.tensor_split(met, changes.tolist())
    return [[len(r) for r in runs if r[0] == label] for label in range(classes)]


@pytest.mark.parametrize("concentration", [0.1, 1.0, 10.0])
def test_dirichlet_streams_have_the_distributions_proportions(concentration):
    classes, per_class = 10, 1000
    labels = torch.arange(classes).repeat_interleave(per_class)
    squares, largest = [], []
    for seed in range(40):
        for runs in _shares(labels, correlated(labels, concentration, seed), classes):
            shares = np.array(runs) / per_class
            assert shares.sum() == pytest.approx(1)
            squares.append((shares**2).sum())
            largest.append(shares.max())
    # Var of one share of a symmetric Dirichlet over K slots: (1/K)(1 - 1/K) / (K a + 1). Slots
    # next to each other may run together, which only ever adds to the sum of squares.
    a, k = concentration, classes
    expected = k * ((1 / k) * (1 - 1 / k) / (k * a + 1) + 1 / k**2)
    assert expected * 0.97 < np.mean(squares) < expected * 1.15
    assert (np.mean(largest) > 0.5) == (concentration < 0.5)


def test_slots_hold_the_shares_that_were_drawn():
    # The construction restated with loops, from the same documented generator.
    labels = torch.tensor([0, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2, 0])
    random, slots = np.random.RandomState(7), [[], [], []]
    for label in (0, 1, 2):
        rows = random.permutation([i for i, found in enumerate(labels.tolist()) if found == label])
        shares = random.dirichlet([0.5, 0.5, 0.5])
        first = round(shares[0] * len(rows))
        second = round((shares[0] + shares[1]) * len(rows))
        for slot, part in enumerate((rows[:first], rows[first:second], rows[second:])):
            slots[slot].append(part.tolist())
    expected = []
    for slot in slots:
        for place in random.permutation(3):
            expected += slot[place]
    assert correlated(labels, 0.5, 7).tolist() == expected


def test_correlated_protocol_is_recorded_and_uses_the_cells_labels():
    data = memory_data({("fog", 5): 40, ("snow", 5): 30})
    results = run(data, protocol="correlated", concentration=0.3, seed=2, batch_size=8)
    assert results.settings["concentration"] == 0.3
    assert "Dirichlet(0.3)" in results.circumstances["order"]
    assert run(data).settings["concentration"] is None
    net, part = FakeAdapter(), data.load(("snow", 5))
    right = 0
    for rows in correlated(part.labels, 0.3, 2).split(8):
        logits = net(part.images[rows].float() / 255)
        right += int((logits.argmax(1) == part.labels[rows]).sum())
    assert results.methods[0].cells[1].accuracy == right / 30


# -- seeds, batches of one ---------------------------------------------------------------


def test_several_seeds_give_means_and_standard_errors(tmp_path):
    data = memory_data({("fog", 1): 20, ("fog", 5): 30, ("snow", 5): 9})
    several = run(data, seed=[0, 3, 5], batch_size=7, out=tmp_path, model_name="m")
    alone = [run(data, seed=seed, batch_size=7) for seed in (0, 3, 5)]
    record = several.methods[0]
    means = [r.methods[0].mean() for r in alone]
    assert len(set(means)) > 1
    assert record.mean() == pytest.approx(mean(means), abs=1e-15)
    assert record.standard_error() == pytest.approx(stdev(means) / math.sqrt(3), abs=1e-15)
    assert alone[0].methods[0].standard_error() is None
    assert [f[3] for f in figures(several)] == [f[3] for r in alone for f in figures(r)]
    assert several.settings["seeds"] == [0, 3, 5]
    info = json.loads((tmp_path / "m_fake.json").read_text())
    assert "seeds 0, 3, 5" in info["footnote"]
    shown = round(100 * record.standard_error(), 2)
    assert f"standard error over the seeds {shown}" in info["footnote"]
    assert "standard error" in several.table()
    rows = list(csv.reader(io.StringIO((tmp_path / "unaggregated_results.csv").read_text())))
    assert len(rows) == 3  # one row a model
    place = rows[0].index("snow") + 4
    expected = mean(r.methods[0].cells[2].accuracy for r in alone)
    assert float(rows[2][place]) == pytest.approx(expected, abs=1e-15)


def test_several_seeds_are_the_adapters_too(make_net, make_model):
    data = memory_data({("fog", 5): 12})

    def once(seed, own):
        net = make_net("tent", make_model("layernorm"), params="lora", lr=0.1, seed=own)
        return run(data, net, seed=seed, batch_size=4, execution=Execution(channels_last=True))

    several = once([1, 2], 7)
    assert several.settings["adapter_seeds"] == [1, 2]
    assert once(1, 7).settings["adapter_seeds"] == [7]
    found = [f[3] for f in figures(several)]
    assert found == [f[3] for seed in (1, 2) for f in figures(once(seed, seed))]
    # what low-rank parameters start from is drawn, so that the seed is seen
    assert once(2, 7).methods[0].cells[0].loss != several.methods[0].cells[1].loss


def test_a_batch_of_one():
    data = memory_data({("fog", 5): 9})
    cell = run(data, batch_size=1).methods[0].cells[0]
    assert len(cell.correct_per_batch) == cell.n == 9


# -- mean corruption error, calibration --------------------------------------------------


def _record(accuracy):
    cells = [
        CellRecord(name, severity, 10, value, 1.0, 0.1, 1.0, 10, 0, 1, [10])
        for (name, severity), value in accuracy.items()
    ]
    return MethodRecord("m_tent", "tent", {}, "", None, 0, cells)


def _full():
    rng = np.random.default_rng(0)
    return {(name, s): rng.random() for name in CORRUPTIONS for s in range(1, 6)}


def test_mean_corruption_error_by_hand():
    accuracy = _full()
    # Figures of the paper's authors, typed in again from their repository.
    published = {
        "gaussian_noise": 0.886428,
        "shot_noise": 0.894468,
        "impulse_noise": 0.922640,
        "defocus_blur": 0.819880,
        "glass_blur": 0.826268,
        "motion_blur": 0.785948,
        "zoom_blur": 0.798360,
        "snow": 0.866816,
        "frost": 0.826572,
        "fog": 0.819324,
        "brightness": 0.564592,
        "contrast": 0.853204,
        "elastic_transform": 0.646056,
        "pixelate": 0.717840,
        "jpeg_compression": 0.606500,
    }
    total = 0.0
    for name in CORRUPTIONS:
        wrong = sum(1 - accuracy[name, severity] for severity in (1, 2, 3, 4, 5))
        total += (wrong / 5) / published[name]
    assert mean_corruption_error(_record(accuracy), "imagenet") == pytest.approx(total / 15)
    assert published == ALEXNET_ERRORS
    assert mean(published.values()) == pytest.approx(0.789, abs=5e-4)  # what papers round it to


def test_mean_corruption_error_of_alexnet_is_one_and_needs_all_cells():
    same = {(n, s): 1 - ALEXNET_ERRORS[n] for n in CORRUPTIONS for s in range(1, 6)}
    assert mean_corruption_error(_record(same), "imagenet") == pytest.approx(1)
    for dataset in ("cifar10", "cifar100", "imagenet3dcc"):
        assert mean_corruption_error(_record(same), dataset) is None
    del same["fog", 3]
    assert mean_corruption_error(_record(same), "imagenet") is None


def test_mean_corruption_error_agrees_with_robustbenchs_formula():
    pandas = pytest.importorskip("pandas")
    accuracy = _full()
    model = pandas.DataFrame(accuracy, index=["m"])
    alexnet = {(n, s): 1 - ALEXNET_ERRORS[n] for n in CORRUPTIONS for s in range(1, 6)}
    alexnet = pandas.DataFrame(alexnet, index=["AlexNet"]).loc["AlexNet"]
    total = 0
    for name in CORRUPTIONS:  # robustbench 1.1.1, eval.py
        total += ((1 - model[name]) / (1 - alexnet[name]).mean()).values.mean() / len(CORRUPTIONS)
    assert mean_corruption_error(_record(accuracy), "imagenet") == pytest.approx(total)


def test_mean_corruption_error_is_in_the_leaderboard_file():
    settings = {"dataset": "imagenet", "model": "m", "protocol": "continual", "batch_size": 4}
    settings |= {"seeds": [0], "execution": {"autocast": "bfloat16", "compile": None}}
    circumstances = {"order": "", "clean": None, "data_note": None}
    circumstances["versions"] = {"ttt_plugins": "0"}
    record = _record(_full())
    info = model_info(Results(settings, circumstances, [record]))
    expected = str(round(100 * mean_corruption_error(record, "imagenet"), 2))
    assert info["corruptions_mce"] == expected
    assert "AlexNet" in info["footnote"]
    assert "autocast bfloat16" in info["footnote"]
    assert "compile" not in info["footnote"]
    assert "resets: before the first cell only" in info["footnote"]


def test_robustbenchs_own_code_reads_the_csv_and_goes_on_with_it(tmp_path, monkeypatch):
    """Its corruptions_evaluation appends a row to our file and finds AlexNet's row in it."""
    pandas = pytest.importorskip("pandas")
    try:
        robustbench = bridge.import_robustbench()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    folder = tmp_path / "model_info" / "imagenet" / "corruptions"
    folder.mkdir(parents=True)
    settings = {"dataset": "imagenet", "model": "m", "protocol": "continual", "batch_size": 4}
    settings |= {"seeds": [0], "execution": {}}
    circumstances = {"order": "", "clean": None, "data_note": None}
    circumstances["versions"] = {"ttt_plugins": "0"}
    ours = _full()
    alexnet = {(n, s): 1 - ALEXNET_ERRORS[n] for n in CORRUPTIONS for s in range(1, 6)}
    methods = [_record(ours), dataclasses.replace(_record(alexnet), name="AlexNet")]
    files = leaderboard_files(Results(settings, circumstances, methods))
    (folder / "unaggregated_results.csv").write_text(files["unaggregated_results.csv"])
    monkeypatch.chdir(tmp_path)
    enums, module = robustbench.model_zoo.enums, robustbench.eval
    dataset, threat = enums.BenchmarkDataset.imagenet, enums.ThreatModel.corruptions
    given = iter(ours.values())
    loaders = {dataset: {threat: lambda *_, **__: (torch.zeros(1), torch.zeros(1))}}
    monkeypatch.setattr(module, "CORRUPTION_DATASET_LOADERS", loaders)
    monkeypatch.setattr(module, "clean_accuracy", lambda *_, **__: next(given))
    accuracy, mce = module.corruptions_evaluation(
        4, "data", dataset, threat, torch.device("cpu"), None, 1, True, None, "theirs"
    )
    assert accuracy == pytest.approx(methods[0].mean())
    assert mce == pytest.approx(mean_corruption_error(methods[0], "imagenet"))
    table = pandas.read_csv(folder / "unaggregated_results.csv", header=[0, 1], index_col=0)
    assert list(table.index) == ["m_tent", "AlexNet", "theirs"]
    assert np.allclose(table.loc["theirs"].values, table.loc["m_tent"].values, rtol=0, atol=0)


def test_calibration_error_by_hand():
    confidences = torch.tensor([0.95, 0.96, 0.70, 0.71, 0.10])
    right = torch.tensor([True, False, True, True, False])
    # Bins of 1/15: the first two in the last bin; 0.70 and 0.71 in (10/15, 11/15]; 0.10 alone.
    expected = (abs(1 - 1.91) + abs(2 - 1.41) + abs(0 - 0.10)) / 5
    assert calibration_error(confidences, right) == pytest.approx(expected, abs=1e-6)
    edges = torch.tensor([0.0, 1.0])
    assert calibration_error(edges, torch.tensor([False, True])) == 0
    assert math.isnan(calibration_error(torch.tensor([math.nan]), right[:1]))


def test_calibration_error_of_a_cell_is_in_the_record():
    data = memory_data({("fog", 5): 20})
    part = data.load(("fog", 5))
    record = run(data, FakeAdapter(lr=0.0)).methods[0].cells[0]
    probabilities = FakeAdapter(lr=0.0)(part.images.float() / 255).softmax(1)
    top, predicted = probabilities.max(1)
    expected = calibration_error(top, predicted == part.labels)
    assert record.ece == pytest.approx(expected, abs=1e-6)
    assert record.peak_memory > 10_000_000  # a process with torch in it


# -- the fast path -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "execution",
    [
        Execution(channels_last=True),
        Execution(autocast="bfloat16"),
        Execution(compile="eager"),
        Execution(True, "bfloat16", "eager"),
    ],
)
@pytest.mark.parametrize("name", ["tent", "mgg"])
def test_options_of_execution_run_and_are_recorded(execution, name, make_net, make_model, tmp_path):
    data = memory_data({("fog", 5): 8}, clean=4)
    plain = run(data, make_net(name, make_model("batchnorm")), batch_size=4)
    net = make_net(name, make_model("batchnorm"))
    found = run(data, net, batch_size=4, execution=execution, out=tmp_path, model_name="m")
    assert found.settings["execution"] == dataclasses.asdict(execution)
    losses = [r.methods[0].cells[0].loss for r in (plain, found)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1 if execution.autocast else 1e-3)
    if execution.autocast:
        assert losses[0] != losses[1]
        assert (
            "autocast bfloat16" in json.loads((tmp_path / f"m_{name}.json").read_text())["footnote"]
        )
    if execution.channels_last:
        weights = [p for p in net.parameters() if p.ndim == 4 and min(p.shape) > 1]
        assert weights
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_options_that_do_not_exist():
    with pytest.raises(InputError, match="bfloat16"):
        Execution(autocast="int8")
    with pytest.raises(InputError, match="no compile backend 'gcc'"):
        Execution(compile="gcc").prepare(FakeAdapter())


def test_batches_are_the_rows_in_order():
    data = memory_data({("fog", 5): 9, ("snow", 5): 7})
    parts = {i: data.load(cell) for i, cell in enumerate(data.counts)}
    rows = torch.tensor([[1, 3], [0, 8], [0, 0], [1, 6], [1, 3]])
    found = torch.cat(list(batches(parts, rows, 2, torch.device("cpu"))))
    expected = torch.stack([parts[part].images[row] for part, row in rows.tolist()])
    assert torch.equal(found, expected)
    labels = torch.stack([parts[part].labels[row] for part, row in rows.tolist()])
    assert torch.equal(gather(parts, rows, "labels"), labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_batches_on_a_gpu_are_those_on_the_cpu(share, monkeypatch):
    monkeypatch.setattr("ttt_plugins.benchmark.device._SHARE", share)
    data = memory_data({("fog", 5): 9, ("snow", 5): 7})
    parts = {i: data.load(cell) for i, cell in enumerate(data.counts)}
    rows = torch.tensor([[1, 3], [0, 8], [0, 0], [1, 6], [1, 3]])
    device = torch.device("cuda")
    found = list(batches(parts, rows, 2, device))
    assert all(batch.device.type == "cuda" for batch in found)
    expected = list(batches(parts, rows, 2, torch.device("cpu")))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_the_loader_reads_ahead_and_keeps_two():
    read = []

    def load(cell):
        read.append(cell)
        if cell == ("bad", 1):
            raise DataError("bad")
        return cell

    loader = Loader(load)
    one, two, bad = (("fog", 1),), (("fog", 2), ("fog", 3)), (("bad", 1),)
    assert loader(one, two) == {0: ("fog", 1)}
    assert loader(two, bad) == {0: ("fog", 2), 1: ("fog", 3)}
    assert read[:3] == [("fog", 1), ("fog", 2), ("fog", 3)]
    for _ in range(2):  # it stays an error
        with pytest.raises(DataError):
            loader(bad)
    assert loader(one) == {0: ("fog", 1)}
    assert read.count(("fog", 1)) == 2
    loader.close()


# -- folders and downloads ---------------------------------------------------------------


@pytest.fixture(scope="module")
def robustbench():
    try:
        return bridge.import_robustbench()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def test_imagenet_3dcc_is_sixty_cells(robustbench, tmp_path):
    files = bridge.imagenet_test_files()
    whole = tmp_path / "whole"
    for name in {file.split("/")[0] for file in files}:
        (whole / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for file in files[:2]:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(whole / file)
    root = tmp_path / "data"
    for name in CORRUPTIONS_3D:
        (root / "ImageNet-3DCC" / name).mkdir(parents=True)
        for severity in range(1, 6):
            (root / "ImageNet-3DCC" / name / str(severity)).symlink_to(whole)
    data = open_dataset("imagenet3dcc", root, n_examples=2)
    assert len(data.counts) == 60
    part = data.load(("h265_abr", 4))
    assert part.images.shape == (2, 3, 224, 224)
    assert torch.equal(data.labels(("fog_3d", 1)), part.labels)
    (root / "ImageNet-3DCC" / "flash" / "2").unlink()
    with pytest.raises(DataError, match="flash/2: no such folder"):
        open_dataset("imagenet3dcc", root, n_examples=2)


def _imagenet(root, count):
    """ImageNet-C with one cell and its first images: (folder of the cell, their names)."""
    files = bridge.imagenet_test_files()
    folder = root / "ImageNet-C" / "fog" / "5"
    for name in {file.split("/")[0] for file in files}:
        (folder / name).mkdir(parents=True)
    for file in files[:count]:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / file)
    return folder, files


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f, files: (f / files[1]).unlink(), "no such file, one of the first 2 images"),
        (lambda f, files: (f / files[-1]).parent.rmdir(), "n[0-9]+ is missing"),
        (lambda f, files: (f / "n99999999").mkdir(), "n99999999 is not one of"),
        (lambda f, files: f.rename(f.parent / "4"), "fog/5: no such folder"),
        (lambda f, files: (f / files[1]).write_bytes(b"<html>"), "loader failed on .*fog"),
        (lambda f, files: (f / files[0]).write_bytes((f / files[0]).read_bytes()[:-9]), "failed"),
    ],
)
def test_imagenet_folders_that_cannot_be_used(spoil, message, robustbench, tmp_path, capsys):
    folder, files = _imagenet(tmp_path, 2)
    spoil(folder, files)
    argv = ["benchmark", "resnet10t", "--method", "source", "--dataset", "imagenet"]
    argv += ["--data-dir", str(tmp_path), "--corruption", "fog", "--severity", "5"]
    out = tmp_path / "out"
    assert main([*argv, "--n-examples", "2", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    # A damaged picture is found when its cell is read; no result is written then either.
    assert not list(out.glob("*.*"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(10_000, 100), "integers from 0 to 99"),
        (np.full(10_000, -1), "integers from 0 to 99"),
        (np.zeros((10_000, 2), int), "must hold 10000 labels"),
    ],
)
def test_cifar100_labels_that_cannot_be(labels, message, robustbench, tmp_path):
    folder = tmp_path / "CIFAR-100-C"
    folder.mkdir()
    np.save(folder / "labels.npy", labels)
    with pytest.raises(DataError, match=message):
        open_dataset("cifar100", tmp_path, corruptions=["fog"])
    np.save(folder / "labels.npy", np.full(50_000, 99))
    shape = (50_000, 32, 32, 3)
    np.lib.format.open_memmap(folder / "fog.npy", "w+", np.uint8, shape).flush()
    data = open_dataset("cifar100", tmp_path, corruptions=["fog"], n_examples=2)
    assert data.load(("fog", 1)).labels.tolist() == data.labels(("fog", 1)).tolist() == [99, 99]


def _pretend(monkeypatch, robustbench, write):
    def download(record, files, save_dir):
        assert record == "2535967"
        assert files == {"CIFAR-10-C.tar"}
        write(save_dir)

    monkeypatch.setattr(robustbench.data, "zenodo_download", download)


def test_missing_data_is_downloaded_by_robustbench(robustbench, tmp_path, monkeypatch, capsys):
    def write(folder):
        (folder / "CIFAR-10-C").mkdir()
        np.save(folder / "CIFAR-10-C" / "labels.npy", np.zeros(10_000, int))
        array = np.lib.format.open_memmap(
            folder / "CIFAR-10-C" / "fog.npy", "w+", np.uint8, (50_000, 32, 32, 3)
        )
        array.flush()
        (folder / "CIFAR-10-C.tar").write_bytes(b"archive")

    _pretend(monkeypatch, robustbench, write)
    with pytest.raises(DataError, match="nothing was downloaded"):
        open_dataset("cifar10", tmp_path, corruptions=["fog"])
    data = open_dataset("cifar10", tmp_path, corruptions=["fog"], n_examples=3, download=True)
    assert len(data.load(("fog", 5))) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["CIFAR-10-C"]
    assert "2.9 GB" in capsys.readouterr().out
    monkeypatch.undo()  # and what is there is not downloaded again
    open_dataset("cifar10", tmp_path, corruptions=["fog"], n_examples=3, download=True)


def test_a_download_that_breaks_off_leaves_nothing(robustbench, tmp_path, monkeypatch, capsys):
    def write(folder):
        (folder / "CIFAR-10-C.tar").write_bytes(b"half")
        raise ConnectionError("no route to host")

    _pretend(monkeypatch, robustbench, write)
    argv = ["benchmark", "ttt_resnet26", "--method", "source", "--data-dir", str(tmp_path)]
    argv += ["--out", str(tmp_path / "out")]
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "could not download it (no route to host)" in shown.err
    assert not list(tmp_path.iterdir())
    assert main([*argv, "--no-download"]) == 2
    assert "nothing was downloaded" in capsys.readouterr().err


def test_imagenet_has_no_downloader(robustbench, tmp_path):
    for dataset in ("imagenet", "imagenet3dcc"):
        with pytest.raises(DataError, match="has no downloader"):
            open_dataset(dataset, tmp_path, download=True)
