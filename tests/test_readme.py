"""The README's code blocks run, and its commands parse."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ttt_plugins.cli import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(text: str = README) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks, in order."""
    parts = re.split(r"^```(.*)\n", text, flags=re.MULTILINE)[1:]
    return list(zip(parts[0::4], parts[1::4], strict=True))


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [content for language, content in _blocks() if language == "python"]
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (8, 1000)
    assert (tmp_path / "runs/my-adapter/config.json").is_file()


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
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("ttt-plugins "):
                found.append(line)
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
