"""``benchmark --images``: cells from any labelled source, and corrupted on the fly."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from benchmark_fakes import FakeAdapter, figures, random_cell, write_parquet
from PIL import Image
from test_benchmark_resume import Stopped, Stopping

from ttt_plugins.benchmark import CorruptionData, run_benchmark, run_field
from ttt_plugins.cli import main
from ttt_plugins.data.corruptions import corrupt
from ttt_plugins.data.labelled import LabelledPictures
from ttt_plugins.data.labels import label_positions, label_set
from ttt_plugins.data.loading import ImageLoader
from ttt_plugins.data.opening import open_images
from ttt_plugins.errors import DataError, InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders 0 to 9 of pictures that a fresh `FakeAdapter` mostly knows."""
    root = tmp_path_factory.mktemp("pictures") / "camera"
    images, labels = random_cell(np.random.default_rng(0), 60)
    labels[:10] = range(10)  # every class has a folder
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / str(label) / f"{number:02d}.png")
    return root


def pictures(source, **options):
    options = {"transform": None, "num_classes": 10, "workers": 0, **options}
    return LabelledPictures(open_images(source), **options)


def read_plainly(root):
    """All images and labels of a folder of class folders, in the order of their names."""
    files = sorted(root.glob("*/*.png"))
    arrays = [np.asarray(Image.open(file)) for file in files]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return images, torch.tensor([int(file.parent.name) for file in files])


def plain_accuracy(images, labels, rows, size):
    net, right = FakeAdapter(), 0
    for part in rows.split(size):
        right += int((net(images[part].float() / 255).argmax(1) == labels[part]).sum())
    return right / len(rows)


def test_a_folder_against_a_plain_loop(folder):
    images, labels = read_plainly(folder)
    data = CorruptionData.from_pictures({"camera": pictures(folder)})
    assert dict(data.counts) == {("camera", 0): 60}
    results = run_benchmark(FakeAdapter(), data, batch_size=7, seed=4, progress=False)
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    assert results.methods[0].cells[0].accuracy == plain_accuracy(images, labels, rows, 7)
    assert torch.equal(data.labels(("camera", 0)), labels)
    some = pictures(folder, count=20)
    assert len(some) == 20
    assert torch.equal(some.read(torch.arange(20)).labels, some.labels)
    assert len(some.labels.unique()) > 5  # drawn, not the first


def test_every_kind_of_source_has_the_same_labels(folder, tmp_path):
    images, labels = read_plainly(folder)
    arrays = {"images": images.permute(0, 2, 3, 1).numpy(), "labels": labels.numpy()}
    np.savez(tmp_path / "some.npz", **arrays)
    wanted = torch.tensor([50, 3, 17, 3])
    sources = [folder, tmp_path / "some.npz", (images, labels)]
    sources.append(list(zip(images, labels.tolist(), strict=True)))
    for source in sources:
        own = pictures(source)
        assert torch.equal(own.labels, labels)
        part = own.read(wanted)
        assert torch.equal(part.images, images[wanted])
        assert torch.equal(part.labels, labels[wanted])
    stored = write_parquet(tmp_path / "some.parquet", 9, seed=2)
    assert pictures(tmp_path / "some.parquet").labels.tolist() == stored.tolist()


def test_corrupted_cells_are_the_functions_on_the_clean_pictures(folder):
    images, labels = read_plainly(folder)
    names = ("gaussian_blur", "speckle_noise")
    data = CorruptionData.from_pictures({"camera": pictures(folder)}, names, (2, 5))
    assert list(data.counts) == [(name, s) for name in names for s in (2, 5)]
    blurred = data.load(("gaussian_blur", 2))
    assert torch.equal(blurred.images, corrupt(images, "gaussian_blur", 2))
    assert torch.equal(blurred.labels, labels)
    noisy = data.load(("speckle_noise", 5)).images.float() / 255
    bright = images.float() / 255
    used = (bright > 0.2) & (bright < 0.6)  # not clipped
    assert ((noisy - bright) / bright)[used].std().item() == pytest.approx(0.2, abs=0.02)
    # Rows are the same whatever they are read with.
    rows = torch.tensor([7, 31])
    part = data.read(("speckle_noise", 5), rows)
    assert torch.equal(part.images, data.load(("speckle_noise", 5)).images[rows])
    both = {"a": pictures(folder), "b": pictures(folder)}
    with pytest.raises(InputError, match="give one"):
        CorruptionData.from_pictures(both, names)


@pytest.mark.parametrize("protocol", ["reset-per-cell", "mixed", "clean-corrupt-clean"])
def test_pieces_are_read_by_rows_and_resume(protocol, folder, tmp_path, monkeypatch):
    names = ("speckle_noise", "saturate")
    data = CorruptionData.from_pictures({"camera": pictures(folder)}, names, (5,))
    most = []
    read_rows = data.load_rows

    def counted(cell, rows):
        most.append(len(rows))
        return read_rows(cell, rows)

    by_rows = dataclasses.replace(data, load_rows=counted, piece=14)
    whole = dataclasses.replace(data, load_rows=None, piece=None)
    options = {"protocol": protocol, "seed": 1, "batch_size": 7, "progress": False}
    if protocol == "clean-corrupt-clean":
        whole = dataclasses.replace(whole, clean_count=None, clean=lambda: data.read(("clean", 0)))
    expected = [c[3] for c in figures(run_benchmark(FakeAdapter(), whole, **options))]
    options |= {"only_results": True, "out": tmp_path / "out"}
    with pytest.raises(Stopped):
        run_benchmark(Stopping(5), by_rows, **options)
    again = Stopping()
    found = run_benchmark(again, by_rows, resume=True, **options)
    assert [c[3] for c in figures(found)] == expected
    assert max(most) <= 14
    assert again.forwards < sum(cell["n"] for cell in expected)  # what was finished was kept


def test_the_field_on_pictures(folder):
    data = CorruptionData.from_pictures({"camera": pictures(folder)}, ["saturate"], [5])
    options = {"streams": ["sorted", "gradual", "clean", "long"], "batch_size": 16, "long": 150}
    found = run_field({"source": FakeAdapter}, data, **options)
    assert list(found.cells) == options["streams"]
    images, labels = read_plainly(folder)
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert found.accuracies()["clean"]["source"] == plain_accuracy(images, labels, rows, 16)
    by_class = rows[labels[rows].argsort(stable=True)]
    saturated = corrupt(images, "saturate", 5)
    expected = plain_accuracy(saturated, labels, by_class, 16)
    assert found.accuracies()["sorted"]["source"] == expected
    assert [c.images for c in (found.cells[s]["source"] for s in options["streams"])] == [
        60,
        9 * 60,
        60,
        180,
    ]


def test_classes_by_identifier_and_by_word():
    wnids = label_set("imagenet-1k")
    assert label_positions(1000, [wnids[5], wnids[0]]) == [5, 0]
    assert label_positions(1000, ["tench", "Great_White_Shark"]) == [0, 2]
    assert label_positions(1000, ["tench, Tinca tinca"]) == [0]
    assert label_positions(1000, ["crane"]) is None  # a bird and a machine
    assert label_positions(1000, ["tench", "no such thing"]) is None
    assert label_positions(10, ["tench", "cat"]) is None


def test_damaged_and_unusable_pictures(folder, tmp_path):
    images, labels = read_plainly(folder)
    for row, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (tmp_path / "some" / str(label)).mkdir(parents=True, exist_ok=True)
        file = tmp_path / "some" / str(label) / f"{row:02d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    file.write_bytes(b"no picture")
    broken = pictures(tmp_path / "some")
    with pytest.raises(DataError, match=file.name):
        broken.read(torch.arange(60))
    rest = pictures(tmp_path / "some", skip_damaged=True)
    assert (len(rest), rest.skipped) == (59, 1)
    assert torch.equal(rest.read(torch.arange(59)).images, images[:59])
    with pytest.raises(InputError, match="10 classes and the model 12"):
        pictures(folder, num_classes=12)
    with pytest.raises(DataError, match="without labels"):
        pictures(folder / "3")
    with pytest.raises(InputError, match="images must be uint8, not"):
        pictures((images.float() / 255, labels))
    with pytest.raises(InputError, match="a stream"):
        pictures(ImageLoader(open_images(folder), workers=0))


def test_the_command(folder, tmp_path, capsys):
    command = ["benchmark", "resnet18", "--method", "source", "--batch-size", "32"]
    command += ["--images", f"cam={folder}", "--image-size", "32", "--workers", "0"]
    assert main([*command, "--out", str(tmp_path / "no")]) != 0  # 1,000 classes
    assert "10 classes and the model 1000" in capsys.readouterr().err
    small = ["benchmark", "bundled:source-resnet26-cifar10", *command[2:]]
    small += ["--n-examples", "16"]
    assert main([*small, "--out", str(tmp_path / "a")]) == 0
    assert "cam" in capsys.readouterr().out
    stored = json.loads((tmp_path / "a" / "results.json").read_text())
    assert stored["settings"]["dataset"] == "pictures"
    assert stored["settings"]["cells"] == {"cam 0": 16}
    assert stored["settings"]["seeds"] == [0]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["plot.png", "results.json"]
    field = [*small[:2], *small[4:], "--methods", "source,tent:lr=0.01", "--corrupt", "saturate"]
    field += ["--severity", "5", "--field", "clean", "sorted"]
    assert main([*field, "--out", str(tmp_path / "b")]) == 0
    assert "tent:lr=0.01: " in capsys.readouterr().out
    assert (tmp_path / "b" / "field.md").read_text().startswith("| accuracy in % |")
    for more, message in (
        ([*small, "--corruption", "fog"], "with --images use --corrupt"),
        ([*small, "--field"], "--field takes --methods"),
        ([*field, "--protocol", "mixed"], "leave out --protocol"),
        ([*field, "--methods", "tent:lr"], "--methods tent:lr: expected KEY=VALUE"),
        ([*field, "--methods", "source,tent:rate=1"], "no field 'rate'"),
        ([*field, "--methods", "tend"], "tend"),
    ):
        assert main([*more, "--out", str(tmp_path / "c")]) != 0
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_restricted_to_the_classes_of_a_folder(tmp_path, capsys):
    """A model of 1,000 classes on folders named by two of them."""
    rng = np.random.default_rng(0)
    names = [label_set("imagenet-1k")[i] for i in (7, 301)]
    for name in names:
        (tmp_path / "two" / name).mkdir(parents=True)
        for i in range(3):
            image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
            image.save(tmp_path / "two" / name / f"{i}.jpg")
    command = ["benchmark", "resnet18", "--method", "source", "--images", str(tmp_path / "two")]
    command += ["--classes", "folder", "--image-size", "32", "--workers", "0"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())["methods"][0]
    assert record["cells"][0]["loss"] < 2  # of two classes, not of a thousand
    assert "two" in capsys.readouterr().out
