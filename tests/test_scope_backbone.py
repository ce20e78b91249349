"""What adapts on which architecture, and which statistics its norms use."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import ttt_plugins as tp
from ttt_plugins.artifacts.folder import bundled_folder
from ttt_plugins.backbones.backbone import Backbone
from ttt_plugins.backbones.statistics import NormStatistics
from ttt_plugins.core import scope

F64 = torch.float64

# Norm layers and adapted scalars, counted from the architectures' papers or by hand.
SELECTED = {
    "resnet18": (20, 2 * (64 + 4 * 64 + 5 * 128 + 5 * 256 + 5 * 512)),
    "vit_tiny_patch16_224": (25, 25 * 2 * 192),
    "deit_tiny_distilled_patch16_224": (25, 25 * 2 * 192),
    # 8 blocks of two, and the last: LayerNorm
    "mixer_s16_224": (17, 17 * 2 * 512),
    # its stand-in for a norm, an affine layer: 12 blocks of two, and the last
    "resmlp_12_224": (25, 25 * 2 * 384),
    # stem, blocks 2-2-6-2, the inputs of three downsamplers, head
    "convnext_atto": (17, 2 * (40 + (2 * 40 + 2 * 80 + 6 * 160 + 2 * 320) + 40 + 80 + 160 + 320)),
    "mobilenetv3_small_050": (34, None),  # BatchNorm fused with its activation
    "resnet26t": (3 + 8 * 3 + 4, None),  # a stem of three, eight bottlenecks, four shortcuts
    "ttt_resnet26": (25, 2 * (8 * 16 + 16 + 7 * 32 + 32 + 7 * 64 + 64)),
    "ttt_resnet26_bn": (25, 2 * (8 * 16 + 16 + 7 * 32 + 32 + 7 * 64 + 64)),
    "ttt_vit_tiny_patch4_32": (13, 13 * 2 * 192),
}


def classes_of_norms(model):
    """Norms by ``isinstance`` and nothing else, to hold the selection against."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    return [m for m in model.modules() if isinstance(m, kinds) and m.weight is not None]


@pytest.mark.parametrize("name", SELECTED)
def test_norms_of_timm_models(name):
    model = timm.create_model(name, num_classes=10)
    backbone = Backbone(model)
    names = scope.select(backbone, "norm")
    parameters = dict(model.named_parameters())
    norms, scalars = SELECTED[name]
    assert len({n.rpartition(".")[0] for n in names}) == norms
    assert len(names) == 2 * norms == len(set(names))
    if scalars is not None:
        assert sum(parameters[n].numel() for n in names) == scalars
    if name != "resmlp_12_224":
        by_class = classes_of_norms(model)
        assert len(by_class) == norms
        own = {id(p) for m in by_class for p in (m.weight, m.bias)}
        assert {id(parameters[n]) for n in names} == own


def test_a_model_without_norms_says_what_to_pass():
    model = timm.create_model("vgg11", num_classes=10)
    with pytest.raises(tp.InputError, match=r"no norm layers.*regular expression"):
        tp.wrap(model, "tent")
    net = tp.wrap(model, "tent", params=r"features\.0\.")
    assert net.names == ["features.0.weight", "features.0.bias"]


def test_order_is_the_models_own(make_model):
    model = make_model("layernorm")
    order = [n for n, _ in model.named_parameters()]
    for params in ("norm", "all", "bias", ["norm.bias", "blocks.0.norm1.weight"]):
        names = scope.select(Backbone(model), params)
        assert names == sorted(names, key=order.index)


def test_selections(make_model):
    model = make_model("layernorm")
    backbone = Backbone(model)
    everything = [n for n, _ in model.named_parameters()]
    assert scope.select(backbone, "all") == everything
    assert scope.select(backbone, r"^blocks\.1\..*norm") == [
        f"blocks.1.norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias")
    ]
    assert scope.select(backbone, {"head.bias"}) == ["head.bias"]
    chosen = tp.wrap(model, "tent", params=["head.bias", "cls_token"])
    assert chosen.names == ["cls_token", "head.bias"]


def test_only_what_was_chosen_moves(make_model, images):
    model = make_model("groupnorm")
    net = tp.wrap(model, "tent", params=["norm.weight"], window=1, lr=1e-2)
    net(images(6))
    exported = dict(net.export().model.named_parameters())
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, exported[n])]
    assert moved == ["norm.weight"]


def test_flatten_and_unflatten_are_inverse():
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(4), "c": torch.randn(())}
    flat = scope.flatten(tensors)
    assert flat.shape == (11,)
    back = scope.unflatten(flat, tensors)
    assert list(back) == ["b", "a", "c"]
    assert all(torch.equal(back[n], t) for n, t in tensors.items())


# -- which statistics BatchNorm uses -----------------------------------------------------------


class TwoNorms(nn.Module):
    """Small enough to write its forward pass by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(4, eps=1e-3)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(self.first(x).relu())
        return self.head(self.second(x).relu().mean((2, 3)))


@pytest.fixture
def two_norms():
    torch.manual_seed(0)
    model = TwoNorms().double()
    for norm in (model.first, model.second):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 2)
    return model.eval()


def by_hand(model, x, normalise):
    with torch.no_grad():
        x = model.conv(normalise(model.first, x).relu())
        return model.head(normalise(model.second, x).relu().mean((2, 3)))


def on_source(norm, x):
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def on_batch(norm, x):
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)


def mixed(prior):
    def normalise(norm, x):
        # arXiv 2006.16971, equation 1: the source counts as `prior` images, the batch as its own.
        share = prior / (prior + len(x))
        mean = share * norm.running_mean + (1 - share) * x.mean((0, 2, 3))
        var = share * norm.running_var + (1 - share) * x.var((0, 2, 3), correction=0)
        shape = (1, -1, 1, 1)
        z = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + norm.eps)
        return z * norm.weight.view(shape) + norm.bias.view(shape)

    return normalise


def predict(model, x, **fields):
    return tp.wrap(model, "source", normalize=False, **fields)(x)


def test_source_statistics(two_norms, images):
    x = images(6, dtype=F64)
    assert torch.allclose(
        predict(two_norms, x), by_hand(two_norms, x, on_source), rtol=0, atol=1e-13
    )


def test_batch_statistics(two_norms, images):
    x = images(6, dtype=F64)
    ours = predict(two_norms, x, statistics="batch")
    assert torch.allclose(ours, by_hand(two_norms, x, on_batch), rtol=0, atol=1e-13)
    assert not torch.allclose(ours, by_hand(two_norms, x, on_source), atol=1e-3)


def test_batch_statistics_of_one_image_are_the_sources(two_norms, images):
    net = tp.wrap(two_norms, "source", normalize=False, statistics="batch")
    source = tp.wrap(two_norms, "source", normalize=False)
    for n in (1, 4, 1):  # going back and forth
        x = images(n, n, F64)
        expected = source(x) if n == 1 else by_hand(two_norms, x, on_batch)
        assert torch.allclose(net(x), expected, rtol=0, atol=1e-13)
    x = images(1, 7, F64)
    assert torch.equal(net(x), source(x))


@pytest.mark.parametrize("prior", [1.0, 16.0, 100])
@pytest.mark.parametrize("n", [1, 6])
def test_mixed_statistics(two_norms, images, prior, n):
    x = images(n, dtype=F64)
    ours = predict(two_norms, x, statistics="mix", prior=prior)
    assert torch.allclose(ours, by_hand(two_norms, x, mixed(prior)), rtol=0, atol=1e-12)


def test_mixed_statistics_go_from_batch_to_source(two_norms, images):
    x = images(6, dtype=F64)
    none = predict(two_norms, x, statistics="mix", prior=0.0)
    assert torch.allclose(none, predict(two_norms, x, statistics="batch"), rtol=0, atol=1e-12)
    all_of_it = predict(two_norms, x, statistics="mix", prior=1e15)
    assert torch.allclose(all_of_it, predict(two_norms, x), rtol=0, atol=1e-10)


def test_statistics_are_read_and_never_written(make_model, images, same_tensors):
    model = make_model("batchnorm")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for statistics in ("source", "batch", "mix"):
        net = tp.wrap(model, "tent", statistics=statistics, window=1, lr=1e-2)
        for n in (5, 1):
            net(images(n))
        assert same_tensors(net.backbone.source_state_dict(), before)
        assert same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("statistics", ["source", "batch", "mix"])
def test_fused_batch_norms_follow_too(statistics, images):
    """timm's BatchNormAct2d: normalises and activates in one module."""
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=10).double()
    for norm in classes_of_norms(model):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    model.eval()
    x = images(4, dtype=F64, size=64)
    ours = predict(model, x, statistics=statistics, prior=0.0)
    plain = model.train()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
            module.train(statistics != "source")
    with torch.no_grad():
        expected = plain(x)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-10)


def test_without_batch_norm_statistics_change_nothing(make_model, images):
    for kind in ("groupnorm", "layernorm"):
        model = make_model(kind)
        logits = [
            tp.wrap(model, "source", statistics=s)(images(4)) for s in ("source", "batch", "mix")
        ]
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])


def test_unknown_statistics(make_model):
    with pytest.raises(tp.InputError, match="source"):
        Backbone(make_model("batchnorm"), statistics=NormStatistics("running"))


# -- source statistics of the features ---------------------------------------------------------


@pytest.mark.parametrize("statistics", ["source", "batch"])
def test_fit_source_statistics(kind, make_model, make_net, images, statistics):
    """Against numpy over all columns at once, gathered with hooks on a plain copy."""
    model = make_model(kind, F64)
    net = make_net("mgg", model, statistics=statistics)
    batches = [images(n, n, F64) for n in (7, 5, 8)]
    # a loader may yield images alone, or tuples that begin with them
    loader = [batches[0], (batches[1], torch.zeros(5)), [batches[2], None, "x"]]
    assert net.fit_source_statistics(loader, progress=False) is net
    columns = {name: [] for name in net.backbone.tapped}
    modules = dict(model.named_modules())
    for name in columns:
        norm = modules[name]

        def keep(module, args, output, name=name, norm=norm):
            if kind == "batchnorm":  # inputs, in units of the running statistics
                shape = (1, -1, 1, 1)
                scale = torch.sqrt(source[name][1] + norm.eps)
                seen = (args[0] - source[name][0].view(shape)) / scale.view(shape)
            else:
                seen = output
            if seen.ndim == 3:
                seen = seen[:, 0]
            else:
                seen = seen.permute(0, 2, 3, 1).flatten(0, 2)
            columns[name].append(seen.numpy())

        norm.register_forward_hook(keep)
    source = {
        n: (modules[n].running_mean.clone(), modules[n].running_var.clone())
        for n in columns
        if kind == "batchnorm"
    }
    if kind == "batchnorm" and statistics == "batch":
        for module in classes_of_norms(model):
            module.running_mean = module.running_var = None
    mean, std = net.backbone.mean.to(F64), net.backbone.std.to(F64)
    with torch.no_grad():
        for batch in batches:
            model((batch - mean) / std)
    gathered = [np.concatenate(parts) for parts in columns.values()]
    tensors = net.learned_tensors()
    expected_mean = np.concatenate([c.mean(0) for c in gathered])
    expected_std = np.concatenate([c.std(0, ddof=1) for c in gathered])
    assert tensors["source.mean"].shape == expected_mean.shape
    assert np.abs(tensors["source.mean"].numpy() - expected_mean).max() < 1e-10
    assert np.abs(tensors["source.std"].numpy() - expected_std).max() < 1e-8


def test_fitted_statistics_are_used_saved_and_moved(make_model, make_net, images, tmp_path):
    model = make_model("layernorm")
    net = make_net("mgg", model, lr=1e-2, discrepancy=5.0)
    assert "no source statistics" in net.describe()
    without = net(images(4))
    net(images(4, 1))
    net.fit_source_statistics([images(16, 30)], progress=False)
    assert "no source statistics" not in net.describe()
    assert net.batches == 0  # adaptation starts anew
    assert torch.equal(net(images(4)), without)  # the first prediction is the source's
    a = net(images(4, 1))
    folder = net.save_pretrained(tmp_path / "fitted")
    loaded = tp.from_pretrained(folder, backbone=model)
    loaded(images(4))
    assert torch.equal(loaded(images(4, 1)), a)
    loaded.to(F64)
    assert loaded.learned_tensors()["source.std"].dtype == F64


def test_fitting_leaves_the_batches_order_out(make_model, make_net, images):
    """Statistics of a set do not depend on how it is cut into batches."""
    model = make_model("groupnorm", F64)
    batch = images(12, 3, F64)
    whole, parts = (
        make_net("mgg", model).fit_source_statistics(loader, progress=False).learned_tensors()
        for loader in ([batch], batch.flip(0).split(5))
    )
    for name in ("source.mean", "source.std"):
        assert torch.allclose(whole[name], parts[name], rtol=1e-9, atol=1e-12)


def test_fitting_inside_inference_mode(make_model, make_net, images):
    model = make_model("layernorm")
    net, other = (make_net("mgg", model, lr=1e-2) for _ in range(2))
    net.fit_source_statistics([images(12, 30)], progress=False)
    with torch.inference_mode():
        other.fit_source_statistics([images(12, 30)], progress=False)
    for seed in range(3):
        assert torch.equal(net(images(4, seed)), other(images(4, seed)))


# -- other odds and ends of a backbone ---------------------------------------------------------


def test_tied_weights_stay_tied(images):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a = nn.GroupNorm(1, 3), nn.Linear(3, 3)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(self.norm(x).mean((2, 3))))

    torch.manual_seed(0)
    model = Tied()
    net = tp.wrap(model, "tent", window=1, params="all", normalize=False, lr=1e-2)
    assert net.names == [n for n, _ in model.named_parameters()]
    assert torch.equal(net(images(3)), model(images(3)).detach())
    net(images(3))
    exported = net.export()
    assert exported.model.a.weight is exported.model.b.weight


def test_number_of_classes_and_input_size(make_model, images):
    net = tp.wrap(make_model("layernorm"), "source")
    assert net.num_classes == 10
    assert net.input_size == (3, 32, 32)

    bare = tp.wrap(
        nn.Sequential(nn.Conv2d(1, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "source",
        normalize=False,
    )
    assert bare.num_classes is None
    assert bare.input_size == (1, None, None)
    bare(torch.rand(2, 1, 9, 9))
    assert bare.num_classes == 7


def test_a_step_costs_the_passes_it_says(make_model, images, make_net):
    """The model runs once a batch, twice for SAR: no pass is hidden from the counters."""
    for method, passes in (("source", 1), ("tent", 1), ("mgg", 1), ("sar", 2)):
        options = {} if method == "source" else {"guard": False}  # which has the source predict too
        net = make_net(method, make_model("groupnorm"), **options)
        calls = []
        net.backbone.model.stem.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        net(images(8))
        assert len(calls) == passes
        assert net.forwards == passes * 8


# -- statistics as a value -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bare:
    """A config that leaves the statistics alone."""

    lr: float = 1e-3


@dataclasses.dataclass(frozen=True)
class OnlyTheKind:
    """A third-party config with one of the two fields."""

    statistics: str = "batch"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tp.Tent(), NormStatistics("stream", 16.0)),
        (tp.MGG(statistics="mix", prior=4.0), NormStatistics("mix", 4.0)),
        (tp.Source(), NormStatistics()),
        (tp.TTT(), NormStatistics()),
        (tp.MT3(), NormStatistics()),
        (Bare(), NormStatistics()),
        (OnlyTheKind(), NormStatistics("batch", 16.0)),
    ],
)
def test_statistics_follow_from_a_config(config, expected):
    assert NormStatistics.of(config) == expected


def test_per_image_configs_have_no_field_without_effect():
    for config in (tp.TTT, tp.MT3):
        assert not {"statistics", "prior"} & {f.name for f in dataclasses.fields(config)}


@pytest.mark.parametrize("name", ["ttt-resnet26-cifar10", "mt3-resnet26-cifar10"])
def test_retired_fields_of_an_artifact_are_read_and_checked(name, tmp_path):
    folder = shutil.copytree(bundled_folder(name), tmp_path / name)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["fields"] |= {"statistics": "source", "prior": 16.0}
    file.write_text(json.dumps(config))
    net = tp.from_pretrained(folder)
    assert net.config == tp.from_pretrained(f"bundled:{name}").config
    for field, value in (("statistics", "batch"), ("prior", "many")):
        file.write_text(json.dumps(config | {"fields": config["fields"] | {field: value}}))
        with pytest.raises(tp.ArtifactError, match=field):
            tp.from_pretrained(folder)


def test_layers_rest_on_their_own_statistics(make_model, images):
    """Also after an error in mid-forward."""
    net = tp.wrap(make_model("batchnorm"), "tent", statistics="mix", lr=0.0)
    before = {n: t.clone() for n, t in net.backbone.source_state_dict().items()}

    def fail(*_):
        raise KeyError("in mid-forward")

    handle = net.backbone.model.head.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        net(images(4))
    handle.remove()
    after = net.backbone.source_state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


class Twice(torch.nn.Module):
    """One BatchNorm in two places of a network."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.head = norm, torch.nn.Linear(3, 4)

    def forward(self, x):
        x = self.norm(x)
        return self.head(self.norm(x).mean((2, 3)))


def test_a_layer_in_two_places_mixes_with_the_source_in_both(images):
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model, x = Twice(norm), images(4)
    with torch.no_grad():
        y, share = x, 16 / 20
        for _ in range(2):
            mean = share * norm.running_mean + (1 - share) * y.mean((0, 2, 3))
            var = share * norm.running_var + (1 - share) * y.var((0, 2, 3), correction=0)
            y = (y - mean[:, None, None]) / (var + norm.eps).sqrt()[:, None, None]
        expected = model.head(y.mean((2, 3)))
    ours = tp.wrap(model, "source", statistics="mix", normalize=False)(x)
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["source", "tent"])
def test_an_exported_batch_norm_model_can_be_traced(method, make_model, images):
    net = tp.wrap(make_model("batchnorm"), method, statistics="source")
    plain = net.export().requires_grad_(False)
    traced = torch.jit.trace(plain, images(4))
    assert torch.allclose(traced(images(4, 1)), plain(images(4, 1)), atol=1e-5)
