"""TTT against plain loops, and the laws of adapting each image on its own."""

import copy
import dataclasses
import gc
import itertools
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import random_heads
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ttt_plugins as tp
from ttt_plugins.backbones.stages import trunk
from ttt_plugins.cli import main
from ttt_plugins.core import chunks as memory
from ttt_plugins.core import heads, views
from ttt_plugins.core.per_image import loss_and_gradient
from ttt_plugins.core.schedules import schedule_factor
from ttt_plugins.core.views import image_keys
from ttt_plugins.data.images import LabelledImages
from ttt_plugins.methods import ttt_head
from ttt_plugins.methods.ttt import rotation_views
from ttt_plugins.train.joint import (
    HeadRecipe,
    JointModel,
    JointRecipe,
    fit_rotation_head,
    train_joint,
)

FAST = {"steps": 2, "copies": 3, "lr": 0.05}


def rotation_net(model, seed=0, **fields):
    config = tp.TTT(**(FAST | fields))
    tensors = random_heads("ttt", model, config.split)
    return tp.wrap(model, config, tensors=tensors, seed=seed)


class Branches(nn.Module):
    """The Y of the paper, by whole copies of the model: trunk shared, two rests."""

    def __init__(self, model, tensors, split):
        super().__init__()
        self.main, self.side = copy.deepcopy(model), copy.deepcopy(model)
        self.trunk, rest = trunk(model, split)
        state = self.side.state_dict()
        state |= {n.removeprefix("rest."): t for n, t in tensors.items() if n.startswith("rest.")}
        self.side.load_state_dict(state)
        self.head = nn.Linear(tensors["head.weight"].shape[1], 4)
        self.head.load_state_dict({n: tensors[f"head.{n}"] for n in ("weight", "bias")})
        self.head.to(tensors["head.weight"].dtype)
        side = dict(self.side.named_parameters())
        self.learned = [side[n] for n in (*self.trunk, *rest)] + list(self.head.parameters())

    def features(self, x):
        return self.side.forward_head(self.side.forward_features(x), pre_logits=True)

    @torch.no_grad()
    def predict(self, x):
        """The main branch on the side's trunk."""
        side = dict(self.side.named_parameters())
        for name, p in self.main.named_parameters():
            if name in self.trunk:
                p.copy_(side[name])
        return self.main(x)


def plain_ttt(model, tensors, images, *, split, lr, steps, copies, keep, seed=0):
    """An unbatched restatement with torch.optim, one image after the other, in float64."""
    model = copy.deepcopy(model).double().eval()
    tensors = {n: t.double() for n, t in tensors.items()}
    mean, std = (
        torch.tensor(model.pretrained_cfg[k], dtype=torch.float64).view(-1, 1, 1)
        for k in ("mean", "std")
    )
    net, logits = Branches(model, tensors, split), []
    for i, image in enumerate(images):
        if not keep:
            net = Branches(model, tensors, split)
        optimizer = torch.optim.SGD(net.learned, lr=lr)
        key = image_keys(image[None], seed) + (i if keep else 0)
        for step in range(steps):
            x, quarters = rotation_views(image[None].double(), key, step, copies)
            loss = F.cross_entropy(net.head(net.features((x[0] - mean) / std)), quarters[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits.append(net.predict((image[None].double() - mean) / std))
    return torch.cat(logits)


@pytest.mark.parametrize("split", [-1, "end", 1])
@pytest.mark.parametrize("mode", ["standard", "online"])
def test_it_equals_the_plain_loop(kind, mode, split, make_model, images):
    model, x = make_model(kind), images(3)
    net = rotation_net(model, mode=mode, split=split).to(torch.float64)
    tensors = random_heads("ttt", model, split)
    keep = mode == "online"
    expected = plain_ttt(model, tensors, x, split=split, keep=keep, **FAST)
    assert torch.allclose(net(x.double()), expected, atol=1e-9)
    assert not torch.allclose(expected, tp.wrap(model.double(), "source")(x.double()), atol=1e-3)


def test_online_goes_on_where_the_last_batch_ended(make_model, images):
    model, x = make_model("groupnorm"), images(5)
    whole = rotation_net(model, mode="online")
    parts = rotation_net(model, mode="online")
    assert torch.equal(whole(x), torch.cat([parts(x[:2]), parts(x[2:])]))


@pytest.mark.parametrize("chunk_size", [2, 3, 8])
def test_batched_equals_the_loop(kind, chunk_size, make_model, images):
    model, x = make_model(kind).double(), images(5, dtype=torch.float64)
    one = rotation_net(model, chunk_size=1)
    expected = torch.cat([one(image[None]) for image in x])
    assert torch.equal(one(x), expected)
    together = rotation_net(model, chunk_size=chunk_size)
    assert torch.allclose(together(x), expected, atol=1e-10)
    assert together.forwards == one.forwards / 2
    assert together.backwards == one.backwards / 2


@pytest.mark.parametrize(
    ("kind", "params"),
    [("batchnorm", "norm"), ("groupnorm", "norm"), ("layernorm", "norm"), ("layernorm", "lora")],
)
def test_batched_equals_the_loop_in_every_scope(kind, params, make_model, images):
    model, x = make_model(kind).double(), images(5, dtype=torch.float64)
    one = rotation_net(model, params=params, chunk_size=1)
    expected = torch.cat([one(image[None]) for image in x])
    together = rotation_net(model, params=params, chunk_size=3)
    assert torch.allclose(together(x), expected, atol=1e-10)
    assert not torch.allclose(expected, tp.wrap(model, "source")(x), atol=1e-6)


@pytest.mark.parametrize("chunk_size", [2, 8])
def test_batched_equals_the_loop_where_some_are_skipped(kind, chunk_size, make_model, images):
    model, x = make_model(kind).double(), images(6, dtype=torch.float64)
    source = tp.wrap(model, "source")
    tensors = {n: t.double() for n, t in random_heads("ttt", model).items()}
    sure = heads.rotation_logits(source.backbone, {}, tensors, x).softmax(1)[:, 0].detach()
    threshold = sure.sort().values[2:4].mean().item()
    one = rotation_net(model, threshold=threshold, chunk_size=1)
    expected = torch.cat([one(image[None]) for image in x])
    together = rotation_net(model, threshold=threshold, chunk_size=chunk_size)
    assert torch.allclose(together(x), expected, atol=1e-10)
    still = (expected - source(x)).abs().amax(1) < 1e-9
    assert torch.equal(still, sure > threshold)
    assert still.sum() == 3


def test_an_image_is_predicted_alike_in_any_batch(make_model, images):
    net, x = rotation_net(make_model("groupnorm")), images(4)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(net(x)[order], net(x[order]))


def test_seeds_change_the_views(make_model, images):
    model, x = make_model("groupnorm"), images(2)
    one, same, other = (rotation_net(model, seed=s)(x) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# -- what the paper says -------------------------------------------------------------------


def test_the_papers_settings_are_the_defaults(make_model, images):
    """As arXiv 1909.13231 and 2103.16201 have them, read off what runs and not off the fields."""
    model, x = make_model("groupnorm"), images(1)
    tensors = {method: random_heads(method, model) for method in ("ttt", "mt3")}
    standard, online, mt3 = (
        tp.wrap(model, config, tensors=tensors[name])._algorithm_now()
        for name, config in (
            ("ttt", tp.TTT()),
            ("ttt", tp.TTT(mode="online")),
            ("mt3", tp.MT3()),
        )
    )
    assert (standard.steps, standard.lr, standard.keep) == (10, 1e-3, False)
    assert (online.steps, online.lr, online.keep) == (1, 1e-3, True)
    assert (mt3.steps, mt3.lr, mt3.keep, mt3.votes) == (1, 0.1, False, None)
    for algorithm in (standard, online, mt3):
        assert all(v.shape[1] == 32 for v in algorithm.task.draw(x, image_keys(x, 0), 0))


@pytest.mark.parametrize("params", ["norm", "all"])
@pytest.mark.parametrize("adapt_head", [True, False, None])
def test_the_head_moves_where_it_is_told_to(params, adapt_head, make_model, images):
    model, x = make_model("groupnorm"), images(2)
    tensors = random_heads("ttt", model)
    moves = params == "all" if adapt_head is None else adapt_head
    fields = {"params": params, "adapt_head": adapt_head}
    online = rotation_net(model, mode="online", **fields)
    online(x)
    state = online.adaptation_state()
    for name, tensor in tensors.items():
        now = state.get(f"params.{name}")
        assert (now is not None and not torch.equal(now, tensor)) is moves, name
    # The trunk moves either way, and the second step sees whether the head did.
    other = rotation_net(model, **(fields | {"adapt_head": not moves}))
    net = rotation_net(model, **fields)
    assert not torch.equal(net(x[:1]), online(x[:1]))
    assert not torch.allclose(net(x), other(x), atol=1e-6)


# -- views ---------------------------------------------------------------------------------


def test_quarter_turns_are_rot90s():
    x, k = torch.rand(2, 4, 3, 5, 5), torch.tensor([[0, 1, 2, 3], [3, 3, 1, 2]])
    turned = views.quarter_turns(x, k)
    for i in range(2):
        for j in range(4):
            assert torch.equal(turned[i, j], torch.rot90(x[i, j], int(k[i, j]), (1, 2)))


def test_four_rotations_are_the_identity():
    x = torch.rand(4, 3, 6, 6)
    turned = x
    for _ in range(4):
        turned = views.quarter_turns(turned, torch.ones(4, dtype=torch.long))
    assert torch.equal(turned, x)
    assert torch.equal(views.quarter_turns(x, torch.zeros(4, dtype=torch.long)), x)


def test_crops_and_flips_against_slices():
    x, u = torch.rand(2, 3, 8, 8), torch.rand(2, 6, 3)
    cut = views.crop_and_flip(x, u, 2)
    padded = F.pad(x, (2,) * 4)
    seen = set()
    for i in range(2):
        for j in range(6):
            top, left = (int(v * 5) for v in u[i, j, :2])
            expected = padded[i, :, top : top + 8, left : left + 8]
            expected = expected.flip(2) if u[i, j, 2] < 0.5 else expected
            assert torch.equal(cut[i, j], expected)
            seen.add((top, left))
    assert len(seen) > 5


def test_uniform_numbers_are_uniform_and_independent():
    keys = image_keys(torch.rand(500, 3, 4, 4), 0)
    assert len(keys.unique()) == 500
    u = views.uniforms(keys, (40,))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.std() - 12**-0.5) < 0.01
    noise = torch.corrcoef(u.T) - torch.eye(40)
    assert noise.abs().max() < 5 / math.sqrt(500)
    assert not torch.equal(u, views.uniforms(keys, (40,), salt=1))
    # Images that differ in one pixel's last bit share nothing.
    x = torch.rand(1, 3, 4, 4)
    y = x.clone()
    y[0, 1, 2, 3] = torch.nextafter(y[0, 1, 2, 3], torch.tensor(2.0))
    assert (
        views.uniforms(image_keys(x, 0), (40,)) == views.uniforms(image_keys(y, 0), (40,))
    ).sum() < 3


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (48, 6)])
def test_turning_a_view_back_by_its_label_rights_it(size, padding):
    x = torch.rand(3, 3, size, size)
    keys = image_keys(x, 0)
    turned, quarters = rotation_views(x, keys, 5, 8)
    upright = views.crop_and_flip(x, views.uniforms(keys, (8, 4), salt=5)[..., :3], padding)
    assert set(quarters.flatten().tolist()) == {0, 1, 2, 3}
    for i in range(3):
        for j in range(8):
            back = torch.rot90(turned[i, j], -int(quarters[i, j]), (1, 2))
            assert torch.equal(back, upright[i, j])


def test_views_and_labels_cover_everything(images):
    _, quarters = rotation_views(images(4), image_keys(images(4), 0), 0, 32)
    counts = quarters.flatten().bincount(minlength=4)
    assert counts.sum() == 128
    assert counts.min() > 15


# -- gradients -----------------------------------------------------------------------------


def test_gradients_reach_the_trunk_and_not_the_main_head(kind, make_model, images):
    model = make_model(kind)
    shared, rest = trunk(model, -1)
    tensors = random_heads("ttt", model)
    backbone = tp.wrap(model, "source").backbone
    x, quarters = rotation_views(images(1), image_keys(images(1), 0), 0, 4)
    params = {f"model.{n}": p.detach() for n, p in model.named_parameters()}

    def loss(params):
        return F.cross_entropy(heads.rotation_logits(backbone, params, tensors, x[0]), quarters[0])

    _, grads = loss_and_gradient(loss, params)
    assert all(grads[f"model.{n}"].any() for n in shared if n.endswith("weight"))
    # What lies behind the split is the head's own, and the classifier is not on the way.
    others = [n for n, _ in model.named_parameters() if n not in set(shared)]
    assert {"head.weight", "head.bias"} <= set(others)
    assert set(rest) < set(others)
    assert not any(grads[f"model.{n}"].any() for n in others)
    assert set(rotation_net(model).names) == set(shared)


def test_skipping_skips_the_sure_images(make_model, images):
    model, x = make_model("groupnorm"), images(8)
    tensors = random_heads("ttt", model)
    source = tp.wrap(model, "source")
    sure = heads.rotation_logits(source.backbone, {}, tensors, x).softmax(1)[:, 0].detach()
    threshold = sure.sort().values[3:5].mean().item()
    net = rotation_net(model, threshold=threshold)
    logits, adapted = net(x), rotation_net(model)(x)
    skipped = sure > threshold
    assert skipped.sum() == 4
    assert torch.equal(logits[~skipped], adapted[~skipped])
    assert torch.equal(logits[skipped], source(x)[skipped])
    passes = FAST["steps"] * FAST["copies"]
    assert net.backwards == 4 * passes
    assert net.forwards == 2 * 8 + 4 * (passes + 1)
    assert torch.equal(rotation_net(model, threshold=0.0)(x), source(x))
    online = rotation_net(model, threshold=threshold, mode="online")
    online(x)
    assert 0 < online.backwards < 8 * passes


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_gradient_that_is_not_finite_is_skipped_for_its_image_alone(
    chunk_size, make_model, images
):
    model, x = make_model("groupnorm"), images(3)
    net = rotation_net(model, chunk_size=chunk_size)
    expected, plain = net(x), tp.wrap(model, "source")(x)
    turns = rotation_views(x, image_keys(x, 0), 0, FAST["copies"])[1]
    assert not torch.equal(turns[0], turns[1])
    assert not torch.equal(turns[2], turns[1])
    task = net._algorithm.task

    def poisoned(params, views, quarters):
        """Infinite in the first step of the second image."""
        poison = torch.where((quarters == turns[1]).all(), torch.inf, 1.0)
        return task.loss(params, views, quarters) * poison

    algorithm = dataclasses.replace(net._algorithm, task=dataclasses.replace(task, loss=poisoned))
    net._algorithm = algorithm
    with pytest.warns(RuntimeWarning, match="not finite"):
        logits = net(x)
    assert net.skipped_updates == 1
    assert torch.allclose(logits[[0, 2]], expected[[0, 2]], atol=1e-5)
    # The second step still happened.
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits[1], expected[1], atol=1e-5)
    assert not torch.allclose(logits[1], plain[1], atol=1e-5)


# -- scopes and memory ---------------------------------------------------------------------


def test_low_rank_changes_start_at_the_source_bit_for_bit(make_model, images):
    model, x = make_model("layernorm"), images(3)
    still = rotation_net(model, params="lora", lr=0.0)
    plain = tp.wrap(model, "source")
    assert torch.equal(still(x), torch.cat([plain(image[None]) for image in x]))
    net = rotation_net(model, params="lora", rank=2)
    assert not torch.equal(net(x), still(x))
    source = net._algorithm_now().source
    assert all(n.startswith("lora.blocks.0.") for n in source)
    a = source["lora.blocks.0.attn.qkv.weight.A"]
    assert a.shape == (2, 24)
    assert a.any()
    assert not source["lora.blocks.0.attn.qkv.weight.B"].any()


def test_low_rank_changes_train_along_a_stream(make_model, images):
    model = make_model("layernorm")
    net = tp.wrap(model, tp.Tent(params="lora", window=1, lr=1e-2))
    first = net(images(6))
    assert not torch.equal(net(images(6)), first)
    exported = net.export()
    with torch.no_grad():
        expected = exported(images(6))
    assert torch.equal(net(images(6)), expected)
    net.reset()
    assert torch.equal(net(images(6)), first)


class Convolutions(nn.Module):
    """Every kind of weight that a low-rank change is for, and every kind that it is not for."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.linear = nn.Linear(12, 6)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = self.pointwise(self.depthwise(self.grouped(self.stem(x).tanh()).tanh()))
        return self.head(self.linear(x.tanh().mean((2, 3))).tanh())


def test_low_rank_changes_are_for_linear_layers_and_plain_1x1_convolutions(images):
    torch.manual_seed(0)
    model, changed = Convolutions().eval(), {"pointwise.weight", "linear.weight"}
    with torch.no_grad():
        model.head.weight.mul_(10)
    net = tp.wrap(model, tp.Tent(params="lora", window=1, lr=0.1), normalize=False)
    assert set(net.names) == changed
    for seed in range(3):
        net(images(8, seed))
    after = net.export().state_dict()
    for name, p in model.named_parameters():
        (now,) = [t for n, t in after.items() if n == name or n.endswith(f".{name}")]
        change = (now - p).detach().flatten(1) if p.ndim > 1 else now - p
        if name in changed:
            assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) in range(1, 5), name
        else:
            assert not change.any(), name
    # Every method shares the choice; the rank is TTT's and MT3's own field.
    for method in (tp.TTT, tp.MT3):
        mobile = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
        config = method(params="lora", rank=3)
        net = tp.wrap(mobile, config, tensors=random_heads(method.__name__.lower(), mobile))
        weights = dict(mobile.named_parameters())
        assert net.names
        assert all(weights[n].shape[2:] == (1, 1) for n in net.names)
        for n in net.names:
            rows, columns = weights[n].shape[:2]
            factors = [net._algorithm_now().source[f"lora.{n}.{f}"] for f in "AB"]
            rank = min(3, rows, columns)
            assert [f.shape for f in factors] == [(rank, columns), (rows, rank)]


@pytest.mark.parametrize("params", ["norm", "all", r"stages\.0\.0"])
def test_scopes_stay_inside_the_trunk(params, make_model):
    model = make_model("groupnorm")
    shared, _ = trunk(model, -1)
    net = rotation_net(model, params=params)
    assert net.names
    assert set(net.names) <= set(shared)
    moved = net._algorithm_now().source
    assert any(n.startswith("head.") for n in moved) is (params == "all")


class Peak(TorchDispatchMode):
    """Bytes alive at once in tensors that were made inside, views of ``known`` ones left out."""

    def __init__(self, known=()):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


#: Models whose weights outweigh their activations.
WIDER = {
    "resnet10t": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
}
MEASURED = [
    *itertools.product(("ttt", "mt3"), ("batchnorm", "groupnorm"), ("all", "norm")),
    *itertools.product(
        ("ttt", "mt3"), ("layernorm", "resnet10t", "vit_tiny_patch16_224"), ("all", "norm", "lora")
    ),
]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("method", "arch", "params"), MEASURED)
def test_the_memory_estimate_is_near_the_measured_peak(
    method, arch, params, steps, make_model, images
):
    if arch in WIDER:
        model = timm.create_model(arch, num_classes=10, **WIDER[arch]).eval()
    else:
        model = make_model(arch)
    tensors = random_heads(method, model)
    options = {"copies": 8, "params": params, "steps": steps}
    net = tp.wrap(model, method, tensors=tensors, **options)
    algorithm, x = net._algorithm_now(), images(1)
    net.backbone.make_ready(x)
    known = [*net.backbone.parameters(), *net.backbone.buffers(), *net._tensors.values()]
    with torch.no_grad(), Peak([*known, *algorithm.source.values(), x]) as measured:
        algorithm._steps(algorithm.source, x, image_keys(x, 0))
    estimate = algorithm.bytes_for(x)
    assert 0.8 < estimate / measured.peak < 1.2
    if arch not in WIDER:  # those name a size of their own
        told = float(re.search(r"about ([\d.]+) MB an image", net.describe())[1])
        # Each is measured, to within 2 %.
        assert told == pytest.approx(estimate / 1e6, rel=0.04, abs=0.05)


def test_chunks_follow_the_free_memory(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    # 10 would fit; a power of two, so that a little less free memory changes nothing.
    assert memory.chunk_size("auto", lambda: 20, cuda) == 8
    assert memory.chunk_size("auto", lambda: 10**6, cuda) == 1
    assert memory.chunk_size(7, lambda: 100, cuda) == 7
    assert memory.chunk_size("auto", lambda: 100, torch.device("cpu")) == 1


# -- errors --------------------------------------------------------------------------------


def test_a_random_head_is_refused(make_model):
    with pytest.raises(tp.InputError, match="ttt-plugins train ttt"):
        tp.wrap(make_model("groupnorm"), "ttt")


@pytest.mark.parametrize("split", [0, 3, -3, 7, 1.5, True, "layer9", ""])
def test_bad_splits(split, make_model):
    with pytest.raises(tp.InputError, match="split"):
        rotation_net(make_model("groupnorm"), split=split)


def test_heads_of_another_model(make_model):
    model = make_model("groupnorm")
    good = random_heads("ttt", model)
    bad = {
        "missing": {n: t for n, t in good.items() if n != "head.bias"},
        "unexpected": good | {"head.more": torch.zeros(1)},
        "shape": good | {"head.weight": torch.zeros(4, 7)},
        "non-finite": good | {"head.bias": torch.full((4,), torch.nan)},
    }
    for message, tensors in bad.items():
        with pytest.raises(tp.ArtifactError, match=message):
            tp.wrap(model, "ttt", tensors=tensors)
    with pytest.raises(tp.ArtifactError, match="another split than 'end'"):
        tp.wrap(model, tp.TTT(split="end"), tensors=good)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((0, 3, 32, 32), "empty"), ((2, 3, 1, 1), "at least 2 x 2"), ((2, 3, 32, 24), "square")],
)
def test_images_that_do_not_fit(shape, message, make_model):
    net = rotation_net(make_model("groupnorm"))
    with pytest.raises(tp.InputError, match=message):
        net(torch.rand(shape))
    assert net.forwards == 0


@pytest.mark.parametrize(
    "field",
    [
        {"mode": "offline"},
        {"copies": 0},
        {"copies": 2.5},
        {"steps": 0},
        {"threshold": 1.5},
        {"chunk_size": 0},
        {"chunk_size": "all"},
        {"rank": 0},
        {"lr": -1.0},
        {"adapt_head": "yes"},
    ],
)
def test_bad_fields(field):
    with pytest.raises(tp.InputError, match=next(iter(field))):
        tp.TTT(**field)


# -- training ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (48, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return LabelledImages(images, torch.arange(48) % 10)


TINY = {"width": 8, "depth": 8, "groups": 4}


def joint_recipe(**fields):
    chosen = {"model_args": TINY, "epochs": 2, "batch_size": 16, "lr": 0.05}
    return JointRecipe(**(chosen | fields))


def test_twins_share_the_trunk_and_own_the_rest(make_model):
    model = make_model("batchnorm")
    joint = JointModel(model, -1)
    shared, rest = trunk(model, -1)
    main, side = dict(joint.model.named_parameters()), dict(joint.twin.named_parameters())
    assert all(main[n] is side[n] for n in shared)
    assert all(main[n] is not side[n] for n in rest)
    buffers, twins = dict(joint.model.named_buffers()), dict(joint.twin.named_buffers())
    assert buffers["stages.0.0.norm1.running_mean"] is twins["stages.0.0.norm1.running_mean"]
    assert buffers["norm.running_mean"] is not twins["norm.running_mean"]
    expected = heads.init_rotation(model, -1, torch.Generator())
    assert joint.head_tensors().keys() == expected.keys()


def turned_by_hand(x, rotations, generator):
    if rotations == "all":
        turned = [torch.rot90(x, k, (2, 3)) for k in range(4)]
        return torch.cat(turned), torch.tensor([0, 1, 2, 3]).repeat_interleave(len(x))
    quarters = torch.randint(0, 4, (len(x),), generator=generator)
    turned = [torch.rot90(one, k, (1, 2)) for one, k in zip(x, quarters.tolist(), strict=True)]
    return torch.stack(turned), quarters


@pytest.mark.parametrize("rotations", ["all", "random"])
def test_joint_training_by_hand(rotations, data, tmp_path):
    """Equation 1 by plain SGD on whole copies whose trunks get the sum of both gradients."""
    recipe = joint_recipe(rotations=rotations, epochs=1, weight_decay=0.01, seed=2)
    model, head, _ = train_joint(recipe, data, data, tmp_path, progress=False)
    torch.manual_seed(2)
    main = timm.create_model("ttt_resnet26", num_classes=10, **TINY)
    side, (shared, rest) = copy.deepcopy(main), trunk(main, -1)
    rotation = nn.Linear(32, 4)
    rotation.load_state_dict(heads.init_linear(32, 4, torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(2 * 1_000_003)  # epoch_generator's, of epoch 0
    mean, std = (torch.tensor(main.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    moving = [*main.parameters(), *side.parameters(), *rotation.parameters()]
    velocity = [torch.zeros_like(p) for p in moving]
    order = torch.randperm(48, generator=generator)
    for rows, factor in zip(order.split(16), (1, 1, 0.1), strict=True):
        x = views.random_crop(data.images[rows], 4, generator)
        x = (views.random_flip(x, generator) / 255 - mean) / std
        loss = F.cross_entropy(main(x), data.labels[rows])
        turned, quarters = turned_by_hand(x, rotations, generator)
        features = side.forward_head(side.forward_features(turned), pre_logits=True)
        (loss + F.cross_entropy(rotation(features), quarters)).backward()
        with torch.no_grad():
            for name in shared:
                a, b = main.get_parameter(name), side.get_parameter(name)
                a.grad = b.grad = a.grad + b.grad
            for i, p in enumerate(moving):
                if p.grad is not None:  # the twin has a classifier that nobody uses
                    velocity[i] = 0.9 * velocity[i] + p.grad + 0.01 * p
                    p -= 0.05 * factor * velocity[i]
                    p.grad = None
    for name, p in main.named_parameters():
        assert torch.allclose(model.get_parameter(name), p, atol=1e-5), name
    expected = {f"rest.{n}": side.get_parameter(n) for n in rest}
    expected |= {f"head.{n}": p for n, p in rotation.named_parameters()}
    assert expected.keys() == head.keys()
    assert all(torch.allclose(head[n], p, atol=1e-5) for n, p in expected.items())


def test_the_rate_falls_at_a_half_and_at_five_sixths():
    factors = [schedule_factor("step", step, 12, 0.05) for step in range(12)]
    assert factors == pytest.approx([1.0] * 6 + [0.1] * 4 + [0.01] * 2)


@pytest.mark.parametrize("rotations", ["all", "random"])
def test_turned_images_turn_back(rotations, images):
    x = images(24)
    turned, quarters = ttt_head.turned(x, rotations, torch.Generator().manual_seed(0))
    assert len(turned) == len(quarters) == (96 if rotations == "all" else 24)
    assert set(quarters.tolist()) == {0, 1, 2, 3}
    for i, (one, k) in enumerate(zip(turned, quarters.tolist(), strict=True)):
        assert torch.equal(torch.rot90(one, -k, (1, 2)), x[i % 24])


@pytest.mark.parametrize(("rotations", "ema"), [("all", 0.0), ("random", 0.9)])
def test_joint_training_resumed_equals_unbroken(rotations, ema, data, tmp_path):
    recipe = joint_recipe(rotations=rotations, ema=ema, schedule="cosine")
    quiet = {"progress": False}
    model, head, log = train_joint(recipe, data, data, tmp_path / "a", **quiet)

    class Broken(Exception):
        pass

    import ttt_plugins.train.epochs as module

    saved, real = [], module.save_checkpoint

    def stop_after_one(file, content):
        real(file, content)
        saved.append(file)
        raise Broken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_checkpoint", stop_after_one)
        with pytest.raises(Broken):
            train_joint(recipe, data, data, tmp_path / "b", **quiet)
    again, other_head, other_log = train_joint(
        recipe, data, data, tmp_path / "b", resume=True, **quiet
    )
    assert len(saved) == 1
    assert log == other_log
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert head.keys() == other_head.keys()
    assert all(torch.equal(t, other_head[n]) for n, t in head.items())
    # The trained pair works together.
    net = tp.wrap(model, tp.TTT(**FAST), tensors=head)
    assert torch.isfinite(net(torch.rand(2, 3, 32, 32))).all()
    with pytest.raises(tp.InputError, match="another recipe"):
        train_joint(joint_recipe(lr=1.0), data, data, tmp_path / "b", resume=True, **quiet)


def test_a_head_on_a_frozen_model(make_model, same_tensors):
    """It learns to tell which way is up, and the model stays as it is."""
    generator = torch.Generator().manual_seed(1)
    ramp = torch.linspace(0, 1, 32).view(1, 1, -1, 1).expand(64, 3, 32, 32)
    images = (0.7 * ramp + 0.3 * torch.rand(64, 3, 32, 32, generator=generator)).clamp(0, 1)
    model = make_model("batchnorm")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    recipe = HeadRecipe(epochs=10, batch_size=8, lr=1e-2, split=1)
    net, log = fit_rotation_head(model, images, recipe, progress=False)
    assert same_tensors(model.state_dict(), before)
    assert log["epochs"][-1]["rotation_accuracy"] > 0.6
    assert net.method == "ttt"
    assert net.config.split == 1
    assert torch.isfinite(net(images[:2])).all()
    for k in range(4):
        turned = torch.rot90(images, k, (2, 3))
        found = heads.rotation_logits(net.backbone, {}, net.learned_tensors(), turned).argmax(1)
        assert (found == k).float().mean() > 0.6, k
    with pytest.raises(tp.InputError, match="square"):
        fit_rotation_head(model, images[..., :20], recipe)
    with pytest.raises(tp.InputError, match="batch"):
        fit_rotation_head(model, images[:3], recipe)


def test_wrap_trains_a_head(make_model, same_tensors, tmp_path):
    """From a tensor or a loader alike; what it saved serves the same model again."""
    model, images = make_model("groupnorm"), torch.rand(24, 3, 32, 32)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    net = tp.wrap(model, "ttt", head="train", data=images, split=1, **FAST)
    loader = [(images[:16], "labels"), (images[16:], "labels")]
    again = tp.wrap(model, tp.TTT(split=1, **FAST), head="train", data=loader)
    assert same_tensors(net.learned_tensors(), again.learned_tensors())
    assert same_tensors(model.state_dict(), before)
    assert net.config == again.config == tp.TTT(split=1, **FAST)
    folder = net.save_pretrained(tmp_path / "head")
    loaded = tp.wrap(model, "ttt", head=folder)
    assert loaded.config == net.config
    assert torch.equal(loaded(images[:2]), net(images[:2]))
    with pytest.raises(tp.ArtifactError, match="was made for"):
        tp.wrap("ttt_resnet26", "ttt", head=folder)


def test_wrap_trains_a_head_by_its_seed(make_model, same_tensors):
    model, images = make_model("groupnorm"), torch.rand(16, 3, 32, 32)
    learned = [
        tp.wrap(model, "ttt", head="train", data=images, seed=seed).learned_tensors()
        for seed in (None, 0, 1, 1)
    ]
    assert same_tensors(learned[0], learned[1])
    assert same_tensors(learned[2], learned[3])
    assert not same_tensors(learned[1], learned[2])


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("ttt", {"head": "train"}, "must be given together"),
        ("ttt", {"data": torch.rand(8, 3, 32, 32)}, "must be given together"),
        ("ttt", {"head": "train", "data": torch.rand(8, 3, 32, 20)}, "square"),
        ("ttt", {"head": "train", "data": []}, "no images"),
        ("ttt", {"head": "train", "data": ["one"]}, "got str"),
        ("ttt", {"head": "train", "data": 3}, "got int"),
        ("ttt", {"head": "no such thing"}, "not an artifact"),
        ("ttt", {"head": 1}, "got int"),
        ("ttt", {"head": "bundled:mgg-resnet26-cifar10"}, "made for mgg"),
        ("ttt", {"head": "bundled:ttt-resnet26-cifar10", "tensors": {}}, "give one"),
        ("tent", {"head": "train", "data": torch.rand(8, 3, 32, 32)}, "tent has no head"),
    ],
)
def test_heads_that_cannot_be(method, options, said, make_model):
    with pytest.raises(tp.TTTError, match=said):
        tp.wrap(make_model("groupnorm"), method, **options)


def test_the_head_belongs_to_the_returned_model(tmp_path):
    """A timm name stands for other random weights each time it is made."""
    images = torch.rand(16, 3, 32, 32)
    recipe = HeadRecipe(epochs=1, batch_size=8, lr=0.0)
    net, _ = fit_rotation_head("ttt_resnet26", images, recipe, progress=False)
    own = dict(net.backbone.model.named_parameters())
    rest = {n.removeprefix("rest."): t for n, t in net.learned_tensors().items() if "rest." in n}
    assert rest
    assert all(torch.equal(t, own[n]) for n, t in rest.items())


def test_estimating_memory_keeps_nothing_alive(make_model, images):
    net = rotation_net(make_model("groupnorm"))
    algorithm, x = net._algorithm_now(), images(1)
    algorithm.bytes_for(x)
    gc.collect()
    with torch.no_grad(), Peak() as watched:
        algorithm.bytes_for(x)
        gc.collect()
        alive = sum(size for ref, size in watched.alive.values() if not ref.expired())
    assert alive < algorithm.bytes_for(x) / 10


def test_describing_draws_nothing(make_model):
    net, state = rotation_net(make_model("groupnorm")), torch.get_rng_state()
    text = net.describe()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        assert net.describe() == text


def test_command_line_mistakes(tmp_path, capsys, monkeypatch):
    tiny = LabelledImages(torch.zeros(1100, 3, 32, 32).byte(), torch.zeros(1100).long())
    monkeypatch.setattr("ttt_plugins.cli.pictures.read_parquet", lambda path: tiny)
    base = ["train", "ttt", "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]
    for more, words in (
        (["--freeze-trunk"], "--model"),
        (["--freeze-trunk", "--model", "resnet18"], "--pretrained"),
        (["--freeze-trunk", "--model", "bundled:source-vit-tiny-cifar10", "--resume"], "resume"),
        (["--freeze-trunk", "--model", "x", "--arch", "ttt_resnet26"], "--arch"),
        (["--model", "resnet18"], "--freeze-trunk"),
        (["--set", "split=1"], "--split"),
    ):
        assert main(base + more) == 2, more
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


class FlattensByView(nn.Module):
    """Features of 4 x 4 positions, flattened by ``view``, which other memory layouts refuse."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.GroupNorm(2, 8), nn.ReLU()
        )
        self.classifier = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.view(x.shape[0], -1))


def test_a_model_that_flattens_by_view_adapts(images, recwarn):
    model = FlattensByView().eval()
    config = tp.TTT(steps=2, copies=4, split="features", lr=0.1)
    options = {"mean": 0.5, "std": 0.25, "head": "train", "data": images(128, size=16)}
    net = tp.wrap(model, config, **options)
    batch = images(3, size=16)
    alone = torch.cat([net(image) for image in batch.split(1)])
    assert torch.equal(net(batch), alone)
    assert not torch.equal(alone, tp.wrap(model, "source", mean=0.5, std=0.25)(batch))
    assert not [w for w in recwarn if "layout" in str(w.message) or "view" in str(w.message)]
