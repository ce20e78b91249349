"""Threads, forks, interrupts, and models that write their own weights in a forward pass."""

import copy
import multiprocessing
import pickle
import sys
import threading

import pytest
import torch
from torch import nn
from torch.backends import cuda

import ttt_plugins as tp
from ttt_plugins.artifacts.tensor_files import fingerprint
from ttt_plugins.utils.attention import plain_attention


def kernels():
    named = ("flash", "mem_efficient", "cudnn", "math")
    return [getattr(cuda, f"{name}_sdp_enabled")() for name in named]


def of(net):
    """Everything a forward pass may and may not change of an adapter's model."""
    return {n: t.clone() for n, t in net.state_dict().items()}


# -- readers in other threads --------------------------------------------------------------


def snapshot(net):
    return net.adaptation_state()


def copied(net):
    return copy.deepcopy(net).adaptation_state()


def pickled(net):
    return pickle.loads(pickle.dumps(net)).adaptation_state()


def exported(net):
    return {n: t.clone() for n, t in net.export().state_dict().items()}


def weights(net):
    return {"fingerprint": fingerprint(net.backbone.source_state_dict())} | of(net)


def frozen(found):
    """Values that can be compared and hashed."""
    return tuple(
        (n, t.numpy().tobytes() if isinstance(t, torch.Tensor) else t) for n, t in found.items()
    )


@pytest.mark.parametrize("read", [snapshot, copied, pickled, exported, weights])
def test_a_reader_beside_an_adapting_thread_sees_what_is_true_between_two_batches(
    read, make_net, make_model, images
):
    """Each reading equals that of an adapter after some number of whole batches."""
    batches = [images(4, seed) for seed in range(12)]

    def build():
        return make_net("tent", make_model("batchnorm"), lr=0.05, statistics="mix")

    alone, true = build(), set()
    true.add(frozen(read(alone)))
    for batch in batches:
        alone(batch)
        true.add(frozen(read(alone)))
    net, seen = build(), []
    thread = threading.Thread(target=lambda: [net(batch) for batch in batches])
    thread.start()
    while thread.is_alive():
        seen.append(frozen(read(net)))
    thread.join()
    assert len(seen) > 3
    assert set(seen) <= true


def test_saving_beside_an_adapting_thread_keeps_the_fingerprint(
    make_net, make_model, images, tmp_path
):
    net = make_net("mgg", make_model("batchnorm"), statistics="mix")
    net.save_pretrained(tmp_path / "before")
    expected = (tmp_path / "before" / "config.json").read_bytes()
    stop = threading.Event()

    def adapt():
        while not stop.is_set():
            net(images(4))

    thread = threading.Thread(target=adapt)
    thread.start()
    try:
        for _ in range(8):
            net.save_pretrained(tmp_path / "now")
            assert (tmp_path / "now" / "config.json").read_bytes() == expected
    finally:
        stop.set()
        thread.join()


def test_writers_beside_an_adapting_thread(make_net, make_model, images):
    """Reset, load and a change of precision in another thread never meet a batch half-way."""
    net, x = make_net("tent", make_model("layernorm"), lr=0.05), images(4)
    source = net(x)
    state = net.adaptation_state()
    net.reset()
    errors, stop = [], threading.Event()

    def adapt():
        try:
            while not stop.is_set():
                assert net(x).isfinite().all()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=adapt)
    thread.start()
    for _ in range(10):
        net.double()
        net.reset()
        net.float()
        net.load_adaptation_state(state)
    stop.set()
    thread.join()
    assert not errors
    net.reset()
    assert torch.equal(net(x), source)


def _predict(net, x, connection):
    connection.send(net(x).tolist())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_in_mid_forward_predicts(make_net, make_model, images):
    net, x = make_net("tent", make_model("batchnorm"), lr=0.05, statistics="mix"), images(4)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(20)

    expected = make_net("tent", make_model("batchnorm"), lr=0.05, statistics="mix")(x)
    net.backbone.model.head.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: net(images(4, 1)))
    thread.start()
    assert inside.wait(20)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_predict, args=(net, x, theirs))
    child.start()
    try:
        assert ours.poll(20), "the child waits for a thread that it does not have"
        assert torch.equal(torch.tensor(ours.recv()), expected)
    finally:
        child.kill()
        go_on.set()
        thread.join()


# -- interrupts ----------------------------------------------------------------------------


#: The files in which a pass begins and ends.
_TRACED = ("adapter", "hooked", "scope", "window", "online", "per_image", "attention")
_TRACED = tuple(f"{name}.py" for name in (*_TRACED, "functional_call", "stateless"))


def interrupted(act, at):
    """Run with a KeyboardInterrupt before the n-th line executed in some files."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.endswith(_TRACED):
            return None
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("source", "batchnorm", {"statistics": "stream"}),
        ("mgg", "batchnorm", {"statistics": "mix"}),
        ("ttt", "layernorm", {"chunk_size": 2, "copies": 2, "steps": 1}),
    ],
)
def test_an_interrupt_anywhere_leaves_the_state_before_or_after_the_batch(
    method, kind, options, make_net, make_model, images, same_tensors
):
    model = make_model(kind)
    before, after = (make_net(method, model, **options) for _ in range(2))
    first, second, third = (images(2, seed) for seed in range(3))
    before(first)
    after(first)
    after(second)
    states = [net.adaptation_state() for net in (before, after)]
    logits = [net(third) for net in (before, after)]
    weights = of(before)
    switches = kernels()
    net = make_net(method, model, **options)
    at, tried = 1, 0
    while True:
        net.reset()
        net(first)
        if not interrupted(lambda: net(second), at):
            break
        tried += 1
        at += 1 + at // 8
        assert same_tensors(of(net), weights), at
        assert any(same_tensors(net.adaptation_state(), state) for state in states), at
        which = [same_tensors(net.adaptation_state(), state) for state in states].index(True)
        assert torch.equal(net(third), logits[which]), at
        assert kernels() == switches, at
        assert torch.is_grad_enabled()
        with torch.autograd.graph.saved_tensors_hooks(*2 * [lambda tensor: tensor]):
            pass  # would be refused
    assert tried > 30


# -- torch's switches ----------------------------------------------------------------------


def test_overlapping_blocks_leave_the_kernels_as_they_were():
    before = kernels()
    cuda.enable_mem_efficient_sdp(False)
    try:
        chosen = kernels()
        first, second = plain_attention(), plain_attention()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert kernels() == [False, False, False, True]
        second.__exit__(None, None, None)
        assert kernels() == chosen
    finally:
        cuda.enable_mem_efficient_sdp(before[1])


class Encoder(nn.Module):
    """PyTorch's own attention, which has a fused path for inference, with dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.3, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layer(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def test_two_threads_leave_torch_as_it_was(images):
    """Adapters of several kinds in threads; fused attention is neither used nor switched off."""
    torch.manual_seed(0)
    model = Encoder().eval()
    x = images(3)
    still = tp.wrap(model, "tent", lr=0.0, window=1, normalize=False)
    plain = tp.wrap(model, "source", normalize=False)
    before = [*kernels(), torch.backends.mha.get_fastpath_enabled()]
    assert before[-1]
    seen, results = set(), []

    def watch(*_):
        seen.add(torch.backends.mha.get_fastpath_enabled())

    still.backbone.model.head.register_forward_hook(watch)

    def adapt(net):
        results.extend(net(x) for _ in range(10))

    threads = [threading.Thread(target=adapt, args=(net,)) for net in (still, plain)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {True}
    assert all(torch.equal(logits, results[0]) for logits in results)
    assert torch.allclose(results[0], model(x), atol=1e-5)
    assert [*kernels(), torch.backends.mha.get_fastpath_enabled()] == before
    assert model.layer.self_attn.dropout == 0.3
    # Exported, moved and asked to train, it still is the same function.
    # Without gradients for its weights, for which torch 2.14 has a kernel that rounds otherwise.
    assert torch.equal(plain.train().export().train().requires_grad_(False)(x), results[0])


# -- models that write their own weights ---------------------------------------------------


class Counting(nn.Module):
    """Counts its passes in a buffer, which is part of what it returns."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, 3)
        self.head = nn.Linear(3, 4)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return self.head(self.norm(x).mean((2, 3))) + self.passes


class Rebinding(Counting):
    """The same with a new tensor each time."""

    def forward(self, x):
        self.passes = self.passes + 1
        return self.head(self.norm(x).mean((2, 3))) + self.passes


class Numpy(Counting):
    """Past torch's own operations."""

    def forward(self, x):
        self.passes.numpy()[...] += 1
        return self.head(self.norm(x).mean((2, 3))) + self.passes


class ActNorm(Counting):
    """Initialises its norm from the first batch that it sees (Glow, arXiv 1807.03039)."""

    def forward(self, x):
        if not self.passes:
            self.norm.weight.data.copy_(1 / (x.std((0, 2, 3)) + 1e-6))
            self.norm.bias.data.copy_(-x.mean((0, 2, 3)))
            self.passes.fill_(1)
        scale, shift = self.norm.weight.view(1, 3, 1, 1), self.norm.bias.view(1, 3, 1, 1)
        return self.head(((x + shift) * scale).square().mean((2, 3)))


class Clamped(Counting):
    """Clamps an adapting weight in every pass."""

    def forward(self, x):
        self.norm.weight.data.clamp_(0.2, 0.9)
        return self.head(self.norm(x).square().mean((2, 3)))


class Training(Counting):
    """BatchNorm that always updates its running statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        norm = self.norm
        x = nn.functional.batch_norm(x, self.mean, self.var, norm.weight, norm.bias, training=True)
        return self.head(x.square().mean((2, 3)) + self.mean)


WRITING = [Counting, Rebinding, Numpy, ActNorm, Clamped, Training]


@pytest.mark.parametrize("kind", WRITING)
@pytest.mark.parametrize("method", ["source", "tent", "sar", "ttt"])
def test_a_model_that_writes_its_weights_is_as_it_was(kind, method, same_tensors):
    torch.manual_seed(0)
    model = kind().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    options = {"normalize": False} | ({} if method in ("source", "ttt") else {"window": 1})
    if method in ("tent", "sar"):
        options["lr"] = 0.1
    if method == "ttt":
        head = {"head.weight": torch.randn(4, 3), "head.bias": torch.zeros(4)}
        options |= {"tensors": head, "copies": 4, "lr": 0.1, "params": "all", "split": "end"}
    net = tp.wrap(model, method, **options)
    batches = [torch.rand(4, 3, 8, 8) for _ in range(3)]
    first = [net(x) for x in batches]
    net.reset()
    assert all(torch.equal(net(x), logits) for x, logits in zip(batches, first, strict=True))
    assert same_tensors(model.state_dict(), before)
    assert same_tensors(net.backbone.source_state_dict(), before)
    alone = tp.wrap(model, "source", normalize=False)(batches[0])
    with torch.no_grad():
        assert torch.equal(alone, copy.deepcopy(model)(batches[0]))
    if method == "tent":
        assert not torch.equal(net.export().state_dict()["model.norm.bias"], before["norm.bias"])


def test_what_is_written_is_copied_and_nothing_else(make_net, make_model, images):
    net = tp.wrap(Clamped().eval(), "tent", normalize=False)
    seen = set()
    net.backbone.model.head.register_forward_hook(lambda m, *_: seen.add(m.weight.data_ptr()))
    assert net.backbone.written is None
    net(torch.rand(2, 3, 8, 8))
    assert net.backbone.written == ("norm.weight",)
    assert seen == {net.backbone.model.head.weight.data_ptr()}
    net = make_net("tent", make_model("batchnorm"))
    net(images(2))
    assert net.backbone.written == ()


class Watched(Counting):
    """Uses what a hook of its own has kept, as feature extractors do."""

    def __init__(self):
        super().__init__()
        self.norm.register_forward_hook(self.keep)
        self.kept = None

    def keep(self, _, __, output):
        self.kept = output

    def forward(self, x):
        self.norm(x)
        return self.head(self.kept.square().mean((2, 3)))


def test_hooks_of_the_model_and_later_ones_are_run():
    """A method of the model belongs to the copy that runs, a later hook sees every batch."""
    model, seen = Watched().eval(), []
    net = tp.wrap(model, "tent", window=1, lr=0.1, normalize=False)
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    model.kept = None
    assert torch.equal(net(x), expected)
    handle = net.backbone.model.head.register_forward_hook(lambda *_: seen.append(1))
    moved = net(x)
    handle.remove()
    assert not torch.equal(moved, expected)
    net(x)
    assert len(seen) == 1
    assert model.kept is None
    again = tp.wrap(net.export(), "source", normalize=False)
    assert torch.equal(again(x), net.export()(x))


def test_weights_are_shared_with_a_model_that_is_trained_on():
    """As `wrap` says."""
    model, x = Counting().eval(), torch.rand(2, 3, 8, 8)
    nets = [tp.wrap(m, "tent", normalize=False) for m in (model, copy.deepcopy(model))]
    before = [net(x) for net in nets]
    with torch.no_grad():
        model.head.bias.add_(1)
    after = []
    for net in nets:
        net.reset()
        after.append(net(x))
    assert torch.allclose(after[0], before[0] + 1)
    assert torch.equal(after[1], before[1])


class Itself(Counting):
    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_that_copies_itself_as_itself_is_refused(inside):
    model = Itself()
    with pytest.raises(tp.InputError, match=r"Itself.*__deepcopy__"):
        tp.wrap(nn.Sequential(nn.Identity(), model) if inside else model, "tent", normalize=False)
    assert not model._forward_hooks
    assert model.training
