"""``wrap(model, "ttt", head="train", data=...)``: a rotation head for a finished model."""

import pytest
import torch

import ttt_plugins as tp
from ttt_plugins.train.joint import HeadRecipe, fit_rotation_head

QUICK = {"steps": 1, "copies": 2, "split": 1}


def rand(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


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
    assert {t.dtype for t in tensors.values()} == {torch.promote_types(dtype, torch.float32)}
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
