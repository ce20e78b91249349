"""The site has its pages, and the notebooks run; CI builds the site."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import ttt_plugins as tp

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", ["quickstart", "own_images"])
def test_notebooks_run(name, capsys):
    notebook = json.loads((DOCS / f"notebooks/{name}.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    namespace: dict = {}
    for cell in code:
        exec(compile("".join(cell["source"]), name, "exec"), namespace)
    shares = [float(share) for share in re.findall(r"([\d.]+) %", capsys.readouterr().out)]
    assert len(shares) >= 3
    assert max(shares) > 50  # real images and a trained network


@pytest.mark.parametrize("name", tp.list_methods())
def test_every_method_has_a_page(name):
    text = (DOCS / f"methods/{name}.md").read_text()
    assert f"<!-- method: {name} -->" in text
    assert f"::: ttt_plugins.methods.{name}" in text
    assert f"methods/{name}.md" in (ROOT / "mkdocs.yml").read_text()


def test_what_pages_include_is_there():
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        for document, heading in re.findall(r"<!-- include: (\S+?)(?:#(.+?))? -->", text):
            assert (ROOT / document).is_file()
            assert not heading or f"# {heading}\n" in (ROOT / document).read_text()
        for name in re.findall(r"<!-- table: (\S+) -->", text):
            assert f"<!-- report: {name} -->" in (ROOT / "RESULTS.md").read_text()
