"""Any timm model, any zoo model, any module: one for each kind of norm and layout of features.

The promises themselves are `examples/coverage.py`'s, which runs them on every timm module.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
import warnings
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from timm import layers
from timm.models import metaformer, mlp_mixer
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torch.utils.checkpoint import checkpoint

import ttt_plugins as tp
from ttt_plugins.backbones.backbone import Backbone
from ttt_plugins.backbones.norms import (
    channel_axis,
    channels,
    late_norms,
    norm_modules,
    norm_parameters,
)
from ttt_plugins.backbones.quirks import caches
from ttt_plugins.backbones.sharing import tied_parameters
from ttt_plugins.backbones.stages import (
    classifier_names,
    describe_split,
    feature_width,
    image_size,
    inner,
    pooled_features,
    stages,
    trunk,
)
from ttt_plugins.backbones.statistics import feature_statistics
from ttt_plugins.core import per_image, scope

EXAMPLES = Path(__file__).parent.parent / "examples"
F64 = torch.float64


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("coverage", EXAMPLES / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 64}
_SWIN = {
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 2),
    "img_size": 64,
    "window_size": 2,
}
_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
_POOL = {
    "depths": (1, 1, 1, 1),
    "dims": (8, 16, 24, 32),
    "norm_layers": metaformer.GroupNorm1NoBias,
}
_MLP = {"num_blocks": 3, "embed_dim": 24, "img_size": 64, "mlp_ratio": 4}
_AFFINE = {"block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine}
_RESNETV2 = {
    "layers": (1, 1, 1, 1),
    "channels": (32, 32, 64, 64),
    "stem_chs": 16,
    "stem_type": "deep",
    "conv_layer": layers.create_conv2d,
}
_LEVIT = {"embed_dim": (16, 24, 32), "key_dim": 4, "num_heads": (1, 2, 2), "depth": (1, 1, 1)}
_CROSSVIT = {"embed_dim": (12, 24), "num_heads": (2, 2), "depth": ((1, 1, 0),) * 3, "img_size": 120}


def _resnetv2(norm, **fields):
    return ResNetV2, _RESNETV2 | {"norm_layer": partial(norm, **fields)}


#: Name of the case -> a timm model or class, its arguments, and the norms that adapt.
CASES = {
    "BatchNorm, NCHW": (
        "resnet10t",
        {"channels": (8, 8, 16, 16), "stem_width": 8},
        {"BatchNorm2d"},
    ),
    "BatchNorm with activation": ("test_efficientnet", {}, {"BatchNormAct2d"}),
    "BatchNorm on tokens, distilled": ("levit_128s", _LEVIT, {"BatchNorm1d", "BatchNorm2d"}),
    "BatchNorm, affine scalars": ("hgnetv2_b0", {}, {"BatchNorm2d", "LearnableAffineBlock"}),
    "LayerNorm, class token": ("vit_tiny_patch16_224", _VIT, {"LayerNorm"}),
    "RmsNorm, class token": (
        "vit_tiny_patch16_224",
        _VIT | {"norm_layer": layers.RmsNorm},
        {"RmsNorm"},
    ),
    "LayerNorm, list of features": ("crossvit_tiny_240", _CROSSVIT, {"LayerNorm"}),
    "LayerNorm, distilled": ("deit_tiny_distilled_patch16_224", _VIT, {"LayerNorm"}),
    "LayerNorm, NHWC": ("swin_tiny_patch4_window7_224", _SWIN, {"LayerNorm"}),
    "LayerNorm2d, NCHW": ("convnext_atto", _CONVNEXT, {"LayerNorm2d"}),
    "LayerNorm2d and response norm": (
        "convnextv2_atto",
        _CONVNEXT,
        {"LayerNorm2d", "GlobalResponseNorm"},
    ),
    "norms without bias": (
        metaformer.MetaFormer,
        _POOL | {"use_mlp_head": False},
        {"LayerNorm2dNoBias", "GroupNorm1NoBias", "LayerNorm2d"},
    ),
    "Affine": (mlp_mixer.MlpMixer, _MLP | _AFFINE, {"Affine"}),
    "GroupNorm with activation": (
        *_resnetv2(layers.GroupNormAct, num_groups=4),
        {"GroupNormAct"},
    ),
    "EvoNorm": (*_resnetv2(layers.EvoNorm2dS0, group_size=4), {"EvoNorm2dS0"}),
    "EvoNorm with running statistics": (*_resnetv2(layers.EvoNorm2dB0), {"EvoNorm2dB0"}),
    "FilterResponseNorm": (
        *_resnetv2(layers.FilterResponseNormTlu2d),
        {"FilterResponseNormTlu2d"},
    ),
    "gains for norms": (
        "nf_resnet26",
        {"depths": (1, 1, 1, 1), "channels": (16, 32, 48, 64), "stem_chs": 16},
        {"ScaledStdConv2d"},
    ),
}
QUICK = ("mgg", "tent")
PER_IMAGE = ("BatchNorm on tokens, distilled", "LayerNorm, list of features", "gains for norms")


def make(case):
    kind, arguments, _ = CASES[case]
    torch.manual_seed(0)
    if not isinstance(kind, str):
        model = kind(num_classes=10, **arguments)
        model.pretrained_cfg = {"input_size": (3, 64, 64), "mean": 0.5, "std": 0.5}
        return model
    return timm.create_model(kind, num_classes=10, **arguments)


@pytest.mark.parametrize("case", CASES)
def test_every_promise_on_every_kind(coverage, case, monkeypatch):
    monkeypatch.setattr(coverage, "SIZES", (64,))
    model = make(case)
    images = coverage.prepare(model)
    norms = {type(model.get_submodule(n)).__name__ for n in norm_parameters(model)}
    kinds = CASES[case][2]
    # Newer timm splits some classes; the kind is what the name begins with.
    assert {n.removesuffix("Fp32") for n in norms} == kinds
    for method in (*QUICK, *(("ttt", "mt3") if case in PER_IMAGE else ())):
        row = coverage.check(model, False, images, method)
        moved, of = row["moved"]
        assert moved >= 0.8 * of, row["still"]
        assert row["own_mb"] < 0.01 or method in ("ttt", "mt3")


@pytest.mark.parametrize("case", CASES)
def test_pooled_features_and_the_trunk(case):
    model = make(case).eval()
    x = torch.rand(1, 3, *([_own_size(model)] * 2))
    pooled = pooled_features(model, x)
    assert pooled.shape == (1, feature_width(model))
    everything = [n for n, _ in model.named_parameters()]
    heads = classifier_names(model)
    owned = [n for n in everything if n.rpartition(".")[0] in heads]
    assert len(owned) == 2 * len(heads)
    found = stages(model)
    assert len(found) > 1
    for split in (1, -1, found[0], "end"):
        before, after = trunk(model, split)
        assert sorted(before + after + owned) == sorted(everything)
        assert before
        assert bool(after) is (split != "end")
    late = late_norms(model)
    assert late < set(norm_parameters(model))
    assert "split: the trunk ends with" in describe_split(model, -1)


def _own_size(model):
    """64, or what position embeddings tie the model to."""
    if hasattr(model, "stages") and caches(model):
        return 224
    return (image_size(model) or (64,))[0]


def test_tapped_features_are_statistics_of_channels(coverage):
    """Of every tapped layer, as many means as it has channels, and each channel's own mean."""
    for case in CASES:
        model = make(case).eval()
        backbone = Backbone(model)
        x = torch.rand(2, 3, *([_own_size(model)] * 2))
        with torch.no_grad(), backbone.recording() as record:
            backbone(x)
        sizes = [channels(m) for m in backbone.tapped.values()]
        assert [x.numel() // _count(x, axes) for x, axes, _ in record] == sizes, case
        mean, std = feature_statistics(record)
        assert mean.shape == std.shape == (sum(sizes),)


def _count(x, axes):
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return count


# -- which axis holds the channels ---------------------------------------------------------------


def norm_layers():
    """Norms of four channels by name, and whether they take channels first."""
    named = {
        "BatchNormAct2d": True,
        "GroupNorm1": True,
        "LayerNorm": False,
        "LayerNorm2d": True,
        "LayerNormAct2d": True,
        "RmsNorm": False,
        "RmsNorm2d": True,
        "SimpleNorm": False,
        "SimpleNorm2d": True,
        "LayerNorm2dFp32": True,
        "LayerNormFp32": False,
        "RmsNorm2dFp32": True,
        "EvoNorm2dB0": True,
        "EvoNorm2dS0": True,
        "FilterResponseNormTlu2d": True,
        "FilterResponseNormAct2d": True,
    }
    for name, first in named.items():
        if hasattr(layers, name):  # some are in newer timm only
            yield name, getattr(layers, name)(4), first
    yield "GlobalResponseNorm", layers.grn.GlobalResponseNorm(4, channels_last=False), True
    yield "GlobalResponseNorm, last", layers.grn.GlobalResponseNorm(4, channels_last=True), False
    yield "Affine", mlp_mixer.Affine(4), False
    yield "torch LayerNorm over maps", nn.LayerNorm((4, 4, 4)), True


@pytest.mark.parametrize("size", [4, 5])
def test_channel_axis_is_where_the_affine_parameters_act(size):
    """Also where height, width and depth are equal and shapes cannot tell."""
    for name, norm, first in norm_layers():
        if name == "EvoNorm2dS0":
            norm = layers.EvoNorm2dS0(4, group_size=2)
        if name == "torch LayerNorm over maps" and size == 5:
            continue
        norm = norm.eval()
        x = torch.rand((2, 4, size, size) if first else (2, size, size, 4)) + 0.1
        weight = next(p for n, p in norm.named_parameters() if n in ("weight", "alpha"))
        with torch.no_grad():
            before = norm(x.clone())
            weight.view(4, -1)[0] += 1
            changed = norm(x.clone()) != before
        axis = channel_axis(norm, before)
        assert changed.movedim(axis, 0)[0].any(), name
        assert not changed.movedim(axis, 0)[1:].any(), name
        assert channels(norm) == 4
        assert list(norm_modules(norm)) == [""], name


# -- models inside models --------------------------------------------------------------------------


class Normalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("sigma", torch.full((1, 3, 1, 1), 0.25))

    def forward(self, x):
        return (x - self.mu) / self.sigma


def test_a_timm_model_inside_a_wrapper():
    net = make("LayerNorm, class token").eval()
    wrapped = nn.Sequential(nn.Sequential(Normalize(), net))
    prefix, found = inner(wrapped)
    assert prefix == "0.1."
    assert found is net
    assert stages(wrapped) == [prefix + n for n in stages(net)]
    assert late_norms(wrapped) == {prefix + n for n in late_norms(net)}
    assert classifier_names(wrapped) == ["0.1.head"]
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pooled = pooled_features(wrapped, x)
        assert torch.equal(pooled, pooled_features(net, (x - 0.5) / 0.25))
    backbone = Backbone(wrapped, normalize=False)
    with torch.no_grad(), backbone.recording() as record:
        backbone(x)
    assert [f.shape for f, _, _ in record] == [(2, 24)] * 4  # class tokens, as without a wrapper


class Committee(nn.Module):
    """Averages the predictions of its members."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return torch.stack([m(x) for m in self.members]).mean(0)


def test_an_ensemble():
    members = [make("BatchNorm, NCHW").eval() for _ in range(3)]
    model = Committee(members).eval()
    assert classifier_names(model) == [f"members.{i}.fc" for i in range(3)]
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pooled = pooled_features(model, x)
        parts = [pooled_features(m, x) for m in members]
    assert torch.equal(pooled, torch.cat(parts, 1))
    assert feature_width(model) == pooled.shape[1]
    before, _ = trunk(model, "end")
    assert not any(".fc." in n for n in before)
    assert not any(".fc." in n for n in scope.select(Backbone(model, normalize=False), "lora"))


def test_a_classifier_that_cannot_be_asked_for(coverage):
    """CLIP's attention pooling: ``get_classifier`` raises in timm 1.0.9."""
    model = coverage._without_memory(lambda: timm.create_model("resnet50_clip", num_classes=10))
    assert classifier_names(model) == ["head.proj"]
    images = torch.rand(2, 3, 224, 224, device="meta")
    pooled = pooled_features(model.eval(), images)
    assert pooled.shape == (2, feature_width(model))


def test_a_model_that_returns_a_pair():
    class Pair(nn.Module):
        pretrained_cfg: ClassVar = {"classifier": ("a", "b"), "input_size": (3, 8, 8)}
        num_classes = 5

        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.GroupNorm(1, 3), nn.Linear(3, 5), nn.Linear(3, 5)

        def forward(self, x):
            x = self.norm(x).square().mean((2, 3))
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    model = Pair()
    x = torch.rand(2, 3, 8, 8)
    net = tp.wrap(model, "tent", normalize=False, lr=0.0)
    assert torch.equal(net(x), sum(model(x)).detach() / 2)


class Shared(nn.Module):
    """One module in two places, and a third that has its weight."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.c = nn.GroupNorm(1, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.b, self.c.weight = self.a, self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(self.norm(x).square().mean((2, 3)))))


def test_shared_modules_and_tied_weights_adapt_and_come_back(images):
    torch.manual_seed(0)
    model = Shared()
    assert tied_parameters(model) == {"a.weight": ["c.weight"]}
    net = tp.wrap(model, "tent", window=1, params="all", normalize=False, lr=0.1)
    first, second = net(images(3)), net(images(3))
    assert torch.equal(first, model(images(3)).detach())
    assert not torch.equal(first, second)
    plain = net.export()
    with torch.no_grad():
        assert torch.equal(plain(images(3)), scope.call(net.backbone, net._params, images(3)))
    net.reset()
    assert torch.equal(net(images(3)), first)


def test_values_cached_from_parameters_do_not_go_stale(coverage):
    model = make("BatchNorm on tokens, distilled")
    x = coverage.prepare(model)
    for cache in caches(model):
        cache.clear()
    model(x).sum().backward()  # the cache holds a tensor of this graph
    assert caches(model)
    assert all(caches(model))
    net = tp.wrap(model, "source", normalize=False)
    name = next(n for n, _ in model.named_parameters() if n.endswith("attention_biases"))
    start = net(x)
    biases = {f"model.{name}": torch.randn_like(dict(model.named_parameters())[name])}
    with torch.no_grad():
        assert not torch.equal(scope.call(net.backbone, biases, x), start)
    assert torch.equal(net(x), start)
    assert not any(caches(net.backbone.model))


# -- refusals --------------------------------------------------------------------------------------


def test_no_classifier():
    model = timm.create_model("test_vit", num_classes=0)
    with pytest.raises(tp.InputError, match=r"num_classes=0.*num_classes=<number"):
        tp.wrap(model, "tent")


def test_frozen_norms_say_so():
    model = layers.freeze_batch_norm_2d(make("BatchNorm with activation"))
    with pytest.raises(tp.InputError, match=r"frozen.*params='all'"):
        tp.wrap(model, "tent")
    net = tp.wrap(model, "tent", params="classifier")
    assert "FrozenBatchNormAct2d keep the source's" in net.describe()
    assert torch.isfinite(net(torch.rand(1, 3, 64, 64))).all()


@pytest.mark.parametrize("method", ["mgg", "tent", "sar"])
def test_no_norms_at_all(method):
    with torch.device("meta"):
        model = timm.create_model("vgg11")
    with pytest.raises(tp.InputError, match=r"no norm layers.*pass params="):
        tp.wrap(model, method)


# -- BatchNorm statistics --------------------------------------------------------------------------


class AllDimensions(nn.Module):
    """BatchNorm over volumes, maps and vectors; each kind once."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.volumes, self.maps, self.vectors = (
            nn.BatchNorm3d(3),
            nn.BatchNorm2d(6),
            nn.BatchNorm1d(6, eps=1e-3),
        )
        self.fc = nn.Linear(6, 5)

    def forward(self, x, norm=None):
        norm = norm or (lambda module, x: module(x))
        x = norm(self.volumes, x[:, :, None]).squeeze(2)
        x = norm(self.maps, self.conv(x)).relu().mean((2, 3))
        return self.fc(norm(self.vectors, x))


@pytest.fixture
def all_dimensions():
    torch.manual_seed(0)
    model = AllDimensions().double()
    for m in (model.volumes, model.maps, model.vectors):
        m.weight.data.uniform_(0.5, 1.5)
        m.running_mean.normal_(0, 0.3)
        m.running_var.uniform_(0.1, 2)
    return model.eval()


@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_every_dimension(all_dimensions, images, training):
    model = all_dimensions
    x = images(6, dtype=F64)

    def by_hand(share):
        def norm(m, x):
            axes = (0, *range(2, x.ndim))
            mean = share * m.running_mean + (1 - share) * x.mean(axes)
            var = share * m.running_var + (1 - share) * x.var(axes, correction=0)
            return F.batch_norm(x, mean, var, m.weight, m.bias, eps=m.eps)

        with torch.no_grad():
            return model(x, norm)

    model.train(training)
    cases = {("source", 1.0): 1, ("batch", 1.0): 0, ("mix", 2.0): 2 / 8, ("mix", 0.0): 0}
    for (statistics, prior), share in cases.items():
        net = tp.wrap(model, "source", normalize=False, statistics=statistics, prior=prior)
        assert torch.allclose(net(x), by_hand(share), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["mgg", "tent", "sar", "source"])
@pytest.mark.parametrize(("statistics", "prior"), [("batch", 1.0), ("mix", 0.0)])
def test_one_image_without_batch_statistics_is_the_sources(
    all_dimensions, images, make_net, method, statistics, prior
):
    """A BatchNorm over vectors would turn a single one into zeros."""
    x = images(1, dtype=F64)
    net = make_net(method, all_dimensions, normalize=False, statistics=statistics, prior=prior)
    source = tp.wrap(all_dimensions, "source", normalize=False)
    assert torch.equal(net(x), source(x))
    assert all(
        torch.isfinite(t).all() for n, t in net.adaptation_state().items() if "level" not in n
    )
    assert "one image" in net.describe()


# -- describe, overhead ------------------------------------------------------------------------


def test_describe_says_what_there_is_to_say(coverage):
    model = make("EvoNorm")
    text = tp.wrap(model, "tent", statistics="mix").describe()
    assert "no BatchNorm" in text
    assert "EvoNorm2dS0" not in text
    evo_b = nn.Sequential(layers.EvoNorm2dB0(3), nn.Flatten(), nn.Linear(12, 2))
    text = tp.wrap(evo_b, "tent", normalize=False).describe()
    assert "1 EvoNorm2dB0 keep the source's" in text
    assert "preprocessing: none here" in text

    model = make("LayerNorm, class token")
    heads = coverage._heads("ttt", model, False, torch.rand(1, 3, 64, 64))
    text = tp.wrap(model, "ttt", tensors=heads).describe()
    before, after = trunk(model, -1)
    sizes = dict(model.named_parameters())
    for count in (sum(sizes[n].numel() for n in names) for names in (before, after)):
        assert f"{count:,}" in text
    assert "split: the trunk ends with 'blocks.2'" in text
    assert "classes: 10" in text
    assert "forward" in text
    assert "MB" in text
    assert "inside" in text
    assert "[0.5, 0.5, 0.5]" in text

    bn = make("BatchNorm, NCHW")
    assert (
        "the source counts as 4 images" in tp.wrap(bn, "tent", statistics="mix", prior=4).describe()
    )
    count = sum(isinstance(m, nn.BatchNorm2d) for m in bn.modules())
    assert f"; {count} layers" in tp.wrap(bn, "tent").describe()


@pytest.mark.parametrize("case", ["BatchNorm, NCHW", "LayerNorm, NHWC", "gains for norms"])
@pytest.mark.parametrize("method", ["mgg", "tent", "sar", "source"])
def test_wrap_copies_no_weights_and_is_quick(coverage, case, method):
    model = make(case)
    start = time.perf_counter()
    net = tp.wrap(model, method)
    seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert coverage.own_bytes(net, model) < 0.02 * weights
    assert seconds < 5  # 0.5 on an idle core; coverage.py reports what it is


# -- the coverage script -----------------------------------------------------------------------


def test_coverage_run_resume_and_report(coverage, tmp_path, monkeypatch):
    monkeypatch.setattr(coverage, "SIZES", (32, 64))
    out = tmp_path / "coverage.json"
    names = ["test_efficientnet", "no_such_model", "test_byobnet"]
    coverage.run(out, ["source", "tent"], names, limit=2)
    first = json.loads(out.read_text())["models"]
    assert first.keys() == {"test_efficientnet", "no_such_model"}
    assert "error" in first["no_such_model"]
    assert not first["no_such_model"]["rows"]

    made = []
    prepare = coverage.prepare
    monkeypatch.setattr(
        coverage, "prepare", lambda model, name: made.append(name) or prepare(model, name)
    )

    def fail(*args):
        raise ValueError("on\npurpose")

    monkeypatch.setattr(coverage, "_heads", fail)
    results = coverage.run(out, ["source", "tent"], names, resume=True)
    assert made == ["test_byobnet"]
    assert results["models"]["test_efficientnet"] == first["test_efficientnet"]
    rows = results["models"]["test_byobnet"]["rows"]
    assert rows["tent"]["error"] == "ValueError: on purpose"
    text = coverage.report(results)
    assert "| test_byobnet | 0." in text
    assert text.count("**fails**") == 4
    assert "- `test_byobnet` × tent: ValueError: on purpose" in text
    assert "- `no_such_model` × source: " in text
    assert "| tent | 1 | 0 | 2 |" in text


def test_smallest_entrypoints(coverage, monkeypatch):
    monkeypatch.setattr(timm, "list_modules", lambda: ["mobilenetv3", "deit"])
    chosen = {
        "mobilenetv3": ["mobilenetv3_small_075", "mobilenetv3_small_050"],
        "deit": ["deit3_small_patch16_224", "deit_tiny_patch16_224"],
    }
    monkeypatch.setattr(timm, "list_models", lambda module: chosen[module])
    found = coverage.smallest_entrypoints()
    assert found == {"mobilenetv3": "mobilenetv3_small_050", "deit": "deit_tiny_patch16_224"}
    assert list(found) == ["mobilenetv3", "deit"]


def test_a_zoo_architecture(coverage):
    if importlib.util.find_spec("robustbench") is None:
        pytest.skip("robustbench is not installed")
    name = "robustbench:cifar10/Modas2021PRIMEResNet18"
    model = coverage.build(name)
    images = coverage.prepare(model, name)
    assert images.shape == (2, 3, 32, 32)
    row = coverage.check(model, True, images, "tent")
    assert row["moved"][0] == row["moved"][1]


# -- layers that torch.func cannot transform -----------------------------------------------------


class _OldSwish(torch.autograd.Function):
    """Without ``setup_context``, as in RobustBench's WideResNets with Swish."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class _Old(nn.Module):
    def forward(self, x):
        return _OldSwish.apply(x)


class _Branching(nn.Module):
    def forward(self, x):
        return x.relu() if x.max() > 0 else x


class _Looking(nn.Module):
    def forward(self, x):
        return x / max(x.detach().abs().max().item(), 1.0)


class _Assigning(nn.Module):
    def forward(self, x):
        out = torch.zeros(x.shape)
        out[:, 1:] = x[:, 1:]
        return out.relu()


class _Recomputing(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.norm, self.reentrant = nn.GroupNorm(2, 8), reentrant

    def forward(self, x):
        return checkpoint(self.again, x, use_reentrant=self.reentrant)

    def again(self, x):
        return self.norm(x).relu()


def _small_network(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), layer)
    second = nn.Sequential(nn.Conv2d(8, 16, 3, 2), nn.GroupNorm(2, 16))
    return nn.Sequential(
        nn.Sequential(first, second), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


def _adapter(coverage, method: str, model: nn.Module, images, **fields):
    fields = coverage.FIELDS.get(method, {}) | {"normalize": False} | fields
    return tp.wrap(model, method, tensors=coverage._heads(method, model, True, images), **fields)


@pytest.mark.parametrize("method", ["ttt", "mt3"])
@pytest.mark.parametrize("layer", [_Old, _Branching, _Looking, _Assigning])
def test_what_torch_func_cannot_transform_adapts_image_by_image(layer, method, coverage):
    model, images = _small_network(layer()), torch.rand(3, 3, 16, 16)
    nets = [_adapter(coverage, method, model, images, chunk_size=n) for n in (3, 1)]
    with pytest.warns(RuntimeWarning, match="one at a time"):
        logits = nets[0](images)
    assert torch.equal(logits, nets[1](images))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # planned once: the second batch goes one at a time at once
        assert torch.equal(nets[0](images), nets[1](images))
    assert [set(net._chunks.values()) for net in nets] == [{1}, {1}]
    assert "one image at a time" in nets[0].describe()


_SHORT = {
    "CUDA's allocator": torch.OutOfMemoryError("no"),
    "the CPU's": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "a library": getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
}


@pytest.mark.parametrize(
    ("method", "error"), [("mt3", "CUDA's allocator"), *(("ttt", error) for error in _SHORT)]
)
def test_a_chunk_that_does_not_fit_is_halved(method, error, coverage, monkeypatch):
    model, images = _small_network(nn.ReLU()), torch.rand(5, 3, 16, 16)
    net = _adapter(coverage, method, model, images, chunk_size=5)
    expected, sizes = net(images), []
    of_many = per_image.PerImage._episode_of_many

    def short_of_memory(self, params, part, keys):
        sizes.append(len(part))
        if len(part) > 2:
            raise _SHORT[error]
        return of_many(self, params, part, keys)

    monkeypatch.setattr(per_image.PerImage, "_episode_of_many", short_of_memory)
    net.reset()
    assert torch.allclose(net(images), expected, atol=1e-5)
    assert sizes == [5, 3, 2, 2]
    net(images)
    assert sizes[4:] == [2, 2]  # what fitted is remembered


def test_a_failing_device_is_no_refusal_of_torch_func(coverage, monkeypatch):
    model, images = _small_network(nn.ReLU()), torch.rand(4, 3, 16, 16)
    net = _adapter(coverage, "ttt", model, images, chunk_size=4)

    def broken(*_):
        raise getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: misaligned address")

    with monkeypatch.context() as patch:
        patch.setattr(per_image.PerImage, "_episode_of_many", broken)
        with pytest.raises(RuntimeError, match="misaligned"):
            net(images)
    net(images)
    assert set(net._chunks.values()) == {4}  # not one at a time for good


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("method", "chunk_size"), [("tent", 0), ("ttt", 1), ("ttt", 2), ("mt3", 1)]
)
def test_recomputed_activations_are_refused(method, chunk_size, reentrant, coverage):
    images = torch.rand(2, 3, 16, 16)
    fields = {"chunk_size": chunk_size} if chunk_size else {}
    net = _adapter(coverage, method, _small_network(_Recomputing(reentrant)), images, **fields)
    with pytest.raises(tp.InputError, match=r"checkpoint.*switch that off"):
        net(images)
    assert net.batches == 0


@pytest.mark.parametrize("method", ["tent", "ttt", "mt3"])
def test_a_callers_hooks_on_saved_tensors_are_no_recomputation(method, coverage):
    images = torch.rand(2, 3, 16, 16)
    fields = {} if method == "tent" else {"chunk_size": 1}
    net = _adapter(coverage, method, _small_network(nn.ReLU()), images, **fields)
    expected = net(images)
    net.reset()
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(net(images), expected)


@pytest.mark.parametrize("method", ["tent", "ttt", "mt3"])
def test_timms_checkpointing_is_switched_off_inside(method, coverage):
    model = timm.create_model("resnet10t", num_classes=5).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = _adapter(coverage, method, model, images, normalize=True)(images)
    model.set_grad_checkpointing(True)
    assert torch.equal(_adapter(coverage, method, model, images, normalize=True)(images), expected)
    assert model.grad_checkpointing


@pytest.mark.parametrize("method", ["tent", "ttt", "mt3"])
def test_compiled_models_and_compiled_adapters(method, coverage):
    model, images = _small_network(nn.ReLU()), torch.rand(3, 3, 16, 16)
    expected = _adapter(coverage, method, model, images)(images)
    heads = {"tensors": coverage._heads(method, model, True, images), "normalize": False}
    fields = coverage.FIELDS.get(method, {}) | heads
    inside = tp.wrap(torch.compile(model, backend="eager"), method, **fields)
    assert torch.equal(inside(images), expected)
    around = torch.compile(_adapter(coverage, method, model, images), backend="eager")
    assert torch.equal(around(images), expected)


def test_torchscript_is_refused():
    script = torch.jit.trace(_small_network(nn.ReLU()).eval(), torch.rand(1, 3, 16, 16))
    with pytest.raises(tp.InputError, match="TorchScript"):
        tp.wrap(script, "tent", normalize=False)


@pytest.mark.parametrize("method", ["ttt", "mt3"])
def test_sizes_that_a_model_without_a_size_refuses(method, coverage):
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3))
    model = nn.Sequential(stages, nn.Flatten(), nn.Linear(4 * 12 * 12, 8), nn.Linear(8, 5))
    images = torch.rand(2, 3, 16, 16)
    net = _adapter(coverage, method, model, images)
    before = net(images)
    with pytest.raises(tp.InputError, match=r"cannot take images of shape \(3, 8, 8\)"):
        net(torch.rand(2, 3, 8, 8))
    with pytest.raises(tp.InputError, match="at least 2 x 2"):
        net(torch.rand(2, 3, 1, 1))
    assert torch.equal(net(images), before)


@pytest.mark.parametrize("method", ["ttt", "mt3"])
def test_the_memory_of_a_model_without_a_size_is_known_after_the_first_image(method, coverage):
    images = torch.rand(2, 3, 16, 16)
    net = _adapter(coverage, method, _small_network(nn.ReLU()), images)
    assert "memory: unknown before the first image" in net.describe()
    net(images)
    assert re.search(r"memory: about [\d.]+ MB an image", net.describe())
