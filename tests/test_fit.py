"""The command ``fit``: source statistics of any clean pictures, in an artifact."""

import pytest
import torch
from PIL import Image

import ttt_plugins as tp
from ttt_plugins.cli.main import main
from ttt_plugins.demo import load_sample

MODEL = "bundled:source-resnet26-cifar10"


@pytest.fixture
def folder(tmp_path):
    """Twelve clean pictures without labels, one of them damaged."""
    (tmp_path / "clean").mkdir()
    for i, image in enumerate(load_sample(n=12).images["clean"]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "clean" / f"{i:02d}.png")
    return tmp_path / "clean"


def fit(folder, out, *more):
    words = ["fit", MODEL, folder, "--method", "mgg", "--workers", "0", "--out", out, *more]
    return main([str(word) for word in words])


def test_the_artifact_has_the_statistics_of_the_pictures(folder, tmp_path, capsys):
    (folder / "zz.png").write_bytes(b"damaged")
    assert fit(folder, tmp_path / "a") == 2
    assert "zz.png" in capsys.readouterr().err
    assert fit(folder, tmp_path / "a", "--skip-damaged", "--set", "discrepancy=3") == 0
    assert "statistics of 12 pictures" in capsys.readouterr().out
    net = tp.from_pretrained(str(tmp_path / "a"))
    assert net.config.discrepancy == 3
    by_hand = tp.wrap(MODEL, "mgg")
    by_hand.fit_source_statistics([load_sample(n=12).images["clean"] / 255])
    for name, tensor in net.learned_tensors().items():
        torch.testing.assert_close(tensor, by_hand.learned_tensors()[name])


def test_some_pictures_are_drawn_and_other_methods_have_no_statistics(folder, tmp_path, capsys):
    tensors = []
    for seed in (0, 1, 1):
        assert fit(folder, tmp_path / "a", "--limit", 5, "--seed", seed) == 0
        assert "statistics of 5 pictures" in capsys.readouterr().out
        tensors.append(tp.from_pretrained(str(tmp_path / "a")).learned_tensors()["source.mean"])
    assert not torch.equal(tensors[0], tensors[1])
    assert torch.equal(tensors[1], tensors[2])
    assert fit(folder, tmp_path / "b", "--method", "tent") == 2
    assert "tent compares no feature statistics" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
