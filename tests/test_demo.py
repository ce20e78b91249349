"""The demo at tiny size, its rates, its picture, and the bar that it shows."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_fakes import FakeAdapter, random_cell
from PIL import Image
from test_benchmark import plain_loop

from ttt_plugins.cli import main
from ttt_plugins.demo import (
    DemoResult,
    Frames,
    Sample,
    build_adapters,
    build_per_image_adapters,
    draw,
    load_sample,
    predict_frames,
    predict_sample,
)
from ttt_plugins.demo.run import BATCH_SIZE, RATES
from ttt_plugins.errors import DataError, InputError, TTTError
from ttt_plugins.utils.progress import progress_bar

ROOT = Path(__file__).parent.parent


def _write_sample(folder, labels, arrays):
    """Tiles of 32x32 in a picture two wide, as the package ships its sample."""
    (folder / "labels.json").write_text(json.dumps([int(label) for label in labels]))
    for name, images in arrays.items():
        grid = images.reshape(-1, 2, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 64, 3)
        Image.fromarray(grid).save(folder / f"{name}.webp", lossless=True)


def test_demo_at_tiny_size(tmp_path):
    rng = np.random.default_rng(0)

    arrays = {n: random_cell(rng, 24)[0] for n in ("snow", "clean", "fog_3d")}
    labels = rng.integers(0, 10, 24)
    _write_sample(tmp_path, labels, arrays)
    sample = load_sample(tmp_path, 16)
    assert list(sample.images) == ["clean", "fog_3d", "snow"]
    assert np.array_equal(sample.images["snow"].permute(0, 2, 3, 1).numpy(), arrays["snow"][:16])
    nets = {"source": FakeAdapter(lr=0.0), "tent": FakeAdapter(lr=0.1), "mgg": FakeAdapter(lr=2.0)}
    result = predict_sample(nets, sample, batch_size=4, progress=False)
    expected = plain_loop([(arrays["snow"][:16], labels[:16])], [True], batch=4)
    fresh = predict_sample({"a": FakeAdapter()}, sample, batch_size=4, progress=False)
    assert fresh.accuracy("a", "snow") == 100 * expected[0]
    assert nets["mgg"].resets == 3
    assert result.table().splitlines()[0].split()[-3:] == ["source", "tent", "mgg"]
    gained, lost = result.changed("source", "mgg")
    gain = result.mean("mgg") - result.mean("source")
    assert 100 * (gained - lost) / (2 * 16) == pytest.approx(gain)
    assert draw(result).startswith(b"\x89PNG")


def test_demo_picture_without_a_corrected_image():
    sample = Sample(torch.zeros(2, dtype=torch.int64), {"fog": torch.zeros(2, 3, 32, 32).byte()})
    nets = {"source": FakeAdapter(lr=0.0), "mgg": FakeAdapter(lr=0.0)}
    result = predict_sample(nets, sample, progress=False)
    assert result.changed("source", "mgg") == (0, 0)
    assert draw(result).startswith(b"\x89PNG")


def test_demo_mistakes(tmp_path):
    with pytest.raises(DataError, match="not the demo's images"):
        load_sample(tmp_path / "none")
    _write_sample(tmp_path, [0, 1, 2, 3], {"fog": np.zeros((4, 32, 32, 3), np.uint8)})
    with pytest.raises(InputError, match="1 to 4 images"):
        load_sample(tmp_path, 5)
    (tmp_path / "labels.json").write_text("[0, 1, 2]")
    with pytest.raises(DataError, match="do not match"):
        load_sample(tmp_path)
    assert issubclass(DataError, TTTError)


def test_demo_of_per_image_methods():
    nets = build_per_image_adapters()
    assert nets["ttt"].config.steps == 1
    assert nets["mt3"].method == "mt3"
    whole = load_sample(n=2)
    sample = Sample(whole.labels, {name: whole.images[name] for name in ("clean", "fog")})
    result = predict_sample(nets, sample, progress=False)
    assert list(result.predictions) == ["ttt's model", "ttt", "mt3's model", "mt3"]


def test_rivals_stand_at_the_best_rates_of_their_grids(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    stored = importlib.import_module("report").load("online-resnet26")
    assert stored["rates"] | RATES == stored["rates"]
    assert stored["batch_size"] == BATCH_SIZE
    for name, net in build_adapters().items():
        if name != "source":
            assert net.config.lr == stored["rates"][name]
            assert net.config.window <= BATCH_SIZE  # a batch is one update


def test_single_frames_are_one_stream_without_resets():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 10, 6))
    images = {
        n: torch.from_numpy(random_cell(rng, 6)[0]).permute(0, 3, 1, 2) for n in ("clean", "fog")
    }
    nets = {"source": FakeAdapter(lr=0.0), "mgg": FakeAdapter(lr=2.0)}
    frames = predict_frames(nets, Sample(labels, images), progress=False)
    assert frames.kinds == (("clean", 6), ("fog", 6))
    assert nets["mgg"].resets == 1
    alone = FakeAdapter(lr=2.0)
    x = torch.cat(list(images.values())).float() / 255
    expected = torch.stack([alone(x[i : i + 1]).argmax() for i in range(12)]) == labels.repeat(2)
    assert torch.equal(frames.right["mgg"], expected)
    assert frames.mean("mgg") == pytest.approx(100 * expected.double().mean().item())


def test_accuracy_lately_by_hand():
    frames = Frames({"a": torch.tensor([True, False, True, True])}, (("clean", 2), ("fog", 2)))
    assert frames.lately("a", 2).tolist() == [100, 50, 50, 100]
    assert frames.table().splitlines()[1].split() == ["clean", "50.0"]
    *_, whole, updates = frames.table().splitlines()
    assert whole.split() == ["whole", "stream", "75.0"]
    assert updates.split() == ["images", "an", "update", "–"]


def test_the_sentence_says_a_loss_too():
    labels = torch.zeros(4, dtype=torch.int64)
    images = {n: torch.zeros(4, 3, 32, 32).byte() for n in ("clean", "fog")}
    right, half = labels, torch.tensor([0, 0, 1, 1])
    predictions = {"source": dict.fromkeys(images, right), "mgg": {"clean": right, "fog": half}}
    result = DemoResult(predictions, {"source": 0.0, "mgg": 0.0}, Sample(labels, images))
    assert "50.0 % of 4 corrupted images instead of 100.0 %" in result.sentence()
    assert "100.0 % of the clean ones instead of 100.0 %" in result.sentence()


def test_the_command_opens_with_the_sentence_and_logs_no_bars(tmp_path, capfd):
    assert main(["demo", "--images", "2", "--out", str(tmp_path)]) == 0
    shown = capfd.readouterr()
    assert shown.out.startswith("Adapting without labels (mgg), the network is right on ")
    assert shown.out.index("whole stream") < shown.out.index("demo.png")
    assert "batch" not in shown.err
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 800


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "shown"), [(io.StringIO, False), (Terminal, True)])
def test_bars_are_for_terminals(stream, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress_bar([1, 2], "a title")) == [1, 2]
    text = sys.stderr.getvalue()
    assert ("a title" in text) == shown
    assert "\n" not in text
