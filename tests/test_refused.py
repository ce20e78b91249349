"""What cannot adapt is refused in one line, and what can is taken, wherever it comes from."""

import copy
import io

import pytest
import torch

import ttt_plugins as tp

#: A method of each kind, with the statistics that hold the most state.
MODES = {
    "source": {},
    "mgg": {"statistics": "stream", "lr": 1e-2},
    "ttt": {"lr": 1e-2},
}


def reloaded(net):
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("method", MODES)
@pytest.mark.parametrize("change", [copy.deepcopy, reloaded, lambda net: net.double()])
def test_changed_inside_inference_mode(change, method, make_net, make_model, images):
    """Copied, loaded or moved in inference mode, an adapter goes on as if done outside it."""
    nets = [make_net(method, make_model("batchnorm"), **MODES[method]) for _ in range(2)]
    for net in nets:
        net(images(4, 0))
    outside = change(nets[0])
    with torch.inference_mode():
        inside = change(nets[1])
    for seed in (1, 2):
        batch = images(4, seed, outside.dtype)
        assert torch.equal(inside(batch), outside(batch))


@pytest.mark.parametrize("method", MODES)
def test_a_model_of_inference_mode(method, make_net, make_model, images):
    with torch.inference_mode():
        model = make_model("batchnorm")
    assert next(model.parameters()).is_inference()
    net = make_net(method, model, **MODES[method])
    expected = make_net(method, make_model("batchnorm"), **MODES[method])
    for seed in (0, 1):
        assert torch.equal(net(images(4, seed)), expected(images(4, seed)))
    with torch.inference_mode():
        plain = net.export()
    plain(images(4)).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_loaded_inside_inference_mode(images):
    with torch.inference_mode():
        net = tp.from_pretrained("bundled:mgg-resnet26bn-cifar10", window=1)
    expected = tp.from_pretrained("bundled:mgg-resnet26bn-cifar10", window=1)
    for seed in (0, 1):
        assert torch.equal(net(images(4, seed)), expected(images(4, seed)))


@pytest.mark.parametrize(
    "record",
    [
        torch.jit.script,
        lambda net: torch.jit.trace(net, torch.rand(2, 3, 32, 32)),
        lambda net: torch.export.export(net, (torch.rand(2, 3, 32, 32),), strict=False),
    ],
)
def test_programs_are_made_of_what_export_returns(record, make_model, images):
    net = tp.wrap(make_model("groupnorm"), "tent", window=1)
    net(images(4))
    with pytest.raises(tp.InputError, match=r"export\(\)"):
        record(net)
    if record is torch.jit.script:
        with pytest.raises(tp.InputError, match=r"torch\.export"):
            record(net.export())
        return
    program = record(net.export())
    program = program.module() if hasattr(program, "module") else program
    torch.testing.assert_close(program(images(2)), net.export()(images(2)))
