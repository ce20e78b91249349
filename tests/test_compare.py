"""``ttt-plugins compare``: tables by hand, and a page that needs nothing beside itself."""

from __future__ import annotations

import copy
import dataclasses
import functools
import html
import json
import math
import re
import shutil
from random import Random

import pytest
from benchmark_fakes import FakeAdapter, memory_data
from hypothesis import HealthCheck, given, settings, strategies

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
    assert table["forwards per image"] == ["1.00"] * 3
    assert table["backwards per image"] == ["0.00", "1.00", "1.00"]
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
        assert "not a page of compare" in refused(file)
    assert "not a page of compare" in refused(tmp_path / "empty.html")
    assert "not a page of compare" in refused("/dev/null")
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


# -- damaged results ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(folders):
    """The ``results.json`` of a run."""
    return json.loads((folders["fast"] / "results.json").read_text())


def _places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from _places(inner, (*path, key))


def _changed(value, path, new):
    """A copy with something else at a place; the place is removed if ``new`` is _REMOVED."""
    if not path:
        return new
    copied = copy.copy(value)
    if len(path) == 1 and new is _REMOVED:
        del copied[path[0]]
    else:
        copied[path[0]] = _changed(value[path[0]], path[1:], new)
    return copied


_REMOVED = object()
_LEAVES = strategies.one_of(
    strategies.none(),
    strategies.booleans(),
    strategies.integers(-3, 40),
    strategies.sampled_from([1 << 64, -(1 << 70), 1e308, -1e308, 1e-308, 0.5, math.nan, math.inf]),
    strategies.text(max_size=8),
    strategies.sampled_from(["\x1b[31m", "\ud800", "$a_$", "_", "<b>", "cifar100", "mixed", "\n"]),
)
_VALUES = strategies.recursive(
    _LEAVES,
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(strategies.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def _is_told(folders, page_file=None):
    """Whether compare gives a table; otherwise one clear line of our own."""
    said, told = "", True
    try:
        said = compare(folders, page_file)
    except (DataError, InputError) as error:
        said, told = str(error), False
    assert all(line.isprintable() for line in said.splitlines())
    assert told or "\n" not in said
    return told


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=strategies.data())
def test_any_change_of_the_results_is_told_in_one_line(draw, stored, folders, tmp_path_factory):
    places = list(_places(stored))
    path = draw.draw(strategies.sampled_from(places))
    new = draw.draw(strategies.just(_REMOVED) | _VALUES) if path else draw.draw(_VALUES)
    folder = tmp_path_factory.mktemp("changed")
    (folder / "results.json").write_text(json.dumps(_changed(stored, path, new)))
    _is_told([folders["fast"], folder])


@pytest.mark.parametrize("seed", range(6))
def test_changed_results_make_a_page_or_one_line(seed, stored, folders, tmp_path):
    """Numbers and words stay what they are, so that more of them come to be drawn."""
    random = Random(seed)
    numbers = [0, 1, 3, 1e99, 0.25, 7e-300, 1 << 62]
    words = ["$a_$", "_", "\x1b[31m", "", "x" * 99]
    for _ in range(4):
        changed = stored
        for path in random.sample(list(_places(stored)), 3):
            try:
                old = functools.reduce(lambda value, key: value[key], path, changed)
            except (KeyError, IndexError, TypeError):
                continue
            if isinstance(old, (int, float, str)):
                new = random.choice(words if isinstance(old, str) else numbers)
                changed = _changed(changed, path, new)
        (tmp_path / "results.json").write_text(json.dumps(changed))
        _is_told([folders["fast"], tmp_path], tmp_path / "page.html")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=strategies.floats(0, 1), bit=strategies.integers(0, 7), cut=strategies.booleans())
def test_any_damage_of_the_file_is_told_in_one_line(place, bit, cut, folders, tmp_path_factory):
    content = bytearray((folders["slow"] / "results.json").read_bytes())
    position = round(place * (len(content) - 1))
    content[position] ^= 1 << bit
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "results.json").write_bytes(content[:position] if cut else content)
    told = _is_told([folders["fast"], folder])
    assert not (told and cut and position < len(content) - 1)  # the end of the last line


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, '{"methods": [[]]}', "\udcff"]
)
def test_results_that_are_none(text, folders, tmp_path):
    (tmp_path / "results.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match="not the results of this program"):
        compare([folders["fast"], tmp_path])


def test_names_do_not_command_the_terminal(stored, folders, tmp_path, capsys):
    folder = tmp_path / "m$a_$\x1b[31m"
    folder.mkdir()
    changed = _changed(stored, ("settings", "model"), "\x1b]0;title\x07\nmodel")
    changed = _changed(changed, ("settings", "device"), "\x9b31m")
    (folder / "results.json").write_text(json.dumps(changed))
    argv = ["compare", str(folders["fast"]), str(folder), "--html", str(tmp_path / "x\x1b.html")]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines())
    assert "\\x1b[31m" in shown
    assert "m$a_$" in shown
    text = (tmp_path / "x\x1b.html").read_text()
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert main(["compare", str(tmp_path / "\x1b[31mnone")]) == 2
    assert capsys.readouterr().err.strip().isprintable()


@pytest.mark.parametrize("name", ["m$a_$", "$\\frac{", "_m", "a\\$b$c", "\udcff", "$$"])
def test_names_are_no_mathematics(name, folders, tmp_path):
    out = tmp_path / "out"
    options = {"out": out, "progress": False, "model_name": f"models/{name}"}
    results = run_benchmark(FakeAdapter(), memory_data({("fog", 5): 6}), **options)
    assert results.settings["model"] == f"models/{name}"
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    named = tmp_path / (name if name.isprintable() else "x")
    shutil.copytree(out, named)
    compare([named, folders["fast"]], tmp_path / "page.html")
    if name.isprintable():
        assert html.escape(f">{name}</text>"[1:]) in html.escape(
            html.unescape((tmp_path / "page.html").read_text())
        )


def test_streams_of_one_length_cut_into_other_batches():
    # 5 + 9 and 7 + 7 images, in batches of 4: five batches and four.
    method = _method([("fog", 1, 5, [4, 1], 0), ("fog", 2, 9, [4, 4, 1], 0)])
    other = _method([("snow", 1, 7, [0, 0], 1), ("snow", 2, 7, [0, 0], 1)])
    both = dataclasses.replace(method, cells=method.cells + other.cells)
    assert accuracy_along(both, 4, False) == accuracy_along(method, 4, False)
