"""Every figure of RESULTS.md and of the README comes from the committed result files."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import ttt_plugins as tp
from ttt_plugins.artifacts.folder import bundled_folder, read_artifact
from ttt_plugins.benchmark import CORRUPTIONS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def report(monkeypatch):
    """`examples/report.py` as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("report")


@pytest.fixture
def cards(report):
    """`examples/into_cards.py` as a module."""
    return importlib.import_module("into_cards")


def prose(text: str) -> str:
    """A document without its code and its tables that the report writes."""
    text = re.sub(r"<!-- report: .*?<!-- end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"Python ≥ 3.10|Apache-2.0", "", text)
    return re.sub(r"`[^`]*`", "", text)


def numbers(text: str) -> set[str]:
    """Decimal numbers, without sign; versions like 1.0.9 are none."""
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text))


def test_the_tables_are_what_the_report_writes(report):
    text = (ROOT / "RESULTS.md").read_text()
    blocks = re.findall(r"<!-- report: (\S+) -->\n(.+?)\n<!-- end -->", text, flags=re.DOTALL)
    assert len(blocks) >= 10
    assert {name for name, _ in blocks} <= report.SECTIONS.keys()
    for name, block in blocks:
        assert block == report.SECTIONS[name](), f"{name}: run python examples/report.py --write"


@pytest.mark.parametrize("document", ["RESULTS.md", "README.md"])
def test_numbers_in_the_text_are_in_the_report(report, document):
    text = prose((ROOT / document).read_text())
    unknown = numbers(text) - numbers(report.report())
    assert not unknown


def test_a_changed_figure_is_noticed(report):
    text = (ROOT / "RESULTS.md").read_text()
    figure = re.search(r"<!-- report: online -->.*?(\d\d\.\d\d)", text, flags=re.DOTALL)
    assert figure
    changed = text[: figure.start(1)] + "99.99" + text[figure.end(1) :]
    assert report.renewed(changed) == text != changed
    assert "99.99" not in numbers(report.report())


def test_errors_are_clustered_by_image(report):
    """By hand: images' means over two corruptions are 1/2, 1/2 and 0."""
    gaps = [[1, 0, 0], [0, 1, 0]]
    mean, error = report.clustered(gaps)
    assert mean == pytest.approx(100 / 3)
    assert error == pytest.approx(100 * (1 / 12) ** 0.5 / 3**0.5)
    # The same gaps under both corruptions are no more evidence than under one.
    once, twice = report.clustered([[1, 0, -1, 1]]), report.clustered([[1, 0, -1, 1]] * 2)
    assert once == pytest.approx(twice)


def streams_of(label, right, seconds, n):
    return {f"{label}/{c}/0": {"n": n, "right": right, "seconds": seconds} for c in CORRUPTIONS[:3]}


def test_time_to_accuracy_by_hand(report):
    result = {"batch_size": 2, "streams": streams_of("sar 0.1", [1, 1, 1], [2.0, 2.0, 2.0], 6)}
    # so far: 1/2, 2/4, 4/6; SAR ends at 3/6, which is reached at once and held
    result["streams"] |= streams_of("mgg", [1, 1, 2], [1.0, 1.0, 1.0], 6)
    assert report.time_to_accuracy(result) == {"batch": 1, "of": 3, "ratio": 6.0}
    result["streams"] |= streams_of("mgg", [2, 0, 0], [1.0, 1.0, 1.0], 6)
    assert report.time_to_accuracy(result) is None
    result["streams"] |= streams_of("mgg", [2, 0, 2], [1.0, 1.0, 1.0], 6)
    assert report.time_to_accuracy(result) == {"batch": 1, "of": 3, "ratio": 6.0}
    # One stalled batch of one stream changes nothing.
    result["streams"][f"sar 0.1/{CORRUPTIONS[0]}/0"]["seconds"] = [2.0, 600.0, 2.0]
    assert report.time_to_accuracy(result)["ratio"] == 6.0


def test_rows_are_cut_at_the_same_image(report):
    """A short stream and the beginning of a long one are the same measurement."""
    streams = {}
    for corruption in CORRUPTIONS:
        streams[f"long/{corruption}/0"] = {"n": 192, "right": [32, 16, 64]}
        streams[f"short/{corruption}/0"] = {"n": 128, "right": [32, 16]}
    result = {"n_examples": 192, "batch_size": 64, "streams": streams}
    assert report.accuracy(result, "long", 0, 2) == report.accuracy(result, "short", 0, 2) == 37.5
    assert report.accuracy(result, "long", 0) == pytest.approx(100 * 112 / 192)
    assert report.accuracy(result, "short", 0) is None  # no whole stream
    assert report.accuracy(result, "short", 0, 3) is None


def test_recorded_hits_are_the_counted_ones(report):
    recorded = 0
    for name in report.BUNDLED:
        for key, stream in report.load(f"online-{name}")["streams"].items():
            assert sum(stream["right"]) <= stream["n"], key
            if "hits" in stream:
                bits = np.unpackbits(np.frombuffer(bytes.fromhex(stream["hits"]), np.uint8))
                parts = np.split(bits[: stream["n"]], range(64, stream["n"], 64))
                assert [int(part.sum()) for part in parts] == stream["right"], key
                recorded += 1
    assert recorded >= len(CORRUPTIONS)


@pytest.mark.parametrize("name", tp.list_bundled())
def test_cards_hold_the_measurements(name, report, cards):
    results = read_artifact(bundled_folder(name)).results
    assert results
    for run in results["runs"]:
        if "results.py" not in run["command"]:
            continue
        if "per_image" in run["command"]:
            measurement = run["command"].split("per_image_results.py ")[1].split()[0]
            assert run == cards.per_image_run(report.load(f"per-image-{measurement}"))
        else:
            backbone = run["command"].split("--backbone ")[1].split("/")[-1]
            assert run == cards.online_run(report.load(f"online-{backbone}"))
