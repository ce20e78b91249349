"""Trainings on pictures of any source: ``--images``."""

import gc
import itertools
import json
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ttt_plugins as tp
from ttt_plugins.cli import pictures
from ttt_plugins.cli.main import main
from ttt_plugins.core import views
from ttt_plugins.core.pictures import image_batches
from ttt_plugins.data.cifar10 import CIFAR10_CLASSES
from ttt_plugins.data.corruptions import TENSOR_CORRUPTIONS
from ttt_plugins.data.images import LabelledImages
from ttt_plugins.data.on_demand import ImagesOnDemand, shuffled_rows
from ttt_plugins.data.source import OPEN_BLOCKS, ImageSource, Sample
from ttt_plugins.demo import load_sample
from ttt_plugins.errors import DataError
from ttt_plugins.methods import ttt_head
from ttt_plugins.train import source
from ttt_plugins.train.source import SourceRecipe, train_source

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
    words = ["train", "mgg", "--model", MODEL, "--images", str(folder)]
    assert main([*words, "--workers", "0", "--out", str(tmp_path / "out")]) == 2
    assert "--max-images" in capsys.readouterr().err


class Drawn(ImageSource):
    """Many pictures that are drawn when they are read; the rows that were read are counted."""

    location = "drawn pictures"
    labelled = True

    def __init__(self, count, side=32):
        self.count, self.side, self.reads = count, side, Counter()

    def __len__(self):
        return self.count

    def read_labels(self):
        return torch.arange(self.count) % 3

    def read(self, row):
        self.reads[row] += 1
        generator = torch.Generator().manual_seed(row)
        pixels = torch.randint(256, (3, self.side, self.side), generator=generator)
        return Sample(pixels.to(torch.uint8), row % 3, str(row))


def held():
    """Bytes of 8-bit tensors that exist now."""
    found = (t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dtype == torch.uint8)
    return sum(t.numel() for t in found)


@pytest.fixture
def most_held(monkeypatch):
    """The largest number of bytes of 8-bit images that existed at every fifth training step."""
    most, flip, steps = [0], views.random_flip, itertools.count(1)

    def watched(images, generator):
        if next(steps) % 5 == 0:
            most[0] = max(most[0], held())
        return flip(images, generator)

    for module in (source, ttt_head):
        monkeypatch.setattr(module, "random_flip", watched)
    return most


def test_training_holds_a_few_batches_of_any_number_of_pictures(tmp_path, most_held, monkeypatch):
    drawn = {"many": Drawn(1000), "few": Drawn(50)}
    monkeypatch.setattr(pictures, "open_images", lambda name, **_: drawn[name])
    gc.collect()
    before, batch = held(), 25 * 3 * 32 * 32
    common = ("--images", "many", "--epochs", 1, "--batch-size", 25)
    model = ("--arch", "ttt_resnet26", "--model-args", '{"width": 8, "depth": 8, "groups": 4}')
    run("source", *model, *common, "--val-images", "few", "--out", tmp_path / "model")
    assert sum(drawn["many"].reads.values()) == 1000 + 2  # the first is looked at beforehand
    assert len(drawn["many"].reads) == 1000
    run(
        "ttt", "--freeze-trunk", "--model", tmp_path / "model", *common,
        "--out", tmp_path / "head",
    )  # fmt: skip
    # Pictures, a batch, its crops; all pictures are forty batches.
    assert batch < most_held[0] - before < 6 * batch


def test_pictures_read_on_demand_train_as_the_same_tensor(tmp_path):
    some = Drawn(60)
    stacked = torch.stack([some.read(row).image for row in range(60)])
    recipe = SourceRecipe(
        arch="ttt_resnet26",
        model_args={"width": 8, "depth": 8, "groups": 4},
        epochs=2,
        batch_size=16,
    )
    results = []
    for images in (stacked, ImagesOnDemand(some, None, workers=0)):
        data = LabelledImages(images, some.read_labels())
        out = tmp_path / str(len(results))
        results.append(train_source(recipe, data, data, out, progress=False))
    (model, log), (other, other_log) = results
    assert log == other_log
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    chosen = ImagesOnDemand(some, None, rows=torch.tensor([7, 3, 50]), workers=0)
    assert torch.equal(chosen[torch.tensor([2, 0])], stacked[[50, 7]])
    assert torch.equal(torch.cat(list(chosen.split(2))), stacked[[7, 3, 50]])


def test_rows_in_blocks_are_shuffled_a_few_blocks_at_a_time():
    blocks = [range(10 * i, 10 * i + 10) for i in range(2 * OPEN_BLOCKS)]
    source = Drawn(10 * len(blocks))
    source.blocks = lambda: blocks
    rows = torch.randperm(len(source), generator=torch.Generator().manual_seed(1))[:120]
    images = ImagesOnDemand(source, None, rows=rows, workers=0)
    order = shuffled_rows(images, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, torch.arange(120))
    assert not torch.equal(order, shuffled_rows(images, torch.Generator().manual_seed(1)))
    opened = [set((rows[part] // 10).tolist()) for part in (order[:40], order[-40:])]
    assert all(len(part) <= OPEN_BLOCKS for part in opened)


def test_damaged_pictures_stop_a_training_or_are_skipped(folder, tmp_path, capsys):
    copy = tmp_path / "pictures"
    shutil.copytree(folder, copy)
    damaged = sorted(copy.rglob("*.png"))[3]
    damaged.write_bytes(damaged.read_bytes()[:60])
    words = ["train", "ttt", "--freeze-trunk", "--model", MODEL, "--images", copy, "--epochs", 1]
    words += ["--batch-size", 4, "--workers", 0, "--out", tmp_path / "head"]
    words = [str(word) for word in words]
    assert main(words) == 2
    assert damaged.name in capsys.readouterr().err
    assert main([*words, "--skip-damaged"]) == 0
    assert "skipped 1 damaged pictures" in capsys.readouterr().out
    assert config(tmp_path / "head")["images"] == 19


def test_wrap_trains_a_head_on_a_folder(folder):
    net = tp.wrap(MODEL, "ttt", head="train", data=folder, seed=0)
    plain = tp.wrap(MODEL, "source").backbone
    pixels = torch.cat([part.mul(255).byte() for part in image_batches(folder, plain)])
    other = tp.wrap(MODEL, "ttt", head="train", data=pixels, seed=0)
    for name, tensor in net.learned_tensors().items():
        assert torch.equal(tensor, other.learned_tensors()[name])
    with pytest.raises(DataError, match="no such file or folder"):
        tp.wrap(MODEL, "ttt", head="train", data=folder / "nothing")
