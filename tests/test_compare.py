"""``ttt-plugins compare``: tables by hand, and a page that needs nothing beside itself."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil

import pytest
from benchmark_fakes import FakeAdapter, memory_data

from ttt_plugins.benchmark import CellRecord, MethodRecord, Results, compare, run_benchmark
from ttt_plugins.benchmark.comparison import differences, page, read_entries, rows
from ttt_plugins.benchmark.plots import accuracy_along
from ttt_plugins.cli import main
from ttt_plugins.errors import DataError, InputError

COUNTS = {("fog", 1): 20, ("fog", 5): 30, ("snow", 5): 21}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three finished runs: by name their folders."""
    root = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setattr("ttt_plugins.benchmark.plots.plot_results", lambda results: b"PNG")

    def run(name, counts=COUNTS, **options):
        options = {"batch_size": 7, "model_name": "a/b", "progress": False, **options}
        lr = options.pop("lr", 8.0)
        source = FakeAdapter("source", lr=0.0)
        out = root / name
        run_benchmark(FakeAdapter(lr=lr), memory_data(counts), baseline=source, out=out, **options)
        return out

    found = {
        "fast": run("fast", seed=[0, 1]),
        "slow": run("slow", lr=1.0, protocol="continual", seed=[0, 1]),
        "<one>": run("<one>", {("fog", 1): 20, ("fog", 5): 30}, protocol="mixed", batch_size=8),
    }
    patch.undo()
    return found


def test_the_table_by_hand(folders):
    entries = read_entries([folders["fast"], folders["slow"]])
    assert [entry.label for entry in entries] == ["source", "fast", "slow"]
    table = {row[0]: row[1:] for row in rows(entries)}
    found = json.loads((folders["fast"] / "results.json").read_text())["methods"]
    fog = {1: [], 5: []}
    for cell in found[0]["cells"]:
        if cell["corruption"] == "fog":
            fog[cell["severity"]].append(cell["accuracy"])
    expected = sum(sum(fog[s]) / 2 for s in (1, 5)) / 2
    assert table["fog"][1] == f"{100 * expected:.2f}"
    assert table["mean"][0] == f"{100 * found[1]['averages']['accuracy']:.2f}"
    assert table["standard error over seeds"][1] == (
        f"{100 * found[0]['averages']['standard_error']:.2f}"
    )
    losses = [cell["loss"] for cell in found[0]["cells"]]
    assert table["loss in nats"][1] == f"{sum(losses) / len(losses):.3f}"
    assert table["forwards an image"] == ["1.00"] * 3
    assert table["backwards an image"] == ["0.00", "1.00", "1.00"]
    assert table["mCE"] == ["-"] * 3
    assert table["clean"] == ["-"] * 3


def test_unadapted_models_that_differ_are_both_shown(folders, tmp_path):
    stored = Results.from_json((folders["fast"] / "results.json").read_text())
    worse = [dataclasses.replace(c, loss=c.loss + 1) for c in stored.methods[1].cells]
    other = dataclasses.replace(stored.methods[1], name="c_source", cells=worse)
    (tmp_path / "results.json").write_text(
        dataclasses.replace(stored, methods=[stored.methods[0], other]).to_json()
    )
    labels = [entry.label for entry in read_entries([folders["fast"], tmp_path])]
    assert labels == ["b_source", "c_source", "fast", tmp_path.name]


def test_what_differs_is_said(folders):
    entries = read_entries([folders["fast"], folders["slow"]])
    (found,) = differences(entries)
    assert found == (
        "protocol differs (source: reset-per-cell, fast: reset-per-cell, slow: continual)"
    )
    assert found in compare([folders["fast"], folders["slow"]])


def test_only_common_cells_are_compared(folders):
    entries = read_entries([folders["fast"], folders["<one>"]])
    # The unadapted model of both is the same, on the common cells and in any order.
    assert [entry.label for entry in entries] == ["source", "fast", "<one>"]
    assert [row[0] for row in rows(entries)][1:3] == ["fog", "mean"]
    text = compare([folders["fast"], folders["<one>"]])
    assert "only the 2 cells that all runs have are compared, of up to 3" in text
    assert "batch_size differs" in text


def test_runs_of_one_name_are_told_apart(folders, tmp_path):
    other = tmp_path / "fast"
    shutil.copytree(folders["fast"], other)
    labels = [entry.label for entry in read_entries([folders["fast"], other])]
    assert labels == ["source", str(folders["fast"]), str(other)]
    again = [entry.label for entry in read_entries([other, other])]
    assert again == ["source", str(other), f"{other} (2)"]


def test_the_page_stands_alone(folders, tmp_path, capsys):
    file = tmp_path / "report.html"
    paths = [str(folders[name]) for name in ("fast", "slow", "<one>")]
    assert main(["compare", *paths, "--html", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "standard error over seeds" in shown
    text = file.read_text()
    assert text.count("<svg") == 3
    for heading in ("By corruption", "Along the stream", "Against cost", "Settings"):
        assert f"<h2>{heading}</h2>" in text
    # Nothing is fetched: no addresses but the names of the SVG format, no scripts.
    assert not set(re.findall(r"https?://[\w./-]+", text)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<(script|link|img|iframe)", text)
    assert not re.search(r"(src|href)=\"(?!#)", text)
    # Names are text, not markup.
    assert "<one>" not in text
    assert html.escape("<one>") in text
    header, *lines = rows(read_entries([folders[n] for n in ("fast", "slow", "<one>")]))
    assert "".join(f"<th>{html.escape(cell)}</th>" for cell in header) in text
    for line in lines:
        assert "".join(f"<td>{html.escape(cell)}</td>" for cell in line) in text


def _method(cells):
    found = [
        CellRecord(*cell, 0.5, 1.0, 0.1, 1.0, 1, 1, 1, batches, None, stream)
        for *cell, batches, stream in cells
    ]
    return MethodRecord("m", "m", {}, "", None, 0, found)


def test_accuracy_along_the_stream_by_hand():
    # Streams of 5, 5 and 3 images at batch 2; the short one is left out.
    method = _method(
        [("fog", 1, 5, [2, 1, 1], 0), ("fog", 2, 5, [0, 1, 0], 1), ("fog", 3, 3, [2, 1], 2)]
    )
    places, values = accuracy_along(method, 2, False)
    assert places == [2, 4, 5]
    assert values == [2 / 4, 4 / 8, 5 / 10]
    # One stream of two cells, one after the other: 3 + 4 images at batch 2.
    method = _method([("fog", 1, 3, [1, 1], 0), ("snow", 1, 4, [0, 2], 0)])
    assert accuracy_along(method, 2, False) == ([2, 3, 5, 7], [1 / 2, 2 / 3, 2 / 5, 4 / 7])
    # The same mixed: four batches of 2, 2, 2, 1.
    method = _method([("fog", 1, 3, [1, 0, 1, 0], 0), ("snow", 1, 4, [1, 0, 0, 1], 0)])
    assert accuracy_along(method, 2, True) == ([2, 4, 6, 7], [2 / 2, 2 / 4, 3 / 6, 4 / 7])


def test_a_long_curve_is_thinned_and_keeps_its_end():
    method = _method([("fog", 1, 1234, [1] * 1234, 0)])
    places, values = accuracy_along(method, 1, False)
    assert len(places) <= 50
    assert places[-1] == 1234
    assert set(values) == {1.0}


def test_compare_mistakes(folders, tmp_path, capsys):
    def refused(*argv):
        assert main(["compare", *map(str, argv), "--html", str(tmp_path / "x.html")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert not (tmp_path / "x.html").exists()
        return lines[0]

    assert "results.json: no such file" in refused(tmp_path)
    bad = tmp_path / "bad"
    bad.mkdir()
    for content in ("{", "[]", '"results"', "3", '{"format_version": 1}', '{"format_version": 2}'):
        (bad / "results.json").write_text(content)
        assert "not the results of this program" in refused(folders["fast"], bad)
    stored = Results.from_json((folders["fast"] / "results.json").read_text())
    other = dataclasses.replace(stored, settings={**stored.settings, "dataset": "cifar100"})
    (bad / "results.json").write_text(other.to_json())
    assert "different datasets cannot be compared: cifar10, cifar100" in refused(
        folders["fast"], bad
    )
    methods = [
        dataclasses.replace(m, cells=[dataclasses.replace(c, corruption="frost") for c in m.cells])
        for m in stored.methods
    ]
    (bad / "results.json").write_text(dataclasses.replace(stored, methods=methods).to_json())
    assert "no cell in common" in refused(folders["fast"], bad)
    with pytest.raises(DataError, match="cannot be written"):
        compare([folders["fast"]], tmp_path / "none" / "x.html")
    with pytest.raises(InputError):
        read_entries([folders["fast"], bad])


def test_a_page_replaces_nothing_but_a_page(folders, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(folders["fast"], run)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    (tmp_path / "thesis.html").write_text("<!doctype html><html><body>mine</body></html>")
    (tmp_path / "link.json").symlink_to(run / "results.json")
    (tmp_path / "empty.html").touch()

    def refused(file):
        assert main(["compare", str(run), str(folders["slow"]), "--html", str(file)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    for file in (run / "results.json", run / "../run/results.json", tmp_path / "link.json"):
        assert "one of the results to compare" in refused(file)
    for file in (run / "plot.png", folders["<one>"] / "results.json", tmp_path / "thesis.html"):
        assert "no page of compare; it stays" in refused(file)
    assert "no page of compare; it stays" in refused(tmp_path / "empty.html")
    assert "no page of compare; it stays" in refused("/dev/null")
    for folder in (tmp_path, ".", "", "..", "/"):
        assert "is a folder; name a file" in refused(folder)
    for file in (tmp_path / "none" / "x.html", "/dev/null/x.html", "a\0b", "x" * 300):
        assert "cannot be written" in refused(file)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "empty.html",
        "link.json",
        "run",
        "thesis.html",
    ]
    # An earlier page is replaced, whatever the runs are called.
    for names in (("<one>",), ("fast", "slow")):
        paths = [str(folders[name]) for name in names]
        assert main(["compare", *paths, "--html", str(tmp_path / "page.html")]) == 0
    assert html.escape("<one>") not in (tmp_path / "page.html").read_text()


def test_what_is_not_finite_survives_the_file():
    cell = CellRecord("fog", 5, 2, 0.5, float("nan"), float("nan"), 1.0, 2, 2, 1, [1])
    results = Results({"dataset": "cifar10"}, {"command": None}, [_method([])])
    results = dataclasses.replace(
        results, methods=[dataclasses.replace(results.methods[0], cells=[cell])]
    )
    again = Results.from_json(results.to_json())
    assert repr(again.methods[0].cells[0]) == repr(cell)
    assert again.circumstances == {"command": None}


def test_one_run_is_a_page_too(folders):
    assert "<svg" in page(read_entries([folders["slow"]]))
