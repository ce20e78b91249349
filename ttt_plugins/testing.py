"""The contract of every method, as checks that any package can run on its own method.

    >>> from ttt_plugins.testing import check_method
    >>> check_method("signsgd")       # or a config object, or your own model

Each check, called a law, takes ``build``, which creates an adapter around ``build.model``, always
the same except for the fields that it is given, and ``images``, which returns images in [0, 1]:
``(n, seed) -> (n, C, H, W)``.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .adapter import Adapter
from .core.registry import get_method
from .errors import InputError
from .wrapping import from_pretrained, wrap

__all__ = ["LAWS", "check_method", "tiny_model"]

Build = Callable[..., Adapter]
Images = Callable[[int, int], Tensor]

_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "batchnorm": ("ttt_resnet26_bn", {"width": 8, "depth": 8}),
    "groupnorm": ("ttt_resnet26", {"width": 8, "depth": 8, "groups": 4}),
    "layernorm": ("ttt_vit_tiny_patch4_32", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
}


def tiny_model(kind: str, seed: int = 0) -> nn.Module:
    """A small untrained classifier of images (B, 3, 32, 32) into 10 classes, in eval mode.

    Args:
        kind: kind of its norm layers: ``"batchnorm"``, ``"groupnorm"`` or ``"layernorm"``.
        seed: seed for its weights.
    """
    arch, options = _TINY[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(arch, num_classes=10, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms start at one and zero and classifiers near zero, which would hide errors.
                parameter.add_(0.2 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model.eval()


def _images(shape: tuple[int, int, int]) -> Images:
    def draw(n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        level = torch.rand(n, shape[0], 1, 1, generator=generator)
        return 0.5 * level + 0.5 * torch.rand(n, *shape, generator=generator)

    return draw


def stream(net: Adapter, images: Images, seeds, n: int = 4) -> list[Tensor]:
    """The logits of one batch after the other, with one seed for each."""
    return [net(images(n, seed)) for seed in seeds]


def all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether two streams' logits are the same, bit for bit."""
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states have equal names, types and bits; NaN is equal to itself."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and torch.equal(a[n].isnan(), b[n].isnan())
        and torch.equal(a[n].nan_to_num(), b[n].nan_to_num())
        for n in a
    )


def it_adapts(build: Build, images: Images) -> None:
    """The state or the predictions change; otherwise most laws would hold trivially."""
    net = build()
    fresh = net.adaptation_state()
    del fresh["batches"]
    logits = stream(net, images, range(3))
    with torch.no_grad():
        plain = [net.backbone(images(4, seed)) for seed in range(3)]
    still = all(torch.equal(t, fresh[n]) for n, t in net.adaptation_state().items() if n in fresh)
    assert not still or not all_equal(logits, plain), "nothing moved"


def gradient_modes_do_not_matter(build: Build, images: Images) -> None:
    """The same logits under ``no_grad``, ``inference_mode`` and with gradients, and no graph."""
    expected = stream(build(), images, range(3))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        net = build()
        with mode():
            logits = stream(net, images, range(2))  # images made inside, too
        logits += stream(net, images, [2])
        assert all_equal(logits, expected), mode.__name__
        assert not any(z.requires_grad for z in logits), mode.__name__


def train_mode_is_eval_mode(build: Build, images: Images) -> None:
    """``train()`` and ``eval()`` change nothing."""
    expected = stream(build(), images, range(3))
    net = build().train()
    logits = stream(net, images, [0])
    logits += stream(net.eval(), images, [1])
    logits += stream(net.train(), images, [2])
    assert all_equal(logits, expected)


def a_batch_of_one_is_a_batch(build: Build, images: Images) -> None:
    """Single images give finite logits and parameters, and no update is skipped."""
    net = build()
    for seed in range(3):
        logits = net(images(1, seed))
        assert logits.ndim == 2
        assert len(logits) == 1
        assert torch.isfinite(logits).all()
    state = net.adaptation_state().items()
    assert all(torch.isfinite(t).all() for n, t in state if n.startswith("params."))
    assert net.skipped_updates == 0


def a_rate_of_zero_is_the_plain_model(build: Build, images: Images) -> None:
    """With ``lr=0`` the logits are those of the model without adaptation, bit for bit."""
    probe = build()
    if not hasattr(probe.config, "lr"):
        return
    still = [build(lr=0.0)]
    if hasattr(probe.config, "window"):
        still.append(build(lr=0.0, window=4))
    source = get_method("source")
    for net in still:
        # With the backbone's statistics. A method that adapts image by image rounds as for one.
        plain, alone = (Adapter(probe.backbone, source, source.config()) for _ in range(2))
        for n in (4, 1, 3, 3):
            x, logits = images(n, n), net(images(n, n))
            single = torch.cat([alone(image[None]) for image in x])
            assert torch.equal(logits, plain(x)) or torch.equal(logits, single)


def reset_is_bit_for_bit(build: Build, images: Images) -> None:
    """``reset()`` gives the state and the stream of a new adapter."""
    net = build()
    first = stream(net, images, range(3))
    net.reset()
    assert same_state(net.adaptation_state(), build().adaptation_state())
    assert all_equal(stream(net, images, range(3)), first)


def _goes_on(build: Build, batches: list[Tensor], stops: Iterable[int], **fields: Any) -> None:
    """A stream that is cut, saved and resumed is the unbroken one, in logits and state."""
    unbroken = build(**fields)
    expected = [unbroken(x) for x in batches]
    for stop in stops:
        before, after = build(**fields), build(**fields)
        logits = [before(x) for x in batches[:stop]]
        after.load_adaptation_state(dict(sorted(before.adaptation_state().items())))
        logits += [after(x) for x in batches[stop:]]
        assert all_equal(logits, expected), stop
        assert same_state(after.adaptation_state(), unbroken.adaptation_state()), stop


def a_stream_stops_and_goes_on(build: Build, images: Images) -> None:
    """A new adapter continues from a saved state, its names in any order, bit for bit."""
    _goes_on(build, [images(4, seed) for seed in range(4)], (0, 1, 3))


def a_saved_adapter_is_the_same(build: Build, images: Images) -> None:
    """``from_pretrained`` restores config, learned tensors and stream of ``save_pretrained``."""
    net = build()
    expected = stream(net, images, range(3))
    with tempfile.TemporaryDirectory() as work:
        folder = net.save_pretrained(Path(work) / "artifact")
        loaded = from_pretrained(folder, backbone=build.model, seed=net.seed)
    assert (loaded.method, loaded.config) == (net.method, net.config)
    assert same_state(loaded.learned_tensors(), net.learned_tensors())
    assert all_equal(stream(loaded, images, range(3)), expected)


def the_wrapped_model_is_untouched(build: Build, images: Images) -> None:
    """Weights, buffers, modes, gradients and hooks of the user's model do not change."""

    def looks(model: nn.Module) -> list:
        return [
            [(n, id(t), t.requires_grad) for n, t in model.named_parameters()],
            [(n, id(t)) for n, t in model.named_buffers()],
            [
                (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
                for n, m in model.named_modules()
            ],
        ]

    model = build.model
    tensors, seen = {n: t.clone() for n, t in model.state_dict().items()}, looks(model)
    net = build()
    stream(net, images, range(3))
    net.export()
    net.reset()
    assert same_state(model.state_dict(), tensors)
    assert looks(model) == seen
    assert all(p.grad is None for p in model.parameters())


def the_seed_decides(build: Build, images: Images) -> None:
    """The same seed gives the same logits; torch's global generator is not used."""
    expected = stream(build(seed=3), images, range(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        assert all_equal(stream(build(seed=3), images, range(3)), expected)
        assert torch.equal(torch.get_rng_state(), before)


def an_error_changes_nothing(build: Build, images: Images) -> None:
    """After an exception inside the model the stream continues as if nothing had happened."""
    expected = stream(build(), images, range(3))
    net = build()
    logits = stream(net, images, range(2))

    def fail(*_: Any) -> None:
        raise KeyError("a law of ttt_plugins.testing")

    handle = net.backbone.model.register_forward_hook(fail)
    try:
        net(images(4, 7))
    except KeyError:
        pass
    else:
        raise AssertionError("an exception inside the model was swallowed")
    finally:
        handle.remove()
    assert all_equal(logits + stream(net, images, [2]), expected)


def a_full_window_is_one_update(build: Build, images: Images) -> None:
    """A batch of at least ``window`` images is one update; smaller ones are collected for one."""
    if not hasattr(build().config, "window"):
        return
    whole = images(8, 0)
    at_once = build(window=1)
    logits = at_once(whole)
    for window in (5, 8):
        net = build(window=window)
        assert torch.equal(net(whole), logits), f"{window=}, a batch of 8"
        assert same_state(net.adaptation_state(), at_once.adaptation_state()), window
    expected = _moved(at_once)
    for size in (1, 2, 4):
        net = build(window=8)
        fresh = _moved(net)
        for part in whole.split(size):
            assert same_state(_moved(net), fresh), f"batches of {size}: an update before the 8th"
            net(part)
        # A running estimate adds images batch by batch, which rounds differently.
        if net.backbone.statistics.kind != "stream":
            assert same_state(_moved(net), expected), f"batches of {size}: another update"
        assert not any(n.startswith("window.") for n in net.adaptation_state()), size


def _moved(net: Adapter) -> dict[str, Tensor]:
    """The part of a state that an update changes: parameters and the rule's state."""
    state = net.adaptation_state()
    return {n: t for n, t in state.items() if n.startswith(("params.", "rule."))}


def smaller_batches_are_predicted_at_once(build: Build, images: Images) -> None:
    """Until a window is full, predictions are those of the present parameters."""
    if not hasattr(build().config, "window"):
        return
    net, source = build(window=8), get_method("source")
    plain = Adapter(net.backbone, source, source.config())  # on the backbone's statistics
    for seed, n in enumerate((3, 1, 3)):
        assert torch.equal(net(images(n, seed)), plain(images(n, seed))), n
    assert net.backwards == 0
    exported = net.export()
    net(images(3, 3))
    assert net.backwards % 8 == 0
    assert net.backwards > 0
    with torch.no_grad():
        before = exported(images(2, 4))
    assert not torch.equal(net(images(2, 4)), before), "the update does not show"


def a_window_stops_and_goes_on(build: Build, images: Images) -> None:
    """A stream that is saved and resumed anywhere in a window is the uninterrupted one."""
    if not hasattr(build().config, "window"):
        return
    sizes = (3, 2, 6, 1, 3, 2)
    _goes_on(build, [images(n, seed) for seed, n in enumerate(sizes)], range(6), window=5)


def the_guard_watches(build: Build, images: Images) -> None:
    """One picture for ever trips the guard, which says so once and is part of the state."""
    if not getattr(build().config, "guard", False):
        return
    picture = images(1, 0).repeat(16, 1, 1, 1)
    net, resumed = build(window=16), build(window=16)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        stream(net, lambda *_: picture, range(15))
    assert {event.reason for event in net.guard_events} == {"one class"}, net.guard_events
    assert sum("guard_events" in str(w.message) for w in told) == 1
    resumed.load_adaptation_state(net.adaptation_state())
    assert (resumed.guard_events, resumed.health()) == (net.guard_events, net.health())
    net.reset()
    assert net.guard_events == []


#: All laws by name.
LAWS: dict[str, Callable[[Build, Images], None]] = {
    law.__name__: law
    for law in (
        it_adapts,
        gradient_modes_do_not_matter,
        train_mode_is_eval_mode,
        a_batch_of_one_is_a_batch,
        a_rate_of_zero_is_the_plain_model,
        reset_is_bit_for_bit,
        a_stream_stops_and_goes_on,
        a_saved_adapter_is_the_same,
        the_wrapped_model_is_untouched,
        the_seed_decides,
        an_error_changes_nothing,
        a_full_window_is_one_update,
        smaller_batches_are_predicted_at_once,
        a_window_stops_and_goes_on,
        the_guard_watches,
    )
}


class _Build:
    """Creates adapters for the laws; ``model`` is the classifier."""

    def __init__(self, model: nn.Module, method: Any, options: dict[str, Any]):
        self.model, self.method = model, method
        # Most laws need an update on every batch, and their batches are small.
        self.options: dict[str, Any] = options
        if hasattr(get_method(method).config, "window"):
            self.options = {"window": 1, **options}

    def __call__(self, **overrides: Any) -> Adapter:
        with warnings.catch_warnings():
            # A plain module does not declare its normalisation, which does not matter here.
            warnings.filterwarnings("ignore", ".*does not say how its input")
            return wrap(self.model, self.method, **(self.options | overrides))


def check_method(
    method: str | Any,
    *,
    model: nn.Module | None = None,
    tensors: dict[str, Tensor] | Callable[[nn.Module], dict[str, Tensor]] | None = None,
    input_size: tuple[int, int, int] = (3, 32, 32),
    **options: Any,
) -> list[str]:
    """Check that a method keeps all laws, in about a second for each network.

    Args:
        method: a name from `list_methods()` or a config object.
        model: the classifier; by default three small ones with BatchNorm, GroupNorm and LayerNorm.
        tensors: learned tensors by name, or a function of the model that returns them.
        input_size: size (C, H, W) of the images that ``model`` accepts.
        **options: options as for `ttt_plugins.wrap`: fields of the config, seed, mean, std,
            normalize. A method whose config has a field ``window`` is checked with updates on every
            batch and with updates on windows.

    Returns:
        the laws that hold, each as ``"<law> on <network>"``.

    Raises:
        AssertionError: a law is broken; the message names it and the network.
        InputError: unknown method or field.
    """
    record = get_method(method)
    if record.build is None:
        raise InputError(f"{record.name} does not adapt; there is nothing to check")
    models = {type(model).__name__: model} if model else {k: tiny_model(k) for k in _TINY}
    held = []
    for name, network in models.items():
        learned = {"tensors": tensors(network) if callable(tensors) else tensors}
        build = _Build(network, method, options | learned)
        for law, check in LAWS.items():
            try:
                check(build, _images(input_size))
            except AssertionError as error:
                what = f" ({error})" if str(error) else ""
                raise AssertionError(f"{record.name} on {name}: not {law}{what}") from error
            held.append(f"{law} on {name}")
    return held
