"""The example scripts at tiny size."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import math
import os
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_fakes import memory_data
from torch import nn

from ttt_plugins.benchmark import CORRUPTIONS
from ttt_plugins.cli.main import main as cli_main
from ttt_plugins.data.images import LabelledImages

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def scripts_are_modules(monkeypatch):
    """As when they are run: a script's folder is on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)


def _load(name: str):
    return importlib.import_module(name)


def random_streams(monkeypatch, module, rows: int) -> list[str]:
    """Random images in place of the files; returns the list of the corruptions asked for."""
    rng = np.random.default_rng(0)
    asked = []

    def stream(data, corruption, n_examples=None):
        asked.append(corruption)
        count = n_examples or rows
        images = torch.from_numpy(rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
        return LabelledImages(images, torch.from_numpy(rng.integers(0, 10, count)))

    monkeypatch.setattr(module, "load_stream", stream)
    return asked


def test_results_are_measured_once_and_reported(monkeypatch, tmp_path):
    results, report = _load("results"), _load("report")
    asked = random_streams(monkeypatch, results, 12)
    monkeypatch.setattr(results, "CORRUPTIONS", CORRUPTIONS[:4])
    monkeypatch.setattr(results, "GRIDS", dict.fromkeys(results.GRIDS, (1e-3, 3e-3, 1e-2)))
    monkeypatch.setattr(results, "stream_accuracy", lambda net, *_: 0.5 - abs(net.config.lr - 3e-3))
    subject, path = results.Subject("resnet26bn", Path()), tmp_path / "online-resnet26bn.json"
    rows = results.rows_for(subject)
    assert "mixed statistics" in rows
    assert results.ADAM in rows
    assert results.PAPER not in rows  # no artifact for it
    result = results.measure(subject, rows, [0, 1], path, 12, 6)
    assert result["rates"] == {"tent": 3e-3, "sar": 3e-3, results.ADAM: 3e-3}
    # source once, the others once a seed
    assert len(result["streams"]) == 4 * (1 + (len(rows) - 1) * 2)
    right = result["streams"][f"tent 0.003/{CORRUPTIONS[3]}/1"]["right"]
    accuracy = report.accuracy(result, "tent 0.003", 1, corruptions=[CORRUPTIONS[3]])
    assert accuracy == pytest.approx(100 * sum(right) / 12)
    assert json.loads(path.read_text()) == result
    # The second time nothing is left to do.
    monkeypatch.setattr(results, "run_stream", lambda *_: pytest.fail("measured again"))
    before = len(asked)
    assert results.measure(subject, rows, [0, 1], path, 12, 6) == result
    assert len(asked) - before <= 3 * 4 + 2 * 4


def test_adam_on_the_same_loss_differs_in_the_rule_alone():
    results = _load("results")
    subject = results.Subject("resnet26bn", Path())
    mgg = results.ROWS["mgg"](subject)
    adam = results.ROWS[results.ADAM](subject, lr=mgg.config.lr)
    assert adam.config == dataclasses.replace(mgg.config, rule="adam")
    assert mgg.config.rule == "memory"


def test_a_stream_that_ends_early_is_the_beginning_of_the_whole(monkeypatch):
    results = _load("results")
    random_streams(monkeypatch, results, 20)
    stream = results.load_stream(Path(), "fog")
    net = results.Subject("resnet26bn", Path()).wrap("tent", lr=1e-2)
    whole = results.run_stream(net, stream, 6, 3)
    part = results.run_stream(net, stream, 6, 3, batches=2)
    assert (whole["n"], part["n"]) == (20, 12)
    assert part["right"] == whole["right"][:2]
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(s["hits"]), np.uint8)) for s in (whole, part)]
    assert bits[0][:12].tolist() == bits[1][:12].tolist()


def test_grids_grow_until_the_best_is_inside(monkeypatch):
    results = _load("results")
    random_streams(monkeypatch, results, 4)
    monkeypatch.setattr(results, "GRIDS", {"tent": (1e-3, 1e-2)})

    def choose(best: float, scores: dict) -> float:
        monkeypatch.setattr(
            results, "stream_accuracy", lambda net, *_: -abs(math.log(net.config.lr / best))
        )
        subject = results.Subject("resnet26bn", Path())
        return results.choose_rate("tent", subject, scores, 64, None, lambda: None)

    scores: dict = {}
    assert choose(3e-2, scores) == 3e-2
    assert sorted(map(float, scores)) == [1e-3, 1e-2, 3e-2, 1e-1]
    scores = {}
    assert choose(1e-3, scores) == 1e-3
    assert sorted(map(float, scores)) == [3e-4, 1e-3, 1e-2]
    scores = {}
    assert choose(1e3, scores) == 0.3  # three times at most
    assert len(scores) == 5


def test_the_field_is_measured_once_and_reported(monkeypatch, tmp_path):
    """In parts that resume; right answers by image, whatever the order of the stream."""
    field, report = _load("field"), _load("report")
    asked = []

    def open_dataset(dataset, folder, corruptions, severities, n_examples):
        asked.append((dataset, corruptions[0], severities, n_examples))
        data = memory_data({("fog", 5): n_examples, ("snow", 5): n_examples}, n_examples)
        return dataclasses.replace(data, dataset="cifar10")

    monkeypatch.setattr(field, "open_dataset", open_dataset)
    path, streams = tmp_path / "field-resnet26bn.json", ("mixed", "batch-4", "clean-corrupt-clean")

    def measure(chosen, **more):
        given = {"extra": False, "n": 6, "methods": ("tent",)} | more
        return field.measure("resnet26bn", Path(), path, chosen=chosen, **given)

    true = field.classify
    counted = []
    monkeypatch.setattr(field, "classify", lambda *a: counted.append(a) or true(*a))
    whole = measure(streams)["streams"]
    assert asked[0] == ("cifar10", CORRUPTIONS[0], [5], 6)
    for name, times in (("mixed", 2), ("batch-4", 2), ("clean-corrupt-clean", 4)):
        assert whole[name]["tent"]["shown"] == whole[name]["source"]["shown"] == [times] * 6
        assert whole[name]["tent"]["done"]
    before = len(counted)
    assert measure(streams)["streams"] == whole
    assert len(counted) == before, "measured again"
    # Stopped after the first of two corruptions.
    cut = json.loads(path.read_text())
    cut["streams"]["batch-4"]["tent"] = field.empty(6) | {"parts": 0, "seconds": 0, "events": {}}
    path.write_text(json.dumps(cut))
    monkeypatch.setattr(field, "write_text", stop_at(2, field.write_text))
    with pytest.raises(KeyboardInterrupt):
        measure(streams)
    assert json.loads(path.read_text())["streams"]["batch-4"]["tent"]["parts"] == 1
    monkeypatch.undo()
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(field, "open_dataset", open_dataset)
    again = measure(streams)["streams"]["batch-4"]["tent"]
    assert again["right"] == whole["batch-4"]["tent"]["right"]
    with pytest.raises(SystemExit, match="another number"):
        measure(streams, n=7)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.field()
    gaps = np.subtract(again["right"], whole["batch-4"]["source"]["right"]) / 2
    error = gaps.std(ddof=1) / 6**0.5
    assert f"| {100 * gaps.mean():+.2f} ± {100 * error:.2f} | not measured |" in text
    assert report.field_gap(cut["streams"]["batch-4"], "tent") is None


def stop_at(call: int, write):
    """A ``write_text`` that is interrupted instead of its nth call."""
    calls = []

    def stopped(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        write(*args)

    return stopped


@pytest.mark.parametrize("name", ["ttt_resnet26_bn", "ttt_vit_tiny_patch4_32"])
def test_step_cost(name):
    step_cost = _load("step_cost")
    found = step_cost.compare(name, 4, 2)
    assert found["ratio"] > 0
    scalars = 1824 if name == "ttt_resnet26_bn" else 13 * 2 * 192
    # W (8, 8), b (8), m and v for each scalar, and two counters
    assert found["state_mb"] == pytest.approx((scalars * 74 * 4 + 16) / 1e6)


def test_per_image_results(monkeypatch, tmp_path):
    results, report = _load("per_image_results"), _load("report")
    calls = random_streams(monkeypatch, results, 3)
    artifact, _ = results.MEASUREMENTS["ttt-standard"]
    small = {"steps": 1, "copies": 2, "lr": 0.1}
    monkeypatch.setitem(results.MEASUREMENTS, "ttt-standard", (artifact, small))
    path = tmp_path / "per-image-ttt-standard.json"
    first = results.measure("ttt-standard", Path(), 3, 0, path, CORRUPTIONS[:1])
    result = results.measure("ttt-standard", Path(), 3, 0, path, CORRUPTIONS[:2])
    assert calls == list(CORRUPTIONS[:2])  # the first was there already
    assert result["cells"][CORRUPTIONS[0]] == first["cells"][CORRUPTIONS[0]]
    cell = result["cells"][CORRUPTIONS[1]]
    assert (cell["forwards"], cell["backwards"]) == (3 * 3, 3 * 2)
    # By hand: differences 1, 0, 0 and -1, 1, 1 have means 0, 1/2, 1/2 by image: mean 1/3,
    # variance 1/12.
    result["cells"] = {
        "a": {**cell, "adapted_right": [1, 1, 0], "source_right": [0, 1, 0]},
        "b": {**cell, "adapted_right": [0, 1, 1], "source_right": [1, 0, 0]},
    }
    figures = report.per_image_figures(result)
    assert figures["gain"] == pytest.approx(100 / 3)
    assert figures["error"] == pytest.approx(100 * (1 / 12 / 3) ** 0.5)
    assert results.line(result) == "33.3 -> 66.7 (+33.3 ± 16.7)"


def test_entropy_alone(monkeypatch, tmp_path):
    script, report = _load("entropy_alone"), _load("report")
    random_streams(monkeypatch, script, 4)
    flags = ["--n-examples", "4", "--rates", "1e-3", "--backbone", "resnet26"]
    script.main(["--data", str(tmp_path), "--out", str(tmp_path), *flags])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.entropy_alone().splitlines()[0] == "| | source | 0.001 |"


def test_operations(monkeypatch):
    """By hand for a small network; beside the passes it does not grow with the network."""
    module = _load("operations")
    monkeypatch.setattr(module, "METHODS", {"tent": 1, "sar": 2})

    def network(blocks):
        block = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU()
        body = [copy.deepcopy(layer) for _ in range(blocks) for layer in block]
        return nn.Sequential(nn.Conv2d(3, 4, 3), *body, nn.Flatten(), nn.Linear(144, 10)).eval()

    images = torch.rand(2, 3, 8, 8)
    found = {}
    for blocks in (1, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing normalises
            for row in module.measure("small", network(blocks), images):
                found[row["method"], blocks] = row
                passes = module.METHODS[row["method"]]
                assert row["forward"] == passes * (2 + 3 * blocks)
                assert row["added"] >= row["rest"]
    for method, most in (("tent", 46), ("sar", 93)):  # may only shrink
        assert found[method, 1]["rest"] == found[method, 3]["rest"] <= most


def test_half_precision(monkeypatch, tmp_path, capsys):
    script = _load("half_precision")
    random_streams(monkeypatch, script, 4)
    script.main(["--data", str(tmp_path), "--n-examples", "4", "--batch-size", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all("bfloat16" in line and "(4 images)" in line for line in lines)


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


def test_a_device_is_held_to_the_cpu(monkeypatch, capsys):
    check = _load("device_check")
    tiny = ["--device", "cpu", "--only", "tent/resnet26-cifar10", "--batches", "1"]
    assert check.main([*tiny, "--batch-size", "2"]) == 0
    assert "first batch 0.0e+00 apart, 100.0% of predictions agree" in capsys.readouterr().out
    monkeypatch.setattr(check, "CLOSE", {False: -1.0})
    assert check.main([*tiny, "--batch-size", "2"]) == 1
    assert "TOO FAR APART" in capsys.readouterr().out


class Parsed(BaseException):
    """A command's arguments are right; nothing is to happen."""


def test_the_gpu_day_goes_on_where_it_was(monkeypatch, tmp_path):
    """A stand-in for Python notes what is run, and the notes are what those programs take."""
    noted, stand_in = tmp_path / "noted", tmp_path / "python"
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >> {noted}\ncase "$*" in *$WRONG*) exit $STATUS;; esac\n'
    )
    stand_in.chmod(0o755)

    def day(wrong="nothing", status=0, **settings):
        noted.write_text("")
        environment = {"OUT": tmp_path / "out", "DATA": "data", "PYTHON": stand_in}
        environment |= {"WRONG": wrong, "STATUS": status} | settings
        environment = os.environ | {name: str(value) for name, value in environment.items()}
        done = subprocess.run([EXAMPLES / "gpu_day.sh"], env=environment, capture_output=True)
        return done.returncode, noted.read_text().splitlines()

    assert day(LIMIT=30) == (3, [])
    status, commands = day("step_cost", 124)  # stopped for time
    assert (status, len(commands)) == (3, 3)
    status, rest = day("per_image", 1)  # a figure that fails holds up nothing
    assert (status, rest[0]) == (1, commands[-1])
    assert day() == (1, [])
    assert day("device_check", 1, OUT=tmp_path / "other")[1] == commands[:2]

    def parse(parser, argv=None, namespace=None):
        _, unknown = parser.parse_known_args(argv, namespace)
        assert not unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for command in map(str.split, [*commands[1:], *rest[1:]]):
        named = command[0] == "-m"  # ttt_plugins
        run = cli_main if named else _load(Path(command[0]).stem).main
        with pytest.raises(Parsed):
            run(command[1 + named :])
    assert len(rest) > 8
