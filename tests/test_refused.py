"""What cannot adapt is refused in one line, and what can is taken, wherever it comes from."""

import copy
import io
import threading

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn.utils import prune

import ttt_plugins as tp
from ttt_plugins.artifacts.card import refresh

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


class Small(nn.Module):
    """A convolution, BatchNorm and two linear layers; ``flow`` is where its gradients end."""

    def __init__(self, flow=None):
        super().__init__()
        self.quantize, self.flow = nn.Identity(), flow
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.norm(self.conv(self.quantize(x))).relu().mean((2, 3))
        if self.flow == "no graph":
            with torch.no_grad():
                return self.head(self.hidden(x))
        if self.flow == "cut":
            # Only the classifier's graph is left.
            x = x.detach()
        return self.head(self.hidden(x))


def dynamic():
    return torch.ao.quantization.quantize_dynamic(Small().eval(), {nn.Linear})


def static():
    model = Small().eval()
    model.quantize, model.head = torch.ao.quantization.QuantStub(), nn.Identity()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    model = torch.ao.quantization.prepare(model)
    model(torch.rand(4, 3, 32, 32))
    return torch.ao.quantization.convert(model)


def program():
    return torch.export.export(Small().eval(), (torch.rand(4, 3, 32, 32),)).module()


UNADAPTABLE = {"quantized": (dynamic, static), "exported program": (program,)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*qengine:UserWarning")
@pytest.mark.parametrize("words", UNADAPTABLE)
@pytest.mark.parametrize("method", ["tent", "mgg", "ttt"])
def test_models_without_gradients_are_refused(method, words, images, tmp_path):
    for make in UNADAPTABLE[words]:
        with pytest.raises(tp.InputError, match=words):
            tp.wrap(make(), method, normalize=False)
        if method == "tent" and make is not static:  # whose logits are quantized
            model = make()
            net = tp.wrap(model, "source", normalize=False)
            assert torch.equal(net(images(4)), model(images(4)))
            folder = net.save_pretrained(tmp_path / make.__name__)
            assert tp.from_pretrained(folder, backbone=model).method == "source"
            with pytest.raises(tp.ArtifactError, match="made for"):
                tp.from_pretrained(folder, backbone=Small())


@pytest.mark.parametrize("flow", ["no graph", "cut"])
@pytest.mark.parametrize("method", ["tent", "sar", "mgg", "ttt"])
def test_no_gradient_is_no_silent_standstill(method, flow, make_net, images, same_tensors):
    """As from custom operations, too, which no one can know when a model is wrapped."""
    split = {"split": "end"} if method == "ttt" else {}
    net = make_net(method, Small(flow), normalize=False, params="norm", **split)
    before = net.adaptation_state()
    with pytest.raises(tp.InputError, match="no gradient reaches"):
        net(images(4))
    assert same_tensors(net.adaptation_state(), before)
    if flow == "cut" and method == "tent":
        net = make_net(method, Small(flow), normalize=False, params="head")
        assert torch.isfinite(net(images(4))).all()


def test_lazy_layers_are_refused_until_they_are_initialised(images):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(tp.InputError, match="lazy layer"):
        tp.wrap(model, "mgg", normalize=False)
    model(images(2))
    assert tp.wrap(model, "mgg", normalize=False)(images(2)).shape == (2, 10)


def test_torchvisions_vit_says_its_size(images):
    settings = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8, "num_classes": 10}
    model = torchvision.models.VisionTransformer(image_size=64, patch_size=16, **settings)
    net = tp.wrap(model, "tent", mean=0.5, std=0.25)
    assert net.input_size == (3, 64, 64)
    with pytest.raises(tp.InputError, match=r"it was made for \(3, 64, 64\)"):
        net(images(2))
    assert net(images(2, size=64)).shape == (2, 10)


def test_an_adapter_wrapped_again_is_its_model(make_model, make_net, images, tmp_path):
    """Its unadapted weights, preprocessing and classes, and nothing of how it adapts."""
    given = {"mean": 0.3, "std": 0.2, "classes": [3, 1, 4]}
    model = make_model("batchnorm")
    first = make_net("tent", model, lr=0.1, **given)
    first(images(4))
    for taken in (first, torch.compile(first)):
        again, expected = (
            make_net("mgg", m, statistics="mix", **kwargs)
            for m, kwargs in ((taken, {}), (model, given))
        )
        for seed in range(2):
            assert torch.equal(again(images(4, seed)), expected(images(4, seed)))
    for exported in (first.export(), again.export()):  # which normalise by themselves
        plain = tp.wrap(exported, "source", normalize=False)
        with torch.no_grad():
            assert torch.equal(plain(images(4)), exported(images(4)))
    assert tp.wrap(first, "source", mean=0.5, std=0.5).backbone.mean.unique() == 0.5
    named = tp.wrap(tp.wrap("bundled:source-resnet26-cifar10", "source"), "tent")
    assert tp.from_pretrained(named.save_pretrained(tmp_path / "named")).config == named.config


def test_an_adapter_in_transformers_own_pipeline(make_model):
    transformers = pytest.importorskip("transformers")
    net = tp.wrap(make_model("groupnorm"), "source")
    assert (net.device, net.dtype) == (torch.device("cpu"), torch.float32)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    classify = transformers.pipeline("image-classification", model=net, image_processor=processor)
    with pytest.raises(tp.InputError, match=r"hosts\.transformers\.image_classification"):
        classify(Image.new("RGB", (32, 32)))


class Odd(nn.Module):
    """One more row than there are images, an attribute that cannot be copied, a value by name."""

    def __init__(self, rows=0):
        super().__init__()
        self.net, self.rows, self.state = Small(), rows, {"locks": [threading.Lock()]}

    def forward(self, x):
        assert self.state["locks"][0].acquire(timeout=1)
        self.state["locks"][0].release()
        return torch.cat([self.net(x), self.net(x[: self.rows])])


@pytest.mark.parametrize("method", ["source", "tent"])
def test_as_many_rows_as_images(method, images):
    net = tp.wrap(Odd(rows=1), method, normalize=False)
    with pytest.raises(tp.InputError, match=r"it returned \(\d, 10\) for \d images"):
        net(images(4))


def test_what_cannot_be_copied_is_shared(images):
    model = Odd().eval()
    net = tp.wrap(model, "tent", normalize=False, window=1, lr=0.1)
    first = net(images(4))
    assert net.backbone.model.state["locks"][0] is model.state["locks"][0]
    assert net.backbone.model.net is not model.net
    with torch.no_grad():
        assert not torch.equal(net.export()(images(4)), first)


def legacy(kind, index):
    """A network one of whose layers has a weight that a hook computes before every pass."""
    linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *linear)
    if kind == "prune":
        prune.l1_unstructured(model[index], "weight", 0.5)
    else:
        getattr(nn.utils, kind)(model[index])
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("method", ["source", "tent", "ttt"])
@pytest.mark.parametrize(
    ("kind", "index"), [("weight_norm", 0), ("spectral_norm", 0), ("prune", 0), ("prune", 1)]
)
def test_weights_that_hooks_compute(kind, index, method, make_net, images):
    """They are computed from what adapts, which only shows if all parameters do."""
    model = legacy(kind, index)
    options = {} if method == "source" else {"params": "all", "lr": 0.1}
    options |= {"split": "end"} if method == "ttt" else {}
    net = make_net(method, model, normalize=False, **options)
    with torch.no_grad():
        plain = model(images(4))
    logits = [net(images(4)) for _ in range(2)]
    with torch.no_grad():
        assert torch.equal(model(images(4)), plain)
    if method == "source":
        assert torch.equal(logits[0], plain)
    assert torch.equal(*logits) == (method != "tent")
    copied, exported = copy.deepcopy(net), net.export()
    expected = net(images(4))  # of Tent: from before its update
    assert torch.equal(copied(images(4)), expected)
    if method != "ttt":
        with torch.no_grad():
            assert torch.equal(exported(images(4)), expected)


@pytest.mark.parametrize(("folder", "facts"), [(None, None), (3, None), (b"x", None), ("", 3)])
def test_a_card_of_nothing(folder, facts):
    with pytest.raises(
        tp.ArtifactError, match=r"not an artifact's folder|no config\.json|facts is a dict"
    ):
        refresh(folder, facts=facts)
