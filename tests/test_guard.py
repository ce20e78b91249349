"""The guard over online adaptation (`ttt_plugins.core.guard`) and the pull home."""

import pytest
import torch
from fixed_stream import sample
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import ttt_plugins as tp
from ttt_plugins.core import guard as rules
from ttt_plugins.core.algorithm import Outcome
from ttt_plugins.core.guard import EVERY, GUARD, Guard
from ttt_plugins.testing import all_equal, same_state

ONLINE = ["tent", "sar", "mgg"]


def guarded(state):
    return {n: t for n, t in state.items() if n.startswith(GUARD)}


@pytest.fixture(scope="module")
def photographs():
    return torch.cat([sample(kind, 96) for kind in ("fog", "gaussian_noise")])


@pytest.fixture(scope="module")
def net():
    return tp.wrap("bundled:source-resnet26bn-cifar10", "tent", window=32, statistics="stream")


def feed(net, images, batches=8):
    """``batches`` of 32 images, taken around and around."""
    net.reset()
    net._notices._warned.clear()
    around = images.repeat(-(-32 * batches // len(images)), 1, 1, 1)
    for batch in around[: 32 * batches].split(32):
        net(batch)
    return {event.reason for event in net.guard_events}


@pytest.mark.filterwarnings("ignore:the guard")
@pytest.mark.parametrize("kind", ["constant", "noise", "one class"])
def test_streams_that_must_trip_it(net, photographs, kind):
    images = photographs
    if kind == "constant":
        images = torch.full_like(images, 0.5)
    if kind == "noise":
        images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    if kind == "one class":
        labels = torch.cat([net.backbone.source_logits(x) for x in images.split(64)]).argmax(1)
        images = images[labels == labels.mode().values]
    reasons = feed(net, images)
    assert reasons == {"one class"} or (kind == "one class" and reasons == {"less sure"})
    assert {event.action for event in net.guard_events} == {"softened"}
    assert net.health()["repetition"] > 0.5


def test_photographs_do_not_trip_it(net, photographs):
    assert feed(net, photographs) <= {"new shift"}
    health = net.health()
    assert health["agreement"] > 0.6
    assert health["classes"] > 5
    assert health["distance"] > 0


def test_an_image_that_is_no_number(net, photographs):
    """It is noted; nothing of it is kept; the warning is given once."""
    net.reset()
    net._notices._warned.clear()
    net.checks_pixels = False
    batch = photographs[:32].clone()
    batch[5] = torch.nan
    try:
        with pytest.warns(RuntimeWarning, match="guard"):
            net(batch)
        assert [e.reason for e in net.guard_events] == ["not finite"]
        assert all(torch.isfinite(t).all() for t in net.adaptation_state().values())
        assert torch.isfinite(net(photographs[:32])).all()
    finally:
        net.checks_pixels = True


@pytest.mark.filterwarnings("ignore:the guard")
def test_a_collapse_is_undone(photographs):
    """Tent at thirty times its rate ends in a class or two; with the guard it does not."""
    classes = {}
    for on in (False, True):
        net = tp.wrap("bundled:source-resnet26-cifar10", "tent", window=32, lr=0.03, guard=on)
        feed(net, photographs, 20)
        classes[on] = len(net(photographs[:64]).argmax(1).unique())
        assert any(e.action == "reset" for e in net.guard_events) == on
    assert classes[False] < classes[True]


def test_a_new_shift_begins_at_the_source(photographs, recwarn):
    """Noise after fog: predictions are the source's again, and nobody is warned."""
    net = tp.wrap("bundled:source-resnet26-cifar10", "tent", window=32)
    fog, noise = photographs[:96], photographs[96:]
    for batch in fog.split(32):
        net(batch)
    assert net.guard_events == []
    assert torch.equal(net(noise[:32]), net.backbone.source_logits(noise[:32]))
    assert net.guard_events == [(96, "new shift", "reset")]
    assert not torch.equal(net(noise[32:64]), net.backbone.source_logits(noise[32:64]))
    assert not [w for w in recwarn if "guard" in str(w.message)]
    free = tp.wrap("bundled:source-resnet26-cifar10", "tent", window=32, guard=False)
    for batch in fog.split(32):
        free(batch)
    assert not torch.equal(free(noise[:32]), net.backbone.source_logits(noise[:32]))


ONLY = torch.eye(10)[0]


def known_of(gap=0.0, source=None, adapted=None, probes=20.0):
    """A state with these signals, of ten classes."""
    even = torch.full((10,), 2.0)
    means = torch.tensor([1, 0.8, 0.7 + gap, 0.7, gap, gap**2]) * probes
    return {
        "guard.seen": torch.tensor(320),
        "guard.means": means,
        "guard.source": even if source is None else source,
        "guard.adapted": even * 16 if adapted is None else adapted,
        "guard.scale": torch.ones(()),
        "guard.events": torch.zeros(rules.EVENTS, 2, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("known", "reason", "share"),
    [
        (known_of(), None, 1.0),
        (known_of(gap=-0.1), "less sure", 0.5),
        (known_of(gap=-0.01), None, 1.0),
        (known_of(gap=-0.1, probes=5.0), None, 1.0),
        (known_of(adapted=ONLY * 320 + 1), "collapse", 0.0),
        (known_of(source=ONLY * 20, adapted=ONLY * 320), "one class", 0.5),
        (known_of(source=ONLY * 20), None, 1.0),
    ],
)
def test_what_becomes_of_an_update(known, reason, share):
    source, moved = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 2.0, 4.0])}
    outcome = Outcome(torch.zeros(2, 10), moved, {"m": torch.ones(3)}, backwards=2)
    after, state = rules._decided(known, outcome, source, lambda: {"m": torch.zeros(3)})
    assert torch.equal(after.params["w"], share * moved["w"])
    assert after.state["m"].sum() == (0 if share == 0 else 3)
    events = Guard(True).events(state)
    assert [e.reason for e in events] == ([reason] if reason else [])
    assert state["guard.scale"] == (0.5 if share == 0 else 1)
    assert (state["guard.means"][0] == 0) == (reason in ("less sure", "collapse"))


@pytest.mark.parametrize(
    ("scale", "openness", "share"), [(1, None, 1), (0.5, None, 0.5), (1, 1, 1), (1, 0, 0)]
)
def test_how_far_an_update_goes(scale, openness, share):
    source, before, after = ({"w": torch.tensor([x])} for x in (0.0, 1.0, 2.0))
    outcome = Outcome(torch.zeros(2, 10), after, {}, backwards=2)
    openness = None if openness is None else torch.tensor(float(openness))
    moved = rules._as_far_as(torch.tensor(float(scale)), openness, before, outcome, source)
    home = 1.0 if openness is None else (1 + openness) / 2
    assert moved.params["w"] == home * (1 + share)


def test_an_accelerator_is_not_waited_for(monkeypatch):
    """Fake tensors have no values: a look at one raises."""
    # The log's count of images is kept on the CPU, where reading it waits for nothing.
    monkeypatch.setattr(rules, "_noted", lambda log, *_: log)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        logits, place = torch.empty(32, 10, device="cuda"), torch.device("cuda")
        probe = rules.Probe([0, 16], torch.empty(2, 10, device=place))
        seen = {"guard.seen": torch.zeros((), dtype=torch.int64)}
        known = {n: t.to(place) for n, t in known_of().items()} | seen
        known = rules._measured(known, logits, probe)
        source = {"w": torch.empty(3, device=place)}
        outcome = Outcome(logits, source, source, backwards=32)
        rules._decided(known, outcome, source, lambda: source)


@pytest.mark.parametrize("method", ONLINE)
def test_a_stream_stops_and_goes_on(method, kind, make_model, make_net, images, tmp_path):
    """Cut anywhere, in batches of any size, through a file."""
    sizes = (7, 40, 1, 3, 33, 16, 2)

    def build():
        return make_net(method, make_model(kind), window=20, lr=0.05, guard=True, pull=0.01)

    unbroken = build()
    expected = [unbroken(images(n, seed)) for seed, n in enumerate(sizes)]
    for stop in range(len(sizes)):
        before, after = build(), build()
        logits = [before(images(n, seed)) for seed, n in enumerate(sizes[:stop])]
        save_file(before.adaptation_state(), tmp_path / "state.safetensors")
        after.load_adaptation_state(load_file(tmp_path / "state.safetensors"))
        logits += [after(images(n, stop + i)) for i, n in enumerate(sizes[stop:])]
        assert all_equal(logits, expected), stop
        assert same_state(after.adaptation_state(), unbroken.adaptation_state()), stop
    assert guarded(unbroken.adaptation_state())
    unbroken.reset()
    assert not guarded(unbroken.adaptation_state())
    assert unbroken.guard_events == []


def test_which_images_the_source_sees_does_not_depend_on_batches(make_model, make_net, images):
    net, seen = make_net("tent", make_model("groupnorm"), window=64, guard=True), []
    true, whole = net.backbone.source_logits, images(100)
    net.backbone.source_logits = lambda x: seen.append(x) or true(x)
    for size in (100, 64, 7, 1):
        net.reset()
        seen.clear()
        for part in whole.split(size):
            net(part)
        assert torch.equal(torch.cat(seen), whole[::EVERY]), size


def test_states_from_before_the_guard_load(make_model, make_net, images):
    net = make_net("tent", make_model("groupnorm"), guard=True)
    old = make_net("tent", make_model("groupnorm"), guard=False)
    old(images(4))
    net(images(20))
    net.load_adaptation_state(old.adaptation_state())
    assert same_state(net.adaptation_state(), old.adaptation_state())
    net(images(20))
    state = net.adaptation_state()
    for name, spoil in (("guard.means", lambda t: t[:2]), ("guard.source", lambda t: -t - 1)):
        with pytest.raises(tp.InputError, match=name):
            net.load_adaptation_state(state | {name: spoil(state[name])})
    with pytest.raises(tp.InputError, match="unknown here"):
        old.load_adaptation_state(state)


@pytest.mark.parametrize("method", ONLINE)
def test_the_pull_goes_home(method, make_model, make_net, images):
    """After an update: params + pull * (source - params)."""
    fields = {"lr": 0.05, "guard": False}
    free = make_net(method, make_model("groupnorm"), **fields)
    pulled = make_net(method, make_model("groupnorm"), pull=0.25, **fields)
    source = free.adaptation_state()
    free(images(6)), pulled(images(6))
    ours, theirs = pulled.adaptation_state(), free.adaptation_state()
    names = [n for n in source if n.startswith("params.")]
    assert any(not torch.equal(theirs[n], source[n]) for n in names)
    for n in names:
        expected = theirs[n] + 0.25 * (source[n] - theirs[n])
        torch.testing.assert_close(ours[n], expected)


@pytest.mark.parametrize("fields", [{"guard": 1.5}, {"guard": None}, {"pull": -0.1}, {"pull": 2}])
def test_fields_that_are_none(fields):
    with pytest.raises(tp.InputError, match=next(iter(fields))):
        tp.Tent(**fields)


def test_it_says_so(make_model, make_net):
    text = make_net("tent", make_model("groupnorm"), pull=0.01, guard=True).describe()
    assert "guard: the source predicts one image in 16 too" in text
    assert "pull: 0.01 of the way back" in text
    plain = make_net("tent", make_model("groupnorm"), guard=False)
    assert "guard:" not in plain.describe().replace("  guard", "")
    assert plain.health() == {"distance": 0.0}


@pytest.mark.filterwarnings("ignore:the guard")
def test_ttt_online_shares_it(make_model, make_net, images):
    """One picture for ever softens, another shift resets; both are part of the state."""

    def build(**fields):
        return make_net("ttt", make_model("groupnorm"), mode="online", copies=2, **fields)

    picture = images(1).expand(16, 3, 32, 32)
    net, free, resumed = build(guard=True, lr=0.01), build(lr=0.01), build(guard=True, lr=0.01)
    noise = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(18):
        net(picture), free(picture)
    assert {event.reason for event in net.guard_events} == {"one class"}
    assert 0 < net.health()["distance"] < free.health()["distance"]
    assert free.guard_events == []
    resumed.load_adaptation_state(net.adaptation_state())
    assert torch.equal(resumed(noise), net(noise))
    assert resumed.guard_events == net.guard_events
    assert net.guard_events[-1] == (18 * 16, "new shift", "reset")
    assert not torch.equal(free(noise), net(noise))
    for mode in ("standard", "batch"):
        with pytest.raises(tp.InputError, match="mode='online'"):
            tp.TTT(mode=mode, guard=True)
