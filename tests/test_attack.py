"""What a user who tries everything meets: one readable error, or the right thing."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import PER_IMAGE

import ttt_plugins as tp
from ttt_plugins.core.gradient_memory import init_slow
from ttt_plugins.train.joint import HeadRecipe, fit_rotation_head

QUICK = {"steps": 1, "copies": 2, "split": 1}


def rand(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def _slow():
    slow = init_slow(torch.Generator().manual_seed(0))
    return {f"memory.{name}": tensor for name, tensor in slow.items()}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (rand(8, 3, 32, 32) * torch.nan, "NaN"),
        (rand(8, 3, 32, 32) * 255, "must lie in"),
        (rand(8, 3, 32, 32) * 4 - 2, "must lie in"),
        (rand(8, 1, 32, 32), "1 channels"),
        (rand(8, 4, 32, 32), "4 channels"),
        (rand(8, 3, 32, 32) > 0.5, "torch.bool"),
        (rand(8, 3, 32, 32).to(torch.complex64), "complex64"),
        (rand(8, 3, 32, 32).mul(255).int(), "int32"),
        ([rand(4, 3, 32, 32), rand(4, 3, 32, 32).mul(255).byte()], "one tensor"),
        ([rand(4, 3, 32, 32), rand(4, 3, 16, 16)], "one tensor"),
        ([{"image": rand(4, 3, 32, 32)}], "got dict"),
        ([()], "got tuple"),
    ],
)
def test_images_for_a_head(data, said, make_model):
    with pytest.raises(tp.InputError, match=said):
        tp.wrap(make_model("groupnorm"), "ttt", head="train", data=data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_head_for_a_model_of_another_precision(dtype, make_model):
    model = make_model("batchnorm").to(dtype)
    recipe = HeadRecipe(epochs=3, batch_size=4, split=1)
    config = tp.TTT(**QUICK)
    net, log = fit_rotation_head(model, rand(16, 3, 32, 32), recipe, config=config, progress=False)
    tensors = net.learned_tensors()
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert all(torch.isfinite(t).all() for t in tensors.values())
    losses = [entry["rotation_loss"] for entry in log["epochs"]]
    assert losses[-1] < losses[0]
    net(rand(2, 3, 32, 32).to(dtype))
    assert net.skipped_updates == 0


def test_a_head_that_diverges(make_model):
    recipe = HeadRecipe(epochs=2, batch_size=4, split=1, lr=1e30)
    with pytest.raises(tp.InputError, match="diverged"):
        fit_rotation_head(make_model("groupnorm"), rand(16, 3, 32, 32), recipe, progress=False)


def test_a_config_that_does_not_fit_comes_before_the_work(make_model, monkeypatch):
    monkeypatch.setattr("ttt_plugins.methods.ttt_head.rotation_logits", None)  # no step is made
    with pytest.raises(tp.InputError, match="selects nothing"):
        tp.wrap(
            make_model("groupnorm"), "ttt", head="train", data=rand(8, 3, 32, 32), params="nope"
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_head_is_trained_in_any_mode(mode, make_model, same_tensors):
    model, config = make_model("groupnorm"), tp.TTT(**QUICK)
    with mode():
        net = tp.wrap(model, config, head="train", data=rand(8, 3, 32, 32))
        logits = net(rand(2, 3, 32, 32))
    usual = tp.wrap(model, config, head="train", data=rand(8, 3, 32, 32))
    assert same_tensors(net.learned_tensors(), usual.learned_tensors())
    assert torch.equal(logits, usual(rand(2, 3, 32, 32)))


def test_no_head_on_random_weights():
    with pytest.raises(tp.InputError, match="random weights"):
        tp.wrap("ttt_resnet26", "ttt", head="train", data=rand(8, 3, 32, 32))


def test_a_head_of_other_weights_says_what_to_do(make_model, tmp_path):
    net = tp.wrap(make_model("groupnorm"), tp.TTT(**QUICK), head="train", data=rand(8, 3, 32, 32))
    folder = net.save_pretrained(tmp_path / "head")
    with pytest.raises(tp.ArtifactError, match='head="train"'):
        tp.wrap(make_model("batchnorm"), "ttt", head=folder)


@pytest.mark.parametrize("loader", [None, 3, [{"image": rand(4, 3, 32, 32)}], [()]])
def test_loaders_of_clean_images(loader, make_model):
    net = tp.wrap(make_model("groupnorm"), "mgg")
    with pytest.raises(tp.InputError, match="loader"):
        net.fit_source_statistics(loader)


def test_clean_images_in_a_folder_that_is_not_there(make_model):
    net = tp.wrap(make_model("groupnorm"), "mgg")
    with pytest.raises(tp.DataError, match="abc: no such file or folder"):
        net.fit_source_statistics("abc")


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


def test_what_is_saved_beside_an_adapter(make_model, tmp_path):
    net = tp.wrap(make_model("groupnorm"), "tent")
    for records in ({"training": {"a": torch.ones(1)}}, {"training": 3}, {"card": 3}):
        with pytest.raises(tp.ArtifactError, match="JSON"):
            net.save_pretrained(tmp_path / "net", **records)
    broken = tp.wrap(
        make_model("groupnorm"), "mgg", tensors={n: t.clone() for n, t in _slow().items()}
    )
    broken._tensors["memory.W1"].fill_(torch.nan)
    with pytest.raises(tp.ArtifactError, match="not finite"):
        broken.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()
    with pytest.raises(tp.InputError, match="org/name"):
        net.push_to_hub(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["tent", "sar", "mgg"])
def test_another_precision_in_the_middle_of_a_stream(method, dtype, make_model, images):
    net = tp.wrap(make_model("batchnorm"), method, window=1)
    net(images(4))
    net.to(dtype)
    assert torch.isfinite(net(images(4, 1).to(dtype))).all()
    assert net.batches == 2
    assert net.skipped_updates == 0
    fresh = tp.wrap(make_model("batchnorm").to(dtype), method, window=1)
    fresh(images(4).to(dtype))
    kinds = [{k: t.dtype for k, t in n.adaptation_state().items()} for n in (net, fresh)]
    assert kinds[0] == kinds[1]


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
    net = tp.wrap(make_model("batchnorm"), "mgg", window=1, statistics=statistics)
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
