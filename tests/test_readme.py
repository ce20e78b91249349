"""The README's code blocks run, and its commands parse."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from ttt_plugins.cli.main import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(text: str = README) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks, in order."""
    parts = re.split(r"^```(.*)\n", text, flags=re.MULTILINE)[1:]
    return list(zip(parts[0::4], parts[1::4], strict=True))


class LightningModule(nn.Module):
    """Stands in for Lightning's, of which the README uses the part about prediction."""


class Trainer:
    def __init__(self, **options):
        assert options == {"logger": False}

    def predict(self, model, dataloaders):
        model.eval()
        with torch.inference_mode():
            model.on_predict_start()
            return [model.predict_step(batch, i) for i, batch in enumerate(dataloaders)]


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("lightning") is None:
        stand_in = SimpleNamespace(LightningModule=LightningModule, Trainer=Trainer)
        monkeypatch.setitem(sys.modules, "lightning", stand_in)
    without = importlib.util.find_spec("torch_ttt") is None
    blocks = [content for language, content in _blocks() if language == "python"]
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        if without and "torch_ttt" in block:
            continue
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (8, 1000)
    assert (tmp_path / "runs/my-adapter/config.json").is_file()
    assert 0 <= namespace["right"] <= 8
    assert [p.shape for p in namespace["predictions"]] == [(4,), (4,)]
    found = namespace["classify"]([Image.new("RGB", (48, 48))] * 2)
    assert [len(each) for each in found] == [3, 3]
    assert found[0][0].keys() == {"label", "score"}
    scores = [label["score"] for label in found[0]]
    assert scores == sorted(scores, reverse=True)
    if not without:
        assert namespace["outputs"].shape == (4, 10)


def test_it_opens_with_exactly_two_commands():
    commands = [content for _, content in _blocks(README.split("\n## ")[0])]
    assert len(commands) == 2
    assert commands[0].strip().endswith("ttt-plugins demo")
    assert "pytest" in commands[1]
    for command in commands:
        assert len(command.strip().splitlines()) == 1
        assert command.startswith("python3 -m venv")


def _commands() -> list[str]:
    found = []
    for _, block in _blocks():
        lines = block.replace("\\\n", " ").splitlines()
        found += [line for line in lines if line.startswith("ttt-plugins ")]
    return found


@pytest.mark.parametrize("line", _commands())
def test_commands_parse(line):
    args = _parser().parse_args(shlex.split(line)[1:])
    assert callable(args.run)


def test_ci_runs_the_test_command():
    script = (ROOT / ".ci/run").read_text()
    awk = re.search(r"\$\((awk .*README\.md)\)", script)[1]
    extracted = subprocess.run(
        ["bash", "-c", awk], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert extracted == _blocks()[1][1].strip()
