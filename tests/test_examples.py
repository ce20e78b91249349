"""The example scripts at tiny size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ttt_plugins.benchmark import CORRUPTIONS
from ttt_plugins.data.images import LabelledImages

EXAMPLES = Path(__file__).parent.parent / "examples"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_table(monkeypatch, tmp_path):
    results = _load("results")
    rng = np.random.default_rng(0)

    def stream(data, corruption, n_examples=None):
        images = torch.from_numpy(rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8))
        return LabelledImages(images, torch.from_numpy(rng.integers(0, 10, 12)))

    monkeypatch.setattr(results, "load_stream", stream)
    monkeypatch.setattr(results, "GRIDS", {"tent": (1e-3, 1e-2), "sar": (1e-3,)})
    found = results.measure("resnet26bn", Path(), [0, 1], 12, 6, tmp_path / "out.json")
    assert found["rates"].keys() == {"tent", "sar", "mgg"}
    # source once, the six that see an order once a seed
    assert len(found["streams"]) == len(CORRUPTIONS) * (1 + 6 * 2)
    right = found["streams"][f"tent/{CORRUPTIONS[3]}/1"]["right"]
    assert results._accuracies(found, "tent", 1)[CORRUPTIONS[3]] == 100 * sum(right) / 12
    text = results.report([json.loads((tmp_path / "out.json").read_text())])
    assert text.count("\n| ") == 2 + len(CORRUPTIONS) + 1
    row = results.summary([found]).splitlines()[-1].split(" | ")
    assert row[0] == "| resnet26bn"
    assert row[1] == "12, 2"
    assert row[2] == f"{results.averages(found)['source'][0]:.2f}"


def test_time_to_accuracy_by_hand():
    results = _load("results")
    streams = {
        "sar/fog/0": {"n": 6, "right": [1, 1, 1], "seconds": [2.0, 2.0, 2.0]},
        # so far: 1/2, 2/4, 4/6; SAR ends at 3/6, which is reached at once and held
        "mgg/fog/0": {"n": 6, "right": [1, 1, 2], "seconds": [1.0, 1.0, 1.0]},
    }
    assert results.time_to_accuracy({"streams": streams, "batch_size": 2}) == (6.0, 1.0, 6.0)
    streams["mgg/fog/0"]["right"] = [2, 0, 0]
    assert results.time_to_accuracy({"streams": streams, "batch_size": 2}) is None
    streams["mgg/fog/0"]["right"] = [2, 0, 2]
    assert results.time_to_accuracy({"streams": streams, "batch_size": 2}) == (6.0, 1.0, 6.0)


@pytest.mark.parametrize("name", ["ttt_resnet26_bn", "ttt_vit_tiny_patch4_32"])
def test_step_cost(name):
    step_cost = _load("step_cost")
    found = step_cost.compare(name, 4, 2)
    assert found["ratio"] > 0
    scalars = 1824 if name == "ttt_resnet26_bn" else 13 * 2 * 192
    # W (8, 8), b (8), m and v for each scalar, and two counters
    assert found["state_mb"] == pytest.approx((scalars * 74 * 4 + 16) / 1e6)


def test_per_image_results(monkeypatch, tmp_path, capsys):
    results = _load("per_image_results")
    rng = np.random.default_rng(0)
    calls = []

    def stream(data, corruption, n_examples=None):
        calls.append(corruption)
        images = torch.from_numpy(rng.integers(0, 256, (n_examples, 3, 32, 32), dtype=np.uint8))
        return LabelledImages(images, torch.from_numpy(rng.integers(0, 10, n_examples)))

    monkeypatch.setattr(results, "load_stream", stream)
    artifact, _ = results.MEASUREMENTS["ttt-standard"]
    small = {"steps": 1, "copies": 2, "lr": 0.1}
    monkeypatch.setitem(results.MEASUREMENTS, "ttt-standard", (artifact, small))
    path = tmp_path / "per-image-ttt-standard.json"
    first = results.measure("ttt-standard", Path(), 3, 0, path, CORRUPTIONS[:1])
    found = results.measure("ttt-standard", Path(), 3, 0, path, CORRUPTIONS[:2])
    assert calls == list(CORRUPTIONS[:2])  # the first was there already
    assert found["cells"][CORRUPTIONS[0]] == first["cells"][CORRUPTIONS[0]]
    cell = found["cells"][CORRUPTIONS[1]]
    assert (cell["forwards"], cell["backwards"]) == (3 * 3, 3 * 2)
    # By hand: differences 1, 0, 0, -1, 1, 1 have mean 1/3 and variance 2/3.
    found["cells"] = {
        "a": {**cell, "adapted_right": [1, 1, 0], "source_right": [0, 1, 0]},
        "b": {**cell, "adapted_right": [0, 1, 1], "source_right": [1, 0, 0]},
    }
    figures = results.figures(found)
    assert figures["gain"] == pytest.approx(100 / 3)
    assert figures["error"] == pytest.approx(100 * (2 / 3 / 6) ** 0.5)
    results.main(["ttt-standard", "--report", "--out", str(tmp_path)])
    assert "ttt-standard | 3 (2 of 15)" in capsys.readouterr().out


def test_per_image_speed():
    speed = _load("per_image_speed")
    tiny = {"width": 8, "depth": 8, "groups": 4}
    for found in (
        speed.ttt(2, 1, 2, 1, "cpu", **tiny),
        speed.mt3(2, 2, 1, "cpu", **tiny),
        speed.meta_training(1, "cpu", model_args=tiny, tasks=2, task_images=2),
    ):
        assert found["ours_s"] > 0
        assert found["speed-up"] > 0
