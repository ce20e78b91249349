"""An accelerator works ahead of Python: nothing in an online step may wait for a tensor's value."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import ttt_plugins as tp
from ttt_plugins import adapter
from ttt_plugins.core import online


@pytest.mark.parametrize("method", ["tent", "sar", "mgg"])
def test_a_step_looks_at_no_tensors_value(method, kind, make_model, images):
    """Fake tensors have shapes but no values: ``if``, ``item`` and the like raise on them."""
    algorithm = tp.wrap(make_model(kind), method).algorithm()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        batch = mode.from_tensor(images(4))
        params, state = dict(algorithm.source), algorithm.init()
        for _ in range(2):
            outcome = algorithm.adapt(params, state, batch)
            params, state = outcome.params, outcome.state
        with pytest.raises(DataDependentOutputException):
            bool(outcome.skipped)


def test_skipped_updates_are_looked_at_now_and_then(make_model, images, monkeypatch):
    """As on an accelerator; whoever asks is told at once."""
    net = tp.wrap(make_model("layernorm"), "tent", window=1, guard=False)
    monkeypatch.setattr(adapter, "may_look", lambda device, batches: batches % 3 == 0)
    true = online.evaluate

    def broken(*args):
        found = true(*args)
        return found._replace(loss=found.loss * torch.nan)

    monkeypatch.setattr(online, "evaluate", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(images(4)), net(images(4))
    assert net.skipped_updates == 2
    with pytest.warns(RuntimeWarning, match="not finite"):
        net(images(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(images(4))
    assert net.skipped_updates == 4


def test_pixels_that_are_known_to_be_good(make_model, images):
    net = tp.wrap(make_model("layernorm"), "tent", window=1)
    net.checks_pixels = False
    before = net.adaptation_state()
    with pytest.warns(RuntimeWarning, match="not finite"):
        net(images(4) * torch.nan)
    after = net.adaptation_state()
    assert all(torch.equal(after[n], t) for n, t in before.items() if n != "batches")
    with pytest.raises(tp.InputError, match="channels"):
        net(torch.rand(4, 2, 32, 32))
