"""Every mistake gets its own clear error, and leaves the adapter as it was."""

import json
import shutil
import warnings

import pytest
import timm
import torch
from conftest import PER_IMAGE
from safetensors.torch import load_file, save_file
from torch import nn

import ttt_plugins as tp

ADAPTING = [m for m in tp.list_methods() if m != "source"]
#: Methods whose loss is on the logits of the batch (what images do alone: test_ttt.py).
BATCHWISE = [m for m in ADAPTING if m not in PER_IMAGE]


def fields(method):
    return {} if method == "source" else {"lr": 1e-2}


# -- batches that cannot be used ---------------------------------------------------------------


def spoiled(value):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[2, 1, 7, 9] = value
    return images


BAD_BATCHES = {
    "nan": (spoiled(torch.nan), "NaN"),
    "inf": (spoiled(torch.inf), "infinite"),
    "minus inf": (spoiled(-torch.inf), "infinite"),
    "empty": (torch.rand(0, 3, 32, 32), "empty"),
    "no pixels": (torch.rand(4, 3, 0, 32), "empty"),
    "grey": (torch.rand(4, 1, 32, 32), "channels"),
    "channels last": (torch.rand(4, 32, 32, 3), "channels"),
    "bytes": (torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), "255"),
    "int64": (torch.ones(4, 3, 32, 32, dtype=torch.int64), "floating point"),
    "bool": (torch.ones(4, 3, 32, 32, dtype=torch.bool), "floating point"),
    "0..255": (255 * torch.rand(4, 3, 32, 32), r"\[0, 1\]"),
    "normalised": (4 * torch.rand(4, 3, 32, 32) - 2, "normalis"),
    "one image": (torch.rand(3, 32, 32), r"\(B, C, H, W\)"),
    "five axes": (torch.rand(1, 4, 3, 32, 32), r"\(B, C, H, W\)"),
    "numpy": (torch.rand(4, 3, 32, 32).numpy(), "ndarray"),
    "list": ([[0.0]], "list"),
    "none": (None, "NoneType"),
}


@pytest.mark.parametrize("what", BAD_BATCHES)
def test_bad_batches(what, method, make_model, make_net, images, same_tensors):
    batch, words = BAD_BATCHES[what]
    net = make_net(method, make_model("layernorm"), **fields(method))
    net(images(4, 0))
    before = net.adaptation_state()
    counters = (net.forwards, net.backwards, net.batches, net.skipped_updates)
    with pytest.raises(tp.InputError, match=words) as caught:
        net(batch)
    assert isinstance(caught.value, tp.TTTError)
    assert isinstance(caught.value, ValueError)
    assert same_tensors(net.adaptation_state(), before)
    assert counters == (net.forwards, net.backwards, net.batches, net.skipped_updates)


def test_a_slight_overshoot_is_no_mistake(make_model, images):
    # Bicubic resampling leaves [0, 1] by a little.
    net = tp.wrap(make_model("groupnorm"), "source")
    assert torch.isfinite(net(images(2) * 1.06 - 0.03)).all()


def test_images_of_a_size_the_model_cannot_take(method, make_model, make_net, images, same_tensors):
    net = make_net(method, make_model("layernorm"), **fields(method))
    net(images(4, 0))
    before = net.adaptation_state()
    with pytest.raises(tp.InputError, match="32"):
        net(images(4, size=24))
    assert same_tensors(net.adaptation_state(), before)


def fail(message, kind=RuntimeError):
    def now():
        raise kind(message)

    return now


ACCELERATOR = getattr(torch, "AcceleratorError", RuntimeError)
#: Failures of the machine, as torch and the libraries under it word them.
FAILURES = {
    "CUDA's allocator": (fail("tried to allocate 2 GiB", torch.OutOfMemoryError), "2 GiB"),
    "the CPU's": (lambda: torch.empty(1 << 60), "allocate memory"),
    "cuBLAS": (
        fail("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        "CUBLAS",
    ),
    "a kernel": (fail("CUDA error: an illegal memory access", ACCELERATOR), "illegal"),
}


class Failing(nn.Module):
    """Fails on images of any size but the first."""

    img_size = (24, 24)

    def __init__(self, failure):
        super().__init__()
        self.norm, self.failure, self.seen = nn.GroupNorm(1, 3), failure, False

    def forward(self, x):
        if x.shape[-1] == 24:
            return self.norm(x).mean((2, 3))
        return FAILURES[self.failure][0]()


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", ["source", "tent"])
def test_failures_of_the_machine_are_not_the_images_fault(method, failure, images):
    # Whoever halves the batch on OutOfMemoryError has to see one.
    settings = {} if method == "source" else {"window": 1}
    net = tp.wrap(Failing(failure), method, mean=0.5, std=0.25, **settings)
    net(images(2, size=24))
    with pytest.raises(RuntimeError, match=FAILURES[failure][1]) as caught:
        net(images(2, size=32))
    assert not isinstance(caught.value, tp.TTTError)
    assert torch.isfinite(net(images(2, size=24))).all()


class Features(nn.Module):
    """Returns what is no batch of logits."""

    def __init__(self, form):
        super().__init__()
        self.norm, self.form = nn.GroupNorm(1, 3), form

    def forward(self, x):
        x = self.norm(x)
        return {"tuple": (x.mean((2, 3)), x), "map": x, "dict": {"logits": x}}[self.form]


@pytest.mark.parametrize("form", ["tuple", "map", "dict"])
def test_models_that_return_no_logits(form, images):
    net = tp.wrap(Features(form), "tent", window=1, mean=0.5, std=0.25)
    with pytest.raises(tp.InputError, match="logits"):
        net(images(2))


# -- models and names that cannot be used ------------------------------------------------------


class PlainConvNet(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = norm or nn.Identity()
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("method", ADAPTING)
def test_nothing_to_adapt(method, make_net):
    split = {"split": "end"} if method == "ttt" else {}  # there is one stage only
    with pytest.raises(tp.InputError, match="PlainConvNet") as caught:
        make_net(method, PlainConvNet(), mean=0.5, std=0.25, params="norm", **split)
    assert "params='all'" in str(caught.value)
    assert "conv.weight" in str(caught.value)


def test_norms_without_affine_parameters_are_nothing_to_adapt():
    with pytest.raises(tp.InputError, match="selects nothing"):
        tp.wrap(PlainConvNet(nn.GroupNorm(2, 4, affine=False)), "tent", mean=0.5, std=0.25)


def test_what_the_error_proposes_works(images):
    for params in ("all", "conv", ["head.bias", "conv.weight"]):
        net = tp.wrap(PlainConvNet(), "tent", window=1, params=params, mean=0.5, std=0.25, lr=1e-2)
        assert torch.isfinite(net(images(3))).all()
        chosen = {"all": 4, "conv": 2}.get(params if isinstance(params, str) else None, 2)
        assert len(net.names) == chosen


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ("nothing-matches-this", "selects nothing"),
        ("(", "regular expression"),
        (["head.weight", "head.wieght"], "head.wieght"),
        ([], "selects nothing"),
        ((), "selects nothing"),
    ],
)
def test_params_that_select_nothing(params, words, make_model):
    with pytest.raises(tp.InputError, match=words):
        tp.wrap(make_model("groupnorm"), "tent", params=params)


@pytest.mark.parametrize("params", [3, [3], object()])
def test_params_of_a_wrong_type(params, make_model):
    with pytest.raises(tp.InputError):
        tp.wrap(make_model("groupnorm"), "tent", params=params)


def test_params_for_a_method_that_adapts_nothing(make_model):
    with pytest.raises(tp.InputError, match="params"):
        tp.wrap(make_model("groupnorm"), "source", params="all")


def test_unknown_method_lists_the_real_ones(make_model):
    with pytest.raises(tp.InputError, match="unknown method 'tnet'") as caught:
        tp.wrap(make_model("groupnorm"), "tnet")
    assert all(name in str(caught.value) for name in tp.list_methods())
    assert "mean 'tent'" in str(caught.value)


def test_a_method_of_another_type(make_model):
    for wrong in (3, nn.Identity(), tp.Tent):
        with pytest.raises(tp.InputError, match="method"):
            tp.wrap(make_model("groupnorm"), wrong)


@pytest.mark.parametrize("method", ["source", "tent", "sar"])
def test_unknown_field_lists_the_real_ones(method, make_model):
    with pytest.raises(tp.InputError, match="no field 'learning_rate'") as caught:
        tp.wrap(make_model("groupnorm"), method, learning_rate=1e-3)
    assert "statistics" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (tp.Tent, "lr", -1e-3),
        (tp.Tent, "lr", "0.001"),
        (tp.Tent, "lr", float("nan")),
        (tp.Tent, "lr", True),
        (tp.Tent, "optimizer", "adamw"),
        (tp.Tent, "momentum", 1.5),
        (tp.Tent, "statistics", "train"),
        (tp.SAR, "margin", 1.1),
        (tp.SAR, "radius", -0.1),
        (tp.SAR, "recovery", None),
        (tp.MGG, "lr", -1.0),
        (tp.MGG, "discrepancy", -0.4),
        (tp.MGG, "prior", -1),
        (tp.MGG, "statistics", 3),
        (tp.Source, "statistics", ""),
    ],
)
def test_field_values_are_checked(config, field, value):
    with pytest.raises(tp.InputError, match=f"{config.__name__}.{field}"):
        config(**{field: value})


def test_infinite_numbers_are_refused():
    with pytest.raises(tp.InputError):
        tp.Tent(lr=float("inf"))


def test_unknown_model_proposes_close_ones():
    with pytest.raises(tp.InputError, match="ttt_resnet62") as caught:
        tp.wrap("ttt_resnet62", "tent")
    assert "'ttt_resnet26'" in str(caught.value)


def test_a_model_of_another_type():
    for wrong in (3, None, nn.Conv2d, {"a": 1}):
        with pytest.raises(tp.InputError, match="model must be"):
            tp.wrap(wrong, "tent")


def test_an_adapter_name_without_weights(make_model, tmp_path):
    folder = tp.wrap(make_model("groupnorm"), "tent").save_pretrained(tmp_path / "a")
    with pytest.raises(tp.InputError, match="from_pretrained"):
        tp.wrap(str(folder), "tent")


# -- normalisation -----------------------------------------------------------------------------


def test_normalize_false_and_mean_contradict_each_other(make_model):
    for given in ({"mean": 0.5}, {"std": 0.25}, {"mean": [0.5] * 3, "std": [0.25] * 3}):
        with pytest.raises(tp.InputError, match="normalize=False"):
            tp.wrap(make_model("groupnorm"), "tent", normalize=False, **given)


def test_mean_and_std_belong_together():
    for given in ({"mean": 0.5}, {"std": 0.25}):
        with pytest.raises(tp.InputError, match="together"):
            tp.wrap(PlainConvNet(nn.GroupNorm(2, 4)), "tent", **given)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ([0.5, 0.5], [0.25] * 3, "mean"),
        ([0.5] * 3, [0.25, 0.0, 0.25], "positive"),
        ([0.5] * 3, [0.25, -0.1, 0.25], "positive"),
        ([0.5, float("nan"), 0.5], [0.25] * 3, "mean"),
        ([0.5] * 3, [0.25, float("inf"), 0.25], "std"),
    ],
)
def test_mean_and_std_are_checked(mean, std, words, make_model):
    with pytest.raises(tp.InputError, match=words):
        tp.wrap(make_model("groupnorm"), "tent", mean=mean, std=std)


@pytest.mark.parametrize("mean", ["0.5", [None] * 3, {"r": 0.5}])
def test_means_that_are_no_numbers(mean, make_model):
    with pytest.raises(tp.InputError, match="mean"):
        tp.wrap(make_model("groupnorm"), "tent", mean=mean, std=0.25)


def test_normalize_must_be_a_bool(make_model):
    with pytest.raises(tp.InputError, match="True or False"):
        tp.wrap(make_model("groupnorm"), "tent", normalize="no")


def test_normalisation_is_what_was_given(make_model, images):
    model = make_model("layernorm")
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    net = tp.wrap(model, "source", mean=mean.tolist(), std=std.tolist())
    with torch.no_grad():
        expected = model((images(3) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
        raw = model(images(3))
    assert torch.equal(net(images(3)), expected)
    assert torch.equal(tp.wrap(model, "source", normalize=False)(images(3)), raw)


def test_timms_normalisation_is_taken(images):
    # mean = std = 0.5, not ImageNet's (ecosystem.md, section 4).
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    assert tp.wrap(model, "source").backbone.mean.flatten().tolist() == [0.5] * 3


def test_a_bare_module_warns_that_nothing_normalises(images):
    model = PlainConvNet(nn.GroupNorm(2, 4))
    with pytest.warns(UserWarning, match="normalize=False"):
        net = tp.wrap(model, "source")
    assert torch.equal(net(images(2)), model(images(2)).detach())


class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


class SelfNormalising(PlainConvNet):
    """As RobustBench's models: mean and std as buffers of its own."""

    def __init__(self):
        super().__init__(nn.GroupNorm(2, 4))
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))

    def forward(self, x):
        return super().forward((x - self.mean) / self.std)


@pytest.mark.parametrize(
    "model", [nn.Sequential(Normalize(), PlainConvNet(nn.GroupNorm(2, 4))), SelfNormalising()]
)
def test_double_normalisation_warns(model, images):
    with pytest.warns(UserWarning, match="normalised twice"):
        tp.wrap(model, "tent", mean=0.5, std=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.wrap(model, "tent", normalize=False)


def test_ordinary_models_do_not_warn(kind, make_model):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tp.wrap(make_model(kind), "tent")
    assert [str(warning.message) for warning in seen] == []


# -- gradients that are not finite -------------------------------------------------------------


class Gate(nn.Module):
    """Passes features on, except that batches of dark images meet ``trouble``."""

    def __init__(self, inner, trouble):
        super().__init__()
        self.inner, self.trouble = inner, trouble
        self.pretrained_cfg, self.num_classes = inner.pretrained_cfg, inner.num_classes

    def forward(self, x):
        logits = self.inner(x)
        if x.mean() > -1:  # normalised: black is about -2
            return logits
        if self.trouble == "gradient":
            # sqrt has an infinite slope at zero: finite logits, a gradient of 0 * inf
            return logits + (0 * logits).square().sum(1, keepdim=True).sqrt()
        return logits * self.trouble


@pytest.mark.parametrize("trouble", [torch.inf, torch.nan, "gradient"])
@pytest.mark.parametrize("method", BATCHWISE)
@pytest.mark.parametrize("at", [0, 2])
def test_a_non_finite_batch_is_skipped(
    method, trouble, at, make_model, make_net, images, same_tensors
):
    model = Gate(make_model("layernorm"), trouble)
    # Without the guard, whose running means count every image.
    net = make_net(method, model, lr=1e-2, params="norm", guard=False)
    reference = make_net(method, model, lr=1e-2, params="norm", guard=False)
    dark = images(4, 9) * 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(at):
            assert torch.equal(net(images(4, seed)), reference(images(4, seed)))
    before = net.adaptation_state()
    with pytest.warns(RuntimeWarning, match="skipped_updates"):
        logits = net(dark)
    assert logits.shape == (4, 10)
    assert torch.isfinite(logits).all() == (trouble == "gradient")
    assert net.skipped_updates == 1
    after = net.adaptation_state()
    before.pop("batches"), after.pop("batches")
    assert same_tensors(after, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned once is enough
        net(dark)
        assert net.skipped_updates == 2
        for seed in range(at, at + 3):  # exactly as if the dark batches had not been there
            assert torch.equal(net(images(4, seed)), reference(images(4, seed)))
    assert net.skipped_updates == 2
    assert reference.skipped_updates == 0


@pytest.mark.parametrize("method", BATCHWISE)
def test_the_prediction_of_a_skipped_batch(method, make_model, make_net, images):
    """It is the one from before the update, of the adapted model."""
    inner = make_model("groupnorm")
    net = make_net(method, Gate(inner, "gradient"), lr=1e-2)
    reference = make_net(method, Gate(inner, 1.0), lr=1e-2)
    for seed in range(2):
        net(images(4, seed)), reference(images(4, seed))
    with pytest.warns(RuntimeWarning):
        logits = net(images(4, 9) * 0.05)
    assert torch.equal(logits, reference(images(4, 9) * 0.05))


def test_sar_skips_when_only_the_second_pass_is_not_finite(
    make_model, make_net, images, monkeypatch, same_tensors
):
    from ttt_plugins.core import online

    net = make_net("sar", make_model("layernorm"), lr=1e-2, guard=False)
    reference = make_net("sar", make_model("layernorm"), lr=1e-2, guard=False)
    net(images(6, 0)), reference(images(6, 0))
    before = net.adaptation_state()
    true = online.evaluate

    def second_pass_breaks(backbone, objective, params, batch, first=None):
        found = true(backbone, objective, params, batch, first)
        return found if first is None else found._replace(loss=found.loss * torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(online, "evaluate", second_pass_breaks)
        with pytest.warns(RuntimeWarning):
            net(images(6, 1))
    assert net.skipped_updates == 1
    after = net.adaptation_state()
    before.pop("batches"), after.pop("batches")
    assert same_tensors(after, before)
    assert torch.equal(net(images(6, 2)), reference(images(6, 2)))


class Loud(nn.Module):
    """Ordinary logits, but on dark batches their slope is enormous, and finite."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.GroupNorm(1, 3), nn.Linear(3, 4)

    def forward(self, x):
        logits = self.head(self.norm(x).mean((2, 3)))
        return logits + 1e25 * (logits - logits.detach()) if x.mean() < 0.1 else logits


@pytest.mark.parametrize("method", ["tent", "mgg"])
def test_an_enormous_finite_gradient_does_not_poison_the_state(method, make_net, images):
    # Its square overflows: with an infinite second moment a scalar would never move again (Adam),
    # or be fed zeros forever (MGG).
    torch.manual_seed(0)
    net = make_net(method, Loud(), mean=0.0, std=1.0, lr=1e-2)
    net(images(4, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net(images(4, 1) * 0.05)
    net(images(4, 2))
    state = net.adaptation_state()
    assert all(torch.isfinite(t).all() for t in state.values())


# -- adaptation states of something else -------------------------------------------------------


def test_states_of_other_adapters_are_refused(make_model, make_net, images, same_tensors):
    net = make_net("tent", make_model("layernorm"), lr=1e-2)
    net(images(4))
    before = net.adaptation_state()
    good = net.adaptation_state()
    name = next(n for n in good if n.startswith("params."))
    wrong = {
        "another model": make_net("tent", make_model("groupnorm"), lr=1e-2).adaptation_state(),
        "another method": make_net("mgg", make_model("layernorm"), lr=1e-2).adaptation_state(),
        "another choice": make_net(
            "tent", make_model("layernorm"), lr=1e-2, params="blocks"
        ).adaptation_state(),
        "a name missing": {n: t for n, t in good.items() if n != name},
        "a name too many": good | {"rule.extra": torch.zeros(1)},
        "another shape": good | {name: torch.zeros(3)},
        "another type": good | {name: good[name].double()},
        "nothing": {},
    }
    for what, state in wrong.items():
        with pytest.raises(tp.InputError, match="another adapter"):
            net.load_adaptation_state(state)
        assert same_tensors(net.adaptation_state(), before), what


@pytest.mark.parametrize("state", [None, [], {"batches": 3}])
def test_states_that_are_no_dicts_of_tensors(state, make_model):
    net = tp.wrap(make_model("groupnorm"), "source")
    with pytest.raises(tp.InputError):
        net.load_adaptation_state(state)


def test_statistics_need_a_method_that_compares_them(make_model, images):
    with pytest.raises(tp.InputError, match="mgg"):
        tp.wrap(make_model("groupnorm"), "tent").fit_source_statistics([images(4)])


@pytest.mark.parametrize("loader", [[], iter(())])
def test_statistics_of_nothing(loader, make_model, make_net, same_tensors):
    net = make_net("mgg", make_model("groupnorm"))
    before = net.learned_tensors()
    with pytest.raises(tp.InputError, match="no images"):
        net.fit_source_statistics(loader, progress=False)
    assert same_tensors(net.learned_tensors(), before)


def test_statistics_of_bad_images(make_model, make_net, images, same_tensors):
    net = make_net("mgg", make_model("groupnorm"), lr=1e-2)
    net(images(4))
    before, learned = net.adaptation_state(), net.learned_tensors()
    with pytest.raises(tp.InputError, match="NaN"):
        net.fit_source_statistics([images(4, 1), spoiled(torch.nan)], progress=False)
    assert same_tensors(net.adaptation_state(), before)
    assert same_tensors(net.learned_tensors(), learned)


# -- damaged artifacts -------------------------------------------------------------------------


@pytest.fixture
def artifact(make_model, make_net, tmp_path):
    return make_net("mgg", make_model("groupnorm")).save_pretrained(tmp_path / "artifact")


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def put_nan(folder):
    edit_tensors(folder, lambda t: t["memory.W1"].view(-1)[3].fill_(torch.nan))


DAMAGES = {
    "truncated weights": truncate,
    "no weights at all": lambda f: (f / "model.safetensors").write_bytes(b""),
    "pickled weights": lambda f: torch.save({"a": torch.zeros(1)}, f / "model.safetensors"),
    "missing weights": lambda f: (f / "model.safetensors").unlink(),
    "non-finite weights": put_nan,
    "a tensor missing": lambda f: edit_tensors(f, lambda t: t.pop("memory.b1")),
    "a tensor too many": lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
    "half the statistics": lambda f: edit_tensors(
        f, lambda t: t.update({"source.mean": torch.zeros(1)})
    ),
    "another shape": lambda f: edit_tensors(f, lambda t: t.update({"memory.W1": torch.zeros(8)})),
    "a newer format": lambda f: edit(f, lambda c: c.update(format_version=2)),
    "no format": lambda f: edit(f, lambda c: c.pop("format_version")),
    "no method": lambda f: edit(f, lambda c: c.pop("method")),
    "no backbone": lambda f: edit(f, lambda c: c.pop("backbone")),
    "an unknown field": lambda f: edit(f, lambda c: c["fields"].update(lrr=1)),
    "a wrong value": lambda f: edit(f, lambda c: c["fields"].update(lr="fast")),
    "broken json": lambda f: (f / "config.json").write_text('{"format_version": 1,'),
    "a list": lambda f: (f / "config.json").write_text("[1]"),
    "not text": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_artifacts(damage, artifact, make_model):
    DAMAGES[damage](artifact)
    with pytest.raises(tp.ArtifactError) as caught:
        tp.from_pretrained(artifact, backbone=make_model("groupnorm"))
    assert isinstance(caught.value, tp.TTTError)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) > 20


# Well-formed files whose values fit no field, or another network.
WRONG_VALUES = {
    "params": lambda f: edit(f, lambda c: c["fields"].update(params=3)),
    "mean": lambda f: edit(f, lambda c: c["backbone"].update(mean="grey")),
    "statistics of another size": lambda f: edit_tensors(
        f, lambda t: t.update({"source.mean": torch.zeros(3), "source.std": torch.ones(3)})
    ),
}


@pytest.mark.parametrize("damage", WRONG_VALUES)
def test_wrong_values_in_artifacts(damage, artifact, make_model, images):
    WRONG_VALUES[damage](artifact)
    with pytest.raises(tp.TTTError):
        tp.from_pretrained(artifact, backbone=make_model("groupnorm"))(images(4))


def test_an_unknown_method_in_an_artifact(artifact, make_model):
    edit(artifact, lambda c: c.update(method="deyo"))
    with pytest.raises(tp.TTTError, match="deyo"):
        tp.from_pretrained(artifact, backbone=make_model("groupnorm"))


def test_no_artifact_there(tmp_path, make_model):
    with pytest.raises(tp.ArtifactError, match="nowhere"):
        tp.from_pretrained(tmp_path / "nowhere", backbone=make_model("groupnorm"))
    with pytest.raises(tp.ArtifactError, match="bundled"):
        tp.from_pretrained("bundled:nowhere")


def test_an_artifact_that_needs_its_model(artifact):
    with pytest.raises(tp.ArtifactError, match="backbone="):
        tp.from_pretrained(artifact)


def test_unknown_override_of_an_artifact(artifact, make_model):
    with pytest.raises(tp.InputError, match="discrepancy"):
        tp.from_pretrained(artifact, backbone=make_model("groupnorm"), lrr=1)
    net = tp.from_pretrained(artifact, backbone=make_model("groupnorm"), lr=0.5)
    assert net.config.lr == 0.5


def test_a_folder_with_something_else_is_not_overwritten(make_model, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(tp.ArtifactError, match="not empty"):
        tp.wrap(make_model("groupnorm"), "tent").save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_save_leaves_the_earlier_artifact(artifact, make_model, make_net, monkeypatch):

    before = {p.name: p.read_bytes() for p in artifact.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("ttt_plugins.artifacts.folder.save_file", full)
    with pytest.raises(tp.ArtifactError, match="no space"):
        make_net("mgg", make_model("groupnorm"), lr=0.5).save_pretrained(artifact)
    assert {p.name: p.read_bytes() for p in artifact.iterdir()} == before
    assert [p.name for p in artifact.parent.iterdir()] == [artifact.name]


def test_saving_again_replaces(artifact, make_model, make_net):
    make_net("mgg", make_model("groupnorm"), lr=0.5).save_pretrained(artifact)
    loaded = tp.from_pretrained(artifact, backbone=make_model("groupnorm"))
    assert loaded.config.lr == 0.5
    shutil.rmtree(artifact)


def test_a_source_artifact_round_trip(make_model, images, tmp_path):
    from ttt_plugins.artifacts.saving import save_with_model

    model = make_model("batchnorm")
    args = {"width": 8, "depth": 8}
    folder = save_with_model(model, "ttt_resnet26_bn", args, tmp_path / "source")
    expected = tp.wrap(model, "source")(images(4))
    assert torch.equal(tp.from_pretrained(folder)(images(4)), expected)
    assert torch.equal(tp.wrap(str(folder), "source")(images(4)), expected)
    edit(folder, lambda c: c.update(architecture="ttt_resnet27"))
    with pytest.raises(tp.TTTError, match="ttt_resnet27"):
        tp.from_pretrained(folder)


def test_error_types_are_also_the_built_in_ones():
    assert issubclass(tp.InputError, (tp.TTTError, ValueError))
    pairs = [
        (tp.InputError, ValueError),
        (tp.ArtifactError, ValueError),
        (tp.DataError, FileNotFoundError),
        (tp.MissingDependencyError, ImportError),
    ]
    for error, builtin in pairs:
        assert issubclass(error, tp.TTTError)
        assert issubclass(error, builtin)
        assert str(error("what went wrong")) == "what went wrong"


def test_learned_tensors_are_checked(slow, make_model):
    model = make_model("groupnorm")
    good = {f"memory.{n}": t for n, t in slow.items()}
    assert tp.wrap(model, "mgg", tensors=good).config == tp.MGG()
    wrong = {
        "W1": good | {"memory.W1": slow["W1"].view(8, 8)},
        "b1": {n: t for n, t in good.items() if n != "memory.b1"},
        "velocity": good | {"velocity": torch.zeros(1)},
    }
    for word, tensors in wrong.items():
        with pytest.raises(tp.ArtifactError, match=word):
            tp.wrap(model, "mgg", tensors=tensors)
    with pytest.raises(tp.ArtifactError, match="tent"):
        tp.wrap(model, "tent", tensors=good)
