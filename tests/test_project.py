"""What stands beside the code: the workflow, the citation, the forms for issues, the changelog."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import ttt_plugins as tp

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def _read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_workflow_runs_everything_on_every_python():
    (job,) = _read(".github/workflows/ci.yml")["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert job["strategy"]["matrix"]["python"] == named
    assert f'requires-python = ">={named[0]}"' in PROJECT
    oldest = named[0].replace(".", "")
    assert f'target-version = "py{oldest}"' in PROJECT
    assert f'pythonVersion = "{named[0]}"' in PROJECT


def test_the_citation_is_of_this_version():
    cited = _read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["version"] == tp.__version__
    assert f'license = "{cited["license"]}"' in PROJECT


@pytest.mark.parametrize("form", ["bug", "model", "method"])
def test_forms_for_issues_are_complete(form):
    content = _read(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert content.keys() == {"name", "description", "labels", "body"}
    fields = [part["id"] for part in content["body"]]
    assert len(set(fields)) == len(fields)
    for part in content["body"]:
        assert part["type"] in ("input", "textarea")
        assert part["attributes"]["label"]


def test_the_changelog_goes_by_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert versions[:2] == ["Unreleased", tp.__version__]


def test_names_in_the_security_policy_exist():
    text = (ROOT / "SECURITY.md").read_text()
    assert "`ArtifactError`" in text
    assert issubclass(tp.ArtifactError, tp.TTTError)
    for group in re.findall(r"`(ttt_plugins\.\w+)`", text):
        parts = {"ttt_plugins.methods": "core/registry", "ttt_plugins.datasets": "data/datasets"}
        assert f'GROUP = "{group}"' in (ROOT / f"ttt_plugins/{parts[group]}.py").read_text()
