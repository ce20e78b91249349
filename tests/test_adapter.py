"""The adapter as a module: options, copies, threads, states, and errors inside the model."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import PER_IMAGE

import ttt_plugins as tp


@pytest.mark.parametrize(
    "options",
    [
        {"device": "foo"},
        {"device": 10**6},
        {"device": "cuda:99"},
        {"seed": "x"},
        {"seed": 1.5},
        {"seed": 1 << 70},
        {"seed": -1},
        {"seed": True},
        {"tensors": "x"},
        {"tensors": {"memory.W1": 3}},
    ],
    ids=str,
)
def test_options_of_wrap(options, make_model):
    with pytest.raises(tp.InputError):
        tp.wrap(make_model("groupnorm"), "mgg", **options)


@pytest.mark.parametrize("method", ["source", "tent", "sar", "mgg", "ttt", "mt3"])
@pytest.mark.parametrize("batches", [0, 1])
def test_pickled_copies_go_on_alike(method, batches, make_model, make_net, images, same_tensors):
    few = {"steps": 1, "copies": 2} if method in PER_IMAGE else {}
    net = make_net(method, make_model("groupnorm"), **few)
    for seed in range(batches):
        net(images(2, seed))
    copies = pickle.loads(pickle.dumps(net)), copy.deepcopy(net)
    expected = net(images(2, 7))
    for twin in copies:
        assert torch.equal(twin(images(2, 7)), expected)
        assert same_tensors(twin.adaptation_state(), net.adaptation_state())


@pytest.mark.parametrize("method", ["source", "tent"])
def test_damaged_adaptation_states(method, make_model, images):
    net = tp.wrap(make_model("groupnorm"), method, **({"window": 1} if method == "tent" else {}))
    net(images(4))
    state = net.adaptation_state()
    with pytest.raises(tp.InputError, match="negative"):
        net.load_adaptation_state(state | {"batches": torch.tensor(-5)})
    for name in (n for n in state if n.startswith("params.")):
        with pytest.raises(tp.InputError, match="not finite"):
            net.load_adaptation_state(state | {name: state[name] * torch.nan})
    net.load_adaptation_state(state)


@pytest.mark.parametrize("statistics", ["batch", "mix"])
def test_threads_take_turns(statistics, make_model, images):
    """Every batch is adapted to once, as in some order one after another."""
    net = tp.wrap(make_model("batchnorm"), "mgg", window=1, statistics=statistics, guard=False)
    failures = []

    def go(seed):
        try:
            for size in (2, 3, 4):
                net(images(size, seed))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=go, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert net.batches == 9
    assert net.forwards == 27


@pytest.mark.parametrize("statistics", ["source", "batch", "mix"])
def test_the_state_dict_is_the_models(statistics, make_model, images, same_tensors):
    model = make_model("batchnorm")
    net = tp.wrap(model, "tent", window=1, statistics=statistics)
    for size in (1, 4):
        net(images(size))
        own = {n.removeprefix("model."): t for n, t in net.backbone.state_dict().items()}
        assert same_tensors(own, model.state_dict())


def test_logits_that_are_whole_numbers(images):
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.GroupNorm(1, 3)

        def forward(self, x):
            return self.norm(x).mean((2, 3)).long()

    net = tp.wrap(Counter(), "tent", window=1, normalize=False)
    with pytest.raises(tp.InputError, match="floating-point"):
        net(images(2))


def test_loading_weights_into_the_shared_model_is_refused(make_model):
    model = make_model("batchnorm")
    net = tp.wrap(model, "tent")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(tp.InputError, match="shares its model's weights"):
        net.load_state_dict({n: t + 1 for n, t in net.state_dict().items()})
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())


def test_the_seed_decides_the_weights_of_an_untrained_model(images):
    global_state = torch.get_rng_state()
    first, again, other = (
        tp.wrap("ttt_resnet26", "source", seed=seed)(images(2)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(global_state, torch.get_rng_state())


def test_a_models_own_fault_is_not_called_a_shape(images):
    class Faulty(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x):
            raise RuntimeError("out of coffee")

    net = tp.wrap(Faulty(), "tent", window=1, normalize=False)
    with pytest.raises(RuntimeError, match=r"^out of coffee$"):
        net(images(2))
