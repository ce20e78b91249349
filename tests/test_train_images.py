"""Trainings on pictures of any source: ``--images``."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ttt_plugins as tp
from ttt_plugins.cli import pictures
from ttt_plugins.cli.main import main
from ttt_plugins.data.cifar10 import CIFAR10_CLASSES
from ttt_plugins.data.corruptions import TENSOR_CORRUPTIONS
from ttt_plugins.demo import load_sample

MODEL = "bundled:source-resnet26-cifar10"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty clean pictures of the demo, larger than the model's input, in class folders."""
    root = tmp_path_factory.mktemp("pictures")
    sample = load_sample(n=20)
    for i, (image, label) in enumerate(zip(sample.images["clean"], sample.labels, strict=True)):
        place = root / CIFAR10_CLASSES[label]
        place.mkdir(exist_ok=True)
        drawn = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((50, 40))
        drawn.save(place / f"{i:02d}.png")
    return root


def run(*words):
    assert main(["train", *map(str, words), "--workers", "0"]) == 0


def config(out):
    return json.loads((out / "config.json").read_text())["training"]


def test_mgg_needs_clean_unlabelled_pictures_only(folder, tmp_path, monkeypatch):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in folder.rglob("*.png"):
        (flat / file.name).write_bytes(file.read_bytes())
    seen = []
    monkeypatch.setattr(
        "ttt_plugins.cli.train.train_mgg",
        lambda recipe, nets, data, work, resume: seen.append((nets, data)) or (nets[0], {}),
    )
    run("mgg", "--model", MODEL, "--images", flat, "--max-images", 12, "--out", tmp_path / "out")
    ((nets, data),) = seen
    assert tuple(data) == TENSOR_CORRUPTIONS
    for part in data.values():
        assert part.images.shape == (12, 3, 32, 32)
        assert part.images.dtype == torch.uint8
    facts = config(tmp_path / "out")
    assert facts["labels_from"] == "the unadapted model's on the clean pictures"
    assert facts["statistics_images"] == 20
    assert "source.mean" in nets[0].learned_tensors()


def test_labels_of_class_folders_are_used_to_choose(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ttt_plugins.cli.train.train_mgg",
        lambda recipe, nets, data, work, resume: seen.append(data) or (nets[0], {}),
    )
    run("mgg", "--model", MODEL, "--images", folder, "--out", tmp_path / "out")
    # The folders need not hold all classes: without as many names they cannot be told apart.
    names = sorted(p.name for p in folder.iterdir())
    expected = "the source's" if len(names) == 10 else "the unadapted model's on the clean pictures"
    assert config(tmp_path / "out")["labels_from"] == expected


def test_a_rotation_head_is_trained_on_any_pictures(folder, tmp_path):
    out = tmp_path / "head"
    run(
        "ttt", "--freeze-trunk", "--model", MODEL, "--images", folder, "--epochs", 1,
        "--batch-size", 8, "--out", out,
    )  # fmt: skip
    assert config(out)["images"] == 20
    assert "head.weight" in load_file(out / "model.safetensors")
    assert tp.from_pretrained(out).method == "ttt"


def test_a_classifier_is_trained_on_any_labelled_pictures(folder, tmp_path, capsys):
    common = ("source", "--arch", "ttt_resnet26", "--epochs", 1, "--batch-size", 8)
    common += ("--model-args", '{"width": 8, "depth": 8, "groups": 4}')
    out = tmp_path / "model"
    run(*common, "--images", folder, "--val-images", folder, "--out", out)
    written = json.loads((out / "config.json").read_text())
    assert written["num_classes"] == len(list(folder.iterdir()))
    assert written["training"]["images"] == 20
    mistake = ["train", *map(str, common), "--images", str(folder), "--out", str(tmp_path / "b")]
    assert main(mistake) == 2
    assert "--val-images" in capsys.readouterr().err
    assert main([*mistake, "--val-images", str(next(folder.iterdir())), "--workers", "0"]) == 2
    assert "without labels" in capsys.readouterr().err


def test_pictures_beyond_the_memory_are_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "_SHARE_OF_MEMORY", 1e-9)
    words = ["train", "ttt", "--freeze-trunk", "--model", MODEL, "--images", str(folder)]
    assert main([*words, "--workers", "0", "--out", str(tmp_path / "out")]) == 2
    assert "--max-images" in capsys.readouterr().err
