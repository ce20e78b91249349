"""MT3 against plain loops and finite differences, and its training's laws."""

import colorsys
import copy
import socket
from dataclasses import replace
from functools import partial

import forked
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import random_heads

import ttt_plugins as tp
from ttt_plugins.artifacts.saving import save_with_model
from ttt_plugins.backbones.backbone import Backbone
from ttt_plugins.core import views
from ttt_plugins.core.heads import init_byol
from ttt_plugins.core.views import image_keys
from ttt_plugins.data.images import LabelledImages
from ttt_plugins.methods.mt3 import _views, byol_loss, rate_names
from ttt_plugins.train import epochs, mt3_step
from ttt_plugins.train.gap import StepGap
from ttt_plugins.train.mt3 import train_mt3
from ttt_plugins.train.mt3_step import (
    MT3Recipe,
    clip_each,
    draw_tasks,
    meta_gradient,
    task_loss,
)

TINY = {"width": 8, "depth": 8, "groups": 4}


def byol_net(model, seed=0, **fields):
    config = tp.MT3(**({"copies": 3} | fields))
    return tp.wrap(model, config, tensors=random_heads("mt3", model), seed=seed)


def two_layers(head, part, x):
    x = F.relu(x @ head[f"{part}.in.weight"].T + head[f"{part}.in.bias"])
    return x @ head[f"{part}.out.weight"].T + head[f"{part}.out.bias"]


def plain_byol(features, head, x1, x2, targets=None):
    """L_ss of arXiv 2103.16201, view by view; ``targets`` stand in for the stopped ones."""

    def distance(a, b):
        pairs = zip(a, b, strict=True)
        return torch.stack([2 - 2 * (p @ q) / (p.norm() * q.norm()) for p, q in pairs])

    z1, z2 = (two_layers(head, "projector", features(x)) for x in (x1, x2))
    p1, p2 = (two_layers(head, "predictor", z) for z in (z1, z2))
    t1, t2 = (z1.detach(), z2.detach()) if targets is None else targets
    return (distance(p1, t2) + distance(p2, t1)).mean()


def normalised(model, x):
    mean, std = (
        torch.tensor(model.pretrained_cfg[k]).to(x).view(-1, 1, 1) for k in ("mean", "std")
    )
    return (x - mean) / std


def plain_mt3(model, head, images, *, lr=0.1, steps=1, copies=3):
    """An unbatched restatement with loss.backward(), one image after the other."""
    logits = []
    for image in images:
        net = copy.deepcopy(model).eval()
        own = {n: t.to(image.dtype).clone().requires_grad_() for n, t in head.items()}

        def features(x, net=net):
            return net.forward_head(net.forward_features(normalised(net, x)), pre_logits=True)

        for step in range(steps):
            x1, x2 = _views(image[None], image_keys(image[None], 0), step, copies)
            plain_byol(features, own, x1[0], x2[0]).backward()
            with torch.no_grad():
                for p in [*net.parameters(), *own.values()]:
                    if p.grad is not None:
                        p -= lr * p.grad
                        p.grad = None
        with torch.no_grad():
            logits.append(net(normalised(net, image[None])))
    return torch.cat(logits)


@pytest.mark.parametrize("steps", [1, 2])
def test_it_equals_the_plain_loop(kind, steps, make_model, images):
    model, x = make_model(kind, torch.float64), images(3, dtype=torch.float64)
    net = byol_net(model, steps=steps)
    expected = plain_mt3(model, random_heads("mt3", model), x, steps=steps)
    assert torch.allclose(net(x), expected, atol=1e-6)
    assert not torch.allclose(expected, tp.wrap(model, "source")(x), atol=1e-3)


@pytest.mark.parametrize("vote", [False, True])
@pytest.mark.parametrize("chunk_size", [2, 5])
def test_batched_equals_the_loop(kind, chunk_size, vote, make_model, images):
    model, x = make_model(kind, torch.float64), images(5, dtype=torch.float64)
    one = byol_net(model, chunk_size=1, vote=vote)
    expected = torch.cat([one(image[None]) for image in x])
    assert torch.equal(one(x), expected)
    assert torch.allclose(byol_net(model, chunk_size=chunk_size, vote=vote)(x), expected, atol=1e-9)


def test_voting_averages_over_the_views(make_model, images):
    model, x = make_model("groupnorm"), images(1)
    net = byol_net(model, vote=True, lr=0.0)
    seen = views.byol_view(x, views.uniforms(image_keys(x, 0), (3, views.BYOL_NUMBERS), salt=-1))
    expected = tp.wrap(model, "source")(seen[0]).softmax(1).mean(0)
    assert torch.allclose(net(x)[0].softmax(0), expected, atol=1e-6)
    assert net.forwards == 6 + 3


def test_the_target_is_stopped(make_model, images):
    """The gradient is the predictor's alone: that of a loss whose targets are constants."""
    model = make_model("groupnorm", torch.float64)
    backbone, head = tp.wrap(model, "source").backbone, random_heads("mt3", model)
    head = {n: t.double() for n, t in head.items()}
    x1, x2 = images(4, 0, torch.float64), images(4, 1, torch.float64)
    leaves = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters()} | head
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    grads = torch.autograd.grad(
        byol_loss(backbone, leaves, leaves, x1, x2),
        list(leaves.values()),
        materialize_grads=True,
        allow_unused=True,
    )

    def features(x):
        return backbone(x, pooled=True)

    with torch.no_grad():
        targets = [two_layers(head, "projector", features(x)) for x in (x1, x2)]
    name, step = "stages.1.0.conv1.weight", 1e-6
    weight = dict(backbone.model.named_parameters())[name]
    direction = torch.randn(
        weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            weight.data = model.get_parameter(name).data + sign * step * direction
            values.append(plain_byol(features, head, x1, x2, targets))
    slope = (values[0] - values[1]) / (2 * step)
    ours = (dict(zip(leaves, grads, strict=True))[f"model.{name}"] * direction).sum()
    assert torch.allclose(ours, slope, rtol=1e-5)


# -- views ---------------------------------------------------------------------------------


def test_resized_crops_against_interpolate():
    x, u = torch.rand(2, 3, 32, 32), torch.rand(2, 40, 4)
    got, sizes = views.resized_crops(x, u), set()
    for i in range(2):
        for j in range(40):
            size = 20 + int(u[i, j, 0] * 12)
            row, col = (int(u[i, j, k] * (33 - size)) for k in (1, 2))
            cut = x[i : i + 1, :, row : row + size, col : col + size]
            expected = F.interpolate(cut, size=32, mode="bilinear")[0]
            expected = expected.flip(-2) if u[i, j, 3] < 0.5 else expected
            assert torch.allclose(got[i, j], expected, atol=1e-6)
            sizes.add(size)
    assert min(sizes) == 20
    assert max(sizes) == 31


def test_colour_jitter_against_colorsys():
    x, u = torch.rand(6, 3, 4, 4), torch.rand(6, 4)
    x[0] = 0.5  # grey: no hue to turn
    got = views.colour_jitter(x, u)
    shift, contrast, saturation, hue = (2 * u - 1).T
    for i in range(6):
        z = x[i] + 0.16 * shift[i]
        mean = z.mean((1, 2), keepdim=True)
        z = ((z - mean) * (1 + 0.16 * contrast[i]) + mean).clamp(0, 1)
        for row in range(4):
            for col in range(4):
                h, s, v = colorsys.rgb_to_hsv(*z[:, row, col].tolist())
                s = min(1, s * (1 + 0.16 * saturation[i].item()))
                rgb = colorsys.hsv_to_rgb((h + 0.04 * hue[i].item()) % 1, s, v)
                assert torch.allclose(got[i, :, row, col], torch.tensor(rgb), atol=1e-5)


def test_views_stay_in_range_and_use_their_chances():
    x, u = torch.rand(1, 3, 16, 16), torch.rand(1, 400, views.BYOL_NUMBERS)
    seen = views.byol_view(x, u)[0]
    assert seen.min() >= 0
    assert seen.max() <= 1
    grey = (seen[:, 0] - seen[:, 1]).abs().amax((1, 2)) < 1e-6
    assert torch.equal(grey, u[0, :, 9] < 0.2)
    plain = views.resized_crops(x, u[..., :4])[0]
    untouched = (seen - plain).abs().amax((1, 2, 3)) < 1e-6
    assert torch.equal(untouched, (u[0, :, 4] >= 0.8) & ~grey)
    assert views.byol_view(torch.rand(2, 1, 16, 16), u[:, :3].expand(2, -1, -1)).shape[2] == 1


def test_shared_augmentation_by_hand():
    x, noise = torch.rand(4, 2, 3, 8, 8), torch.randn(4, 2, 3, 8, 8)
    u = torch.tensor(
        [
            [0.1, 0.9, 0.9, 0.5, 0.0],  # upside down
            [0.9, 0.1, 0.9, 1.0, 0.0],  # mirrored, brighter by 0.2
            [0.9, 0.9, 0.1, 0.5, 0.0],  # blurred
            [0.9, 0.9, 0.9, 0.0, 1.0],  # darker by 0.2, noise of deviation 0.02
        ]
    )
    got = views.shared_augmentation(x, u, noise)
    weights = torch.tensor([0.27406862, 0.45186276, 0.27406862])
    blurred = sum(
        weights[a] * weights[b] * F.pad(x[2], (1,) * 4, "reflect")[..., a : a + 8, b : b + 8]
        for a in range(3)
        for b in range(3)
    )
    assert torch.allclose(got[0], x[0].flip(-2), atol=1e-6)
    assert torch.allclose(got[1], (x[1].flip(-1) + 0.2).clamp(0, 1), atol=1e-6)
    assert torch.allclose(got[2], blurred, atol=1e-5)
    assert torch.allclose(got[3], (x[3] - 0.2 + 0.02 * noise[3]).clamp(0, 1), atol=1e-6)


# -- meta-training -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return LabelledImages(images, torch.arange(40) % 10)


def recipe_of(**fields):
    chosen = {"model_args": TINY, "epochs": 2, "tasks": 2, "task_images": 3, "steps_per_epoch": 2}
    return MT3Recipe(**(chosen | fields))


def meta_of(model, dtype=torch.float64):
    meta = {f"model.{n}": p.detach().clone().to(dtype) for n, p in model.named_parameters()}
    return meta | {n: t.to(dtype) for n, t in random_heads("mt3", model).items()}


def tasks_of(data, recipe, dtype=torch.float64):
    n = recipe.tasks * recipe.task_images
    generator = torch.Generator().manual_seed(3)
    *x, y = draw_tasks(
        data.images[:n], data.labels[:n], recipe.task_images, generator, recipe.inner_steps
    )
    return (*(t.to(dtype) for t in x), y)


@pytest.mark.parametrize("kind", ["groupnorm", "layernorm"], indirect=True)
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_outer_gradient_against_finite_differences(kind, together, steps, make_model, data):
    """Targets of the inner loss are constants to the outer derivative too (TensorFlow's
    stop_gradient), so they stand still while the parameters are moved.

    With two inner steps, each on views of its own, every tensor has a factor on the inner rate.
    """
    model = make_model(kind, torch.float64)
    backbone = Backbone(model)
    recipe = recipe_of(together=together, clip=0.5, inner_steps=steps, task_images=2)
    meta, tasks = meta_of(model), tasks_of(data, recipe)
    if kind == "groupnorm":  # a quarter of the pixels, for speed
        *views, labels = tasks
        tasks = (*(x[..., ::2, ::2].contiguous() for x in views), labels)
    if steps == 2:
        names = rate_names(model)
        assert len(names) == len(meta) - 2  # all but the classifier's weight and bias
        meta |= {n: torch.tensor(0.5 + i / len(names)).double() for i, n in enumerate(names)}
    ours, record = meta_gradient(meta, tasks, backbone, recipe)

    def run(meta, images, pooled=False):
        own = {n: t for n, t in meta.items() if n.startswith("model.")}
        return torch.func.functional_call(backbone, own, (images, pooled))

    def outer(meta, stopped):
        total, targets = 0, []
        for i in range(recipe.tasks):
            x1, x2, x, y = (t[i] for t in tasks)
            phi, pairs = meta, list(zip(x1.chunk(steps), x2.chunk(steps), strict=True))
            for number, pair in enumerate(pairs):
                with torch.no_grad():
                    targets.append([two_layers(phi, "projector", run(phi, z, True)) for z in pair])
                leaves = {n: t.detach().requires_grad_() for n, t in phi.items()}
                still = stopped and stopped[(steps + 1) * i + number]
                inner = plain_byol(partial(run, leaves, pooled=True), leaves, *pair, still)
                grads = torch.autograd.grad(
                    inner, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
                moved = {}
                for (name, t), g in zip(phi.items(), grads, strict=True):
                    rate = 0.1 * meta.get(f"rate.{name}", 1)
                    moved[name] = t - rate * g * min(1, 0.5 / max(g.norm().item(), 1e-30))
                phi = moved
            with torch.no_grad():
                last = pairs[-1]
                targets.append([two_layers(phi, "projector", run(phi, z, True)) for z in last])
                at_phi = stopped and stopped[(steps + 1) * i + steps]
                total += F.cross_entropy(run(phi, x), y) + 0.1 * plain_byol(
                    partial(run, phi, pooled=True), phi, *last, at_phi
                )
        return total, targets

    value, stopped = outer(meta, None)
    assert torch.allclose(record[0], value)
    generator = torch.Generator().manual_seed(5)
    weights = [n for n in meta if n.startswith("model.") and n.endswith("weight")][1:5]
    groups = [[name] for name in ["projector.in.weight", "predictor.out.bias", *weights]]
    if rates := [n for n in meta if n.startswith("rate.")]:
        groups += [rates[::5], rates]
    for names in groups:
        along = {
            n: torch.randn(meta[n].shape, generator=generator, dtype=torch.float64) for n in names
        }
        # Larger steps cross kinks of the ReLUs, where the inner gradient jumps; of smaller ones
        # rounding remains, whose mean over several is smaller.
        slopes = []
        for step in (1.2e-8, 1.5e-8, 1.8e-8):
            ends = [
                outer(meta | {n: meta[n] + s * step * d for n, d in along.items()}, stopped)[0]
                for s in (1, -1)
            ]
            slopes.append((ends[0] - ends[1]) / (2 * step))
        slope, expected = sum(slopes) / len(slopes), sum((ours[n] * along[n]).sum() for n in names)
        assert torch.allclose(expected, slope, rtol=1e-4, atol=1e-7), names


def test_first_order_takes_the_inner_gradient_for_a_constant(make_model, data):
    model = make_model("groupnorm", torch.float64)
    backbone, recipe = Backbone(model), recipe_of(first_order=True)
    meta, tasks = meta_of(model), tasks_of(data, recipe)
    second, _ = meta_gradient(meta, tasks, backbone, replace(recipe, first_order=False))
    for together in (1, 2):
        ours, _ = meta_gradient(meta, tasks, backbone, replace(recipe, together=together))
        expected = {n: torch.zeros_like(t) for n, t in meta.items()}
        for task in zip(*tasks, strict=True):
            leaves = {n: t.detach().requires_grad_() for n, t in meta.items()}
            inner = byol_loss(backbone, leaves, leaves, *task[:2])
            grads = torch.autograd.grad(
                inner, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            grads = clip_each(dict(zip(leaves, grads, strict=True)), recipe.clip)
            phi = {n: (t - 0.1 * grads[n]).detach().requires_grad_() for n, t in leaves.items()}
            own = {n: t for n, t in phi.items() if n.startswith("model.")}
            logits = torch.func.functional_call(backbone, own, (task[2],))
            loss = F.cross_entropy(logits, task[3]) + 0.1 * byol_loss(backbone, phi, phi, *task[:2])
            for n, g in zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True):
                expected[n] += g
        assert all(torch.allclose(ours[n], t, atol=1e-9) for n, t in expected.items())
    name = "model.stages.0.0.conv1.weight"
    assert not torch.allclose(ours[name], second[name], atol=1e-6)


def test_each_tensor_is_clipped_on_its_own():
    grads = {"long": torch.full((4,), 10.0), "short": torch.ones(4), "zero": torch.zeros(3)}
    grads = {n: g.requires_grad_() for n, g in grads.items()}
    clipped = clip_each(grads, 10.0)
    assert torch.allclose(clipped["long"].norm(), torch.tensor(10.0))
    assert torch.equal(clipped["short"], grads["short"])
    assert not clipped["zero"].any()
    sum(g.square().sum() for g in clipped.values()).backward()
    assert all(torch.isfinite(g.grad).all() for g in grads.values())
    assert all(clip_each(grads, 0.0)[n] is g for n, g in grads.items())


def test_the_outer_step_by_hand(data, tmp_path):
    """The tasks' mean gradient, each tensor clipped, under SGD with momentum 0.9."""
    recipe = recipe_of(epochs=1, lr=0.5, clip=0.05, seed=3)
    model, head, _ = train_mt3(recipe, data, tmp_path, progress=False)
    torch.manual_seed(3)
    start = timm.create_model("ttt_resnet26", num_classes=10, **TINY)
    meta = {f"model.{n}": p.detach().clone() for n, p in start.named_parameters()}
    meta |= init_byol(start, torch.Generator().manual_seed(3))
    velocity = {n: torch.zeros_like(p) for n, p in meta.items()}
    generator = torch.Generator().manual_seed(3 * 1_000_003)  # epoch_generator's, of epoch 0
    order, lengths = torch.randperm(40, generator=generator), []
    for rows in order[:12].split(6):
        tasks = draw_tasks(data.images[rows], data.labels[rows], 3, generator)
        one, two = (
            meta_gradient(meta, tuple(t[i : i + 1] for t in tasks), Backbone(start), recipe)[0]
            for i in (0, 1)
        )
        for name in meta:
            g = (one[name] + two[name]) / 2
            lengths.append(g.norm().item())
            velocity[name] = 0.9 * velocity[name] + g * min(1, 0.05 / max(lengths[-1], 1e-30))
            meta[name] = meta[name] - 0.5 * velocity[name]
    assert 5 < sum(length > 0.05 for length in lengths) < len(lengths) - 5
    for name, p in model.named_parameters():
        assert torch.allclose(p, meta[f"model.{name}"], atol=1e-5), name
    assert all(torch.allclose(t, meta[n], atol=1e-5) for n, t in head.items())


def test_classified_images_are_cut_from_two_pixels_of_padding(monkeypatch):
    monkeypatch.setattr(mt3_step, "shared_augmentation", lambda part, *_: part)
    whole = torch.rand(32, 3, 32, 32)
    places = set()
    _, _, x, _ = draw_tasks(whole, torch.arange(32), 8, torch.Generator().manual_seed(0))
    padded = F.pad(whole, (2, 2, 2, 2))
    for one, image in zip(x.flatten(0, 1), padded, strict=True):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 5, 5, 32, 32)
        same = (windows == one[:, None, None]).all(-1).all(-1).all(0)
        assert same.sum() == 1
        places.add(tuple(same.nonzero()[0].tolist()))
    assert {row for row, _ in places} == {col for _, col in places} == set(range(5))


@pytest.mark.parametrize("together", [1, 2])
def test_autocast_computes_in_bfloat16(together, make_model, data):
    backbone, seen, found = Backbone(make_model("groupnorm")), set(), {}
    backbone.model.stages[0][0].conv1.register_forward_hook(lambda *a: seen.add(a[-1].dtype))
    meta = meta_of(backbone.model, torch.float32)
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        recipe = recipe_of(autocast=autocast, together=together)
        tasks = tasks_of(data, recipe, torch.float32)
        seen.clear()
        found[autocast] = grads, record = meta_gradient(meta, tasks, backbone, recipe)
        assert seen == {dtype}
        assert {g.dtype for g in grads.values()} == {torch.float32}
        leaves = {n: p.clone().requires_grad_() for n, p in meta.items()}
        task = (t[0] for t in tasks)
        loss, _ = task_loss(leaves, *task, backbone=backbone, recipe=recipe, transforms=False)
        assert loss.dtype == record.dtype == torch.float32
    exact, rounded = found[False][1], found[True][1]
    assert torch.allclose(rounded[:3], exact[:3], rtol=0.1)
    assert not torch.equal(rounded[:3], exact[:3])


def test_the_logged_accuracies_are_of_the_same_images(data, tmp_path):
    """An inner step of length 0 changes nothing, while the outer ones do."""
    recipe = recipe_of(epochs=1, lr=0.5, inner_lr=0.0, steps_per_epoch=4)
    *_, log = train_mt3(recipe, data, tmp_path, progress=False)
    (entry,) = log["epochs"]
    assert entry["accuracy_before"] == entry["accuracy_after"] > 0


def same_model(a, b):
    return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_resumed_equals_unbroken(data, tmp_path, same_tensors, monkeypatch):
    recipe = recipe_of(schedule="cosine")
    model, head, log = train_mt3(recipe, data, tmp_path / "a", progress=False)
    real = epochs.save_checkpoint

    class Broken(Exception):
        pass

    def stop(file, saved):
        real(file, saved)
        raise Broken

    monkeypatch.setattr(epochs, "save_checkpoint", stop)
    with pytest.raises(Broken):
        train_mt3(recipe, data, tmp_path / "b", progress=False)
    monkeypatch.undo()
    again, other, other_log = train_mt3(recipe, data, tmp_path / "b", resume=True, progress=False)
    assert log == other_log
    assert [e["epoch"] for e in log["epochs"]] == [1, 2]
    assert same_model(model, again)
    assert same_tensors(head, other)
    with pytest.raises(tp.InputError, match="another recipe"):
        train_mt3(recipe_of(lr=1.0), data, tmp_path / "b", resume=True, progress=False)


def test_two_processes_equal_one(data, tmp_path):
    """With the variables that torchrun sets; `test_benchmark_sharding` starts torchrun itself."""
    recipe = recipe_of(tasks=3, epochs=1)
    model, head, log = train_mt3(recipe, data, tmp_path / "one", progress=False)

    def work():
        train_mt3(recipe, data, tmp_path / "two", progress=False)

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        forked.start(work, environment=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(two["meta"][f"model.{name}"], tensor, atol=1e-6)
    assert all(torch.allclose(two["meta"][n], t, atol=1e-6) for n, t in head.items())
    for key, value in log["epochs"][0].items():
        assert abs(two["log"][0][key] - value) < 1e-5


def test_from_an_artifact(data, tmp_path):
    recipe = recipe_of(init="bundled:source-resnet26bn-cifar10", epochs=1, steps_per_epoch=1)
    model, head, log = train_mt3(recipe, data, tmp_path / "a", progress=False)
    assert log["architecture"] == "ttt_resnet26_bn"
    source = tp.wrap("bundled:source-resnet26bn-cifar10", "source").backbone.model
    assert torch.equal(model.norm.running_mean, source.norm.running_mean)
    moved = (model.head.weight - source.head.weight).abs().max()
    assert 0 < moved < 0.1
    net = tp.wrap(model, tp.MT3(copies=2), tensors=head)
    assert torch.isfinite(net(torch.rand(2, 3, 32, 32))).all()


def test_what_cannot_be_trained(data, tmp_path):
    with pytest.raises(tp.InputError, match="--init"):
        train_mt3(recipe_of(arch="ttt_resnet26_bn", model_args={}), data, tmp_path)
    with pytest.raises(tp.InputError, match="carries no model"):
        train_mt3(recipe_of(init="bundled:mgg-resnet26-cifar10"), data, tmp_path)
    with pytest.raises(tp.InputError, match="meta-batch"):
        train_mt3(recipe_of(tasks=100), data, tmp_path)
    with pytest.raises(tp.InputError, match="square"):
        train_mt3(recipe_of(), LabelledImages(data.images[..., :20], data.labels), tmp_path)
    with pytest.raises(tp.InputError, match="could not create"):
        train_mt3(recipe_of(arch="no_such_net"), data, tmp_path)


# -- errors --------------------------------------------------------------------------------


def test_a_model_without_trained_heads_is_refused(make_model):
    with pytest.raises(tp.InputError, match="ttt-plugins train mt3"):
        tp.wrap(make_model("groupnorm"), "mt3")
    model = make_model("layernorm")
    with pytest.raises(tp.ArtifactError, match="shape"):
        tp.wrap(model, "mt3", tensors=random_heads("mt3", make_model("groupnorm")))


@pytest.mark.parametrize(
    "field", [{"copies": 0}, {"steps": 1.5}, {"vote": "yes"}, {"lr": float("nan")}, {"rank": True}]
)
def test_bad_fields(field):
    with pytest.raises(tp.InputError, match=next(iter(field))):
        tp.MT3(**field)


def test_heads_are_built_for_any_width(make_model):
    for kind, width in (("groupnorm", 32), ("layernorm", 24)):
        head = init_byol(make_model(kind), torch.Generator())
        assert head["projector.in.weight"].shape == (256, width)
        assert head["predictor.out.weight"].shape == (128, 256)


def test_a_process_without_tasks_adds_nothing(make_model, data):
    model = make_model("groupnorm", torch.float64)
    meta, tasks = meta_of(model), tasks_of(data, recipe_of())
    none = tuple(t[:0] for t in tasks)
    grads, record = meta_gradient(meta, none, Backbone(model), recipe_of())
    assert grads.keys() == meta.keys()
    assert not any(g.any() for g in grads.values())
    assert not record.any()


def test_first_order_without_the_outer_self_supervision(make_model, data):
    model = make_model("groupnorm", torch.float64)
    recipe = recipe_of(first_order=True, self_supervised=0.0)
    grads, _ = meta_gradient(meta_of(model), tasks_of(data, recipe), Backbone(model), recipe)
    assert not grads["predictor.out.bias"].any()
    assert grads["model.head.weight"].any()


def test_tasks_share_their_corruption(data):
    """Both views and the classified images of a task are as bright as each other."""
    grey = torch.full((24, 3, 32, 32), 128, dtype=torch.uint8)
    drawn = draw_tasks(grey, torch.arange(24), 4, torch.Generator().manual_seed(0))
    x1, x2, x, y = drawn
    assert x1.shape == x2.shape == x.shape == (6, 4, 3, 32, 32)
    assert torch.equal(y.flatten(), torch.arange(24))
    level = x[..., 8:24, 8:24].mean((1, 2, 3, 4))  # the padding is black
    assert level.std() > 0.02
    for views_of in (x1, x2):
        assert (views_of.mean((1, 2, 3, 4)) - level).abs().max() < 0.2
        assert torch.corrcoef(torch.stack([views_of.mean((1, 2, 3, 4)), level]))[0, 1] > 0.6


def test_it_stops_before_it_saves_what_is_not_finite(data, tmp_path):
    with pytest.raises(tp.InputError, match="diverged"):
        train_mt3(recipe_of(lr=1e30, clip=0.0), data, tmp_path, progress=False)
    saved = tmp_path / "checkpoint.pt"
    if saved.is_file():
        meta = torch.load(saved, weights_only=True)["meta"]
        assert all(torch.isfinite(t).all() for t in meta.values())


def test_sure_votes_stay_finite(make_model, images):
    net = byol_net(make_model("groupnorm", confidence=400.0), vote=True)
    assert torch.isfinite(net(images(2))).all()


# -- learned rates, held images ----------------------------------------------------------------


def with_rates(model, low=0.25):
    names = rate_names(model)
    factors = {n: torch.tensor(low + i / len(names)) for i, n in enumerate(names)}
    return random_heads("mt3", model) | factors


def moved_by_hand(model, tensors, image, key, lr, steps):
    """All tensors of a network and its heads after steps at rates of their own."""
    moved = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    moved |= {n: t for n, t in tensors.items() if not n.startswith("rate.")}
    for step in range(steps):
        x1, x2 = (v[0] for v in _views(image, key, step, 3))
        net = copy.deepcopy(model)
        net.load_state_dict({n: moved[f"model.{n}"] for n in net.state_dict()})
        head = {n: t.clone().requires_grad_() for n, t in moved.items() if "model." not in n}

        def features(x, net=net):
            return net.forward_head(net.forward_features(normalised(net, x)), pre_logits=True)

        plain_byol(features, head, x1, x2).backward()
        leaves = {f"model.{n}": p for n, p in net.named_parameters()} | head
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                rate = lr * tensors.get(f"rate.{name}", torch.ones(()))
                moved[name] = (leaf - rate * leaf.grad).detach()
    return moved


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("steps", [1, 2])
def test_factors_multiply_the_rate_of_their_tensors(steps, chunk_size, make_model, images):
    model, x = make_model("groupnorm"), images(3)
    tensors = with_rates(model)
    config = tp.MT3(copies=3, lr=0.2, steps=steps, chunk_size=chunk_size)
    adapted = tp.wrap(model, config, tensors=tensors)(x)
    for i, key in enumerate(image_keys(x, 0)):
        moved = moved_by_hand(model, tensors, x[i : i + 1], key[None], 0.2, steps)
        net = copy.deepcopy(model)
        net.load_state_dict({n: moved[f"model.{n}"] for n in net.state_dict()})
        with torch.no_grad():
            assert torch.allclose(adapted[i], net(normalised(net, x[i : i + 1]))[0], atol=1e-4)
    plain = {n: t for n, t in tensors.items() if not n.startswith("rate.")}
    without = tp.wrap(model, config, tensors=plain)(x)
    assert not torch.allclose(adapted, without, atol=1e-3)
    ones = plain | {n: torch.ones(()) for n in rate_names(model)}
    assert torch.equal(tp.wrap(model, config, tensors=ones)(x), without)


def test_factors_are_saved_with_the_rest(make_model, images, tmp_path):
    model = make_model("layernorm")
    net = tp.wrap(model, tp.MT3(copies=2), tensors=with_rates(model))
    folder = net.save_pretrained(tmp_path / "net")
    again = tp.from_pretrained(folder, backbone=model)
    assert again.learned_tensors().keys() == net.learned_tensors().keys()
    assert torch.equal(again(images(2)), net(images(2)))
    for params in ("norm", "lora"):
        few = tp.from_pretrained(folder, backbone=model, params=params)
        assert torch.isfinite(few(images(2))).all()


def test_factors_are_for_all_tensors_or_none(make_model):
    model = make_model("groupnorm")
    tensors = with_rates(model)
    name = next(n for n in tensors if n.startswith("rate."))
    for bad in (
        {n: t for n, t in tensors.items() if n != name},
        tensors | {name: torch.ones(2)},
        tensors | {name: torch.tensor(torch.nan)},
        tensors | {"rate.model.head.weight": torch.ones(())},
    ):
        with pytest.raises(tp.ArtifactError, match=r"rate\.model"):
            tp.wrap(model, tp.MT3(copies=2), tensors=bad)


def test_rates_are_learned_and_taken_over(data, tmp_path, same_tensors):
    recipe = recipe_of(rate_lr=0.05, epochs=1, inner_steps=2, steps_per_epoch=3)
    model, head, _ = train_mt3(recipe, data, tmp_path / "a", progress=False)
    factors = {n: t for n, t in head.items() if n.startswith("rate.")}
    assert list(factors) == rate_names(model)
    assert sum(t.item() != 1 for t in factors.values()) > len(factors) / 2
    net = tp.wrap(model, tp.MT3(copies=2, steps=2), tensors=head)
    assert torch.isfinite(net(torch.rand(1, 3, 32, 32))).all()
    folder = tmp_path / "artifact"
    save_with_model(model, "ttt_resnet26", TINY, folder, config=net.config, tensors=head)
    recipe = recipe_of(init=str(folder), lr=0.0, epochs=1)
    _, again, _ = train_mt3(recipe, data, tmp_path / "b", progress=False)
    assert same_tensors(again, head)


def test_the_epoch_that_is_best_after_the_step_is_kept(data, tmp_path, monkeypatch, same_tensors):
    recipe, script = recipe_of(epochs=3, lr=0.2), [0.3, 0.5, 0.5]

    def scripted(self, model, head):
        return {"extras_before": 0.1, "extras_after": script.pop(0)}

    gap = StepGap({"noise": data[:4]}, tp.MT3(copies=2))
    with monkeypatch.context() as patch:
        patch.setattr(StepGap, "measure", scripted)
        model, head, log = train_mt3(recipe, data, tmp_path / "a", gap=gap, progress=False)
    assert log["chosen"] == {"extras_before": 0.1, "extras_after": 0.5, "epoch": 2}
    assert [entry["extras_after"] for entry in log["epochs"]] == [0.3, 0.5, 0.5]
    # A run of two epochs ends at the weights that the run of three passed through.
    two, other, _ = train_mt3(replace(recipe, epochs=2), data, tmp_path / "b", progress=False)
    assert same_model(model, two)
    assert same_tensors(head, other)


def test_held_images_are_measured_as_an_adapter_would(data):
    model = timm.create_model("ttt_resnet26", num_classes=10, **TINY).eval()
    head, config = random_heads("mt3", model), tp.MT3(copies=2, lr=2.0)
    measured = StepGap({"noise": data[:20], "dark": data[20:40]}, config).measure(model, head)
    for name, net in (
        ("extras_before", tp.wrap(model, "source")),
        ("extras_after", tp.wrap(model, config, tensors=head)),
    ):
        right = (net(data.images / 255).argmax(1) == data.labels).float().mean().item()
        assert measured[name] == pytest.approx(right)


def test_resuming_with_held_images_remembers_the_best(data, tmp_path, monkeypatch, same_tensors):
    recipe, gap = recipe_of(epochs=3, lr=0.3), StepGap({"noise": data[:24]}, tp.MT3(copies=2))
    whole = train_mt3(recipe, data, tmp_path / "a", gap=gap, progress=False)
    real, seen = epochs.save_checkpoint, []

    class Broken(Exception):
        pass

    def stop(file, saved):
        real(file, saved)
        seen.append(1)
        if len(seen) == 2:
            raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", stop)
        with pytest.raises(Broken):
            train_mt3(recipe, data, tmp_path / "b", gap=gap, progress=False)
    for other in (None, StepGap({"noise": data[8:32]}, gap.config)):
        with pytest.raises(tp.InputError, match="other held-out images"):
            train_mt3(recipe, data, tmp_path / "b", gap=other, resume=True, progress=False)
    again = train_mt3(recipe, data, tmp_path / "b", gap=gap, resume=True, progress=False)
    assert same_model(whole[0], again[0])
    assert same_tensors(whole[1], again[1])
    assert whole[2] == again[2]


def test_a_checkpoint_older_than_a_field_of_the_recipe(data, tmp_path):
    """It resumes if the field has its default, and is refused otherwise."""
    recipe = recipe_of(epochs=1)
    model, *_ = train_mt3(recipe, data, tmp_path, progress=False)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name in ("rate_lr", "inner_steps"):
        del saved["recipe"][name]
    torch.save(saved, tmp_path / "checkpoint.pt")
    again, *_ = train_mt3(recipe, data, tmp_path, resume=True, progress=False)
    assert same_model(model, again)
    with pytest.raises(tp.InputError, match="another recipe"):
        train_mt3(replace(recipe, rate_lr=0.1), data, tmp_path, resume=True, progress=False)
