"""A classifier restricted to some of its classes, and sets of labels."""

import json

import pytest
import torch
from timm.data import ImageNetInfo
from torch import nn

import ttt_plugins as tp
from ttt_plugins.artifacts.saving import save_pretrained
from ttt_plugins.data.labels import LABEL_SETS, class_names, label_set, positions
from ttt_plugins.errors import ArtifactError, InputError

CHOSEN = [7, 2, 5, 0]


class Masked(nn.Module):
    """The same restriction by hand."""

    def __init__(self, model):
        super().__init__()
        self.model, self.pretrained_cfg = model, model.pretrained_cfg

    def forward(self, x):
        return self.model(x)[:, CHOSEN]


@pytest.mark.parametrize("method", ["source", "tent", "sar", "mgg", "ttt", "mt3"])
def test_adaptation_and_prediction_see_the_chosen_classes_only(
    method, make_model, make_net, images, slow
):
    options = {} if method in ("source", "ttt", "mt3") else {"lr": 0.05}
    model = make_model("batchnorm")
    ours = make_net(method, model, classes=CHOSEN, **options)
    assert ours.num_classes == len(CHOSEN)
    if method in ("ttt", "mt3"):  # their heads need to look into the model
        found = ours(images(4))
        whole = make_net(method, model, **options)(images(4))
        assert torch.equal(found, whole[:, CHOSEN])
        return
    by_hand = make_net(method, Masked(make_model("batchnorm")), **options)
    for seed in range(3):
        torch.testing.assert_close(ours(images(6, seed)), by_hand(images(6, seed)))
    if method != "source":
        whole = make_net(method, model, **options)
        for seed in range(3):
            moved = whole(images(6, seed))
        assert not torch.equal(moved[:, CHOSEN], ours(images(6, 2)))


def test_the_choice_is_kept_in_artifacts(make_model, tmp_path, images):
    model = make_model("batchnorm")
    net = tp.wrap(model, "tent", classes=CHOSEN, lr=0.05)
    expected = net(images(5))
    folder = save_pretrained(net, tmp_path / "saved")
    again = tp.from_pretrained(folder, backbone=make_model("batchnorm"))
    assert again.backbone.classes == tuple(CHOSEN)
    assert torch.equal(again(images(5)), expected)
    assert "classes: 4 of the model's" in again.describe()
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone"]["classes"] == CHOSEN
    for bad in ([], [1, 1], [-1], ["a"], 3, [True]):
        config["backbone"]["classes"] = bad
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ArtifactError, match="classes"):
            tp.from_pretrained(folder, backbone=make_model("batchnorm"))


def test_an_artifact_without_the_choice_says_nothing_of_it(make_model, tmp_path):
    folder = save_pretrained(tp.wrap(make_model("batchnorm"), "tent"), tmp_path / "saved")
    assert "classes" not in json.loads((folder / "config.json").read_text())["backbone"]


@pytest.mark.parametrize("bad", [[], [0, 0], [10], [-1], [1.5], [True]])
def test_impossible_choices_are_refused(bad, make_model):
    with pytest.raises(InputError, match="classes"):
        tp.wrap(make_model("batchnorm"), "tent", classes=bad)


def test_a_bare_module_tells_its_classes_with_its_first_logits(images):
    net = tp.wrap(
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), "source", mean=0, std=1, classes=[5]
    )
    with pytest.raises(InputError, match="position 5, but the model returned 4"):
        net(images(2))


def test_label_sets_are_timms():
    for name in ("imagenet-r", "imagenet-a"):
        chosen = positions(name)
        assert len(chosen) == 200
        assert [label_set("imagenet-1k")[i] for i in chosen] == list(label_set(name))
    assert label_set("imagenet-1k") == tuple(ImageNetInfo().label_names())
    assert LABEL_SETS == ("imagenet-1k", "imagenet-a", "imagenet-r")
    with pytest.raises(InputError, match="unknown set of labels 'imagenet-q'"):
        label_set("imagenet-q")
    with pytest.raises(InputError, match="is not a subset of"):
        positions("imagenet-r", "imagenet-a")


def test_class_names_are_the_images_own_or_timms():
    assert class_names(2, ["ant", "bee"]) == ["ant", "bee"]
    assert class_names(2, ["n01440764", "bee"]) == ["tench, Tinca tinca", "bee"]
    assert class_names(1000)[0] == "tench, Tinca tinca"
    assert class_names(1000, ["ant"])[0] == "tench, Tinca tinca"
    assert class_names(10) is None
    assert class_names(None, ["ant"]) is None
