"""Data sets of class folders, made in miniature: ImageNet-R, -A, -Sketch, -V2, and others'."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import ttt_plugins as tp
from ttt_plugins.benchmark import open_class_folders, open_dataset, run_benchmark
from ttt_plugins.cli.main import main
from ttt_plugins.data import datasets
from ttt_plugins.data.datasets import DATASETS
from ttt_plugins.data.labels import label_set
from ttt_plugins.errors import DataError, InputError

EXAMPLE = Path(__file__).parent.parent / "examples" / "plugin_dataset"
IMAGENET = label_set("imagenet-1k")
#: The folders of the published archives, and the names of their class folders.
LAYOUTS = {
    "imagenet-r": (["imagenet-r"], label_set("imagenet-r")),
    "imagenet-a": (["imagenet-a"], label_set("imagenet-a")),
    "imagenet-sketch": (["sketch"], IMAGENET),
    "imagenetv2": (
        [
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2-threshold0.7-format-val",
            "imagenetv2-top-images-format-val",
        ],
        tuple(map(str, range(1000))),
    ),
}


class Reader(nn.Module):
    """Reads the class, one of ``count``, from a picture's colour."""

    def __init__(self, count=1000):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(count))

    def forward(self, x):
        red, green = (x.mean((2, 3))[:, :2] * 32).round().long().unbind(1)
        return self.bias + 9.0 * nn.functional.one_hot(red + 32 * green, len(self.bias))


def write_class(folder, place, count=1):
    """Pictures in the colour of a class."""
    folder.mkdir(parents=True)
    for i in range(count):
        colour = (8 * (place % 32), 8 * (place // 32), 50 * i)
        Image.new("RGB", (4, 4), colour).save(folder / f"{i}.png")


def reader(count=1000, **options):
    return tp.wrap(Reader(count), "source", normalize=False, **options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts(name, tmp_path):
    folders, classes = LAYOUTS[name]
    for folder in folders:
        for label, own in enumerate(classes):
            # A folder of numbers is the class itself; others are found among ImageNet's classes.
            place = label if own.isdigit() else IMAGENET.index(own)
            write_class(tmp_path / folder / own, place, 1 + (label == 3))
        (tmp_path / folder / "README.txt").write_text("not a picture")
    subset = {"imagenet-r", "imagenet-a"} & {name}
    net = reader(classes=name if subset else None)
    data = open_class_folders(name, tmp_path, net, workers=0)
    assert list(data.counts.values()) == [len(classes) + 1] * len(folders)
    results = run_benchmark(net, data, batch_size=100, seed=0, progress=False)
    assert set(results.methods[0].accuracies().values()) == {1.0}
    assert results.settings["dataset"] == name
    # One of the folders itself; some of its pictures; some of its cells.
    cell = DATASETS[name].corruptions[-1]
    few = open_class_folders(
        name, tmp_path / folders[-1], net, corruptions=[cell], n_examples=5, workers=0
    )
    assert dict(few.counts) == {(cell, 0): 5}
    with pytest.raises(InputError, match="classes, the model 10"):
        open_class_folders(name, tmp_path, reader(10, classes=range(10)))
    with pytest.raises(DataError, match="holds no folder"):
        open_class_folders(name, tmp_path / folders[0] / classes[0], net)
    with pytest.raises(InputError, match="open_class_folders"):
        open_dataset(name, tmp_path)
    write_class(tmp_path / folders[0] / "n99999999", 0)
    with pytest.raises(DataError, match="n99999999 is not one of them"):
        open_class_folders(name, tmp_path, net)


def test_the_command_restricts_the_model(tmp_path, capsys):
    for own in label_set("imagenet-a"):
        write_class(tmp_path / "imagenet-a" / own, IMAGENET.index(own))
    words = ["benchmark", "test_vit", "--method", "tent", "--dataset", "imagenet-a"]
    words += ["--data-dir", str(tmp_path), "--n-examples", "6", "--workers", "0"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "ImageNet-A" in printed
    assert "classes: 200 of the model's, no others" in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [m["method"] for m in found["methods"]] == ["tent", "source"]
    assert not list((tmp_path / "out").glob("unaggregated*"))
    assert main([*words, "--corruption", "fog", "--out", str(tmp_path / "b")]) == 2
    assert "unknown corruption 'fog'" in capsys.readouterr().err


@pytest.fixture
def cameras(monkeypatch, tmp_path):
    """The example, installed as its files lie after pip, and a broken one."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(DATASETS, "_records", dict(datasets._OWN))
    monkeypatch.setattr(DATASETS, "_discovered", False)
    points = {
        "ttt_plugins_cameras": "cameras = ttt_plugins_cameras:CAMERAS",
        "plug_broken": "broken = plug_broken:SIZE",
        "plug_thief": "cifar10 = plug_broken:SIZE",
    }
    for name, point in points.items():
        info = site / f"{name}-0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[{datasets.GROUP}]\n{point}\n")
    (site / "plug_broken.py").write_text("SIZE = 3\n")
    code = (EXAMPLE / "ttt_plugins_cameras.py").read_text()
    (site / "ttt_plugins_cameras.py").write_text(code)
    yield
    for name in ("ttt_plugins_cameras", "plug_broken"):
        sys.modules.pop(name, None)


def test_another_package_adds_a_data_set(cameras, tmp_path, capsys):
    assert DATASETS["cifar10"].classes == 10
    assert "ttt_plugins_cameras" not in sys.modules  # a known name loads no plugin
    with pytest.warns(RuntimeWarning) as warned:
        assert DATASETS["cameras"].title == "Cameras"
    told = [str(one.message) for one in warned]
    assert any("'broken'" in text and "must be a Dataset, not " in text for text in told)
    assert any("'cifar10'" in text and "would replace" in text for text in told)
    assert set(DATASETS) == {*datasets._OWN, "cameras"}
    assert main(["list"]) == 0
    assert "cameras: Cameras" in capsys.readouterr().out
    for cell, turned in (("day", 0), ("night", 1)):
        for place, own in enumerate(("deer", "boar", "fox")):
            write_class(tmp_path / cell / own, (place + turned) % 3)
    net = reader(3)
    data = open_class_folders("cameras", tmp_path, net, workers=0)
    out = tmp_path / "out"
    results = run_benchmark(net, data, batch_size=2, seed=0, out=out, progress=False)
    assert results.methods[0].accuracies() == {("day", 0): 1.0, ("night", 0): 0.0}


def test_records_that_contradict_themselves_are_refused():
    spec = importlib.util.spec_from_file_location("cameras", EXAMPLE / "ttt_plugins_cameras.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for changes in ({"folders": ("day",)}, {"classes": 4}, {"layout": "npy"}):
        with pytest.raises(InputError, match="Cameras"):
            datasets.replace(module.CAMERAS, **changes)
