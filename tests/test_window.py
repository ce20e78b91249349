"""Prediction and adaptation have batches of their own (`ttt_plugins.core.window`)."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import ttt_plugins as tp
from ttt_plugins import testing
from ttt_plugins.core import registry
from ttt_plugins.core.window import Window, decode, encode
from ttt_plugins.methods import register_update_rule
from ttt_plugins.testing import all_equal, same_state

ONLINE = ["tent", "sar", "mgg"]
WINDOWED = [name for name in testing.LAWS if "window" in name or "at_once" in name]


@pytest.fixture(params=ONLINE)
def method(request):
    """Runs a test with every online method."""
    return request.param


@pytest.fixture
def build(method, kind, make_model, make_net):
    """``build(**fields)`` -> the method at hand on the kind of network at hand."""

    def make(**fields):
        return make_net(method, make_model(kind), **({"lr": 1e-2} | fields))

    return make


def updates(state):
    """The part of an adaptation state that updates change."""
    return {n: t for n, t in state.items() if n.startswith(("params.", "rule."))}


@pytest.mark.parametrize("law", WINDOWED)
def test_a_public_law(build, images, law):
    assert len(WINDOWED) == 3
    assert testing.LAWS[law](build, images) is None


def test_the_default_is_the_papers(method):
    assert registry.get_method(method).config().window == 64


@pytest.mark.parametrize("each", [1, 2, 3])
def test_batches_that_divide_the_window_do_not_matter(build, kind, images, each):
    """The same updates; the same predictions where norms do not look at the batch."""
    fields = {"window": 6, "statistics": "source"}
    one, several = build(**fields), build(**fields)
    x = torch.cat([images(6, seed) for seed in range(3)])
    ours = torch.cat([one(image[None]) for image in x])
    theirs = torch.cat([several(part) for part in x.split(each)])
    assert same_state(updates(one.adaptation_state()), updates(several.adaptation_state()))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(theirs, build(lr=0.0)(x), atol=1e-4), "nothing was adapted"


def test_a_batch_that_crosses_the_boundary(build, images):
    """It is predicted as a whole, the oldest images make the update, and the others wait."""
    net, expected = build(window=5), build(window=1)
    first, second = images(3, 0), images(4, 1)
    net(first)
    predicted = build(lr=0.0)(second)
    assert torch.equal(net(second), predicted)
    expected(torch.cat([first, second])[:5])
    state = net.adaptation_state()
    assert same_state(updates(state), updates(expected.adaptation_state()))
    assert torch.equal(state["window.images"], second[2:])


def test_larger_batches_leave_waiting_images_alone(build, images):
    net, expected = build(window=5), build(window=1)
    net(images(3, 0))
    waiting = net.adaptation_state()["window.images"]
    assert torch.equal(net(images(6, 1)), expected(images(6, 1)))
    state = net.adaptation_state()
    assert torch.equal(state["window.images"], waiting)
    assert same_state(updates(state), updates(expected.adaptation_state()))


def test_images_of_another_size_start_a_new_window(make_net, make_model, images):
    net = make_net("tent", make_model("groupnorm"), window=5)
    net(images(3, 0))
    net(images(2, 1, size=24))
    assert net.adaptation_state()["window.images"].shape == (2, 3, 24, 24)
    assert net.backwards == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_8_bits_a_pixel_where_that_is_exact(dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    exact = (levels.float() / 255).to(dtype) if dtype.itemsize < 4 else levels.to(dtype) / 255
    stored = encode(exact)
    assert stored.dtype == torch.uint8
    assert torch.equal(decode(stored, dtype), exact)
    exact[0, 0, 0, 0] = 0.4999
    assert encode(exact).dtype == dtype
    assert torch.equal(decode(encode(exact), dtype), exact)


def test_what_waits_is_8_bits_while_all_of_it_is(make_net, make_model, images):
    net = make_net("tent", make_model("groupnorm"), window=4)
    photographs, drawn = (images(8, 0) * 255).round() / 255, images(1, 1)
    net(photographs[:1])
    assert net.adaptation_state()["window.images"].dtype == torch.uint8
    net(drawn)
    assert net.adaptation_state()["window.images"].dtype == torch.float32
    net(photographs[1:4])  # the update takes the drawn one, and one photograph waits
    state = net.adaptation_state()
    assert state["window.images"].dtype == torch.uint8
    assert torch.equal(decode(state["window.images"], torch.float32), photographs[3:4])


def test_the_callers_images_are_copied(make_net, make_model, images):
    nets = [make_net("tent", make_model("groupnorm"), window=4, lr=1e-2) for _ in range(2)]
    for net, spoils in zip(nets, (True, False), strict=True):
        x = images(3, 0)
        net(x)
        if spoils:
            x.zero_()
            for tensor in net.adaptation_state().values():
                tensor.zero_()
    logits = [[net(images(3, seed)) for seed in (1, 2)] for net in nets]
    assert all_equal(*logits)


def test_through_a_file_and_another_precision(build, images, tmp_path):
    before, unbroken, after = build(window=7), build(window=7), build(window=7)
    for net in (before, unbroken):
        for seed in range(3):
            net(images(3, seed))
    save_file(before.adaptation_state(), tmp_path / "state.safetensors")
    after.load_adaptation_state(load_file(tmp_path / "state.safetensors"))
    for seed in range(3, 6):
        assert torch.equal(after(images(3, seed)), unbroken(images(3, seed)))
    after.to(torch.float64)
    after.load_adaptation_state(after.adaptation_state())
    assert after(images(6, 9, torch.float64)).dtype == torch.float64


def test_states_from_before_windows_load(build, images):
    """They hold no images that wait; none do, then."""
    net = build(window=4)
    net(images(3, 0))
    old = build(window=4).adaptation_state()
    net.load_adaptation_state(old)
    assert same_state(net.adaptation_state(), old)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.repeat(3, 1, 1, 1), "images wait, but at most 4 can"),
        (lambda t: t[:, :1], "expected"),
        (lambda t: t.double(), "expected"),
        (lambda t: t / 0, "not finite"),
        (lambda t: t[:0], "0 images wait"),
    ],
)
def test_damaged_states_are_refused(make_net, make_model, images, spoil, message):
    net = make_net("tent", make_model("groupnorm"), window=5)
    net(images(2, 0))
    state = net.adaptation_state()
    waiting = spoil(state["window.images"])
    with pytest.raises(tp.InputError, match=message):
        net.load_adaptation_state(state | {"window.images": waiting})
    with pytest.raises(tp.InputError, match="unknown here"):
        net.load_adaptation_state(state | {"window.else": waiting})
    with pytest.raises(tp.InputError, match="unknown here"):
        make_net("tent", make_model("groupnorm")).load_adaptation_state(state)
    assert same_state(net.adaptation_state(), state)


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "all"])
def test_windows_that_are_none(method, make_model, make_net, window):
    with pytest.raises(tp.InputError, match="window must be an integer"):
        make_net(method, make_model("groupnorm"), window=window)


def test_artifacts_without_the_field_load():
    net = tp.from_pretrained("bundled:mgg-resnet26bn-cifar10")
    assert net.config.window == 64
    assert "window: 64 images an update" in net.describe()


@dataclass(frozen=True)
class Plain:
    """A third party's fields, without a window."""

    lr: float = 1e-2


@dataclass(frozen=True)
class Gathering(Plain):
    """With one."""

    window: int = 6


@dataclass(frozen=True)
class Step:
    """Plain gradient descent."""

    config: Plain
    passes: ClassVar[int] = 1

    def init(self, params):
        return {}

    def step(self, params, state, first, situation):
        return {n: p - self.config.lr * first.grads[n] for n, p in params.items()}, state


@pytest.fixture
def registered(monkeypatch):
    """Two rules of a third party, gone afterwards."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register_update_rule("plain_rule", Plain, Step)
    register_update_rule("gathering_rule", Gathering, Step)


@pytest.mark.usefixtures("registered")
def test_rules_of_third_parties(make_model, images):
    model = make_model("groupnorm")
    plain, gathering = tp.wrap(model, "plain_rule"), tp.wrap(model, "gathering_rule")
    assert Window.of(plain.config).size == 1
    for net in (plain, gathering):
        net(images(3, 0))
    assert plain.backwards == 3
    assert gathering.backwards == 0
    gathering(images(3, 1))
    assert gathering.backwards == 6


@pytest.mark.usefixtures("registered")
def test_check_method_covers_the_window(make_model, monkeypatch):
    model = make_model("groupnorm")
    held = testing.check_method("gathering_rule", model=model)
    assert any("a_window_stops_and_goes_on" in law for law in held)

    def forgets(self, adapt, backbone, params, state, waiting, images):
        outcome, _ = original(self, adapt, backbone, params, state, {}, images)
        return outcome, {}

    original = Window.step
    monkeypatch.setattr(Window, "step", forgets)
    with pytest.raises(AssertionError, match="a_full_window_is_one_update"):
        testing.check_method("gathering_rule", model=model)
