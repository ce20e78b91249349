"""Cards and results: made from config.json and results.json, valid for the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

import ttt_plugins as tp
from ttt_plugins.artifacts.card import render_card
from ttt_plugins.artifacts.folder import bundled_folder, read_artifact
from ttt_plugins.artifacts.measured import load_measured
from ttt_plugins.cli import main

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "tests/frozen/benchmark-results.json"


def metadata_of(path):
    """The card's metadata, checked as huggingface_hub does before it uploads."""
    found = metadata_load(path)
    data = ModelCardData(**dict(found), ignore_metadata_errors=False)
    assert data.pipeline_tag == "image-classification"
    assert data.library_name in ("ttt_plugins", "timm")
    if data.base_model is not None:
        validate_repo_id(data.base_model)
        assert found["base_model_relation"] == "adapter"
    if "model-index" in found:
        name, measured = model_index_to_eval_results(found["model-index"])
        assert name == data.model_name
        assert measured
        for result in measured:
            assert 0 <= result.metric_value <= 1
            assert result.task_type == "image-classification"
    return found


@pytest.mark.parametrize("name", tp.list_bundled())
def test_bundled_cards(name):
    folder = bundled_folder(name)
    found = metadata_of(folder / "README.md")
    assert found["license"] == "apache-2.0"
    assert found["datasets"] == ["cifar10"]
    text = ModelCard.load(folder / "README.md").text
    for word in ("## Use", "## Training", "## Limits", f"bundled:{name}", "JPEG"):
        assert word in text
    artifact = read_artifact(folder)
    if artifact.config["method"] != "source":
        assert "## Citation" in text
        assert "arXiv" in text
    # By `ttt-plugins card hub_cards/*`, never by hand.
    assert artifact.card == render_card(name, artifact, bundled=True)


@pytest.mark.parametrize("name", [n for n in tp.list_bundled() if n.startswith("mgg-resnet26")])
def test_bundled_results_are_the_measured_ones(name):
    backbone = name.split("-")[1]
    stored = read_artifact(bundled_folder(name)).results
    run = stored["runs"][0]
    measured = json.loads((ROOT / f"examples/results/online-{backbone}.json").read_text())
    streams = [v for k, v in measured["streams"].items() if k.startswith("mgg/")]
    mean = sum(sum(s["right"]) / s["n"] for s in streams) / len(streams)
    assert run["accuracy"]["mgg"] == pytest.approx(mean, abs=1e-6)
    found = metadata_load(bundled_folder(name) / "README.md")
    _, shown = model_index_to_eval_results(found["model-index"])
    assert shown[0].metric_value == pytest.approx(mean, abs=1e-6)


@pytest.fixture
def folder(make_model, make_net, method, tmp_path):
    return make_net(method, make_model("groupnorm")).save_pretrained(
        tmp_path / "net",
        results=BENCHMARK,
        training={"command": "made | by hand", "note": "A note."},
        card={"license": "mit", "datasets": ["cifar10"], "note": "Mind the gap."},
    )


def test_what_a_user_saves(folder, method):
    found = metadata_of(folder / "README.md")
    assert found["license"] == "mit"
    assert method in found["tags"]
    text = (folder / "README.md").read_text()
    for word in ("## Results", "A note.", "Mind the gap.", "CIFAR-10-C", "reset-per-cell"):
        assert word in text
    # The benchmark measured Tent: only Tent's card, and the source's, claims a figure.
    assert ("model-index" in found) == (method in ("tent", "source"))


def test_the_card_command(folder, method, tmp_path, capsys):
    (folder / "README.md").write_text("lost")
    assert main(["card", str(folder), "--license", "apache-2.0", "--note", "New."]) == 0
    assert metadata_of(folder / "README.md")["license"] == "apache-2.0"
    config = json.loads((folder / "config.json").read_text())
    assert config["card"] == {"license": "apache-2.0", "datasets": ["cifar10"], "note": "New."}
    assert main(["card", str(folder), "--license", "no such licence!"]) == 2
    assert main(["card", str(tmp_path / "nothing")]) == 2
    assert main(["card", str(folder), "--results", str(folder / "config.json")]) == 2
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    for word in (method, "fingerprint", "apache-2.0", "CIFAR-10-C", "format"):
        assert word in out


def test_results_of_a_benchmark_run_now(tmp_path):
    # The benchmark's file of today, not only the frozen one.
    import torch

    from ttt_plugins.benchmark import CorruptionData, run_benchmark
    from ttt_plugins.data.images import LabelledImages

    part = LabelledImages(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))
    data = CorruptionData.from_arrays({("fog", 5): part}, dataset="cifar10", layout="arrays")
    net = tp.wrap(str(ROOT / "tests/frozen/source-v1"), "tent")
    run = run_benchmark(net, data, seed=[0, 1], progress=False)
    reduced = load_measured(json.loads(run.to_json()))["runs"][0]
    assert reduced["accuracy"] == {"tent": run.methods[0].mean()}
    assert (reduced["severities"], reduced["corruptions"]) == ([5], ["fog"])
    assert reduced["seeds"] == [0, 1]
    assert "tent" in reduced["standard_error"]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(format_version=2),
        lambda r: r.update(runs={}),
        lambda r: r["runs"].append(3),
        lambda r: r["runs"][0].pop("accuracy"),
        lambda r: r["runs"][0].update(accuracy={"tent": 73.3}),
        lambda r: r["runs"][0].update(accuracy={"tent": "high"}),
        lambda r: r["runs"][0].update(seeds=["a"]),
        lambda r: r["runs"][0].update(by_corruption={"fog": 3}),
        lambda r: r["runs"][0].update(colour="red"),
    ],
)
def test_results_that_are_none(change, make_model, tmp_path):
    found = load_measured(BENCHMARK)
    change(found)
    with pytest.raises(tp.ArtifactError):
        tp.wrap(make_model("groupnorm"), "tent").save_pretrained(tmp_path / "net", results=found)
    assert not (tmp_path / "net").exists()


def test_paths_are_shortened():
    from ttt_plugins.artifacts.publish import _shorten

    said = "ttt-plugins train --data-dir /home/me/data --out runs/x 'C:\\Users\\me\\y' ~/z a/b"
    assert _shorten(said) == "ttt-plugins train --data-dir .../data --out runs/x '.../y' .../z a/b"
    for kept in ("https://example.org/a/b", "../shared/data", "bundled:x", "n/a", "1 / 2", ".../a"):
        assert _shorten(kept) == kept
    assert _shorten({"a": ["/x/y", 3]}) == {"a": [".../y", 3]}
