"""BatchNorm on a running estimate over the stream (`statistics="stream"`)."""

import pytest
import torch
from torch import nn

import ttt_plugins as tp
from ttt_plugins import testing
from ttt_plugins.backbones.statistics import HORIZON
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
    """The estimate of `OneNorm`, restated: counts, means and variances batch after batch."""

    def __init__(self, norm):
        self.source = norm.running_mean.clone(), norm.running_var.clone()
        self.count, self.mean, self.var = 0, torch.zeros(3).double(), torch.zeros(3).double()

    def see(self, x):
        before, total = min(self.count, HORIZON), min(self.count, HORIZON) + len(x)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        both = (before * self.mean + len(x) * mean) / total
        self.var = (
            before * (self.var + (self.mean - both) ** 2) + len(x) * (var + (mean - both) ** 2)
        ) / total
        self.mean, self.count = both, total

    def moments(self):
        own = (self.mean, self.var)
        return [
            (PRIOR * s + self.count * t) / (PRIOR + self.count)
            for s, t in zip(self.source, own, strict=True)
        ]

    def logits(self, model, x):
        mean, var = (t.view(3, 1, 1) for t in self.moments())
        norm = model.norm
        z = (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(3, 1, 1)
        with torch.no_grad():
            return model.head((z + norm.bias.view(3, 1, 1)).square().mean((2, 3)))


def net_of(model, method="source", **fields):
    return tp.wrap(model, method, normalize=False, statistics="stream", prior=PRIOR, **fields)


def test_it_equals_a_plain_loop(model, images):
    """Over more images than the estimate reaches back, in batches of every size."""
    net, still, loop = net_of(model), net_of(model, "tent", lr=0.0, window=7), PlainLoop(model.norm)
    for seed, n in enumerate([1, 6, 2, HORIZON, 1, 40, 3]):
        x = images(n, seed, torch.float64)
        loop.see(x)
        expected = loop.logits(model, x)
        assert torch.allclose(net(x), expected, atol=1e-6)
        assert torch.allclose(still(x), expected, atol=1e-6)
    assert net.adaptation_state()["statistics.count"] == loop.count


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
        assert net.adaptation_state()["statistics.count"] == 17


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
    net, loop = net_of(model), PlainLoop(model.norm)
    before = model.norm.running_mean.clone()
    x = images(6, 0, torch.float64)
    loop.see(x)
    net(x)
    other = images(2, 1, torch.float64)
    with torch.no_grad():
        assert torch.allclose(net.export()(other), loop.logits(model, other), atol=1e-6)
    assert torch.equal(model.norm.running_mean, before)


def test_damaged_estimates_are_refused(make_model, images):
    model = make_model("batchnorm")
    net = tp.wrap(model, "source", statistics="stream")
    net(images(3))
    state = net.adaptation_state()
    name = next(n for n in state if n.startswith("statistics.") and n != "statistics.count")
    for wrong, message in ((state[name][:1], "unknown here"), (state[name] / 0, "not finite")):
        with pytest.raises(tp.InputError, match=message):
            net.load_adaptation_state(state | {name: wrong})
    with pytest.raises(tp.InputError, match="unknown here"):
        tp.wrap(model, "source").load_adaptation_state(state)
    assert same_state(net.adaptation_state(), state)


def test_it_says_so(make_model):
    text = tp.wrap(make_model("batchnorm"), "tent", statistics="stream").describe()
    assert "norm statistics: stream (the source counts as 16 images" in text
