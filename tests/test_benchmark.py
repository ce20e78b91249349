"""The benchmark against plain hand-written loops, on tiny data folders made here."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from benchmark_fakes import FakeAdapter, memory_data, random_cell, write_parquet
from PIL import Image
from torch import nn

from ttt_plugins.benchmark import (
    CORRUPTIONS,
    DATASETS,
    PROTOCOLS,
    CorruptionData,
    evaluate_cell,
    load_stream,
    open_dataset,
    run_benchmark,
)
from ttt_plugins.benchmark import resume as resume_module
from ttt_plugins.benchmark.leaderboard import INELIGIBLE, model_info, unaggregated_csv
from ttt_plugins.benchmark.protocols import plan, shuffled
from ttt_plugins.cli import main
from ttt_plugins.cli.flags import Parser, add_dataclass_flags, dataclass_from_args
from ttt_plugins.data.images import to_float
from ttt_plugins.errors import DataError, InputError, MissingDependencyError
from ttt_plugins.utils import robustbench as bridge

BATCH = 7


def plain_loop(cells, resets, order=lambda n: range(n), batch=BATCH):
    """Accuracy of each cell of [(images NHWC uint8, labels)], written out without the package."""
    net, found = FakeAdapter(), []
    for (images, labels), reset in zip(cells, resets, strict=True):
        if reset:
            net.reset()
        rows = list(order(len(labels)))
        right = 0
        for start in range(0, len(rows), batch):
            chosen = rows[start : start + batch]
            x = torch.tensor(images[chosen].astype(np.float32) / 255).permute(0, 3, 1, 2)
            right += int((net(x).argmax(1).numpy() == labels[chosen]).sum())
        found.append(right / len(rows))
    return found


def arrays_of(data: CorruptionData):
    loaded = [data.load(cell) for cell in data.counts]
    return [(part.images.permute(0, 2, 3, 1).numpy(), part.labels.numpy()) for part in loaded]


def accuracies(results, method: int = 0):
    return [cell.accuracy for cell in results.methods[method].cells]


@pytest.fixture(scope="session")
def robustbench():
    try:
        return bridge.import_robustbench()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def big_folder(tmp_path_factory):
    """RobustBench's layout: sparse files of full length, the first rows of two blocks filled."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "CIFAR-10-C"
    folder.mkdir()
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 10, 10_000)
    np.save(folder / "labels.npy", labels)
    for name in ("fog", "snow"):
        shape = (50_000, 32, 32, 3)
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, shape)
        for severity in (3, 5):
            array[(severity - 1) * 10_000 :][:40] = random_cell(rng, 40)[0]
        array.flush()
        del array
    return root


@pytest.fixture
def compact_folder(tmp_path):
    """The compact layout: 20 test images, all at severity 5, the first 8 at severity 1."""
    folder = tmp_path / "cifar10c"
    folder.mkdir()
    (tmp_path / "cifar10").mkdir()
    write_parquet(tmp_path / "cifar10" / "test.parquet", 20, 3)
    write_parquet(tmp_path / "cifar10" / "train.parquet", 30, 4)
    rng = np.random.default_rng(2)
    for name in ("fog", "snow"):
        images = random_cell(rng, 20)[0]
        np.savez_compressed(folder / f"{name}.npz", severity_5=images, severity_1=images[:8])
    np.savez_compressed(folder / "spatter.npz", severity_5=random_cell(rng, 12)[0])
    return folder


# -- the loop ----------------------------------------------------------------------------


def test_robustbench_layout_agrees_with_a_plain_loop(robustbench, big_folder):
    options = {"corruptions": ["snow", "fog"], "severities": [5, 3], "n_examples": 40}
    data = open_dataset("cifar10", big_folder, **options)
    results = run_benchmark(FakeAdapter(), data, batch_size=BATCH, progress=False)
    labels = np.load(big_folder / "CIFAR-10-C" / "labels.npy")[:40]
    cells = []
    for name in ("snow", "fog"):
        array = np.load(big_folder / "CIFAR-10-C" / f"{name}.npy", mmap_mode="r")
        cells += [(np.array(array[s : s + 40]), labels) for s in (40_000, 20_000)]
    assert accuracies(results) == plain_loop(cells, [True] * 4)
    assert len(set(accuracies(results))) > 1  # else the comparison would say little
    assert results.methods[0].clean_accuracy is None


def test_a_folder_may_be_named_itself_and_hold_labels_five_times(robustbench, big_folder, tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    (folder / "fog.npy").symlink_to(big_folder / "CIFAR-10-C" / "fog.npy")
    np.save(folder / "labels.npy", np.tile(np.load(big_folder / "CIFAR-10-C" / "labels.npy"), 5))
    one = load_stream(folder, "fog", 3, n_examples=40)
    other = load_stream(big_folder, "fog", 3, n_examples=40)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)
    assert one.images.dtype == torch.uint8
    assert one.images.shape == (40, 3, 32, 32)


@pytest.mark.parametrize(
    ("protocol", "resets"),
    [
        ("reset-per-cell", [True, True, True, True]),
        ("reset-per-corruption", [True, False, True, False]),
        ("continual", [True, False, False, False]),
    ],
)
@pytest.mark.parametrize("seed", [None, 0, 3])
def test_protocols_agree_with_a_plain_loop(protocol, resets, seed):
    data = memory_data({("fog", 1): 20, ("fog", 5): 30, ("snow", 1): 20, ("snow", 5): 9})
    net = FakeAdapter()
    results = run_benchmark(
        net, data, protocol=protocol, batch_size=BATCH, seed=seed, progress=False
    )

    def order(count):
        if seed is None:
            return range(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    assert accuracies(results) == plain_loop(arrays_of(data), resets, order)
    assert net.resets == sum(resets)
    for cell in results.methods[0].cells:
        assert sum(cell.correct_per_batch) == round(cell.accuracy * cell.n)
        assert cell.forwards == cell.backwards == cell.n


def test_mixed_stream_agrees_with_a_plain_loop():
    data = memory_data({("fog", 1): 20, ("snow", 5): 31})
    net = FakeAdapter()
    results = run_benchmark(net, data, protocol="mixed", batch_size=BATCH, seed=4, progress=False)
    images, labels = (np.concatenate(part) for part in zip(*arrays_of(data), strict=True))
    order = torch.randperm(51, generator=torch.Generator().manual_seed(4)).numpy()
    plain, right = FakeAdapter(), np.zeros(51, bool)
    for start in range(0, 51, BATCH):
        rows = order[start : start + BATCH]
        x = torch.tensor(images[rows].astype(np.float32) / 255).permute(0, 3, 1, 2)
        right[rows] = plain(x).argmax(1).numpy() == labels[rows]
    assert accuracies(results) == [right[:20].mean(), right[20:].mean()]
    assert net.resets == 1
    counts = [cell.correct_per_batch for cell in results.methods[0].cells]
    along = [sum(batch) for batch in zip(*counts, strict=True)]
    assert along == [right[order[i : i + BATCH]].sum() for i in range(0, 51, BATCH)]


def test_every_protocol_meets_every_image_once():
    counts = {("fog", 1): 5, ("snow", 2): 3}
    data = memory_data(counts, clean=4)
    for protocol, facts in PROTOCOLS.items():
        met = []
        for stretch in plan(protocol, data, 0):
            met += [(stretch.cells[part], row) for part, row in stretch.rows.tolist()]
        wanted = [(cell, row) for cell, n in counts.items() for row in range(n)]
        # The clean images surround each cell.
        wanted += [(("clean", 0), row) for row in range(4)] * (2 * facts.with_clean)
        assert sorted(met) == sorted(wanted)
    with pytest.raises(InputError, match="needs clean images"):
        plan("clean-corrupt-clean", memory_data(counts), 0)
    with pytest.raises(InputError, match="continual"):
        plan("backwards", data, 0)


def test_clean_accuracy_is_fresh_and_agrees_with_our_counting(robustbench):
    data = memory_data({("fog", 5): 20}, clean=33)
    net, source = FakeAdapter(), FakeAdapter("source", lr=0.0)
    net(torch.rand(50, 3, 32, 32))  # what came before must not matter
    results = run_benchmark(net, data, baseline=source, batch_size=BATCH, progress=False)
    clean = data.clean()
    for method, lr in ((0, 8.0), (1, 0.0)):
        x = clean.images.float() / 255
        expected = robustbench.utils.clean_accuracy(FakeAdapter(lr=lr), x, clean.labels, BATCH)
        assert results.methods[method].clean_accuracy == pytest.approx(expected, abs=0)
        record = evaluate_cell(FakeAdapter(lr=lr), clean.images, clean.labels, BATCH)
        assert record.accuracy == pytest.approx(expected, abs=1e-12)
        assert len(record.correct_per_batch) == 5
    assert accuracies(results)[0] == plain_loop(arrays_of(data), [True])[0]
    # the unadapted model saw the same images
    x, labels = data.load(("fog", 5)).images.float() / 255, data.load(("fog", 5)).labels
    right = (FakeAdapter(lr=0.0)(x).argmax(1) == labels).double().mean().item()
    assert accuracies(results, 1) == [right]


def test_loss_is_the_mean_cross_entropy():
    data = memory_data({("fog", 5): 20})
    part = data.load(("fog", 5))
    record = evaluate_cell(FakeAdapter(lr=0.0), part.images, part.labels, 6)
    logits = FakeAdapter(lr=0.0)(part.images.float() / 255)
    expected = nn.functional.cross_entropy(logits, part.labels).item()
    assert record.loss == pytest.approx(expected, rel=1e-6)


def test_bytes_become_the_floats_that_robustbench_makes():
    values = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor(values.numpy().astype(np.float32) / 255)
    assert torch.equal(to_float(values), expected)


def test_shuffling_is_by_seed_and_absent_without():
    assert shuffled(5, None).tolist() == [0, 1, 2, 3, 4]
    assert shuffled(50, 1).tolist() == shuffled(50, 1).tolist() != shuffled(50, 2).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"protocol": "sometimes"}, "reset-per-cell"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        run_benchmark(FakeAdapter(), memory_data({("fog", 5): 3}), progress=False, **change)


def test_a_model_of_other_classes_is_refused(tmp_path):
    with pytest.raises(InputError, match="cifar10 has 10 classes, the model 7"):
        run_benchmark(FakeAdapter(classes=7), memory_data({("fog", 5): 3}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    unknown = FakeAdapter(classes=7)
    unknown.num_classes = None  # a bare module before its first batch
    images, labels = torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.tensor([1, 9, 2])
    with pytest.raises(InputError, match="label 9"):
        evaluate_cell(unknown, images, labels, 3)


# -- data folders ------------------------------------------------------------------------


def test_compact_layout(compact_folder):
    data = open_dataset("cifar10", compact_folder, corruptions=["fog", "snow"])
    assert dict(data.counts) == {
        (name, s): {1: 8, 5: 20}[s] for name in ("fog", "snow") for s in (1, 5)
    }
    with np.load(compact_folder / "snow.npz") as arrays:
        images = arrays["severity_5"]
    from ttt_plugins.data.parquet import read_parquet

    test = read_parquet(compact_folder.parent / "cifar10" / "test.parquet")
    part = data.load(("snow", 5))
    assert np.array_equal(part.images.permute(0, 2, 3, 1).numpy(), images)
    assert torch.equal(part.labels, test.labels)
    assert torch.equal(data.clean().images, test.images)
    assert torch.equal(data.load(("snow", 1)).labels, test.labels[:8])
    assert data.note == "re-encoded CIFAR-10 images; not official CIFAR-10-C figures"
    # the folder above both is as good a name
    above = load_stream(compact_folder.parent, "snow", 5, n_examples=4)
    assert torch.equal(above.images, part.images[:4])


def test_extra_corruptions_are_the_last_training_rows(compact_folder):
    from ttt_plugins.data.parquet import read_parquet

    train = read_parquet(compact_folder.parent / "cifar10" / "train.parquet")
    assert torch.equal(load_stream(compact_folder, "spatter").labels, train.labels[-12:])
    part = load_stream(compact_folder, "spatter", n_examples=5)
    assert torch.equal(part.labels, train.labels[-12:-7])
    # The clean images of extra corruptions alone are those that they are made from.
    data = open_dataset("cifar10", compact_folder, corruptions=["spatter"], n_examples=5)
    assert torch.equal(data.clean().images, train.images[-12:-7])
    assert data.from_clean
    both = open_dataset("cifar10", compact_folder, corruptions=["spatter", "snow"], n_examples=5)
    assert not torch.equal(both.clean().images, train.images[-12:-7])
    assert not both.from_clean


def test_imagenet_goes_the_same_way(robustbench, tmp_path):
    files = bridge.imagenet_test_files()
    folder = tmp_path / "ImageNet-C" / "fog" / "4"
    for name in {file.split("/")[0] for file in files}:
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for file in files[:3]:
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / file)
    options = {"corruptions": ["fog"], "severities": [4]}
    data = open_dataset("imagenet", tmp_path, n_examples=3, **options)
    part = data.load(("fog", 4))
    assert part.images.shape == (3, 3, 224, 224)
    names = sorted({file.split("/")[0] for file in files})
    assert part.labels.tolist() == [names.index(file.split("/")[0]) for file in files[:3]]
    assert data.clean is None
    with pytest.raises(DataError, match="one of the first 4"):
        open_dataset("imagenet", tmp_path, n_examples=4, **options)
    (folder / "n00000000").mkdir()
    with pytest.raises(DataError, match="n00000000 is not one of"):
        open_dataset("imagenet", tmp_path, n_examples=3, **options)


def _compact_mistakes():
    zeros = np.zeros
    return {
        "missing file": ({}, "fog.npz: no such file"),
        "missing severity": ({"severity_4": zeros((3, 32, 32, 3), np.uint8)}, "severity_5"),
        "floats": ({"severity_5": zeros((3, 32, 32, 3))}, "uint8"),
        "channels first": ({"severity_5": zeros((3, 3, 32, 32), np.uint8)}, "uint8"),
        "more images than labels": ({"severity_5": zeros((21, 32, 32, 3), np.uint8)}, "20 labels"),
        "no images": ({"severity_5": zeros((0, 32, 32, 3), np.uint8)}, "0 images"),
        "pickle": ({"severity_5": np.array([None, {}])}, "not a readable npz"),
    }


@pytest.mark.parametrize("case", _compact_mistakes())
def test_compact_mistakes_are_one_line_and_leave_nothing(case, compact_folder, tmp_path, capsys):
    arrays, message = _compact_mistakes()[case]
    (compact_folder / "fog.npz").unlink()
    if arrays:
        np.savez(compact_folder / "fog.npz", **arrays)
    _refused(compact_folder, tmp_path, capsys, message)


def _refused(folder, tmp_path, capsys, message, *more):
    """Both the function and the command refuse, the command in one line and with nothing made."""
    with pytest.raises(DataError, match=message):
        open_dataset("cifar10", folder, corruptions=["snow", "fog"], severities=[5])
    out = tmp_path / "out"
    argv = ["benchmark", "ttt_resnet26", "--method", "source", "--data-dir", str(folder)]
    argv += ["--out", str(out), "--corruption", "snow", "fog", "--severity", "5", *more]
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ttt-plugins: error: ")
    assert not out.exists()


def test_truncated_npz_and_missing_labels(compact_folder, tmp_path, capsys):
    content = (compact_folder / "fog.npz").read_bytes()
    (compact_folder / "fog.npz").write_bytes(content[:-100])
    _refused(compact_folder, tmp_path, capsys, "not an npz file")
    (compact_folder / "fog.npz").write_bytes(content)
    (tmp_path / "cifar10" / "test.parquet").rename(tmp_path / "labels.parquet")
    _refused(compact_folder, tmp_path, capsys, "--labels")
    data = open_dataset(
        "cifar10", compact_folder, corruptions=["fog"], labels=tmp_path / "labels.parquet"
    )
    assert data.counts["fog", 5] == 20
    with pytest.raises(DataError, match="has 8 images, but 9 are requested"):
        open_dataset(
            "cifar10",
            compact_folder,
            corruptions=["fog"],
            n_examples=9,
            labels=tmp_path / "labels.parquet",
        )


def _big(shape, dtype, folder, name="fog"):
    array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    array.flush()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "fog.npy").unlink(), "fog.npy: no such file"),
        (lambda f: (f / "labels.npy").unlink(), "labels.npy: no such file"),
        (lambda f: _big((49_999, 32, 32, 3), np.uint8, f), "must be uint8"),
        (lambda f: _big((50_000, 32, 32, 3), np.int8, f), "must be uint8"),
        (lambda f: _big((50_000, 3, 32, 32), np.uint8, f), "must be uint8"),
        (lambda f: (f / "fog.npy").write_bytes(b"\x93NUMPY"), "not a readable npy"),
        (lambda f: np.save(f / "labels.npy", np.zeros(9_999, int)), "10000 labels"),
        (lambda f: np.save(f / "labels.npy", np.zeros(10_000)), "integers from 0 to 9"),
        (lambda f: np.save(f / "labels.npy", np.full(10_000, 10)), "integers from 0 to 9"),
    ],
)
def test_robustbench_layout_mistakes(spoil, message, robustbench, tmp_path, capsys):
    folder = tmp_path / "data" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    np.save(folder / "labels.npy", np.zeros(10_000, int))
    for name in ("fog", "snow"):
        _big((50_000, 32, 32, 3), np.uint8, folder, name)
    spoil(folder)
    _refused(tmp_path / "data", tmp_path, capsys, message)


def test_a_truncated_npy_is_found_before_the_first_image(robustbench, tmp_path, capsys):
    folder = tmp_path / "data" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    np.save(folder / "labels.npy", np.zeros(10_000, int))
    for name in ("fog", "snow"):
        _big((50_000, 32, 32, 3), np.uint8, folder, name)
    with (folder / "fog.npy").open("r+b") as file:
        file.truncate(1000)
    _refused(tmp_path / "data", tmp_path, capsys, "not a readable npy")


def test_too_many_examples_and_unknown_names(robustbench, big_folder, tmp_path):
    with pytest.raises(DataError, match="10000 images, but 10001 are requested"):
        open_dataset("cifar10", big_folder, corruptions=["fog"], n_examples=10_001)
    for change, message in (
        ({"corruptions": ["frog"]}, "unknown corruption 'frog'"),
        ({"severities": [0]}, "severities must be from 1 to 5"),
        ({"n_examples": 0}, "n_examples"),
    ):
        with pytest.raises(InputError, match=message):
            open_dataset("cifar10", big_folder, **change)
    with pytest.raises(InputError, match="cifar100"):
        open_dataset("cifar11", big_folder)
    with pytest.raises(DataError, match="holds no folder CIFAR-100-C"):
        open_dataset("cifar100", big_folder)
    with pytest.raises(DataError, match="no such folder"):
        open_dataset("cifar10", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# -- what a run leaves behind ------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run over a folder: (results, folder, the function that made it)."""
    out = tmp_path_factory.mktemp("run") / "out"
    data = memory_data({("fog", 5): 10, ("fog", 1): 10, ("snow", 5): 12, ("saturate", 5): 9})
    data = dataclasses.replace(data, note="for tests")

    def run(**changes):
        options = {"batch_size": BATCH, "progress": False, "out": out, **changes}
        return run_benchmark(
            FakeAdapter(), data, baseline=FakeAdapter("source", lr=0.0), model_name="a/b", **options
        )

    return run(), out, run


def test_results_json(finished):
    results, out, _ = finished
    names = sorted(path.name for path in out.iterdir())
    assert names == ["b_fake.json", "plot.png", "results.json", "unaggregated_results.csv"]
    found = json.loads((out / "results.json").read_text())
    assert found["format_version"] == 2
    assert found["settings"]["protocol"] == "reset-per-cell"
    assert found["settings"]["cells"] == {"fog 5": 10, "fog 1": 10, "snow 5": 12, "saturate 5": 9}
    assert found["settings"]["config"] == {"lr": 8.0, "params": ["shift"]}
    assert found["data_note"] == "for tests"
    assert found["clean"] is None
    assert {"torch", "timm", "robustbench", "ttt_plugins", "python"} <= found["versions"].keys()
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert [m["method"] for m in found["methods"]] == ["fake", "source"]
    for method, record in zip(found["methods"], results.methods, strict=True):
        assert [c["accuracy"] for c in method["cells"]] == [c.accuracy for c in record.cells]
        mean = sum(c["accuracy"] for c in method["cells"]) / 4
        assert method["averages"]["accuracy"] == pytest.approx(mean)
        wanted = {"corruption", "severity", "n", "loss", "seconds", "forwards", "backwards"}
        assert wanted <= method["cells"][0].keys()
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_finite_is_null():
    results = run_benchmark(FakeAdapter(), memory_data({("fog", 5): 4}), progress=False)
    cell = dataclasses.replace(results.methods[0].cells[0], loss=float("nan"))
    broken = dataclasses.replace(
        results, methods=[dataclasses.replace(results.methods[0], cells=[cell])]
    )
    assert json.loads(broken.to_json())["methods"][0]["cells"][0]["loss"] is None


def test_csv_reads_back_as_robustbench_reads_it(finished):
    pandas = pytest.importorskip("pandas")
    results, out, _ = finished
    table = pandas.read_csv(out / "unaggregated_results.csv", header=[0, 1], index_col=0)
    table.columns = table.columns.set_levels(
        [table.columns.levels[0], table.columns.levels[1].astype(int)]
    )
    assert table.shape == (2, 75)
    assert list(table.index) == ["b_fake", "b_source"]
    assert list(dict.fromkeys(table.columns.get_level_values(0))) == CORRUPTIONS
    for method, row in zip(results.methods, table.index, strict=True):
        for cell in method.cells:
            if cell.corruption != "saturate":  # not one of the fifteen
                assert table.loc[row, (cell.corruption, cell.severity)] == cell.accuracy
    assert int(table.loc["b_fake"].notna().sum()) == 3
    assert all(len(row) == 76 for row in csv.reader(io.StringIO(unaggregated_csv(results))))


def test_leaderboard_json_has_robustbenchs_schema(finished, robustbench):
    results, out, _ = finished
    found = json.loads((out / "b_fake.json").read_text())
    info = robustbench.utils.ModelInfo(**found)
    assert list(found) == [field.name for field in dataclasses.fields(info)]
    fifteen = [c.accuracy for c in results.methods[0].cells if c.corruption != "saturate"]
    assert float(info.corruptions_acc) == pytest.approx(100 * sum(fifteen) / 3, abs=0.005)
    assert info.eps is None
    for part in (INELIGIBLE, "reset-per-cell", "batch size 7", "3 of 75 cells", "10-12 images"):
        assert part in info.footnote
    assert "for tests" in info.footnote
    assert "clean accuracy not measured" in info.footnote
    source = dataclasses.replace(results, methods=results.methods[1:])
    assert INELIGIBLE not in model_info(source)["footnote"]


def test_our_tables_of_names_are_robustbenchs(robustbench):
    data, enums = robustbench.data, robustbench.model_zoo.enums
    ours = [dataset for dataset in DATASETS.values() if dataset.robustbench is not None]
    for dataset in ours:
        key, threat = bridge._enums(dataset.robustbench)
        assert tuple(dataset.corruptions) == data.CORRUPTIONS_DICT[key][threat]
        assert dataset.title == data.CORRUPTIONS_DIR_NAMES[key][threat]
        assert dataset.classes == robustbench.utils.DATASET_CLASSES[key]
    assert len(ours) == len(enums.BenchmarkDataset) + 1


def test_other_settings_are_refused_and_the_same_are_not(finished):
    results, out, run = finished
    before = (out / "results.json").read_text()
    assert accuracies(run()) == accuracies(results)
    with pytest.raises(InputError, match="batch_size differs"):
        run(batch_size=3)
    kept = json.loads((out / "results.json").read_text())
    assert kept["settings"] == json.loads(before)["settings"]
    run(batch_size=3, overwrite=True)
    assert json.loads((out / "results.json").read_text())["settings"]["batch_size"] == 3
    run(overwrite=True)
    (out / "results.json").write_text("{")
    with pytest.raises(InputError, match="other settings"):
        run()
    run(overwrite=True)


def test_a_full_disk_leaves_what_was_there(finished, monkeypatch):
    _, out, run = finished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    original = resume_module.Path.write_bytes

    def full(path, content):
        if "results.json" in path.name:
            raise OSError(28, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(resume_module.Path, "write_bytes", full)
    with pytest.raises(DataError, match="No space left"):
        run()
    now = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert now == before
    monkeypatch.undo()
    run(resume=True)  # what was evaluated is not lost either
    assert {path.name for path in out.iterdir()} == before.keys()


def test_out_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create this folder"):
        run_benchmark(FakeAdapter(), memory_data({("fog", 5): 3}), out=tmp_path / "file" / "out")


def test_table(finished):
    results, _, _ = finished
    lines = results.table().splitlines()
    assert lines[0].split() == ["corruption", "images", "fake", "source", "gain"]
    assert [line.split()[0] for line in lines[1:]] == ["fog", "snow", "saturate", "mean"]
    assert lines[1].split()[1] == "20"
    assert len({len(line) for line in lines}) == 1


# -- RobustBench's zoo -------------------------------------------------------------------


def test_importing_robustbench_lends_no_name(robustbench):
    assert not [name for name in sys.modules if name.split(".")[0] == "autoattack"]
    assert bridge.import_robustbench() is robustbench


def test_a_missing_robustbench_is_explained(monkeypatch):
    for name in ("robustbench", "robustbench.eval"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "robustbench.eval")
    monkeypatch.setattr(bridge, "version", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "ttt-plugins\[robustbench\]"'):
        bridge.import_robustbench()
    assert not [name for name in sys.modules if name.split(".")[0] == "autoattack"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'pkg_resources'"), "setuptools>=77.0.3,<82"),
        (RuntimeError("operator torchvision::nms does not exist"), "torch .* and torchvision"),
        (ImportError("cannot import name 'x' from 'timm'"), "together with robustbench .* timm"),
    ],
)
def test_pairs_of_versions_that_cannot_work_are_named(error, message, monkeypatch):
    monkeypatch.setattr(bridge, "version", lambda name: "1.2.3")
    monkeypatch.delitem(sys.modules, "robustbench.eval", raising=False)

    def fails(name):
        raise error

    monkeypatch.setattr(bridge.importlib, "import_module", fails)
    with pytest.raises(MissingDependencyError, match=message):
        bridge.import_robustbench()


def test_zoo_weights_beside_the_model(robustbench, tmp_path):
    key, threat = bridge._enums(DATASETS["cifar10"].robustbench)
    zoo = robustbench.model_zoo.model_dicts[key][threat]
    model = zoo["Hendrycks2020AugMix_ResNeXt"]["model"]().eval()
    folder = tmp_path / "cifar10" / "corruptions"
    folder.mkdir(parents=True)
    file = folder / "Hendrycks2020AugMix_ResNeXt.pt"
    torch.save({"state_dict": model.state_dict()}, file)
    loaded = bridge.load_zoo_model("robustbench:cifar10/Hendrycks2020AugMix_ResNeXt", tmp_path)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    file.write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(DataError, match="not the weights of"):
        bridge.load_zoo_model("robustbench:cifar10/Hendrycks2020AugMix_ResNeXt", tmp_path)


def test_zoo_mistakes(robustbench, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="Kireev2021Effectiveness_RLAT"):
        bridge.load_zoo_model("robustbench:cifar10/Kireev2021Effectiveness", tmp_path)
    for spec in ("robustbench:cifar10", "robustbench:svhn/Standard"):
        with pytest.raises(InputError, match="robustbench:<dataset>/<name>"):
            bridge.load_zoo_model(spec, tmp_path)

    def offline(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(robustbench.utils, "download_gdrive_new", offline)
    name = "Hendrycks2020AugMix_ResNeXt"
    with pytest.raises(DataError, match=f"{name}.pt: no such file.*no route to host"):
        bridge.load_zoo_model(f"robustbench:cifar10/{name}", tmp_path)


# -- command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["benchmark"],
        ["benchmark", "m", "--data-dir", "d", "--out", "o", "--severity", "6"],
        ["benchmark", "m", "--data-dir", "d", "--out", "o", "--protocol", "never"],
        ["benchmark", "m", "--data-dir", "d", "--out", "o", "--set", "lr"],
        ["train", "source", "--data-dir", "d", "--out", "o", "--model-args", "3"],
    ],
)
def test_misspelt_commands(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ttt-plugins: error: ")


def test_module_runs_and_shows_no_traceback(tmp_path):
    argv = [sys.executable, "-W", "ignore", "-m", "ttt_plugins", "benchmark", "ttt_resnet26"]
    argv += ["--method", "tent", "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "o")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"ttt-plugins: error: {tmp_path / 'none'}: no such folder"]


def test_interrupt_is_130(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ttt_plugins.cli.artifacts.list_methods", interrupted)
    assert main(["list"]) == 130


def test_benchmark_command_end_to_end(robustbench, compact_folder, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["benchmark", "ttt_resnet26", "--method", "tent", "--data-dir", str(compact_folder)]
    argv += ["--out", str(out), "--corruption", "fog", "--severity", "5", "1", "--batch-size", "8"]
    argv += ["--n-examples", "8", "--seed", "1", "--lr", "0", "--set", "optimizer=sgd"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "corruption" in shown
    assert "not official" in shown
    found = json.loads((out / "results.json").read_text())
    assert found["settings"]["cells"] == {"fog 5": 8, "fog 1": 8}
    assert found["settings"]["config"]["optimizer"] == "sgd"
    assert found["command"].startswith("ttt-plugins benchmark ttt_resnet26 --method tent")
    adapted, source = found["methods"]
    # A rate of zero: the adapter and the source beside it are one model.
    assert [c["loss"] for c in adapted["cells"]] == pytest.approx(
        [c["loss"] for c in source["cells"]], abs=1e-6
    )
    assert adapted["clean_accuracy"] == source["clean_accuracy"]
    assert main([*argv[:-3], "0.1"]) == 2
    assert "config differs" in capsys.readouterr().err
    assert main(["benchmark", "no_such_model", *argv[2:]]) == 2
    assert main([*argv, "--set", "lrr=1"]) == 2


def test_train_source_command_makes_an_artifact(tmp_path, monkeypatch, capsys):
    write_parquet(tmp_path / "train.parquet", 20, 3)
    write_parquet(tmp_path / "test.parquet", 5, 4)
    monkeypatch.setattr("ttt_plugins.cli.pictures.EXTRA_ROWS", 4)
    out = tmp_path / "model"
    argv = ["train", "source", "--data-dir", str(tmp_path), "--out", str(out), "--epochs", "1"]
    small = ["--model-args", '{"width": 8, "depth": 8}']
    assert main([*argv, *small, "--batch-size", "8"]) == 0
    assert (out / "model.safetensors").is_file()
    assert main(["info", str(out)]) == 0
    assert "ttt_resnet26" in capsys.readouterr().out
    assert main([*argv[:4], "--out", str(tmp_path / "none"), "--batch-size", "17"]) == 2
    assert "16 images do not fill one batch" in capsys.readouterr().err


def test_flags_from_a_dataclass(capsys):
    @dataclasses.dataclass(frozen=True)
    class Recipe:
        """A recipe.

        Attributes:
            first_rate: share of 100 %, which
                goes on.
            low, high: bounds.
            quick: whether.
            sizes: several.
            more: a table.
            limit: or none.

        Raises:
            nothing: at all.
        """

        first_rate: float = 0.5
        low: int = 1
        high: int = 2
        quick: bool = False
        sizes: tuple[int, ...] = (1, 2)
        more: dict = dataclasses.field(default_factory=dict)
        limit: float | None = None

    parser = Parser(prog="x")
    add_dataclass_flags(parser, Recipe)
    assert dataclass_from_args(parser.parse_args([]), Recipe) == Recipe()
    argv = ["--first-rate", "0.25", "--high", "9", "--quick", "--sizes", "4", "5", "6"]
    argv += ["--limit", "3", "--more", '{"width": 32}']
    made = dataclass_from_args(parser.parse_args(argv), Recipe)
    assert made == Recipe(0.25, 1, 9, True, (4, 5, 6), {"width": 32}, 3.0)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "share of 100 %, which goes on (default: 0.5)" in shown
    assert "bounds (default: 2)" in shown
    assert "nothing" not in shown
