"""Joint training with BYOL's loss: a step by hand, resuming, and the way to the meta-training."""

import json
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

import ttt_plugins as tp
from ttt_plugins.cli.main import main
from ttt_plugins.core.heads import init_byol
from ttt_plugins.core.schedules import schedule_factor
from ttt_plugins.data.cifar10 import EXTRA_ROWS
from ttt_plugins.data.images import LabelledImages
from ttt_plugins.train import epochs
from ttt_plugins.train.byol import ByolRecipe, _ByolTraining, train_byol
from ttt_plugins.train.mt3_step import draw_tasks

TINY = {"width": 8, "depth": 8, "groups": 4}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (48, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return LabelledImages(images, torch.arange(48) % 10)


def recipe_of(**fields):
    chosen = {"model_args": TINY, "epochs": 2, "batch_size": 12, "task_images": 4, "lr": 0.05}
    return ByolRecipe(**(chosen | fields))


def by_hand(model, head, x1, x2, x, y, weight):
    """Cross-entropy plus weight times BYOL's loss, image by image and view by view."""
    mean, std = (
        torch.tensor(model.pretrained_cfg[k]).to(x).view(-1, 1, 1) for k in ("mean", "std")
    )

    def layers(part, z):
        z = (z @ head[f"{part}.in.weight"].T + head[f"{part}.in.bias"]).clamp_min(0)
        return z @ head[f"{part}.out.weight"].T + head[f"{part}.out.bias"]

    def projection(image):
        maps = model.forward_features((image[None] - mean) / std)
        return layers("projector", model.forward_head(maps, pre_logits=True))[0]

    def distance(a, b):
        return 2 - 2 * (a @ b) / (a.norm() * b.norm())

    losses = []
    for one, two in zip(x1, x2, strict=True):
        a, b = projection(one), projection(two)
        losses.append(
            distance(layers("predictor", a), b.detach())
            + distance(layers("predictor", b), a.detach())
        )
    cross = [
        F.cross_entropy(model((image[None] - mean) / std), label[None])
        for image, label in zip(x, y, strict=True)
    ]
    return torch.stack(cross).mean() + weight * torch.stack(losses).mean()


@pytest.mark.parametrize("views", [1.0, 0.5])
def test_loss_and_gradient_by_hand_in_double_precision(views, data):
    recipe = recipe_of(self_supervised=0.7, views=views, batch_size=16, seed=3)
    training = _ByolTraining(recipe, tp.MT3(), data, data, None, torch.device("cpu"))
    training.net.double()
    training.normalise.double()
    torch.manual_seed(3)
    model = timm.create_model("ttt_resnet26", num_classes=10, **TINY).double()
    head = init_byol(model, torch.Generator().manual_seed(3))
    head = {n: t.double().requires_grad_() for n, t in head.items()}
    rows = slice(0, 16)
    generator = torch.Generator().manual_seed(1)
    x1, x2, x, y = draw_tasks(data.images[rows], data.labels[rows], 4, generator)
    count = round(4 * views)
    expected = by_hand(
        model,
        head,
        *(v[:count].flatten(0, 1).double() for v in (x1, x2)),
        x.flatten(0, 1).double(),
        y.flatten(),
        0.7,
    )
    expected.backward()
    generator = torch.Generator().manual_seed(1)
    loss, numbers = training.loss(data.images[rows], data.labels[rows], generator)
    loss.backward()
    # The augmented pixels are single precision in both.
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert torch.allclose(numbers[0] + 0.7 * numbers[1], expected, rtol=1e-12)
    for name, p in training.net.named_parameters():
        mine = dict(model.named_parameters()).get(name.removeprefix("model."))
        mine = head[name] if mine is None else mine
        assert torch.allclose(p.grad, mine.grad, rtol=1e-9, atol=1e-13), name


def test_the_whole_training_by_hand(data, tmp_path):
    """SGD with momentum and weight decay on what the epoch's generator draws, in one cycle."""
    recipe = recipe_of(epochs=2, schedule="one-cycle", weight_decay=0.01, seed=2)
    model, head, log = train_byol(recipe, data, data, tmp_path, **QUIET)
    torch.manual_seed(2)
    mine = timm.create_model("ttt_resnet26", num_classes=10, **TINY)
    heads = init_byol(mine, torch.Generator().manual_seed(2))
    moving = {f"model.{n}": p for n, p in mine.named_parameters()}
    moving |= {n: t.requires_grad_() for n, t in heads.items()}
    velocity = {n: torch.zeros_like(p) for n, p in moving.items()}
    losses = []
    for epoch in range(2):
        generator = torch.Generator().manual_seed(2 * 1_000_003 + epoch)
        for i, rows in enumerate(torch.randperm(48, generator=generator).split(12)):
            x1, x2, x, y = draw_tasks(data.images[rows], data.labels[rows], 4, generator)
            flat = (t.flatten(0, 1) for t in (x1, x2, x))
            loss = by_hand(mine, heads, *flat, y.flatten(), 0.1)
            losses.append(loss.item())
            grads = torch.autograd.grad(loss, list(moving.values()))
            lr = 0.05 * schedule_factor("one-cycle", 4 * epoch + i, 8, 0)
            with torch.no_grad():
                for (name, p), g in zip(moving.items(), grads, strict=True):
                    velocity[name] = 0.9 * velocity[name] + g + 0.01 * p
                    p -= lr * velocity[name]
    assert all(
        torch.allclose(p, moving[f"model.{n}"], atol=1e-5) for n, p in model.named_parameters()
    )
    assert head.keys() == heads.keys()
    assert all(torch.allclose(t, heads[n], atol=1e-5) for n, t in head.items())
    for entry, part in zip(log["epochs"], (losses[:4], losses[4:]), strict=True):
        total = entry["cross_entropy"] + 0.1 * entry["byol_loss"]
        assert total == pytest.approx(sum(part) / 4, abs=1e-5)


def test_one_cycle_rises_and_falls():
    factors = [schedule_factor("one-cycle", step, 100, 0) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 25)
    assert factors[15] == pytest.approx((1 + 1 / 25) / 2)
    assert factors[30] == 1 == max(factors)
    assert factors[:31] == sorted(factors[:31])
    assert factors[30:] == sorted(factors[30:], reverse=True)
    assert factors[65] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3


def test_a_constant_rate_decays_late():
    factors = [schedule_factor("constant-then-decay", step, 100, 0) for step in range(100)]
    assert factors[:76] == [1.0] * 76
    assert factors[75:] == sorted(factors[75:], reverse=True)
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resumed_equals_unbroken(ema, data, tmp_path, same_tensors, monkeypatch):
    recipe = recipe_of(ema=ema, schedule="one-cycle", views=0.5)
    model, head, log = train_byol(recipe, data, data, tmp_path / "a", **QUIET)
    real = epochs.save_checkpoint

    class Broken(Exception):
        pass

    def stop(file, saved):
        real(file, saved)
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", stop)
        with pytest.raises(Broken):
            train_byol(recipe, data, data, tmp_path / "b", **QUIET)
    torch.manual_seed(99)
    again, other, other_log = train_byol(recipe, data, data, tmp_path / "b", resume=True, **QUIET)
    assert log == other_log
    assert same_tensors(model.state_dict(), again.state_dict())
    assert same_tensors(head, other)
    with pytest.raises(tp.InputError, match="another recipe"):
        train_byol(replace(recipe, lr=1.0), data, data, tmp_path / "b", resume=True, **QUIET)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"views": 0.0}, "views must be above 0"),
        ({"views": 1.5}, "views"),
        ({"task_images": 5}, "multiple of task_images"),
        ({"schedule": "nope"}, "schedule must be one of"),
        ({"self_supervised": -1.0}, "self_supervised"),
    ],
)
def test_bad_recipes(fields, said):
    with pytest.raises(tp.InputError, match=said):
        recipe_of(**fields)


def test_from_joint_training_to_meta_training(data, tmp_path, monkeypatch, capsys):
    """The commands: heads and network of the joint training are where the meta-training starts."""
    rows = torch.arange(EXTRA_ROWS + 48) % 48
    monkeypatch.setattr("ttt_plugins.cli.pictures.read_parquet", lambda _: data[rows])
    monkeypatch.setattr("ttt_plugins.cli.train.load_stream", lambda *_: data[:8])
    joint, out = tmp_path / "joint", tmp_path / "meta"
    base = ["train", "mt3", "--data-dir", "data", "--epochs", "1", "--extras", "extras"]
    base += ["--extras-images", "2", "--set", "copies=2"]
    first = [*base, "--out", str(joint), "--joint", "--batch-size", "16"]
    assert main([*first, "--model-args", json.dumps(TINY), "--schedule", "one-cycle"]) == 0
    assert f"train mt3 --init {joint}" in capsys.readouterr().out
    record = json.loads((joint / "config.json").read_text())["training"]
    assert record["recipe"]["schedule"] == "one-cycle"
    assert 0 <= record["epochs"][0]["extras_after"] <= 1
    weights = tp.from_pretrained(joint)
    second = [*base, "--out", str(out), "--init", str(joint), "--lr", "0", "--steps-per-epoch", "1"]
    second += ["--schedule", "constant-then-decay", "--rate-lr", "0.1", "--inner-steps", "2"]
    assert main(second) == 0
    net = tp.from_pretrained(out)
    assert (net.config.steps, net.config.copies) == (2, 2)
    kept = {n: t for n, t in net.learned_tensors().items() if not n.startswith("rate.")}
    assert all(torch.equal(t, kept[n]) for n, t in weights.learned_tensors().items())
    assert any(n.startswith("rate.") for n in net.learned_tensors())
    assert json.loads((out / "config.json").read_text())["training"]["chosen"]["epoch"] == 1
    capsys.readouterr()
    for more, words in (
        (["--batch-size", "8"], "--batch-size has no effect without --joint"),
        (["--joint", "--tasks", "2"], "--tasks has no effect with --joint"),
        (["--extras-images", "0"], "--extras-images must be at least 1"),
    ):
        assert main([*base, "--out", str(tmp_path / "no"), *more]) == 2
        assert words in capsys.readouterr().err
