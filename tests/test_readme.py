"""The documents' code blocks run, their commands parse, their links lead somewhere."""

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
DOCUMENTS = (
    "README.md",
    "RESULTS.md",
    "CONTRIBUTING.md",
    "docs/app.md",
    "docs/benchmark.md",
    "examples/hosts/README.md",
)
MOST_WORDS_OF_THE_README = 1300


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


def run_blocks(document: str, without: str | None = None) -> dict:
    """Run a document's Python blocks one after the other; the names they leave."""
    text = (ROOT / document).read_text()
    namespace: dict = {}
    for language, block in _blocks(text):
        if language == "python" and not (without and without in block):
            exec(compile(block, document, "exec"), namespace)
    return namespace


def test_readme_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sum(language == "python" for language, _ in _blocks()) >= 3
    namespace = run_blocks("README.md")
    assert namespace["logits"].shape == (8, 1000)
    assert (tmp_path / "runs/my-adapter/config.json").is_file()
    assert 0 <= namespace["right"] <= 8


def test_host_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("lightning") is None:
        stand_in = SimpleNamespace(LightningModule=LightningModule, Trainer=Trainer)
        monkeypatch.setitem(sys.modules, "lightning", stand_in)
    without = importlib.util.find_spec("torch_ttt") is None
    namespace = run_blocks("examples/hosts/README.md", "torch_ttt" if without else None)
    assert [p.shape for p in namespace["predictions"]] == [(4,), (4,)]
    labels = namespace["classify"]([Image.new("RGB", (48, 48))] * 2)
    assert [len(each) for each in labels] == [3, 3]
    assert labels[0][0].keys() == {"label", "score"}
    scores = [label["score"] for label in labels[0]]
    assert scores == sorted(scores, reverse=True)
    if not without:
        assert namespace["outputs"].shape == (4, 10)


@pytest.mark.parametrize(
    "document", sorted({*DOCUMENTS} - {"README.md", "examples/hosts/README.md"})
)
def test_blocks_of_other_documents_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(document)


def test_the_readme_is_short():
    assert len(README.split()) <= MOST_WORDS_OF_THE_README


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target
    for script in re.findall(r"\b(?:examples|tests|docs|hub_cards|ttt_plugins)/[\w./-]+", text):
        assert (ROOT / script.rstrip(".")).exists(), script


def test_the_picture_is_small():
    assert (ROOT / "docs/demo.png").stat().st_size <= 200_000


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
    for document in DOCUMENTS:
        for _, block in _blocks((ROOT / document).read_text()):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("ttt-plugins ")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", _commands())
def test_commands_parse(line):
    args = _parser().parse_args(shlex.split(line)[1:])
    assert callable(args.run)


def test_ci_runs_the_test_command():
    script = (ROOT / ".ci/run").read_text()
    match = re.search(r"\$\((awk .*README\.md)\)", script)
    assert match
    awk = match[1]
    extracted = subprocess.run(
        ["bash", "-c", awk], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert extracted == _blocks()[1][1].strip()
