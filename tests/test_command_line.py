"""Mistakes on the command line: one line of our own, before any work, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import fields

import pytest
import torch
from benchmark_fakes import FakeAdapter, memory_data

import ttt_plugins as tp
from ttt_plugins.artifacts.folder import FILES, bundled_folder, check_target
from ttt_plugins.benchmark import Execution, run_benchmark
from ttt_plugins.cli import main
from ttt_plugins.cli.flags import key_value
from ttt_plugins.data.cifar10 import EXTRA_ROWS
from ttt_plugins.data.images import LabelledImages
from ttt_plugins.train import epochs
from ttt_plugins.train.joint import JointRecipe
from ttt_plugins.train.mgg import MGGRecipe
from ttt_plugins.train.mt3 import MT3Recipe
from ttt_plugins.train.source import SourceRecipe

SOURCE = "bundled:source-resnet26-cifar10"
NORMED = "bundled:source-resnet26bn-cifar10"
TRAININGS = {
    "source": ["source"],
    "ttt": ["ttt"],
    "head": ["ttt", "--freeze-trunk", "--model", SOURCE],
    "mt3": ["mt3"],
    "mgg": ["mgg", "--model", NORMED],
}
SMALL = ["--model-args", '{"width": 8, "depth": 8}', "--epochs", "1"]
TASKS = [*SMALL, "--tasks", "2", "--task-images", "2"]
#: For each training, flags that make it as short as can be.
SHORT = {
    "source": [*SMALL, "--batch-size", "8"],
    "ttt": [*SMALL, "--batch-size", "8"],
    "head": ["--epochs", "1", "--batch-size", "8"],
    "mt3": [*TASKS, "--steps-per-epoch", "1"],
    "mgg": ["--epochs", "1", "--length", "1", "--grid", "0.001"],
}
HUGE = "99999999999999999999"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def images(monkeypatch):
    """Sixteen images to train on, wherever the command says that they are."""
    count = EXTRA_ROWS + 16
    made = LabelledImages(
        torch.randint(
            0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0)
        ).byte(),
        torch.arange(count) % 10,
    )
    monkeypatch.setattr("ttt_plugins.cli.pictures.read_parquet", lambda _: made)
    monkeypatch.setattr("ttt_plugins.cli.train.load_stream", lambda *_, **__: made[:16])


@pytest.fixture
def some_data(monkeypatch):
    """Four images to measure on, wherever the command says that they are."""
    monkeypatch.setattr(
        "ttt_plugins.cli.benchmark.open_dataset", lambda *_, **__: memory_data({("fog", 5): 4})
    )


@pytest.fixture
def no_work(monkeypatch):
    """Reading images is an error: what is refused is refused before."""

    def read(*_, **__):
        raise AssertionError("images were read")

    monkeypatch.setattr("ttt_plugins.cli.pictures.read_parquet", read)
    monkeypatch.setattr("ttt_plugins.cli.train.load_stream", read)
    monkeypatch.setattr("ttt_plugins.cli.benchmark.open_dataset", read)


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def refused(here, capsys):
    """Run a command that is a mistake; its one line."""

    def run(*argv):
        before = listing(here)
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("ttt-plugins: error: ")
        assert listing(here) == before
        return lines[0]

    return run


def train(kind, *more, out="out"):
    return ["train", *TRAININGS[kind], "--data-dir", "data", "--out", out, *more]


def benchmark(*more, model=SOURCE, out="out"):
    return ["benchmark", model, "--data-dir", "data", "--out", out, *more]


# -- the folder of a benchmark -----------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_benchmark_spoils_no_artifact(more, here, no_work, refused):
    shutil.copytree(bundled_folder("source-resnet26-cifar10"), here / "artifact")
    before = {p.name: p.read_bytes() for p in (here / "artifact").iterdir()}
    said = refused(*benchmark("--method", "tent", *more, out="artifact"))
    assert "artifact holds a config.json" in said
    with pytest.raises(tp.InputError, match=r"holds a config.json"):
        run_benchmark(
            FakeAdapter(), memory_data({("fog", 5): 4}), out=here / "artifact", overwrite=bool(more)
        )
    assert {p.name: p.read_bytes() for p in (here / "artifact").iterdir()} == before
    tp.from_pretrained(here / "artifact")


@pytest.mark.parametrize("out", ["file", "file/below", "a\0b", "x" * 300])
def test_a_benchmark_into_no_folder(out, here, no_work, refused):
    (here / "file").write_text("mine")
    assert "cannot create this folder" in refused(*benchmark("--method", "tent", out=out))


@pytest.mark.parametrize("more", [["--compile", "nope"], ["--overwrite", "--compile", "nope"]])
def test_a_compile_backend_that_does_not_exist(more, here, no_work, refused):
    cell = here / "out" / "unfinished" / "method0-seed0-stream000" / "0000.safetensors"
    cell.parent.mkdir(parents=True)
    cell.write_text("hours of work")
    (here / "out" / "unfinished" / "run.json").write_text("{}")
    assert "no compile backend 'nope'" in refused(*benchmark("--method", "tent", *more))
    with pytest.raises(tp.InputError, match="no compile backend"):
        Execution(compile="nope")


@pytest.mark.parametrize("seeds", [[HUGE], ["1", "4294967296"], ["-1"]])
def test_seeds_of_a_benchmark(seeds, no_work, refused):
    assert "--seed must be an integer from 0 to 4294967295" in refused(
        *benchmark("--method", "tent", "--seed", *seeds)
    )
    with pytest.raises(tp.InputError, match="seed must be an integer"):
        run_benchmark(FakeAdapter(), memory_data({("fog", 5): 4}), seed=[int(s) for s in seeds])


@pytest.mark.parametrize("flag", ["--threads", "--batch-size"])
@pytest.mark.parametrize("value", [HUGE, "0", "-1"])
def test_numbers_out_of_range(flag, value, some_data, refused):
    assert "must" in refused(*benchmark("--method", "tent", flag, value))


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_demo_into_no_folder(out, here, monkeypatch, refused):
    def work(*_, **__):
        raise AssertionError("the demo ran")

    monkeypatch.setattr("ttt_plugins.demo.run.predict_sample", work)
    (here / "file").write_text("mine")
    assert "cannot create this folder" in refused("demo", "--out", out)


# -- --set -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [
        "model_dir=x",
        "model=x",
        "method=tent",
        "pretrained=true",
        "tensors=3",
        "device=cpu",
        "seed=3",
        "head=x",
        "data=3",
        "normalize=false",
        "lrr=1",
        "backbone=x",
        "revision=x",
    ],
)
def test_set_takes_fields_alone(pair, some_data, refused):
    name = pair.partition("=")[0]
    for argv, config in (
        (benchmark("--method", "tent"), tp.Tent),
        (benchmark("--method", "source"), tp.Source),
        (benchmark(model="bundled:mgg-resnet26-cifar10"), tp.MGG),
    ):
        said = refused(*argv, "--set", pair)
        assert f"{config.__name__} has no field {name!r}" in said
        assert all(field.name in said for field in fields(config))
        assert ("Did you mean 'lr'?" in said) == (name == "lrr" and config is not tp.Source)


def test_the_step_size_of_mgg_comes_from_its_grid(no_work, refused):
    assert "give --grid 0.5" in refused(*train("mgg", "--set", "lr=0.5"))
    assert "give --grid nan" in refused(*train("mgg", "--set", "lr=nan"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "lr=1", "--lr", "2"], "lr is given twice: 1 and 2.0"),
        (["--set", "lr=1", "lr=2"], "lr is given twice: 1 and 2"),
        (["--set", "prior=" + "9" * 400], "more than 64 bits"),
    ],
)
def test_set_takes_one_value(more, words, some_data, refused):
    assert words in refused(*benchmark("--method", "tent", *more))


@pytest.mark.parametrize("kind", ["ttt", "head", "mt3", "mgg"])
def test_set_of_trainings_takes_fields_alone(kind, no_work, refused):
    assert "has no field 'model_dir'" in refused(*train(kind, "--set", "model_dir=x"))
    assert "params is given twice" in refused(*train(kind, "--set", "params=a", "params=b"))


# -- the folders of a training -----------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file", "not an artifact"),
        ("full", "not empty and not an artifact"),
        ("dangling", "not an artifact"),
        ("..", "cannot be the name of"),
        (".", "cannot be the name of"),
        ("", "cannot be the name of"),
        ("new/..", "cannot be the name of"),
        ("a\0b", "null byte"),
        ("x" * 250, "too long"),
        ("file/below", "is not a folder"),
        ("/dev/null/x", "/dev/null is not a folder"),
    ],
)
def test_where_a_training_cannot_write(kind, out, words, here, no_work, refused):
    (here / "file").write_text("mine")
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("mine")
    (here / "dangling").symlink_to(here / "nothing")
    assert words in refused(*train(kind, out=out))


@pytest.mark.parametrize("kind", [kind for kind in TRAININGS if kind != "head"])
def test_where_checkpoints_cannot_go(kind, here, no_work, refused):
    (here / "out-training").write_text("mine")
    assert "out-training must hold the training's checkpoints" in refused(*train(kind))
    (here / "out-training").unlink()
    (here / "out-training" / "checkpoint.pt").mkdir(parents=True)
    for more in ([], ["--resume"]):
        assert "checkpoint.pt is not a file" in refused(*train(kind, *more))


def test_what_may_be_written_into(tmp_path):
    for name in FILES:
        (tmp_path / "artifact").mkdir(exist_ok=True)
        (tmp_path / "artifact" / name).write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("artifact", "empty", "new", "new/below", "x" * 200):
        assert check_target(tmp_path / name) == tmp_path / name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "empty"]


# -- what is found before a training begins ----------------------------------------------------

NO_RECIPE = [
    ("source", ["--batch-size", "17"], "16 images do not fill one batch"),
    ("source", ["--arch", "nope"], "timm could not create 'nope'"),
    ("source", ["--model-args", '{"width": "x"}'], "timm could not create"),
    ("source", ["--model-args", '{"groups": 0}'], "timm could not create"),
    ("source", ["--init", "bundled:mgg-resnet26-cifar10"], "carries no model"),
    ("source", ["--init", "bundled:source-vit-tiny-cifar10"], "do not fit ttt_resnet26"),
    ("source", ["--optimizer", "muon"], "muon"),
    ("ttt", ["--batch-size", "17"], "16 images do not fill one batch"),
    ("ttt", ["--split", "99"], "split must be"),
    ("ttt", ["--split", "nope"], "split='nope'"),
    ("ttt", ["--arch", "nope"], "timm could not create 'nope'"),
    ("ttt", ["--set", "params=nope"], "params='nope' selects nothing"),
    ("ttt", ["--set", "params=(weight)+"], "not accepted as params"),
    ("ttt", ["--set", "params=head", "--split", "1"], "params='head' selects nothing"),
    ("mt3", ["--tasks", "17"], "do not fill one meta-batch"),
    ("mt3", ["--arch", "nope"], "timm could not create 'nope'"),
    ("mt3", ["--arch", "ttt_resnet26_bn"], "has BatchNorm"),
    ("mt3", ["--set", "params=nope"], "params='nope' selects nothing"),
    ("mt3", ["--set", "params=(weight)+"], "not accepted as params"),
    ("mgg", ["--batch-size", "17"], "at least one batch"),
    ("mgg", ["--grid", "0.001", "-1"], "grid must hold step sizes of at least 0, got -1.0"),
    ("mgg", ["--grid", "nan"], "grid must hold step sizes of at least 0, got nan"),
    ("mgg", ["--meta-lr", "nan"], "meta_lr must be a number"),
    ("mgg", ["--set", "params=nope"], "params='nope' selects nothing"),
    ("mgg", ["--statistics-images", "0"], "--statistics-images must be at least 1"),
]


@pytest.mark.parametrize(("kind", "more", "words"), NO_RECIPE)
def test_a_training_that_cannot_be_leaves_no_folder(kind, more, words, images, refused):
    assert words in refused(*train(kind, *SHORT[kind], *more))


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("seed", [HUGE, "-1", "4294967296"])
def test_seeds_of_trainings(kind, seed, no_work, refused):
    assert "seed must be an integer from 0 to 4294967295" in refused(*train(kind, "--seed", seed))


@pytest.mark.parametrize("recipe", [SourceRecipe, JointRecipe, MT3Recipe, MGGRecipe])
def test_recipes_check_their_numbers(recipe):
    numbers = [f.name for f in fields(recipe) if f.type in ("int", "float")]
    assert "seed" in numbers
    assert len(numbers) > 5
    for name in numbers:
        for value in (float("nan"), float("inf"), -1, "3", None):
            with pytest.raises(tp.InputError, match=f"{recipe.__name__}.{name} "):
                recipe(**{name: value})
    integers = [f.name for f in fields(recipe) if f.type == "int"]
    for name in integers:
        with pytest.raises(tp.InputError, match=f"{recipe.__name__}.{name} "):
            recipe(**{name: 1.5})
    for name in {"cutmix", "ema", "label_smoothing", "patch_drop_until", "warmup"} & set(numbers):
        with pytest.raises(tp.InputError, match=name):
            recipe(**{name: 1.01})


def test_a_recipe_that_drops_every_patch():
    with pytest.raises(tp.InputError, match="patch_drop must be below 1"):
        SourceRecipe(patch_drop=1.0)


def test_a_data_folder_with_nothing_to_train_on(monkeypatch, refused):
    few = LabelledImages(torch.zeros(EXTRA_ROWS, 3, 32, 32).byte(), torch.zeros(EXTRA_ROWS).long())
    monkeypatch.setattr("ttt_plugins.cli.pictures.read_parquet", lambda _: few)
    for kind in ("source", "ttt", "head", "mt3"):
        assert f"no images before the last {EXTRA_ROWS}" in refused(*train(kind, *SHORT[kind]))


# -- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in TRAININGS if kind != "head"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "list"])
def test_a_damaged_checkpoint(kind, damage, here, images, refused):
    file = here / "out-training" / "checkpoint.pt"
    file.parent.mkdir()
    torch.save({"recipe": {}, "made_by": {}, "log": []}, file)
    if damage == "list":
        torch.save([1, 2], file)
    else:
        whole = file.read_bytes()
        content = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"\x80 no archive"}
        file.write_bytes(content[damage])
    said = refused(*train(kind, *SHORT[kind], "--resume"))
    assert "checkpoint.pt is damaged" in said
    assert "delete it or leave out --resume" in said


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    epochs.save_checkpoint(file, {"epoch": 1})

    def full(saved, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0\nand more lines")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(tp.errors.DataError, match=r"cannot be written \(PytorchStreamWriter"):
        epochs.save_checkpoint(file, {"epoch": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert torch.load(file, weights_only=True) == {"epoch": 1}


# -- signals and the environment ---------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("kind", [kind for kind in TRAININGS if kind != "head"])
def test_a_stopped_training_says_how_to_resume(number, code, kind, images, monkeypatch, capsys):
    def stopped(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr("ttt_plugins.cli.train.check_device", stopped)
    before = signal.getsignal(signal.SIGTERM)
    assert main(train(kind, *SHORT[kind])) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "ttt-plugins: stopped: to resume, run the same command with --resume"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "-1"), ("RANK", "x"), ("RANK", "2"), ("RANK", "")],
)
def test_a_training_in_a_senseless_environment(name, value, images, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    assert name in refused(*train("mt3", *SHORT["mt3"]))


@pytest.mark.parametrize("kind", [kind for kind in TRAININGS if kind != "head"])
def test_checkpoints_on_a_read_only_disk(kind, here, no_work, refused, monkeypatch):
    """Found before anything is read, not when the first checkpoint is written."""
    (here / "out-training").mkdir()
    real = os.access
    # What the system answers on a read-only disk, also to its administrator.
    monkeypatch.setattr(
        os, "access", lambda path, mode: "-training" not in str(path) and real(path, mode)
    )
    assert "this process may not write there" in refused(*train(kind))


# -- everything else ---------------------------------------------------------------------------


def test_an_error_of_the_system_is_one_line(monkeypatch, refused):
    def broken(*_, **__):
        raise PermissionError(13, "Permission denied", "a\nfile")

    monkeypatch.setattr("ttt_plugins.cli.artifacts.list_methods", broken)
    assert "Permission denied" in refused("list")


def test_a_short_training_still_ends_in_an_artifact(here, images, capsys):
    """With fields of --set; what was refused above is refused for a reason."""
    assert main(train("ttt", *SHORT["ttt"], "--set", "params=norm", "steps=1", "lr=0.01")) == 0
    net = tp.from_pretrained(here / "out")
    assert (net.config.params, net.config.steps, net.config.lr) == ("norm", 1, 0.01)
    assert listing(here / "out-training") == ["checkpoint.pt"]
    recipe = json.loads((here / "out" / "config.json").read_text())["training"]["recipe"]
    assert recipe["batch_size"] == 8


@pytest.mark.parametrize("kind", ["source", "ttt"])
def test_a_classifier_that_diverges_is_told_at_once(kind, here, images, monkeypatch, capsys):
    monkeypatch.setattr(
        "ttt_plugins.train.epochs.save_checkpoint", lambda *_: pytest.fail("it was saved")
    )
    assert main(train(kind, *SMALL, "--batch-size", "8", "--lr", "1e30")) == 2
    assert "training diverged in epoch 1" in capsys.readouterr().err
    assert not list(here.rglob("checkpoint.pt"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("False", False), ("true", True), ("None", None), ("0.1", 0.1), ("norm", "norm")],
)
def test_set_reads_values_as_json_or_as_python_spells_them(text, value):
    assert key_value(f"field={text}") == ("field", value)
