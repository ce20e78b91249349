"""BatchNorm on a running estimate over the stream (`statistics="stream"`)."""

import pytest
import torch
from torch import nn

import ttt_plugins as tp
from ttt_plugins import testing
from ttt_plugins.backbones.stream import (
    CLUSTERING,
    COLLAPSED,
    EVERY,
    FAR,
    GROUPS,
    HORIZON,
    NEAR,
    PROBES,
    SPREAD,
    START,
    SURE,
    Stream,
)
from ttt_plugins.testing import all_equal, same_state

PRIOR = 5.0


class OneNorm(nn.Module):
    """Its BatchNorm sees the images themselves."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 10)

    def forward(self, x):
        return self.head(self.norm(x).square().mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = OneNorm().double().eval()
    model.norm.get_buffer("running_mean").uniform_(0.2, 0.8)
    model.norm.get_buffer("running_var").uniform_(0.02, 0.2)
    return model


class PlainLoop:
    """The statistics of `OneNorm`, restated image by image, in lists and plain numbers.

    Classes are groups of their own here, because there are fewer than `GROUPS`.
    """

    def __init__(self, net):
        self.net, norm = net, net.backbone.model.norm
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()
        self.shares, self.open = [], 1.0
        self.groups = [(0.0, torch.zeros(3).double(), torch.zeros(3).double())] * 10
        self.repeats, self.seen, self.probed, self.shift = None, 0, 0, torch.zeros(3).double()

    def probe(self, x):
        """The source's predictions of some images, and how far they are from its own."""
        first = [i for i in range(len(x)) if i < START]
        places = [i for i in range(len(x)) if (self.seen + i) % EVERY == 0] if self.seen else first
        self.seen += len(x)
        if not places:
            return
        some, old = x[places], min(self.probed, PROBES)
        new = (some.mean((0, 2, 3)) - self.mean) / (self.var + 1e-5).sqrt()
        self.probed = old + len(some)
        self.shift = (old * self.shift + len(some) * new) / self.probed
        if self.repeats is None and len(some) >= 8:
            labels = self.net.backbone.source_logits(some).argmax(1).tolist()
            self.repeats = max(0.0, self.repeats_of(labels)[0] - COLLAPSED)

    def repeats_of(self, labels):
        pairs = [a == b for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j]
        excess = sum(pairs) / max(1, len(pairs)) - 0.1
        return max(0.0, excess / 0.9), len(pairs)

    def logits(self, x):
        model, n = self.net.backbone.model, len(x)
        self.probe(x)
        repeats = self.repeats or 0.0
        batch = n / (1 + (n - 1) * CLUSTERING * repeats)
        parts = [(batch, x.mean((0, 2, 3)), x.square().mean((0, 2, 3)))] + [
            (min(count, HORIZON / 10), mean, square) for count, mean, square in self.groups
        ]
        total = sum(count for count, *_ in parts)
        mean = torch.stack([count * m for count, m, _ in parts]).sum(0) / total
        square = torch.stack([count * s for count, _, s in parts]).sum(0) / total
        excess = 0.0
        if total > batch:
            alike = [0.1 + 0.9 * repeats] + [1.0] * 10
            pairs = sum(p[0] ** 2 * a for p, a in zip(parts, alike, strict=True)) - total
            excess = max(0.0, pairs / max(1, total * (total - 1)) - 0.1)
        effective = total / (1 + total * CLUSTERING * excess)
        distance = float(self.shift.square().mean()) - SPREAD / self.probed
        near = 1 - min(1.0, max(0.0, (distance - NEAR) / (FAR - NEAR)))
        self.open = 1 - near * min(1.0, self.probed / SURE)
        share = self.open * effective / (effective + PRIOR)
        self.shares.append(share)
        own = (1 - share) * self.mean + share * mean
        var = (1 - share) * self.var + share * (square - mean.square())
        norm, of = model.norm, (1, 3, 1, 1)
        z = (x - own.view(of)) / (var.view(of) + norm.eps).sqrt() * norm.weight.view(of)
        with torch.no_grad():
            out = model.head((z + norm.bias.view(of)).square().mean((2, 3)))
        self.join(x, out.argmax(1).tolist())
        return out

    def join(self, x, labels):
        old = [(min(count, HORIZON / 10) * self.open, m, s) for count, m, s in self.groups]
        for image, label in zip(x, labels, strict=True):
            count, mean, square = old[label]
            new = image.mean((1, 2)), image.square().mean((1, 2))
            old[label] = (
                count + 1,
                (count * mean + new[0]) / (count + 1),
                (count * square + new[1]) / (count + 1),
            )
        self.groups = old
        now, pairs = self.repeats_of(labels)
        share = 1.0 if self.repeats is None else pairs / (pairs + 2 * GROUPS)
        self.repeats = now * share + (self.repeats or 0.0) * (1 - share)


def net_of(model, method="source", **fields):
    return tp.wrap(model, method, normalize=False, statistics="stream", prior=PRIOR, **fields)


def test_it_equals_a_plain_loop(model, images):
    """Over more images than the estimate reaches back, in batches of every size."""
    net, still = net_of(model), net_of(model, "tent", lr=0.0, window=7)
    loop = PlainLoop(net)
    for seed, n in enumerate([1, 6, 2, HORIZON, 1, 40, 3]):
        x = images(n, seed, torch.float64)
        expected = loop.logits(x)
        assert torch.allclose(net(x), expected, atol=1e-6)
        assert torch.allclose(still(x), expected, atol=1e-6)
    counts = torch.tensor([count for count, *_ in loop.groups]).double()
    assert torch.allclose(net.adaptation_state()["statistics.counts"].double(), counts)
    assert (counts > 1).sum() > 1
    assert min(loop.shares) < max(loop.shares)


def test_the_first_batch_is_seen_as_with_mix(make_model, images):
    model = make_model("batchnorm")
    mix = tp.wrap(model, "source", statistics="mix", prior=PRIOR)
    net = tp.wrap(model, "source", statistics="stream", prior=PRIOR)
    assert torch.allclose(net(images(6)), mix(images(6)), atol=1e-4)
    assert not torch.allclose(net(images(6, 1)), mix(images(6, 1)), atol=1e-4)


def test_a_batch_of_one_is_seen_with_what_the_stream_taught(make_model, images):
    model = make_model("batchnorm")
    net = tp.wrap(model, "source", statistics="stream")
    alone = net(images(1, 9))
    net.reset()
    net(images(32, 1))
    assert not torch.allclose(net(images(1, 9)), alone, atol=1e-3)


@pytest.mark.parametrize("method", ["tent", "sar", "mgg"])
def test_every_promise_holds(method, make_model, make_net, images):
    """Cut streams, windows, resets, errors: the estimate is part of the state."""
    model = make_model("batchnorm")

    def build(**fields):
        chosen = {"window": 1, "lr": 1e-2, "statistics": "stream"} | fields
        return make_net(method, model, **chosen)

    build.model = model
    for law in testing.LAWS.values():
        law(build, images)


def test_images_join_once(make_model, make_net, images):
    """Not again with the update on the window, nor in SAR's second pass."""
    model = make_model("batchnorm")
    for method in ("tent", "sar"):
        net = make_net(method, model, statistics="stream", window=4, lr=1e-2)
        for seed in range(6):
            net(images(2, seed))
        net(images(5, 7))
        assert net.adaptation_state()["statistics.counts"].sum() == 17


def test_the_source_alone_stops_and_goes_on(make_model, images):
    model = make_model("batchnorm")
    nets = [tp.wrap(model, "source", statistics="stream") for _ in range(2)]
    fresh = nets[0].adaptation_state()
    nets[0](images(6))
    nets[1].load_adaptation_state(nets[0].adaptation_state())
    assert all_equal(*([net(images(3, 1))] for net in nets))
    nets[0].reset()
    assert same_state(nets[0].adaptation_state(), fresh)


def test_an_exported_model_keeps_the_estimate(model, images):
    net, other = net_of(model), images(2, 1, torch.float64)
    before = model.norm.running_mean.clone()
    net(images(200, 0, torch.float64))
    exported = net.export()
    with torch.no_grad():
        expected = exported(other)
        together = exported(torch.cat([other, 1 - other]))[:2]
        assert torch.allclose(together, expected, atol=1e-9), "a batch joins"
    stays, starts = (n(other[:1]).sub(expected[:1]).norm() for n in (net, net_of(model)))
    assert stays < starts / 2
    assert torch.equal(model.norm.running_mean, before)


def test_an_image_that_is_no_number_joins_nothing(model, images):
    net, clean = net_of(model), net_of(model)
    net.checks_pixels = False
    x = images(12, 0, torch.float64)
    net(torch.cat([x, x[:1] / 0]))
    clean(x)
    ours, theirs = net.adaptation_state(), clean.adaptation_state()
    assert torch.equal(ours["statistics.counts"], theirs["statistics.counts"])
    assert all(torch.isfinite(t).all() for t in ours.values())
    assert torch.isfinite(net(x)).all()


def test_the_sources_own_images_are_seen_on_its_own_statistics():
    """Until the stream is another one, and again when it is over."""
    source, stream = (torch.zeros(3), torch.ones(3)), Stream({}, 16.0)
    noise, labels = torch.Generator().manual_seed(0), torch.eye(10)[torch.arange(64) % 10]
    alone = []
    for level in (0.0, 0.0, *[1.2] * 4, *[0.0] * 12):
        x = level + torch.randn(64, 3, 4, 4, generator=noise)
        places = stream.places(64)
        stream.observe("norm", x[places], len(places), source)
        stream.probe(places, labels[places])
        mean, var = stream.choose("norm", x, 64, source)
        alone.append(torch.equal(mean, source[0]) and torch.equal(var, source[1]))
        stream = Stream(stream.joined(labels), 16.0)
    assert alone[:2] == [True, True]
    assert not any(alone[2:6])
    assert all(alone[-2:])


def test_a_new_shift_makes_the_estimate_forget(images):
    """In the very batch that is new, which is then normalised like the first of a stream."""
    source, labels = (torch.zeros(3), torch.ones(3)), torch.eye(10)[torch.arange(40) % 10]
    noise = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def after(past, x):
        stream = Stream(past, 16.0)
        stream.watch(x)
        return stream.choose("norm", x, 40, source)[1], stream.joined(labels), stream.changed

    alone, _, _ = after({}, noise)
    _, past, changed = after({}, images(40))
    assert not changed
    for x, new in ((images(40, 1), False), (noise, True), (noise, False)):
        var, past, changed = after(past, x)
        assert changed == new
        assert torch.allclose(var, alone) == new
    assert past["statistics.counts"].sum() == 80


def test_a_stream_sorted_by_class_moves_little(model):
    """Images of one class say more of the class than of the shift."""

    def moved(labels):
        stream = Stream({}, 16.0)
        x = 1 + 0.1 * torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        stream.observe("norm", x, 32, (torch.zeros(3), torch.ones(3)))
        stream.probe([0], torch.eye(10)[labels])
        stream.choose("norm", x, 32, (torch.zeros(3), torch.ones(3)))
        later = Stream(stream.joined(torch.eye(10)[labels]), 16.0)
        return [
            s.choose("norm", x, 32, (torch.zeros(3), torch.ones(3)))[0] for s in (stream, later)
        ]

    several, one = moved(torch.arange(32) % 10), moved(torch.full((32,), 3))
    for many, few in zip(several, one, strict=True):
        assert many.min() > 0.5
        assert few.max() < 0.15


def test_damaged_estimates_are_refused(make_model, images):
    model = make_model("batchnorm")
    net = tp.wrap(model, "source", statistics="stream")
    net(images(3))
    state = net.adaptation_state()
    name = next(n for n in state if n.startswith("statistics.") and state[n].ndim == 3)
    for wrong, message in ((state[name][:, :1], "unknown here"), (state[name] / 0, "not finite")):
        with pytest.raises(tp.InputError, match=message):
            net.load_adaptation_state(state | {name: wrong})
    with pytest.raises(tp.InputError, match="unknown here"):
        tp.wrap(model, "source").load_adaptation_state(state)
    assert same_state(net.adaptation_state(), state)


def test_it_says_so(make_model):
    text = tp.wrap(make_model("batchnorm"), "tent", statistics="stream").describe()
    assert "norm statistics: stream (the source counts as 16 images" in text
