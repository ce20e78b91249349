"""Training of source networks and of optimizers, and the views that training draws."""

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch

import ttt_plugins as tp
from ttt_plugins.artifacts.saving import save_with_model
from ttt_plugins.cli import main
from ttt_plugins.core import gradient_memory, views
from ttt_plugins.core.schedules import cosine
from ttt_plugins.data.cifar10 import EXTRA_ROWS
from ttt_plugins.data.images import LabelledImages, to_float
from ttt_plugins.train import mgg as meta
from ttt_plugins.train import network
from ttt_plugins.train import source as supervised
from ttt_plugins.train.byol import ByolRecipe, train_byol
from ttt_plugins.train.joint import JointRecipe, train_joint
from ttt_plugins.train.mt3 import MT3Recipe, train_mt3


def tensors_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def made_up(n, seed=0, classes=4, size=32):
    """Images whose overall colour tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    tint = torch.rand(classes, 3, 1, 1, generator=torch.Generator().manual_seed(9))
    noise = torch.rand(n, 3, size, size, generator=generator)
    return LabelledImages((255 * (0.6 * tint[labels] + 0.4 * noise)).byte(), labels)


class Interrupted(Exception):
    """What stands for Ctrl-C or a power cut."""


def interrupt_after(monkeypatch, module, name, calls):
    """Let ``module.name`` raise at its call number ``calls`` + 1."""
    true, seen = getattr(module, name), []

    def counted(*args, **kwargs):
        seen.append(1)
        if len(seen) > calls:
            raise Interrupted
        return true(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


# -- source networks ---------------------------------------------------------------------------

SMALL = {"width": 8, "depth": 8}
RECIPES = {
    "sgd": supervised.SourceRecipe(
        arch="ttt_resnet26_bn",
        model_args=SMALL,
        epochs=2,
        batch_size=16,
        lr=0.05,
        cutmix=0.5,
        ema=0.9,
    ),
    "adamw": supervised.SourceRecipe(
        arch="ttt_vit_tiny_patch4_32",
        model_args={"embed_dim": 24, "depth": 2, "num_heads": 3},
        epochs=2,
        batch_size=16,
        optimizer="adamw",
        lr=1e-3,
        patch_drop=0.5,
        patch_drop_until=1.0,  # draws from the global generator in the second epoch, too
        ema=0.9,
    ),
}


@pytest.mark.parametrize("optimizer", [*RECIPES, "muon"])
def test_source_training_resumes_bit_for_bit(optimizer, tmp_path, monkeypatch):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    recipe = RECIPES.get(optimizer) or replace(RECIPES["adamw"], optimizer="muon", lr=1e-2)
    train, test = made_up(64), made_up(16, 1)
    unbroken, log = supervised.train_source(
        recipe, train, test, tmp_path / "unbroken", progress=False
    )
    with monkeypatch.context() as patch:
        # The accuracy is measured after an epoch's steps and before its checkpoint.
        interrupt_after(patch, network, "accuracy", 1)
        with pytest.raises(Interrupted):
            supervised.train_source(recipe, train, test, tmp_path / "broken", progress=False)
    torch.manual_seed(1234)  # a new process draws from elsewhere
    resumed, again = supervised.train_source(
        recipe, train, test, tmp_path / "broken", resume=True, progress=False
    )
    assert tensors_equal(resumed.state_dict(), unbroken.state_dict())
    assert again == log
    assert [entry["epoch"] for entry in log["epochs"]] == [1, 2]


def test_source_training_learns(tmp_path):
    recipe = replace(RECIPES["sgd"], epochs=6, cutmix=0.0, cutout=0, label_smoothing=0.0)
    model, log = supervised.train_source(
        recipe, made_up(64), made_up(32, 1), tmp_path, progress=False
    )
    assert log["epochs"][-1]["loss"] < log["epochs"][0]["loss"]
    assert log["epochs"][-1]["test_accuracy"] > 0.5  # of four classes
    net = tp.wrap(model, "source")
    test = made_up(32, 1)
    found = (net(to_float(test.images)).argmax(1) == test.labels).float().mean().item()
    assert found == pytest.approx(log["epochs"][-1]["test_accuracy"])
    assert not model.training


def test_source_training_without_resume_starts_over(tmp_path):
    recipe = replace(RECIPES["sgd"], epochs=1)
    first, _ = supervised.train_source(recipe, made_up(32), made_up(8), tmp_path, progress=False)
    second, _ = supervised.train_source(recipe, made_up(32), made_up(8), tmp_path, progress=False)
    assert tensors_equal(first.state_dict(), second.state_dict())
    other, _ = supervised.train_source(
        replace(recipe, seed=1), made_up(32), made_up(8), tmp_path / "b", progress=False
    )
    assert not torch.equal(first.stem.weight, other.stem.weight)


def test_source_training_refuses_another_recipe(tmp_path):
    recipe = replace(RECIPES["sgd"], epochs=1)
    supervised.train_source(recipe, made_up(32), made_up(8), tmp_path, progress=False)
    with pytest.raises(tp.InputError, match="another recipe"):
        supervised.train_source(
            replace(recipe, lr=0.1), made_up(32), made_up(8), tmp_path, resume=True, progress=False
        )


def test_source_training_says_what_it_cannot_do(tmp_path):
    with pytest.raises(tp.InputError, match="one batch"):
        supervised.train_source(RECIPES["sgd"], made_up(8), made_up(8), tmp_path, progress=False)
    with pytest.raises(tp.InputError, match="optimizer must be one of"):
        supervised.train_source(
            replace(RECIPES["sgd"], optimizer="lion"),
            made_up(32),
            made_up(8),
            tmp_path,
            progress=False,
        )


def test_weight_decay_spares_norms_and_biases(make_model):
    for name, recipe in RECIPES.items():
        model = make_model("batchnorm" if name == "sgd" else "layernorm")
        (optimizer,) = supervised._optimizers(model, recipe)
        decayed = [p for g in optimizer.param_groups for p in g["params"] if g["weight_decay"] > 0]
        spared = [p for g in optimizer.param_groups for p in g["params"] if not g["weight_decay"]]
        assert {p.ndim for p in spared} == {1}
        assert decayed
        assert all(p.ndim >= 2 for p in decayed)
        assert len(decayed) + len(spared) == len(list(model.parameters()))


def test_rate_rises_and_falls():
    rates = [cosine(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[55] == pytest.approx(0.5)  # half way down the cosine
    assert 0 <= rates[-1] < 0.01


def test_augmented_targets_are_distributions():
    data = made_up(32)
    for cutmix in (0.0, 1.0):
        recipe = replace(RECIPES["sgd"], cutmix=cutmix, label_smoothing=0.1)
        x, target = supervised._augment(
            data.images, data.labels, 4, recipe, torch.Generator().manual_seed(0)
        )
        assert x.shape == data.images.shape
        assert x.min() >= 0
        assert x.max() <= 1
        assert torch.allclose(target.sum(1), torch.ones(32))
        sure = target.gather(1, data.labels[:, None])
        assert torch.allclose(sure, torch.full_like(sure, 0.925)) is (cutmix == 0)


# -- checkpoints -------------------------------------------------------------------------------

#: What each training's checkpoint holds; runs that an earlier version began resume from it.
LAYOUTS = {
    "source": {"model", "average", "optimizer0", "schedule0", "recipe"},
    "ttt": {"joint", "average", "optimizer", "schedule", "recipe"},
    "byol": {"net", "average", "optimizer", "schedule", "recipe"},
    "mt3": {"meta", "velocity", "recipe"},
    "mgg": {"slow", "optimizer", "params", "best", "made_by"},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_checkpoints_keep_their_layout(kind, tmp_path, make_model, corrupted):
    data, quiet, small = made_up(16), {"progress": False}, {"epochs": 1, "model_args": GROUPED}
    if kind == "source":
        recipe = supervised.SourceRecipe(batch_size=8, **small)
        supervised.train_source(recipe, data, data, tmp_path, **quiet)
    elif kind == "ttt":
        train_joint(JointRecipe(batch_size=8, **small), data, data, tmp_path, **quiet)
    elif kind == "byol":
        train_byol(ByolRecipe(batch_size=8, **small), data, data, tmp_path, **quiet)
    elif kind == "mt3":
        recipe = MT3Recipe(tasks=1, task_images=2, steps_per_epoch=1, **small)
        train_mt3(recipe, data, tmp_path, **quiet)
    else:
        net = untrained(make_model("groupnorm"))
        meta.train_mgg(replace(RECIPE, epochs=1), net, corrupted, tmp_path, **quiet)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved.keys() == LAYOUTS[kind] | {"log", "epoch"}
    assert saved["epoch"] == len(saved["log"]) == 1


# -- what a training starts from, and what it takes --------------------------------------------

GROUPED = {"width": 8, "depth": 8, "groups": 4}


def started(kind, init, out, **fields):
    """A model of one training that starts from an artifact, as a step of length 0 leaves it."""
    chosen = {"init": str(init), "epochs": 1, "lr": 0.0} | fields
    data, quiet = made_up(16), {"progress": False}
    if kind == "mt3":
        recipe = MT3Recipe(tasks=1, task_images=2, steps_per_epoch=1, **chosen)
        return train_mt3(recipe, data, out, **quiet)[0]
    chosen |= {"model_args": GROUPED, "batch_size": 8}
    if kind == "ttt":
        return train_joint(JointRecipe(**chosen), data, data, out, **quiet)[0]
    return supervised.train_source(supervised.SourceRecipe(**chosen), data, data, out, **quiet)[0]


def artifact_with(folder, mean, std, **learned):
    model = timm.create_model("ttt_resnet26", num_classes=4, **GROUPED).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (mean,) * 3, "std": (std,) * 3}
    return save_with_model(model, "ttt_resnet26", GROUPED, folder, **learned)


@pytest.mark.parametrize("kind", ["source", "ttt", "mt3"])
def test_the_preprocessing_comes_with_the_weights(kind, tmp_path, images):
    first = artifact_with(tmp_path / "first", 0.0, 1.0)
    model = started(kind, first, tmp_path / "work")
    again = save_with_model(model, "ttt_resnet26", GROUPED, tmp_path / "again")
    expected = tp.from_pretrained(first)(images(4))
    # In channels_last, as it was trained, sums have another order.
    assert torch.allclose(tp.wrap(model, "source")(images(4)), expected, atol=1e-6)
    assert torch.equal(tp.from_pretrained(again)(images(4)), expected)


def test_meta_training_starts_from_a_joint_artifact(tmp_path):
    data, recipe = made_up(16), JointRecipe(model_args=GROUPED, epochs=1, batch_size=8)
    model, head, _ = train_joint(recipe, data, data, tmp_path / "work", progress=False)
    folder = save_with_model(
        model, recipe.arch, GROUPED, tmp_path / "joint", config=tp.TTT(), tensors=head
    )
    assert tensors_equal(started("mt3", folder, tmp_path / "b").state_dict(), model.state_dict())


@pytest.fixture
def sixteen(monkeypatch):
    """Sixteen images to train on, wherever the command says that they are."""
    monkeypatch.setattr("ttt_plugins.cli.pictures.read_parquet", lambda _: made_up(EXTRA_ROWS + 16))


def command(kind, out, *more):
    return ["train", kind, "--data-dir", "data", "--out", str(out), "--epochs", "1", *more]


ONE_STEP = ("--tasks", "1", "--task-images", "2", "--steps-per-epoch", "1")


@pytest.mark.parametrize("kind", ["source", "ttt", "mt3"])
@pytest.mark.parametrize("more", [(), ("--model-args", "{}")])
def test_images_of_a_size_that_the_model_does_not_take(kind, more, tmp_path, capsys, sixteen):
    argv = command(kind, tmp_path / "out", "--arch", "vit_tiny_patch16_224", *more)
    assert main(argv) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "cannot take images of shape (3, 32, 32)" in said
    assert "(3, 224, 224)" in said
    assert "train on images that vit_tiny_patch16_224 accepts" in said
    assert not list(tmp_path.iterdir())


def test_a_head_for_images_of_another_size():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=24, depth=2, num_heads=3
    )
    with pytest.raises(tp.InputError, match=r"cannot take images of shape \(3, 32, 32\)"):
        tp.wrap(model, "ttt", head="train", data=torch.rand(16, 3, 32, 32), split=1)


def recipe_in(folder):
    return json.loads((folder / "config.json").read_text())["training"]["recipe"]


def test_the_command_meta_trains_another_architecture(tmp_path, sixteen, images):
    """Without --model-args: the paper's are those of its own network alone."""
    out = tmp_path / "net"
    assert main(command("mt3", out, "--arch", "ttt_vit_tiny_patch4_32", *ONE_STEP)) == 0
    recipe = recipe_in(out)
    assert recipe["arch"] == "ttt_vit_tiny_patch4_32"
    assert recipe["model_args"] == {}
    net = tp.from_pretrained(out, copies=2)
    assert net.method == "mt3"
    assert torch.isfinite(net(images(1))).all()
    log = json.loads((out / "config.json").read_text())["training"]["epochs"]
    assert [entry["epoch"] for entry in log] == [1]


def test_arguments_of_the_papers_network():
    assert MT3Recipe().model_args["width"] == 32
    assert MT3Recipe(model_args={}).model_args == {}
    assert MT3Recipe(arch="ttt_resnet26_bn").model_args == {}


def test_the_command_meta_trains_an_artifact(tmp_path, sixteen):
    """The stored recipe names the network that was trained, and the run can be resumed."""
    first = artifact_with(tmp_path / "first", 0.5, 0.25)
    argv = command("mt3", tmp_path / "net", "--init", str(first), *ONE_STEP)
    assert main(argv) == 0
    recipe = recipe_in(tmp_path / "net")
    assert recipe["arch"] == "ttt_resnet26"
    assert recipe["model_args"] == GROUPED
    assert recipe["init"] == str(first)
    weights = (tmp_path / "net" / "model.safetensors").read_bytes()
    assert main([*argv, "--resume"]) == 0
    assert (tmp_path / "net" / "model.safetensors").read_bytes() == weights


def test_the_command_trains_a_head(tmp_path, sixteen, images):
    first, out = artifact_with(tmp_path / "first", 0.5, 0.25), tmp_path / "head"
    more = ("--model", str(first), "--batch-size", "8", "--seed", "3")
    assert main(command("ttt", out, "--freeze-trunk", *more)) == 0
    expected = {"split": -1, "epochs": 1, "batch_size": 8, "lr": 1e-3, "padding": 4, "seed": 3}
    assert recipe_in(out) == expected
    net = tp.from_pretrained(out, lr=0.0, copies=2, steps=1)
    assert net.method == "ttt"
    assert torch.isfinite(net(images(2))).all()
    assert torch.allclose(net(images(2)), tp.from_pretrained(first)(images(2)), atol=1e-6)


# -- optimizers --------------------------------------------------------------------------------

RECIPE = meta.MGGRecipe(
    epochs=3,
    sequences=2,
    length=3,
    batch_size=4,
    alpha=1e-2,
    meta_lr=1e-2,
    grid=(1e-3, 1e-2),
)


@pytest.fixture(scope="module")
def corrupted():
    clean = made_up(24)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randint(0, 60, clean.images.shape, generator=generator)
    return {
        "noise": LabelledImages((clean.images.int() + noise).clamp(0, 255).byte(), clean.labels),
        "dark": LabelledImages((clean.images.float() * 0.4).byte(), clean.labels),
    }


def untrained(model, **fields):
    return meta.untrained(model, **{"discrepancy": 0.1, **fields})


def slow_of(net):
    return {n: t for n, t in net.learned_tensors().items() if n.startswith("memory.")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labelled": True, "truncation": 2, "restore": True, "decay": True, "clip": 1.0},
        {"per_image": False, "validate_every": 2, "length": 9},  # longer than the data
    ],
)
def test_meta_training_resumes_bit_for_bit(options, tmp_path, monkeypatch, make_model, corrupted):
    recipe, model = replace(RECIPE, **options), make_model("batchnorm")
    kwargs = {"progress": False}
    unbroken, log = meta.train_mgg(
        recipe, untrained(model), corrupted, tmp_path / "unbroken", **kwargs
    )
    with monkeypatch.context() as patch:
        # In the middle of the second epoch: one of its two sequences is over.
        interrupt_after(patch, meta, "run_sequence", recipe.sequences + 1)
        with pytest.raises(Interrupted):
            meta.train_mgg(recipe, untrained(model), corrupted, tmp_path / "broken", **kwargs)
    torch.manual_seed(1234)
    resumed, again = meta.train_mgg(
        recipe, untrained(model), corrupted, tmp_path / "broken", resume=True, **kwargs
    )
    assert again == log
    assert resumed.config == unbroken.config
    assert tensors_equal(resumed.learned_tensors(), unbroken.learned_tensors())
    assert [entry["epoch"] for entry in log["epochs"]] == [1, 2, 3]


def test_several_classifiers_share_an_optimizer(tmp_path, monkeypatch, make_model, corrupted):
    """Sequence by sequence in turn, validated by their average; resumed as unbroken."""
    nets = [untrained(make_model("groupnorm")), untrained(make_model("batchnorm"))]
    turns, real = [], meta.run_sequence

    def noted(algorithm, *args):
        turns.append(next(i for i, n in enumerate(nets) if n.backbone is algorithm.backbone))
        return real(algorithm, *args)

    monkeypatch.setattr(meta, "run_sequence", noted)
    recipe = replace(RECIPE, epochs=2, sequences=2)
    net, log = meta.train_mgg(recipe, nets, corrupted, tmp_path / "whole", progress=False)
    assert turns == [0, 1] * 4
    assert net.backbone is nets[0].backbone
    for entry in log["epochs"]:
        for lr, parts in entry["by_classifier"].items():
            assert entry["accuracy"][lr] == pytest.approx(sum(parts) / 2)
    with monkeypatch.context() as patch:
        interrupt_after(patch, meta, "run_sequence", 5)
        with pytest.raises(Interrupted):
            meta.train_mgg(recipe, nets, corrupted, tmp_path / "broken", progress=False)
    resumed, again = meta.train_mgg(
        recipe, nets, corrupted, tmp_path / "broken", resume=True, progress=False
    )
    assert again == log
    assert tensors_equal(resumed.learned_tensors(), net.learned_tensors())
    with pytest.raises(tp.InputError, match="another recipe, config or model"):
        meta.train_mgg(
            recipe, nets[::-1], corrupted, tmp_path / "broken", resume=True, progress=False
        )
    with pytest.raises(tp.InputError, match="at least one classifier"):
        meta.train_mgg(recipe, [], corrupted, tmp_path / "none", progress=False)


def test_the_command_makes_an_optimizer_of_no_classifiers(tmp_path, monkeypatch, corrupted):
    """Two models, the GroupNorm one with its source statistics and without."""
    monkeypatch.setattr("ttt_plugins.cli.train.load_stream", lambda *_: corrupted["noise"])
    monkeypatch.setattr("ttt_plugins.cli.pictures.read_parquet", lambda _: made_up(EXTRA_ROWS + 8))
    seen, real = [], meta.train_mgg

    def noted(recipe, nets, *args, **kwargs):
        seen.extend(algorithm.objective.name for algorithm in (n.algorithm() for n in nets))
        return real(recipe, nets, *args, progress=False, **kwargs)

    monkeypatch.setattr("ttt_plugins.cli.train.train_mgg", noted)
    models = [f"bundled:source-{name}-cifar10" for name in ("resnet26", "resnet26bn")]
    argv = ["train", "mgg", "--model", *models, "--entropy-alone", "--data-dir", str(tmp_path)]
    argv += ["--out", str(tmp_path / "net"), "--epochs", "1", "--length", "2", "--grid", "1e-3"]
    assert main(argv) == 0
    assert ["alone" in name for name in seen] == [True, False, False]
    net = tp.from_pretrained(tmp_path / "net", backbone=models[1])
    assert net.config.lr == 1e-3
    assert all(name.startswith("memory.") for name in net.learned_tensors())
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["training"]["classifiers"] == models
    assert config["backbone"] == {"source": "module", "fits": "any"}


def test_the_best_validation_is_kept(tmp_path, make_model, corrupted):
    net, log = meta.train_mgg(
        RECIPE, untrained(make_model("batchnorm")), corrupted, tmp_path, progress=False
    )
    scores = {
        (entry["epoch"], float(lr)): score
        for entry in log["epochs"]
        for lr, score in entry["accuracy"].items()
    }
    assert {lr for _, lr in scores} == set(RECIPE.grid)
    chosen = log["chosen"]
    assert chosen["accuracy"] == max(scores.values())
    assert scores[chosen["epoch"], chosen["lr"]] == chosen["accuracy"]
    assert net.config.lr == chosen["lr"]
    # and the adapter that comes back is the one that scored so
    found = [meta.stream_accuracy(net, part) for part in corrupted.values()]
    assert sum(found) / len(found) == pytest.approx(chosen["accuracy"])
    json.dumps(log)


def test_the_best_is_neither_the_first_nor_the_last(tmp_path, monkeypatch, make_model, corrupted):
    """Scripted scores: epoch 2 at the second step size is best, and its weights come back."""
    model, scores = make_model("groupnorm"), {}
    script = iter([0.3, 0.4, 0.5, 0.7, 0.6, 0.2])

    def scripted(net, data):
        # One score for each epoch and step size, the same on both corruptions.
        key = (net.config.lr, net.learned_tensors()["memory.W1"].sum().item())
        return scores.setdefault(key, next(script) if key not in scores else None)

    monkeypatch.setattr(meta, "stream_accuracy", scripted)
    net, log = meta.train_mgg(
        RECIPE, untrained(model), corrupted, tmp_path / "three", progress=False
    )
    assert log["chosen"] == {"accuracy": 0.7, "lr": RECIPE.grid[1], "epoch": 2}
    assert net.config.lr == RECIPE.grid[1]
    monkeypatch.undo()
    # A run of two epochs ends at the weights that the run of three passed through.
    meta.train_mgg(
        replace(RECIPE, epochs=2), untrained(model), corrupted, tmp_path / "two", progress=False
    )
    saved = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["slow"]
    assert tensors_equal(slow_of(net), {f"memory.{n}": t for n, t in saved.items()})


def test_meta_training_moves_every_slow_weight(tmp_path, make_model, corrupted):
    net, _ = meta.train_mgg(
        replace(RECIPE, epochs=1),
        untrained(make_model("groupnorm")),
        corrupted,
        tmp_path,
        progress=False,
    )
    first = gradient_memory.init_slow(torch.Generator().manual_seed(RECIPE.seed))
    trained = slow_of(net)
    assert all(torch.isfinite(t).all() for t in trained.values())
    assert all(not torch.equal(t, trained[f"memory.{n}"]) for n, t in first.items())


def test_meta_training_leaves_the_network_alone(tmp_path, make_model, corrupted):
    model = make_model("batchnorm")
    before = copy.deepcopy(model.state_dict())
    meta.train_mgg(replace(RECIPE, epochs=1), untrained(model), corrupted, tmp_path, progress=False)
    assert tensors_equal(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [{"labelled": True}, {"truncation": 3}, {"restore": True}, {"per_image": False}, {"seed": 1}],
)
def test_options_are_not_ignored(change, tmp_path, make_model, corrupted):
    recipe = replace(RECIPE, epochs=1)
    model = make_model("groupnorm")
    a, _ = meta.train_mgg(recipe, untrained(model), corrupted, tmp_path / "a", progress=False)
    b, _ = meta.train_mgg(
        replace(recipe, **change), untrained(model), corrupted, tmp_path / "b", progress=False
    )
    assert not tensors_equal(slow_of(a), slow_of(b))


def test_labels_matter_to_the_labelled_loss_alone(tmp_path, make_model, corrupted):
    """The unlabelled outer loss must not see a label; only the choice of checkpoint may."""
    model = make_model("groupnorm")
    shuffled = {
        name: LabelledImages(part.images, (part.labels + 1) % 4) for name, part in corrupted.items()
    }
    for labelled in (False, True):
        recipe = replace(RECIPE, epochs=1, grid=(1e-3,), labelled=labelled)
        a, b = (
            slow_of(
                meta.train_mgg(
                    recipe, untrained(model), data, tmp_path / f"{labelled}{i}", progress=False
                )[0]
            )
            for i, data in enumerate((corrupted, shuffled))
        )
        assert tensors_equal(a, b) is (not labelled)


def test_the_adapter_says_what_to_train_on(tmp_path, make_model, corrupted, images):
    """Its losses, its statistics and its choice of parameters; it is not changed itself."""
    model, recipe = make_model("layernorm"), replace(RECIPE, epochs=1)
    nets = {
        "plain": untrained(model),
        "fitted": untrained(model).fit_source_statistics([images(16)], progress=False),
        "choice": untrained(model, params="blocks.*norm"),
        "without": untrained(model, discrepancy=0.0).fit_source_statistics(
            [images(16)], progress=False
        ),
    }
    trained = {}
    for name, net in nets.items():
        before = net.learned_tensors()
        trained[name], _ = meta.train_mgg(recipe, net, corrupted, tmp_path / name, progress=False)
        assert tensors_equal(net.learned_tensors(), before)
        assert net.batches == 0
        assert trained[name].config == replace(net.config, lr=trained[name].config.lr)
        assert trained[name].names == net.names
    assert tensors_equal(
        {n: t for n, t in trained["fitted"].learned_tensors().items() if "source" in n},
        {n: t for n, t in nets["fitted"].learned_tensors().items() if "source" in n},
    )
    assert not tensors_equal(slow_of(trained["plain"]), slow_of(trained["fitted"]))
    assert not tensors_equal(slow_of(trained["plain"]), slow_of(trained["choice"]))
    assert tensors_equal(slow_of(trained["plain"]), slow_of(trained["without"]))


def test_meta_training_refuses_another_recipe(tmp_path, make_model, corrupted):
    recipe, model = replace(RECIPE, epochs=1), make_model("groupnorm")
    meta.train_mgg(recipe, untrained(model), corrupted, tmp_path, progress=False)
    with pytest.raises(tp.InputError, match="another recipe"):
        meta.train_mgg(
            replace(recipe, labelled=True),
            untrained(model),
            corrupted,
            tmp_path,
            resume=True,
            progress=False,
        )


def test_meta_training_needs_images(tmp_path, make_model, corrupted):
    for data in ({}, {"noise": corrupted["noise"][:2]}):
        with pytest.raises(tp.InputError, match="at least one batch"):
            meta.train_mgg(
                RECIPE, untrained(make_model("groupnorm")), data, tmp_path, progress=False
            )


def test_a_finished_run_only_reports(tmp_path, monkeypatch, make_model, corrupted):
    recipe, model = replace(RECIPE, epochs=1), make_model("groupnorm")
    net, log = meta.train_mgg(recipe, untrained(model), corrupted, tmp_path, progress=False)
    interrupt_after(monkeypatch, meta, "run_sequence", 0)
    again, same = meta.train_mgg(
        recipe, untrained(model), corrupted, tmp_path, resume=True, progress=False
    )
    assert same == log
    assert tensors_equal(again.learned_tensors(), net.learned_tensors())


def test_stream_accuracy_is_the_share_of_right_answers(make_model):
    data = made_up(21)
    net = tp.wrap(make_model("groupnorm"), "source")
    expected = (net(to_float(data.images)).argmax(1) == data.labels).float().mean().item()
    assert meta.stream_accuracy(net, data, batch_size=8) == pytest.approx(expected)
    tent = tp.wrap(make_model("groupnorm"), "tent", lr=1e-2)
    first = meta.stream_accuracy(tent, data, batch_size=8)
    assert meta.stream_accuracy(tent, data, batch_size=8) == first  # from a reset
    assert tent.batches == 3


# -- views -------------------------------------------------------------------------------------


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(b, h, w):
    """Images of which every pixel has a value of its own, none of them 0."""
    return 1 + torch.arange(b * 3 * h * w, dtype=torch.float32).view(b, 3, h, w)


def test_a_crop_is_a_window_of_the_padded_image():
    images = numbered(40, 6, 5)
    cropped = views.random_crop(images, 2, generator())
    assert cropped.shape == images.shape
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    places = set()
    for one, whole in zip(cropped, padded, strict=True):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(one, whole[:, top : top + 6, left : left + 5])
        ]
        assert len(found) == 1
        places.add(found[0])
    assert {t for t, _ in places} == {le for _, le in places} == set(range(5))  # 0 and 4 included


def test_no_padding_is_no_crop():
    images = numbered(4, 6, 5)
    assert torch.equal(views.random_crop(images, 0, generator()), images)


def test_crops_keep_the_images_type():
    images = made_up(3).images
    assert views.random_crop(images, 4, generator()).dtype == torch.uint8
    assert views.random_flip(images, generator()).dtype == torch.uint8


def test_a_flip_mirrors_about_half():
    images = numbered(400, 3, 4)
    flipped = views.random_flip(images, generator())
    mirrored = torch.tensor(
        [torch.equal(one, image.flip(2)) for one, image in zip(flipped, images, strict=True)]
    )
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(flipped, images, strict=True)])
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250
    assert torch.equal(views.random_flip(flipped, generator()), images)  # the same ones, back


def test_cutout_fills_one_square():
    images = numbered(60, 16, 16)
    fill = torch.tensor([-1.0, -2.0, -3.0])
    cut = images.clone()
    assert views.cutout_(cut, 6, fill, generator()) is cut
    sizes = set()
    for one, image in zip(cut, images, strict=True):
        hole = one[0] == -1
        assert torch.equal(one[1] == -2, hole)
        assert torch.equal(one[2] == -3, hole)
        assert torch.equal(one[:, ~hole], image[:, ~hole])
        rows, cols = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        # a rectangle, at most as large as asked for, smaller where the border cuts it
        assert hole.sum() == len(rows) * len(cols) > 0
        assert len(rows) <= 6
        assert len(cols) <= 6
        sizes.add((len(rows), len(cols)))
    assert (6, 6) in sizes
    assert len(sizes) > 1


def test_cutmix_share_is_the_area_left():
    # Each image has one value of its own, so a pasted pixel tells where it comes from.
    b = 50
    images = torch.arange(b, dtype=torch.float32).view(b, 1, 1, 1).expand(b, 3, 16, 16).clone()
    shares = []
    for seed in range(5):
        mixed = images.clone()
        out, partner, share = views.cutmix_(mixed, 1.0, generator(seed))
        assert out is mixed
        assert sorted(partner.tolist()) == list(range(b))
        for i in range(b):
            own = mixed[i] == i
            pasted = mixed[i] == partner[i]
            assert (own | pasted).all()
            if partner[i] != i:
                assert share[i].item() == pytest.approx(own.float().mean().item(), abs=1e-6)
                rows, cols = pasted[0].any(1).sum(), pasted[0].any(0).sum()
                assert pasted[0].sum() == rows * cols  # one box, the same in every channel
        shares.append(share.mean().item())
    assert min(shares) >= 0
    assert max(shares) <= 1
    assert max(shares) - min(shares) > 0.1


def test_views_draw_from_their_generator_alone():
    images = numbered(20, 8, 8)
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def draw(seed):
        g = generator(seed)
        x = views.random_flip(views.random_crop(images, 2, g), g).clone()
        views.cutout_(x, 3, torch.zeros(3), g)
        return views.cutmix_(x, 1.0, g)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "field", ["epochs", "sequences", "length", "batch_size", "truncation", "validate_every"]
)
def test_a_recipe_of_nothing_is_refused(field):
    with pytest.raises(tp.InputError, match=field):
        meta.MGGRecipe(**{field: 0})
