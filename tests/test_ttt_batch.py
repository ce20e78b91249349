"""TTT with mode="batch": one adaptation for the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_heads

import ttt_plugins as tp
from ttt_plugins.core.heads import rotation_logits
from ttt_plugins.core.scope import call
from ttt_plugins.core.views import image_keys
from ttt_plugins.methods.ttt import rotation_views


@pytest.fixture
def make(make_model):
    """``make(kind, **fields)`` -> an adapter of TTT in batch mode."""

    def build(kind="groupnorm", **fields):
        model = make_model(kind)
        heads = random_heads("ttt", model)
        fields = {"mode": "batch", "steps": 2, "copies": 3, "lr": 0.01} | fields
        return tp.wrap(model, "ttt", tensors=heads, **fields)

    return build


@pytest.mark.parametrize("params", ["all", "norm"])
def test_the_steps_are_those_of_a_plain_loop(make, images, kind, params):
    """Autograd's own descent on the mean loss of all views, then one prediction of the batch."""
    net = make(kind, params=params)
    algorithm = net.algorithm()
    x, learned = images(4), net.learned_tensors()
    leaves = {n: t.clone().requires_grad_() for n, t in algorithm.source.items()}
    for number in range(2):
        views, quarters = rotation_views(x, image_keys(x, 0), number, 3)
        head = {n: leaves.get(n, t) for n, t in learned.items()}
        logits = rotation_logits(net.backbone, leaves, head, views.flatten(0, 1))
        loss = F.cross_entropy(logits, quarters.flatten())
        grads = torch.autograd.grad(
            loss, list(leaves.values()), materialize_grads=True, allow_unused=True
        )
        leaves = {
            n: (t - 0.01 * g).detach().requires_grad_()
            for (n, t), g in zip(leaves.items(), grads, strict=True)
        }
    expected = call(net.backbone, {n: t.detach() for n, t in leaves.items()}, x)
    assert torch.allclose(net(x), expected, atol=1e-5)
    assert torch.allclose(net.loss, loss.detach(), atol=1e-5)
    assert net.forwards == 4 * (2 * 3 + 1)
    assert net.backwards == 4 * 2 * 3


def test_a_batch_of_one_adapts_as_in_standard_mode(make, images, kind):
    x = images(1)
    assert torch.allclose(make(kind)(x), make(kind, mode="standard")(x), atol=1e-5)


def test_images_share_their_steps_and_nothing_is_kept(make, images):
    net = make()
    x = images(4)
    first = net(x)
    assert torch.equal(net(x), first)
    assert not torch.allclose(net(x[:2]), first[:2], atol=1e-6)
    assert torch.allclose(net(x.flip(0)), first.flip(0), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_chunks_decide_on_memory_alone(make, images, chunk):
    assert torch.allclose(make(chunk_size=chunk)(images(4)), make()(images(4)), atol=1e-5)


def test_a_step_that_is_not_finite_is_skipped(make, images):
    with torch.no_grad():
        net = make(lr=1e30, steps=3)
    with pytest.warns(RuntimeWarning, match="not finite"):
        logits = net(images(3))
    assert logits.shape == (3, 10)
    assert net.skipped_updates == 1


def test_it_describes_itself(make):
    text = make(steps=1).describe()
    assert "that the batch shares, 3 views of each image" in text
    assert "cost: 4 forward and 3 backward passes an image" in text
    assert "21 images at a time" in text  # 64 views fill a CPU


def test_ten_steps_unless_given(make):
    assert make(steps=None).algorithm().steps == 10


def test_single_images_cannot_be_left_out(make):
    with pytest.raises(tp.InputError, match="excludes single images"):
        make(threshold=0.9)


def test_an_artifact_takes_the_mode(images):
    net = tp.from_pretrained("bundled:ttt-resnet26-cifar10", mode="batch", steps=1, copies=2)
    assert net(images(2)).shape == (2, 10)


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_torch_ttts_engine_takes_the_mode(make_model, images):
    pytest.importorskip("torch_ttt", reason="torch-ttt is not installed")
    from torch_ttt.engine_registry import EngineRegistry

    import ttt_plugins.hosts.torch_ttt  # noqa: F401

    parameters = {"mode": "batch", "num_steps": 2, "copies": 2}
    engine = EngineRegistry.get_engine("ttt_plugins_ttt")(
        make_model("groupnorm"), optimization_parameters=parameters
    )
    outputs, loss = engine.train()(images(4))
    (F.cross_entropy(outputs, torch.arange(4)) + loss).backward()
    outputs, loss = engine.eval()(images(4))
    learned = {n: t.detach() for n, t in engine.learned().items()}
    fields = {"mode": "batch", "steps": 2, "copies": 2}
    net = tp.wrap(engine.model, "ttt", tensors=learned, **fields)
    assert torch.equal(outputs, net(images(4)))
    assert torch.equal(loss, net.loss)
