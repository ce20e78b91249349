"""Our engines under torch-ttt's contract."""

import builtins
import copy
import importlib
import pickle
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import random_heads
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ttt_plugins as tp
from ttt_plugins.core.views import image_keys, quarter_turns
from ttt_plugins.train.mt3_step import MT3Recipe, task_loss

MODULE = "ttt_plugins.hosts.torch_ttt"
NAMES = {"mgg": "mgg", "mt3": "mt3", "ttt": "ttt_plugins_ttt"}
FEW = {"mgg": {}, "mt3": {"copies": 2}, "ttt": {"copies": 2, "num_steps": 2}}


@pytest.fixture
def registry():
    pytest.importorskip("torch_ttt", reason="torch-ttt is not installed")
    importlib.import_module(MODULE)
    return importlib.import_module("torch_ttt.engine_registry").EngineRegistry


@pytest.fixture
def make(registry, make_model):
    """``make(method, kind, **options)`` -> an engine."""

    def build(method, kind="groupnorm", model=None, **options):
        model = make_model(kind) if model is None else model
        options = {"optimization_parameters": dict(FEW[method])} | options
        return registry.get_engine(NAMES[method])(model, **options)

    return build


def own(engine, **fields):
    """The adapter that an engine's outputs are compared with, around a model of its own."""
    config = engine.adapter().config
    learned = {n: t.detach() for n, t in engine.learned().items()}
    return tp.wrap(copy.deepcopy(engine.model), config, tensors=learned, **fields)


def step(engine, images, labels=None, number=0, optimizer=None):
    engine.train()
    labels = torch.arange(len(images)) if labels is None else labels
    logits, loss = engine(images)
    (F.cross_entropy(logits, labels) + 0.1 * loss).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return logits, loss


def test_names(registry):
    from torch_ttt.engine.ttt_engine import TTTEngine as Theirs

    assert registry.get_engine("ttt") is Theirs
    for method in ("mgg", "mt3"):
        assert registry.get_engine(method) is registry.get_engine(f"ttt_plugins_{method}")
    assert registry.get_engine("ttt_plugins_ttt").__module__ == MODULE


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("method", list(NAMES))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_are_the_adapters_own(make, images, kind, method, mode, monkeypatch):
    engine = make(method, kind).eval()
    net = own(engine)
    engine.adapter()
    monkeypatch.setattr("torch_ttt.engine.base_engine.deepcopy", None)
    with mode():
        for seed in (0, 1):
            logits, loss = engine(images(2, seed))
            assert torch.equal(logits, net(images(2, seed)))
            assert torch.equal(loss, net.loss)
            assert loss.ndim == 0
            assert torch.isfinite(loss)
            assert not logits.requires_grad
    engine.reset()
    net.reset()
    assert torch.equal(engine(images(2))[0], net(images(2)))


@pytest.mark.parametrize("method", list(NAMES))
def test_a_users_optimizer_reaches_every_head_from_the_first_step(make, images, kind, method):
    engine = make(method, kind)
    before = {n: p.detach().clone() for n, p in engine.named_parameters()}
    optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
    net = tp.wrap(engine.model, engine.config, tensors=engine.learned())
    learned = {n for n in net.learned_tensors() if "running_" not in n and "source." not in n}
    assert {n[6:].replace("/", ".") for n in before if n.startswith("heads.")} == learned
    for seed in range(2):
        step(engine, images(4, seed), optimizer=optimizer)
    assert before.keys() == dict(engine.named_parameters()).keys()
    still = {n for n, p in engine.named_parameters() if torch.equal(p, before[n])}
    if method == "mgg":  # the classifier stays
        assert still == {n for n in before if n.startswith("model.")}
    else:
        # A bias in front of a norm that takes the mean away has no gradient.
        assert not {n for n in still if n.startswith("heads.")}, still
        assert len(still) < 3, still


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("method", list(NAMES))
def test_trained_weights_are_what_adapts(make, images, method):
    engine = make(method)
    optimizer = torch.optim.SGD(engine.parameters(), lr=0.05)

    def stream(one):
        return torch.cat([one(images(3, seed)) for seed in range(2)])

    first = stream(lambda x: engine.eval()(x)[0])
    step(engine, images(4), optimizer=optimizer)
    logits = stream(lambda x: engine.eval()(x)[0])
    assert torch.equal(logits, stream(own(engine)))
    assert not torch.equal(logits, first)
    other = make(method)
    other.load_state_dict(engine.state_dict())
    assert torch.equal(stream(lambda x: other.eval()(x)[0]), logits)


def test_meta_training_is_the_trainers(make, images):
    """Value and gradient of ``train.mt3.task_loss`` on the same views, unclipped."""
    engine = make("mt3", "layernorm")
    labels = torch.tensor([3, 1, 4, 1])
    step(engine, images(4), labels)
    backbone = tp.wrap(engine.model, "source").backbone
    drawn = engine.adapter().with_tensors(tp.MT3(copies=1)).algorithm().task
    views = drawn.draw(images(4), image_keys(images(4), 0), 1)
    meta = {f"model.{n}": p.detach() for n, p in engine.model.named_parameters()}
    meta |= {n: t.detach() for n, t in engine.learned().items()}
    meta = {n: t.clone().requires_grad_() for n, t in meta.items()}
    recipe = MT3Recipe(clip=0.0, self_supervised=0.1)
    task = [*(v[:, 0] for v in views), images(4), labels]
    with sdpa_kernel(SDPBackend.MATH):
        loss, _ = task_loss(meta, *task, backbone=backbone, recipe=recipe, transforms=False)
    expected = dict(zip(meta, torch.autograd.grad(loss, list(meta.values())), strict=True))
    for name, p in engine.model.named_parameters():
        assert torch.allclose(p.grad, expected[f"model.{name}"], atol=1e-5), name
    for name, p in engine.learned().items():
        assert torch.allclose(p.grad, expected[name], atol=1e-5), name


def test_joint_training_by_hand(make, images, make_model):
    """Cross-entropy of the plain model, and of the rotation behind the twin with another rest."""
    engine = make("ttt", "groupnorm", tensors=random_heads("ttt", make_model("groupnorm")))
    with torch.no_grad():
        for p in engine.heads.parameters():
            p.add_(0.05)
    logits, loss = step(engine, images(4))
    model, heads = copy.deepcopy(engine.model), engine.learned()
    mean = torch.tensor(model.pretrained_cfg["mean"]).view(-1, 1, 1)
    std = torch.tensor(model.pretrained_cfg["std"]).view(-1, 1, 1)
    assert torch.allclose(logits, model((images(4) - mean) / std))
    task = engine.adapter().with_tensors(tp.TTT(copies=1)).algorithm().task
    views, quarters = task.draw(images(4), image_keys(images(4), 0), 1)
    model.load_state_dict(
        {n[5:]: t for n, t in heads.items() if n.startswith("rest.")}, strict=False
    )
    features = model.forward_head(
        model.forward_features((views[:, 0] - mean) / std), pre_logits=True
    )
    rotation = F.linear(features, heads["head.weight"], heads["head.bias"])
    assert torch.allclose(loss, F.cross_entropy(rotation, quarters[:, 0]), atol=1e-5)
    upright = quarter_turns(views[:, 0], -quarters[:, 0] % 4)
    assert torch.equal(quarter_turns(upright, quarters[:, 0]), views[:, 0])


def test_batch_norms_learn_their_statistics_in_train_mode(make, images):
    engine = make("ttt", "batchnorm")
    before = {n: b.clone() for n, b in engine.model.named_buffers() if "running_mean" in n}
    step(engine, images(8))
    after = dict(engine.model.named_buffers())
    assert not any(torch.equal(after[n], b) for n, b in before.items())


class Net(nn.Module):
    """A user's own small network, as in torch-ttt's examples."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, 2), nn.Conv2d(4, 8, 3, 2)
        self.fc1, self.fc2 = nn.Linear(288, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@pytest.mark.filterwarnings("ignore:.*does not say how its input")
@pytest.mark.parametrize("name", ["ttt", "ttt_plugins_ttt"])
def test_a_script_of_theirs_with_one_name_changed(registry, name):
    torch.manual_seed(0)
    model = Net()
    engine = registry.get_engine(name)(model, "fc1", optimization_parameters={"lr": 1e-2})
    optimizer = torch.optim.Adam(engine.parameters(), lr=1e-3)
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    engine.train()
    for _ in range(2):
        optimizer.zero_grad()
        outputs, loss_ttt = engine(x)
        (F.cross_entropy(outputs, y) + 0.5 * loss_ttt).backward()
        optimizer.step()
    engine.eval()
    plain = model(x)
    for steps in (0, 1, 2):
        engine.optimization_parameters["num_steps"] = steps
        outputs, loss_ttt = engine(x)
        assert outputs.shape == (4, 10)
        assert loss_ttt.numel() == 1
        assert torch.allclose(outputs, plain, atol=1e-6) is (steps == 0)


def test_num_steps_of_an_online_engine_are_updates(make, images):
    engine = make("mgg", optimization_parameters={"lr": 1e-2, "num_steps": 2}).eval()
    net = own(engine)
    net(images(3))
    assert torch.equal(engine(images(3))[0], net(images(3)))


def test_moves(make, images):
    engine = make("mgg").eval()
    engine(images(3))
    expected = own(engine)
    expected(images(3))
    assert torch.equal(engine(images(3, 1))[0], expected(images(3, 1)))
    engine.to(torch.float64)
    assert engine(images(3, dtype=torch.float64))[0].dtype == torch.float64
    engine.to(torch.float32)
    assert engine(images(3))[0].dtype == torch.float32


def pickled(engine):
    return pickle.loads(pickle.dumps(engine))


def reloaded(engine):
    engine.load_state_dict(copy.deepcopy(engine.state_dict()))
    return engine


def copied_twice(engine):
    return copy.deepcopy(copy.deepcopy(engine))


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("again", [copy.deepcopy, copied_twice, pickled, reloaded])
@pytest.mark.parametrize("case", ["mgg", "ttt online"])
def test_a_stream_continues_in_a_copy(make, images, again, case):
    method, _, mode = case.partition(" ")
    parameters = FEW[method] | ({"mode": mode} if mode else {})
    engine = make(method, optimization_parameters=parameters).eval()
    net = own(engine)
    engine(images(3)), net(images(3))
    twin = again(engine)
    expected = [net(images(3, seed)) for seed in (1, 2)]
    assert torch.equal(twin(images(3, 1))[0], expected[0])
    assert torch.equal(twin(images(3, 2))[0], expected[1])
    if twin is not engine:  # which has a stream of its own
        assert torch.equal(engine(images(3, 1))[0], expected[0])
    twin.reset()
    net.reset()
    assert torch.equal(twin(images(3))[0], net(images(3)))


def test_a_copy_with_other_weights_starts_at_the_source(make, images):
    engine = make("mgg").eval()
    engine(images(3))
    name = next(n for n, p in engine.named_parameters() if n.startswith("model.") and p.ndim == 4)
    state = engine.state_dict()
    state[name] = state[name] + 0.01
    twin = copy.deepcopy(engine)
    twin.load_state_dict(state)
    assert torch.equal(twin(images(3))[0], own(twin)(images(3)))
    twice = copy.deepcopy(copy.deepcopy(engine))
    with torch.no_grad():
        twice.get_parameter(name).add_(0.01)
    assert torch.equal(copy.deepcopy(twice)(images(3))[0], own(twice)(images(3)))


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_copy_model_says_whether_calls_keep_what_was_learned(make, images):
    """As in torch-ttt's own engines."""
    engine = make("mgg", optimization_parameters={"copy_model": True}).eval()
    first = engine(images(3))[0]
    engine(images(3, 1))
    assert torch.equal(engine(images(3))[0], first)
    engine.optimization_parameters["copy_model"] = False
    engine.reset()
    engine(images(3))
    assert not torch.equal(engine(images(3))[0], first)

    engine = make("ttt", optimization_parameters={"copies": 2, "copy_model": False}).eval()
    assert engine.adapter().config.mode == "online"
    engine.optimization_parameters["copy_model"] = True
    assert engine.adapter().config.mode == "standard"
    engine = make("mt3", optimization_parameters={"copies": 2, "copy_model": False}).eval()
    with pytest.raises(tp.InputError, match="mt3 always forgets"):
        engine(images(2))


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_an_optimizers_name_is_answered_by_a_warning(make, images):
    parameters = {"optimizer_name": "adam", "copies": 2}
    engine = make("mt3", optimization_parameters=parameters).eval()
    with pytest.warns(UserWarning, match="the update rule is mt3's own"):
        logits = engine(images(2))[0]
    assert torch.equal(logits, own(engine)(images(2)))


@pytest.mark.parametrize("method", list(NAMES))
@pytest.mark.parametrize("training", [True, False])
def test_unknown_keywords_are_an_error_in_both_modes(make, images, method, training):
    engine = make(method).train(training)
    with pytest.raises(TypeError, match="mask"):
        engine(images(2), mask=None)


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_mistakes(make, images, make_model):
    with pytest.raises(tp.InputError, match="no field 'optimiser'"):
        make("mt3", optimization_parameters={"optimiser": "adam"}).eval()(images(2))
    with pytest.raises(tp.InputError, match="no field 'colour'"):
        make("mgg", colour=1)
    for method in NAMES:
        engine = make(method)
        for mode in (True, False):
            with pytest.raises(tp.InputError, match="must lie in"):
                engine.train(mode)(3 * images(2))
    with pytest.raises(tp.InputError, match="lora"):
        make("mt3", params="lora")(images(2))
    with pytest.warns(UserWarning, match="untrained"):
        make("mt3").eval()(images(1))


def _installed(monkeypatch, version):
    real = importlib.metadata.version

    def fake(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version if name == "torch-ttt" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", fake)


def _fail(monkeypatch, match):
    for name in [n for n in sys.modules if n.startswith("ttt_plugins.hosts.torch_ttt")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(tp.MissingDependencyError, match=match) as caught:
        importlib.import_module(MODULE)
    assert "\n" not in str(caught.value)
    assert "ttt-plugins[torch-ttt]" in str(caught.value)


@pytest.fixture
def hidden(monkeypatch):
    """None of torch-ttt's modules is loaded."""
    for name in [n for n in sys.modules if n.split(".")[0] == "torch_ttt"]:
        monkeypatch.delitem(sys.modules, name)


def test_it_is_not_installed(hidden, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_ttt", None)
    _installed(monkeypatch, None)
    _fail(monkeypatch, "not installed")


def test_einops_is_missing(hidden, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("torch_ttt", "einops"):
            raise ModuleNotFoundError("No module named 'einops'", name="einops")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    _installed(monkeypatch, "0.0.2")
    _fail(monkeypatch, "needs einops")


def test_it_is_too_old_or_broken(hidden, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_ttt", ModuleType("torch_ttt"))
    _installed(monkeypatch, "0.0.1")
    _fail(monkeypatch, r"torch-ttt 0.0.1 is broken or too old.*engine")
    for name in ("engine", "engine.base_engine", "engine_registry"):
        monkeypatch.setitem(sys.modules, f"torch_ttt.{name}", ModuleType(name))
    sys.modules["torch_ttt.engine.base_engine"].BaseEngine = object
    sys.modules["torch_ttt.engine_registry"].EngineRegistry = object
    _fail(monkeypatch, "not a module with ttt_forward")
