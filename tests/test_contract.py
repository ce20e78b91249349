"""What every method promises on every kind of network (design.md, the contract suite)."""

import copy
import json
from contextlib import contextmanager

import pytest
import torch
from conftest import PER_IMAGE
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import ttt_plugins as tp
from ttt_plugins import testing
from ttt_plugins.core import per_image, updates
from ttt_plugins.testing import all_equal, stream

#: A step size at which a few batches of the tiny models visibly change the logits.
LR = 1e-2


ADAPTING = [m for m in tp.list_methods() if m != "source"]


#: Methods that keep what they learned; the others forget after each image.
KEEPING = [m for m in ADAPTING if m != "mt3"]


def fields(method, **more):
    """Fields that make ``method`` move on batch statistics; `source` has no step size.

    Per-image methods have no batch statistics, and TTT goes along the stream.
    """
    chosen = {} if method in PER_IMAGE else {"statistics": "batch"}
    if method == "ttt":
        chosen |= {"mode": "online", "steps": 1}
    if method != "source":
        chosen["lr"] = LR
    return chosen | more


@pytest.fixture
def build(method, kind, make_model, make_net):
    """``build(model=None, **fields)`` -> the method at hand on the kind of network at hand."""

    def make(model=None, **more):
        return make_net(
            method, make_model(kind) if model is None else model, **fields(method, **more)
        )

    return make


@torch.no_grad()
def test_it_adapts(build, kind, method, moved, images):
    """Otherwise most of the promises below would hold for free."""
    net = build()
    first, *_, last = stream(net, images, [0, 1, 2, 0])
    assert moved(net) is (method in KEEPING)
    assert torch.equal(first, last) is (method not in KEEPING)
    if method not in ADAPTING or method not in KEEPING:
        # Online methods predict their first batch before they move: it tells nothing.
        plain = as_it_predicts(method, net.backbone, images(4, 0))
        assert torch.equal(first, plain) is (method == "source")
    assert net.skipped_updates == 0
    assert first.shape == (4, 10)
    assert net.num_classes == 10


#: What a third party's methods are held to as well; the rest of this file asks for more.
PUBLIC = [
    "gradient_modes_do_not_matter",
    "train_mode_is_eval_mode",
    "a_batch_of_one_is_a_batch",
    "reset_is_bit_for_bit",
    "the_seed_decides",
]


@pytest.mark.parametrize("law", PUBLIC)
def test_a_public_law(build, images, law):
    """The laws assert; test_plugins.py shows that methods that break them are caught."""
    assert testing.LAWS[law](build, images) is None


def test_states_pass_between_gradient_modes(build, images, same_tensors):
    """Everything but the forward pass, too, may run inside inference mode."""
    net, other = build(), build()
    stream(net, images, range(2))
    with torch.inference_mode():
        other.load_adaptation_state(net.adaptation_state())
        description = other.describe()
    assert "adapts" in description
    assert all_equal(stream(net, images, [2, 3]), stream(other, images, [2, 3]))
    with torch.inference_mode():
        other.reset()
    assert all_equal(stream(other, images, range(2)), stream(build(), images, range(2)))


def test_wrapped_inside_inference_mode(method, kind, make_model, make_net, images):
    model = make_model(kind)
    expected = stream(make_net(method, model, **fields(method)), images, range(2))
    with torch.inference_mode():
        net = make_net(method, model, **fields(method))
        logits = stream(net, images, range(2))
    assert all_equal(logits, expected)


def test_the_wrapped_models_mode_does_not_matter(method, kind, make_model, make_net, images):
    model = make_model(kind)
    expected = stream(make_net(method, model.eval(), **fields(method)), images, range(2))
    logits = stream(make_net(method, model.train(), **fields(method)), images, range(2))
    assert all_equal(logits, expected)


def params_of(net):
    return {n: t for n, t in net.adaptation_state().items() if n.startswith("params.")}


@pytest.mark.parametrize("statistics", ["source", "batch", "mix", "stream"])
def test_lr_zero_is_the_plain_model(method, kind, make_model, make_net, images, statistics):
    model = make_model(kind)
    still = {} if method == "source" else {"lr": 0.0}
    if method in PER_IMAGE:  # a batch is one image there, so there is nothing to choose
        with pytest.raises(tp.InputError, match="statistics"):
            make_net(method, model, statistics=statistics, **still)
        if statistics != "source":
            return
    else:
        still["statistics"] = statistics
    net = make_net(method, model, **still)
    plain = make_net("source", model, statistics=statistics)
    for seed, n in enumerate((4, 1, 3)):
        assert torch.equal(net(images(n, seed)), as_it_predicts(method, plain, images(n, seed)))


def as_it_predicts(method, plain, x):
    """The plain model's logits, one image at a time where the method goes through them so.

    Convolutions round differently for another batch size.
    """
    if method in PER_IMAGE:
        return torch.cat([plain(image[None]) for image in x])
    return plain(x)


def test_lr_zero_equals_the_users_own_forward(method, kind, make_model, make_net, images):
    """With source statistics nothing of ours is left but the normalisation."""
    model = make_model(kind)
    still = {} if method == "source" else {"lr": 0.0}
    chosen = {} if method in PER_IMAGE else {"statistics": "source"}
    net = make_net(method, model, **chosen, **still)
    mean = torch.tensor(model.pretrained_cfg["mean"]).view(-1, 1, 1)
    std = torch.tensor(model.pretrained_cfg["std"]).view(-1, 1, 1)
    with torch.no_grad():
        expected = as_it_predicts(method, lambda x: model((x - mean) / std), images(4))
    assert torch.equal(net(images(4)), expected)


def test_stopped_saved_loaded_and_continued(build, images, same_tensors, tmp_path):
    unbroken = build()
    expected = stream(unbroken, images, range(4))
    for stop in (0, 1, 3):
        before = build()
        logits = stream(before, images, range(stop))
        # Through a file, because safetensors gives the names back sorted, and the rule's flat
        # tensors (velocity, m, v, W, b) follow the order of the parameters.
        save_file(before.adaptation_state(), tmp_path / "state.safetensors")
        after = build()
        after.load_adaptation_state(load_file(tmp_path / "state.safetensors"))
        logits += stream(after, images, range(stop, 4))
        assert all_equal(logits, expected), stop
        assert same_tensors(after.adaptation_state(), unbroken.adaptation_state()), stop
        assert after.batches == unbroken.batches


def test_a_saved_state_is_a_copy(build, images):
    net = build()
    stream(net, images, [0])
    state = net.adaptation_state()
    kept = {n: t.clone() for n, t in state.items()}
    stream(net, images, [1])
    assert all(torch.equal(t.nan_to_num(), state[n].nan_to_num()) for n, t in kept.items())
    # What the caller does with its dict is its own affair: before the stream goes on,
    reference, net = build(), build()
    for one in (reference, net):
        stream(one, images, [0])
    for t in net.adaptation_state().values():
        t.zero_()
    expected = stream(reference, images, [1, 2])
    assert all_equal(stream(net, images, [1, 2]), expected)
    # and after it was loaded.
    net.load_adaptation_state(state)
    for t in state.values():
        t.zero_()
    assert all_equal(stream(net, images, [1, 2]), expected)


def test_the_users_model_is_untouched(method, kind, make_model, make_net, images, same_tensors):
    model = make_model(kind).train()
    model.head.requires_grad_(False)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    identities = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    modes = {n: m.training for n, m in model.named_modules()}
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    net = make_net(method, model, **fields(method))
    stream(net, images, range(3))
    net.export()
    net.to(torch.float64)
    net(images(4, dtype=torch.float64))
    net.reset()
    assert same_tensors(model.state_dict(), tensors)
    assert identities == {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert wanted == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_weights_are_duplicated(method, kind, make_model, make_net):
    model = make_model(kind)
    net = make_net(method, model, **fields(method))
    own = {t.data_ptr() for t in model.state_dict().values() if t.ndim}
    held = {t.data_ptr() for t in net.backbone.source_state_dict().values() if t.ndim}
    assert held <= own


def test_two_adapters_on_one_model(method, kind, make_model, make_net, images):
    model = make_model(kind)
    expected = stream(make_net(method, copy.deepcopy(model), **fields(method)), images, range(3))
    one = make_net(method, model, **fields(method))
    other = make_net("tent", model, lr=0.1)
    logits = []
    for seed in range(3):
        logits.append(one(images(4, seed)))
        other(images(4, 50 + seed))
    assert all_equal(logits, expected)


def test_two_adapters_on_one_backbone(method, kind, make_model, make_net, images):
    first = make_net(method, make_model(kind), **fields(method))
    second = make_net(method, None, backbone=first.backbone, **fields(method))
    expected = stream(make_net(method, make_model(kind), **fields(method)), images, range(3))
    ours, theirs = [], []
    for seed in range(3):
        ours.append(first(images(4, seed)))
        theirs.append(second(images(1 + seed, 20 + seed)))  # one image: the other statistics
    assert all_equal(ours, expected)
    second.reset()
    assert all_equal([second(images(4, seed)) for seed in range(3)], expected)


def test_export_predicts_with_the_adapted_parameters(build, method, images, moved):
    net = build()
    stream(net, images, range(3))
    plain = net.export()
    assert isinstance(plain, nn.Module)
    assert not isinstance(plain, tp.Adapter)
    state = net.adaptation_state()
    adapted = {
        n.removeprefix("params."): t for n, t in state.items() if n.startswith("params.model.")
    }
    with torch.no_grad():
        expected = functional_call(net.backbone, adapted, (images(4, 9),))
        exported = plain(images(4, 9))
    assert torch.equal(exported, expected)
    net.reset()
    with torch.no_grad():
        source = net.backbone(images(4, 9))
        assert torch.equal(plain(images(4, 9)), exported)  # not by a later reset,
    assert torch.equal(exported, source) is (method not in KEEPING)


def test_export_is_independent(build, images):
    net = build()
    stream(net, images, range(2))
    plain = net.export()
    with torch.no_grad():
        for tensor in [*plain.parameters(), *plain.buffers()]:
            tensor.zero_()
    expected = build()
    stream(expected, images, range(2))
    assert all_equal(stream(net, images, [2]), stream(expected, images, [2]))


def test_exported_module_can_be_trained(build, images):
    plain = build().export()
    plain(images(4)).sum().backward()
    assert all(p.requires_grad for p in plain.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in plain.parameters())


def test_save_and_from_pretrained(build, kind, method, make_model, images, tmp_path, same_tensors):
    net = build(params="norm") if method != "source" else build()
    expected = stream(net, images, range(3))
    folder = net.save_pretrained(tmp_path / "artifact")
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in folder.iterdir()}
    loaded = tp.from_pretrained(folder, backbone=make_model(kind))
    assert (loaded.method, loaded.config) == (net.method, net.config)
    assert all_equal(stream(loaded, images, range(3)), expected)  # from the source, not mid-stream
    assert same_tensors(loaded.learned_tensors(), net.learned_tensors())
    again = loaded.save_pretrained(tmp_path / "again")
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (folder / weights).read_bytes()


def test_an_artifact_of_other_weights_is_refused(build, kind, make_model, tmp_path):
    folder = build().save_pretrained(tmp_path / "artifact")
    other = make_model(kind, seed=1)
    if json.loads((folder / "config.json").read_text())["backbone"].get("fits") == "any":
        tp.from_pretrained(folder, backbone=other)  # it was made for no weights in particular
        return
    with pytest.raises(tp.ArtifactError, match="strict_backbone=False"):
        tp.from_pretrained(folder, backbone=other)
    with pytest.warns(UserWarning, match="weights"):
        tp.from_pretrained(folder, backbone=other, strict_backbone=False)


def test_moving_to_float64(build, method, images):
    net = build().to(torch.float64)
    logits = stream(net, lambda n, s: images(n, s, torch.float64), range(3))
    assert all(z.dtype == torch.float64 for z in logits)
    single = stream(build(), images, range(3))
    assert all(
        torch.allclose(a, b.double(), atol=2e-2) for a, b in zip(logits, single, strict=True)
    )


def test_moving_mid_stream_keeps_what_was_learned(build, method, images):
    net = build()
    stream(net, images, range(3))
    before = params_of(net)
    net.to(torch.float64)
    after = params_of(net)
    assert all(torch.equal(after[n], t.double()) for n, t in before.items())
    logits = net(images(4, 3, torch.float64))
    assert logits.dtype == torch.float64
    reference = build()
    expected = stream(reference, images, range(4))[-1]
    assert torch.allclose(logits, expected.double(), atol=1e-3)
    net.reset()
    assert torch.allclose(
        net(images(4, 0, torch.float64)), stream(build(), images, [0])[0].double(), atol=1e-3
    )


def test_images_of_another_precision_or_layout(build, images):
    expected = stream(build(), images, range(2))
    net = build()
    assert torch.equal(net(images(4, 0).double()), expected[0])
    strided = images(4, 1).to(memory_format=torch.channels_last).requires_grad_()
    logits = net(strided)
    assert torch.allclose(logits, expected[1], atol=1e-4)
    assert not logits.requires_grad
    assert strided.grad is None


class Stop(Exception):
    """An error the library knows nothing of."""


def explode(*args, **kwargs):
    raise Stop


@contextmanager
def nothing_left_behind(build, images, same_tensors):
    """Yields a net in the middle of a stream, which what happens to it must not disturb."""
    net = build()
    stream(net, images, range(2))
    before = net.adaptation_state()
    counters = (net.forwards, net.backwards, net.batches, net.skipped_updates)
    yield net
    assert same_tensors(net.adaptation_state(), before)
    assert counters == (net.forwards, net.backwards, net.batches, net.skipped_updates)
    expected = stream(build(), images, range(4))
    assert all_equal(stream(net, images, [2, 3]), expected[2:])


def test_an_error_inside_the_model_changes_nothing(build, images, same_tensors):
    with nothing_left_behind(build, images, same_tensors) as net:
        # In the middle of the network, with its features half recorded.
        handle = next(iter(net.backbone.tapped.values())).register_forward_hook(explode)
        with pytest.raises(Stop):
            net(images(4, 2))
        handle.remove()


@pytest.mark.parametrize("method", ADAPTING, indirect=True)
def test_an_error_inside_the_rule_changes_nothing(build, images, same_tensors, monkeypatch):
    with nothing_left_behind(build, images, same_tensors) as net:
        for rule in (updates.SGD, updates.Adam, updates.SharpnessAware, updates.GradientMemory):
            monkeypatch.setattr(rule, "step", explode)
        monkeypatch.setattr(per_image, "descend", explode)
        with pytest.raises(Stop):
            net(images(4, 2))
        monkeypatch.undo()


@pytest.mark.parametrize("method", ["sar"], indirect=True)
def test_an_error_in_the_second_pass_changes_nothing(build, images, same_tensors):
    calls = []

    def late(*args):
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    with nothing_left_behind(build, images, same_tensors) as net:
        handle = net.backbone.register_forward_pre_hook(late)
        with pytest.raises(Stop):
            net(images(4, 2))
        handle.remove()


def test_describe_says_how_many_scalars_adapt(build, method, kind, make_model):
    net = build()
    text = net.describe()
    assert text.startswith(method)
    if method == "source":
        assert "nothing" in text
    else:
        parameters = dict(make_model(kind).named_parameters())
        scalars = sum(parameters[n].numel() for n in net.names)
        if method == "ttt":  # its head moves along
            head = net.learned_tensors().items()
            scalars += sum(t.numel() for n, t in head if "running_" not in n)
        assert scalars > 0
        assert f"{scalars:,} scalars" in text
        forwards = {"sar": 2, "ttt": 5, "mt3": 9}.get(method, 1)  # 4 views, 8, and the image
        assert f"{forwards} forward" in text
    wanted = "source" if method in PER_IMAGE else "batch"
    assert (f"norm statistics: {wanted}" in text) is (kind == "batchnorm")


def test_counters(build, method, images):
    net = build(**({"guard": False} if method in ("tent", "sar", "mgg") else {}))
    stream(net, images, range(3), n=5)
    forwards = {"sar": 2, "ttt": 5, "mt3": 9}.get(method, 1)
    assert net.forwards == 15 * forwards
    backwards = {"source": 0, "ttt": 4, "mt3": 8}.get(method, forwards)
    assert net.backwards == 15 * backwards
    assert net.batches == (0 if method == "source" else 3)


def test_a_deep_copy_goes_its_own_way(build, images):
    net = build()
    stream(net, images, range(2))
    twin = copy.deepcopy(net)
    expected = stream(net, images, [2, 3])
    net.reset()
    assert all_equal(stream(twin, images, [2, 3]), expected)


def test_an_adapter_lives_inside_another_module(build, images):
    outer = nn.Sequential(build(), nn.Softmax(1)).train().to(torch.float64)
    p = outer(images(4, dtype=torch.float64))
    assert torch.allclose(p.sum(1), torch.ones(4, dtype=torch.float64))


class NormFirst(nn.Module):
    """Nothing between the images and an adapted layer that would copy them."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.GroupNorm(1, 3), nn.Linear(3, 10)

    def forward(self, x):
        return self.head(self.norm(x).square().mean((2, 3)))


def test_raw_images_made_in_inference_mode(method, make_net, images):
    torch.manual_seed(0)
    model = NormFirst()
    split = {"split": "end"} if method == "ttt" else {}  # there is one stage only
    expected = stream(make_net(method, model, normalize=False, **split), images, range(2))
    net = make_net(method, model, normalize=False, **split)
    with torch.inference_mode():
        assert all_equal(stream(net, images, range(2)), expected)


class AttentionNet(nn.Module):
    """A bare module on PyTorch's own encoder layer, which has a fused path of its own where no
    gradient is wanted."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, 4)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.layers(tokens).mean(1))


def test_lr_zero_with_pytorchs_own_encoder(method, make_net, images):
    """Fused under no_grad (source) and not with gradients (adapters), which rounds otherwise."""
    torch.manual_seed(0)
    model = AttentionNet().eval()
    still = {} if method == "source" else {"lr": 0.0}
    net = make_net(method, model, mean=0.5, std=0.25, **still)
    plain = make_net("source", model, mean=0.5, std=0.25)
    for seed in range(2):
        assert torch.equal(net(images(4, seed)), as_it_predicts(method, plain, images(4, seed)))


# -- images that a pipeline has normalised -------------------------------------------------


def normalised(model, x):
    mean = torch.tensor(model.pretrained_cfg["mean"]).view(-1, 1, 1)
    std = torch.tensor(model.pretrained_cfg["std"]).view(-1, 1, 1)
    return (x - mean) / std


def test_normalised_images_lead_to_the_same_predictions(
    build, kind, make_model, images, same_tensors, tmp_path
):
    model = make_model(kind)
    plain, net = build(model), build(model, normalized_input=True)
    for seed in range(3):
        x = (255 * images(4, seed)).byte().float() / 255
        assert torch.equal(net(normalised(model, x)), plain(x))
    assert same_tensors(net.adaptation_state(), plain.adaptation_state())
    assert same_tensors(net.learned_tensors(), plain.learned_tensors())
    folder = net.save_pretrained(tmp_path / "artifact")
    again = tp.from_pretrained(folder, backbone=model, normalized_input=True, seed=net.seed)
    net.reset()
    x = normalised(model, images(4))
    assert torch.equal(again(x), net(x))


def test_normalised_images_are_checked_as_pixels(make_model, make_net, images):
    model = make_model("groupnorm")
    net = make_net("tent", model, normalized_input=True)
    net(normalised(model, images(4)))
    with pytest.raises(tp.InputError, match="must lie in"):
        net(normalised(model, 2 * images(4)))
    with pytest.raises(tp.InputError, match="has no mean and std"):
        tp.wrap(model, "tent", normalize=False, normalized_input=True)
    with pytest.raises(tp.InputError, match="normalized_input must be"):
        tp.wrap(model, "tent", normalized_input="yes")


def test_statistics_are_fitted_on_what_the_pipeline_yields(make_model, make_net, images):
    model = make_model("groupnorm")
    plain, net = (make_net("mgg", model, normalized_input=n) for n in (False, True))
    plain.fit_source_statistics([images(4, s) for s in range(2)], progress=False)
    net.fit_source_statistics([normalised(model, images(4, s)) for s in range(2)], progress=False)
    for name, tensor in plain.learned_tensors().items():
        assert torch.allclose(net.learned_tensors()[name], tensor, rtol=1e-4, atol=1e-5)
