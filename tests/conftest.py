"""Tiny models with weights that are far from any trivial value, and adapters around them."""

import copy
import math
import os

import pytest
import timm
import torch
from torch import nn

import ttt_plugins as tp
from ttt_plugins.core import gradient_memory, heads
from ttt_plugins.core.registry import get_method

# These models are too small for a second thread to help, and on busy cores threads that wait for
# each other made the suite five times slower.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

KINDS = ("batchnorm", "groupnorm", "layernorm")

# Architecture, its arguments, and a scale of the classifier's weights at which some predictions
# are sure enough for SAR's filter and some are not.
_ARCHITECTURES = {
    "batchnorm": ("ttt_resnet26_bn", {"width": 8, "depth": 8}, 3.5),
    "groupnorm": ("ttt_resnet26", {"width": 8, "depth": 8, "groups": 4}, 2.0),
    "layernorm": ("ttt_vit_tiny_patch4_32", {"embed_dim": 24, "depth": 2, "num_heads": 3}, 2.0),
}


def _random_images(n, seed=0, dtype=torch.float32, size=32):
    """Smooth-ish images in [0, 1] whose brightness and contrast differ from image to image."""
    generator = torch.Generator().manual_seed(1000 + seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    fine = torch.rand(n, 3, size, size, generator=generator)
    level = torch.rand(n, 3, 1, 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (0.5 * smooth + 0.2 * fine + 0.3 * level).clamp(0, 1).to(dtype)


def _randomise(model, seed, confidence):
    """Weights that leave no term of a formula at 0 or 1, and activations of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and p.shape[0] > 1:
                p.copy_(normal(p.shape) * math.sqrt(2 / p[0].numel()))
            elif p.ndim >= 2:  # class token and position embedding
                p.copy_(0.3 * normal(p.shape))
            elif name.endswith("weight"):  # gains of norms
                p.copy_(1 + 0.2 * normal(p.shape))
            else:
                p.copy_(0.2 * normal(p.shape))
        if isinstance(getattr(model, "head", None), nn.Linear):
            model.head.weight.mul_(confidence)
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model.train()
        with torch.no_grad():
            for i in range(4):  # from the defaults 0 and 1 to something of the model's own
                model(2 * _random_images(16, 500 + i) - 1)
    return model.eval()


@pytest.fixture(autouse=True, scope="session")
def _no_flushing():
    """No test cuts the power, and flushing every file took longer than most small runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def images():
    """``images(n, seed=0, dtype=torch.float32)`` -> (n, 3, 32, 32) in [0, 1]."""
    return _random_images


@pytest.fixture(params=KINDS)
def kind(request):
    """Runs a test on a BatchNorm ResNet, a GroupNorm ResNet and a LayerNorm ViT."""
    return request.param


@pytest.fixture(params=tp.list_methods())
def method(request):
    """Runs a test with every method the registry knows."""
    return request.param


@pytest.fixture(scope="session")
def make_model():
    """``make_model(kind, dtype=torch.float32, seed=0, confidence=1.0)`` -> a tiny timm model.

    ``confidence`` scales the classifier's weights.
    """
    built = {}

    def make(kind, dtype=torch.float32, seed=0, confidence=1.0):
        key = (kind, seed, confidence)
        if key not in built:
            arch, kwargs, scale = _ARCHITECTURES[kind]
            model = timm.create_model(arch, num_classes=10, **kwargs)
            built[key] = _randomise(model, seed, scale * confidence)
        return copy.deepcopy(built[key]).to(dtype)

    return make


@pytest.fixture
def slow():
    """Slow weights of the memory layer with every tensor moved off its initial value."""
    generator = torch.Generator().manual_seed(7)
    weights = gradient_memory.init_slow(generator)
    return {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in weights.items()}


#: Methods that adapt to each image on its own, on BatchNorm's source statistics.
PER_IMAGE = ("mt3", "ttt")


def random_heads(method, model, split=-1):
    """Self-supervised heads with random values, for ``ttt`` and ``mt3``."""
    generator = torch.Generator().manual_seed(11)
    if method == "mt3":
        return heads.init_byol(model, generator)
    return heads.init_rotation(model, split, generator)


@pytest.fixture
def make_net(slow):
    """``make_net(method, model, tensors=None, backbone=None, **options)`` -> an adapter.

    Like ``tp.wrap``, except that MGG gets this suite's slow weights, and TTT and MT3 random heads
    and few views, so that nothing depends on the bundled artifacts. Online methods make an update
    on every batch, whatever its size, and use its BatchNorm statistics. ``tensors`` adds to the
    learned tensors (source statistics); ``backbone`` is used instead of a new one.
    """

    def make(method, model, tensors=None, backbone=None, **options):
        if method in PER_IMAGE and tensors is None:
            split = options.get("split", -1)
            tensors = random_heads(method, model if backbone is None else backbone.model, split)
        if method in PER_IMAGE:
            options = {"copies": 4} | ({"steps": 2} if method == "ttt" else {}) | options
        if hasattr(get_method(method).config, "window"):
            options = {"window": 1, "statistics": "batch"} | options
        if method == "mgg":
            tensors = {f"memory.{n}": t for n, t in slow.items()} | (tensors or {})
        if backbone is None:
            return tp.wrap(model, method, tensors=tensors, **options)
        record = get_method(method)
        return tp.Adapter(backbone, record, record.config(**options), tensors=tensors)

    return make


@pytest.fixture(scope="session")
def moved():
    """``moved(net)`` -> whether any adapted parameter differs from the source."""

    def differs(net):
        source = dict(net.backbone.model.named_parameters())
        state = net.adaptation_state()
        return any(
            not torch.equal(t, source[n.removeprefix("params.model.")])
            for n, t in state.items()
            if n.startswith("params.")
        )

    return differs


@pytest.fixture(scope="session")
def same_tensors():
    """``same_tensors(a, b)``: equal keys, types and bits (NaN equal to itself)."""

    def same(a, b):
        return a.keys() == b.keys() and all(
            a[n].dtype == b[n].dtype
            and torch.equal(a[n].isnan(), b[n].isnan())
            and torch.equal(a[n].nan_to_num(), b[n].nan_to_num())
            for n in a
        )

    return same
