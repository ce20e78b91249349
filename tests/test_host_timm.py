"""Adapters under timm's scripts: the loader, the warm-up and the loop of its validate.py."""

import runpy
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config

import ttt_plugins as tp
import ttt_plugins.hosts.timm_models  # registers the name ttt_plugins
from ttt_plugins.hosts.timm_models import TimmModel, run_script

MGG = "bundled:mgg-resnet26-cifar10"


@pytest.fixture
def folder(tmp_path):
    """A folder as validate.py takes it, of twelve images in three classes."""
    draw = np.random.default_rng(0)
    for i in range(12):
        place = tmp_path / "validation" / f"class_{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8)).save(place / f"{i}.png")
    return tmp_path


def loader_of(folder, model, **arguments):
    """What validate.py reads images with: it normalises as the model's configuration says."""
    config = resolve_data_config(arguments, model=model, use_test_size=True)
    loader = create_loader(
        create_dataset("", root=str(folder), split="validation"),
        input_size=config["input_size"],
        batch_size=4,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=1,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=torch.device("cpu"),
    )
    return loader, config


def validate(model, folder, **arguments):
    """validate.py's own steps: eval mode, inference mode, random numbers first, then the images."""
    loader, config = loader_of(folder, model, **arguments)
    model.eval()
    with torch.inference_mode():
        model(torch.randn((4, *config["input_size"])))
        return [model(images) for images, _ in loader], loader


def test_validate_predicts_as_the_adapter_does_on_its_own(folder):
    model = timm.create_model("ttt_plugins", pretrained=True, num_classes=None, adapter=MGG)
    assert model.num_classes == 10
    outputs, loader = validate(model, folder)
    net = tp.from_pretrained(MGG)
    expected = [net(images) for images, _ in loader]
    assert all(map(torch.equal, outputs, expected))
    assert model.net.batches == net.batches == len(loader)


def test_an_adapter_by_itself_refuses_the_warm_up(folder):
    with pytest.raises(tp.InputError, match="must lie in"):
        validate(tp.from_pretrained(MGG), folder)


def test_a_second_normalisation_is_refused(folder):
    model = timm.create_model("ttt_plugins", adapter=MGG)
    with pytest.raises(tp.InputError, match="must lie in"):
        validate(model, folder, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def test_a_classifier_and_a_method(images):
    """As create_model passes on what validate.py's --model-kwargs say."""
    fields = {"method": "tent", "lr": 0.002, "seed": 3, "warm_up": False}
    model = timm.create_model("ttt_plugins", classifier="resnet10t", in_chans=3, **fields)
    net = tp.wrap("resnet10t", "tent", lr=0.002, seed=3)
    own = timm.get_pretrained_cfg("resnet10t").to_dict()
    assert model.pretrained_cfg["input_size"] == own["input_size"] == net.input_size
    assert model.pretrained_cfg["crop_pct"] == own["crop_pct"]
    assert torch.equal(model(images(2)), net(images(2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give adapter=NAME"),
        ({"classifier": "ttt_resnet26"}, "give adapter=NAME"),
        ({"adapter": MGG, "classifier": "ttt_resnet26", "method": "tent"}, "give adapter=NAME"),
        ({"adapter": MGG, "num_classes": 7}, "num_classes=10, not 7"),
        ({"adapter": MGG, "in_chans": 1}, "in_chans=3, not 1"),
        ({"adapter": MGG, "colour": 1}, "no field 'colour'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(tp.InputError, match=message):
        timm.create_model("ttt_plugins", **arguments)


def test_a_model_without_a_configuration(images):
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    module = torch.nn.Sequential(*layers)
    net = tp.wrap(module, "source", normalize=False)
    model = TimmModel(net, warm_up=False)
    assert model.pretrained_cfg == {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    assert torch.equal(model(images(2)), net(images(2)))


def test_a_script_is_run_with_the_name_known(tmp_path):
    """Arguments in validate.py's form, model-kwargs read as it reads them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import argparse, neighbour, timm, timm.utils\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--model')\n"
        "parser.add_argument('--model-kwargs', nargs='*', action=timm.utils.ParseKwargs)\n"
        "args = parser.parse_args()\n"
        "if __name__ == '__main__':\n"
        "    model = timm.create_model(args.model, pretrained=True, **args.model_kwargs)\n"
        "    print(model.net.config)\n"
    )
    (tmp_path / "neighbour.py").write_text("")
    kwargs = ("--model-kwargs", f"adapter='{MGG}'", "lr=0.004")

    def run():
        sys.argv = ["timm_models", str(script), "--model", "ttt_plugins", *kwargs]
        runpy.run_module("ttt_plugins.hosts.timm_models", run_name="__main__", alter_sys=True)

    process = forked.start(run, output=tmp_path / "said")
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    assert "lr=0.004" in (tmp_path / "said").read_text()
    with pytest.raises(tp.InputError, match="no script"):
        run_script([str(tmp_path / "none.py")])


def test_the_example(folder, capsys):
    example = Path(__file__).parent.parent / "examples/hosts/timm_validate.py"
    scope = {"__name__": "example"}
    exec(compile(example.read_text(), str(example), "exec"), scope)
    scope["main"](str(folder))
    assert "of 12 images" in capsys.readouterr().out
