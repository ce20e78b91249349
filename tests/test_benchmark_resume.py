"""Runs that are stopped and resumed, against unbroken ones: the same figures, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time

import forked
import pytest
import torch
from benchmark_fakes import FakeAdapter, figures, memory_data, write_parquet
from safetensors.torch import save

import ttt_plugins as tp
from ttt_plugins.artifacts.saving import save_with_model
from ttt_plugins.benchmark import PROTOCOLS, Execution, run_benchmark
from ttt_plugins.benchmark import jobs as jobs_module
from ttt_plugins.benchmark.resume import UNFINISHED, Progress
from ttt_plugins.cli import main
from ttt_plugins.core.heads import init_byol, init_rotation
from ttt_plugins.errors import DataError, InputError, MissingDependencyError
from ttt_plugins.utils import files as files_module
from ttt_plugins.utils import robustbench as bridge

COUNTS = {("fog", 1): 20, ("fog", 5): 30, ("snow", 1): 20, ("snow", 5): 9}
FILES = ["b_fake.json", "plot.png", "results.json", "unaggregated_results.csv"]


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch):
    """Drawing takes longer than everything else here, and other tests look at the picture."""
    monkeypatch.setattr("ttt_plugins.benchmark.plots.plot_results", lambda results: b"PNG")


class Stopped(Exception):
    """Stands for whatever ends a process in the middle of a batch."""


class Stopping(FakeAdapter):
    """Ends at its n-th batch."""

    def __init__(self, after=10**9, **options):
        super().__init__(**options)
        self.after = after

    def forward(self, images):
        self.after -= 1
        if self.after < 0:
            raise Stopped
        return super().forward(images)


def run(out, net=None, **options):
    options = {"batch_size": 7, "progress": False, "model_name": "a/b", **options}
    data = options.pop("data", None) or memory_data(COUNTS)
    source = FakeAdapter("source", lr=0.0)
    return run_benchmark(net or FakeAdapter(), data, baseline=source, out=out, **options)


def names(out):
    return sorted(path.name for path in out.iterdir())


@pytest.fixture(scope="module")
def unbroken_run(tmp_path_factory):
    """``unbroken_run(protocol)`` -> options, results and folder of a run, made once."""
    made = {}

    def make(protocol):
        if protocol not in made:
            clean = 10 if PROTOCOLS[protocol].with_clean else 0
            options = {"protocol": protocol, "seed": [0, 3], "data": memory_data(COUNTS, clean)}
            folder = tmp_path_factory.mktemp("unbroken")
            made[protocol] = options, run(folder, **options), folder
        return made[protocol]

    return make


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("after", [0, 1, 4, 9, 12])
def test_a_stopped_run_ends_with_the_figures_of_an_unbroken_one(
    protocol, after, unbroken_run, tmp_path
):
    options, unbroken, folder = unbroken_run(protocol)
    with pytest.raises(Stopped):
        run(tmp_path / "out", Stopping(after), **options)
    assert names(tmp_path / "out") == [UNFINISHED]
    again = Stopping()
    resumed = run(tmp_path / "out", again, resume=True, **options)
    assert figures(resumed) == figures(unbroken)
    assert names(tmp_path / "out") == FILES
    # what was finished is not done again
    whole = sum(c.forwards for c in unbroken.methods[0].cells)
    if after == 12 and protocol != "mixed":
        assert again.forwards < whole
    files = ("unaggregated_results.csv", "b_fake.json")
    for file in files:
        assert (tmp_path / "out" / file).read_text() == (folder / file).read_text()


def test_stopped_again_and_again(tmp_path):
    unbroken = run(None, protocol="continual")
    batches = 3 + 5 + 3 + 2
    for _ in range(20):
        try:
            resumed = run(tmp_path / "out", Stopping(5), protocol="continual", resume=True)
            break
        except Stopped:
            continue
    # Five batches a time are enough for any one cell, so that each time gets one further.
    assert figures(resumed) == figures(unbroken)
    assert batches > 2 * 5


def test_every_cell_is_on_disk_before_the_next_one_starts(tmp_path):
    seen = []
    out = tmp_path / "out"

    class Looking(FakeAdapter):
        def forward(self, images):
            seen.append(len(list(out.glob(f"{UNFINISHED}/method0*/0*.safetensors"))))
            return super().forward(images)

    run(out, Looking(), protocol="continual", batch_size=10)
    assert seen == [0, 0, 1, 1, 1, 2, 2, 3]


def test_a_long_stretch_is_kept_in_pieces(tmp_path, monkeypatch):
    whole = run(None, protocol="mixed", seed=1)
    monkeypatch.setattr(jobs_module, "PIECE", 15)  # two batches
    with pytest.raises(Stopped):
        run(tmp_path / "out", Stopping(7), protocol="mixed", seed=1)
    again = Stopping()
    resumed = run(tmp_path / "out", again, protocol="mixed", seed=1, resume=True)
    assert figures(resumed)[4:] == figures(whole)[4:]  # the source, whose passes are whole
    assert [f[3]["accuracy"] for f in figures(resumed)] == [
        f[3]["accuracy"] for f in figures(whole)
    ]
    assert figures(resumed) == figures(whole)
    assert again.forwards == sum(COUNTS.values()) - 6 * 7


def test_every_methods_state_is_stored_whole(method, make_net, make_model, tmp_path):
    data = memory_data({("fog", 1): 10, ("fog", 5): 10, ("snow", 5): 9})

    def once(out, stop=False, **options):
        def load(cell):
            if stop and cell == ("snow", 5):
                raise Stopped
            return data.load(cell)

        model, generator = make_model("batchnorm"), torch.Generator().manual_seed(2)
        more = {}
        if method == "ttt":
            tensors = init_rotation(model, tp.TTT().split, generator)
            more = {"tensors": tensors, "mode": "online", "copies": 2}
        elif method == "mt3":
            more = {"tensors": init_byol(model, generator)}
        return run_benchmark(
            make_net(method, model, **more),
            dataclasses.replace(data, load=load),
            out=out,
            protocol="continual",
            batch_size=4,
            progress=False,
            **options,
        )

    unbroken = once(None)
    with pytest.raises(Stopped):
        once(tmp_path / "out", stop=True)
    assert figures(once(tmp_path / "out", resume=True)) == figures(unbroken)


def test_what_is_no_adapter_is_refused_at_once(make_model, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"ByobNet|ResNet.* is not an adapter: wrap the model first"
    ):
        run(tmp_path / "out", make_model("batchnorm"))
    monkeypatch.delattr(FakeAdapter, "load_adaptation_state")
    with pytest.raises(InputError, match="FakeAdapter is not an adapter"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "lose", ["state.safetensors", "0000.safetensors", "0001.safetensors", "state and last"]
)
def test_a_lost_or_damaged_file_costs_time_only(lose, tmp_path):
    unbroken = run(None, protocol="continual")
    with pytest.raises(Stopped):
        run(tmp_path / "out", Stopping(12), protocol="continual")
    (folder,) = (tmp_path / "out" / UNFINISHED).glob("method0*")
    assert names(folder) == [*(f"000{i}.safetensors" for i in range(3)), "state.safetensors"]
    if lose == "state and last":
        (folder / "0002.safetensors").unlink()
        lose = "state.safetensors"
    (folder / lose).write_bytes((folder / lose).read_bytes()[:-5])
    resumed = run(tmp_path / "out", protocol="continual", resume=True)
    assert figures(resumed) == figures(unbroken)


def test_a_description_that_is_nested_deeply_costs_time_only(tmp_path):
    unbroken = run(None, protocol="continual")
    with pytest.raises(Stopped):
        run(tmp_path / "out", Stopping(12), protocol="continual")
    (folder,) = (tmp_path / "out" / UNFINISHED).glob("method0*")
    about = torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)
    for file in folder.iterdir():
        file.write_bytes(save({"about": about}))
    resumed = run(tmp_path / "out", protocol="continual", resume=True)
    assert figures(resumed) == figures(unbroken)


def test_memory_layout_belongs_to_the_state(tmp_path):
    progress = Progress(tmp_path / "unfinished")
    progress.begin({})
    evaluation = dataclasses.replace(_evaluation(), seconds=1.5)
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    progress.save("stream", 0, evaluation, {"w": weight, "v": torch.randn(2, 2).T})
    after, state = progress.state("stream")
    assert after == 0
    assert state["w"].stride() == weight.stride()
    assert torch.equal(state["w"], weight)
    (found,) = progress.evaluations("stream", 3)
    assert found.seconds == 1.5
    assert torch.equal(found.answers.right, evaluation.answers.right)


def _evaluation():
    from ttt_plugins.benchmark.evaluate import classify

    data = memory_data({("fog", 5): 3})
    rows = torch.tensor([[0, 0], [0, 1], [0, 2]])
    return classify(FakeAdapter(), {0: data.load(("fog", 5))}, rows, 2)


# -- what may be gone on with ------------------------------------------------------------


def test_an_unfinished_run_is_not_lost_by_accident(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run(out, Stopping(9))
    with pytest.raises(InputError, match=r"unfinished run.*--resume.*--overwrite"):
        run(out)
    again = Stopping()
    run(out, again, overwrite=True)
    assert again.forwards == sum(COUNTS.values())
    assert names(out) == FILES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "batch_size"),
        ({"protocol": "continual"}, "protocol"),
        ({"seed": 4}, "seeds"),
        ({"seed": [0, 1]}, "seeds"),
        ({"model_name": "c"}, "model"),
        ({"execution": Execution(autocast="bfloat16")}, "execution"),
        ({"net": FakeAdapter(lr=4.0)}, "config"),
        ({"data": memory_data({("fog", 1): 20})}, "cells"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused(change, message, finished, tmp_path):
    out = tmp_path / "out"
    if finished:
        run(out, seed=0)
    else:
        with pytest.raises(Stopped):
            run(out, Stopping(9), seed=0)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for resume in (False, True):
        with pytest.raises(InputError, match=f"other settings.*{message} differs"):
            run(out, **{"seed": 0, **change}, resume=resume)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_other_weights_and_other_concentrations_are_refused(make_net, make_model, tmp_path):
    def once(seed, **options):
        net = make_net("source", make_model("batchnorm", seed=seed))
        data = memory_data({("fog", 5): 9})
        options = {"out": tmp_path / "out", "progress": False, "resume": True, **options}
        return run_benchmark(net, data, **options)

    once(0, protocol="correlated")
    with pytest.raises(InputError, match="weights differs"):
        once(1, protocol="correlated")
    with pytest.raises(InputError, match="concentration differs"):
        once(0, protocol="correlated", concentration=0.2)
    once(0, protocol="correlated")


def test_another_number_of_threads_is_refused(tmp_path, monkeypatch):
    run(tmp_path / "out")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(InputError, match="threads differs"):
        run(tmp_path / "out", resume=True)


def test_other_versions_are_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run(out, Stopping(9))
    file = out / UNFINISHED / "run.json"
    header = json.loads(file.read_text())
    header["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(header))
    with pytest.raises(InputError, match=r"other versions.*torch 1.0, now 2"):
        run(out, resume=True)


def test_a_finished_run_is_returned(tmp_path):
    first = run(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    found = run(tmp_path / "out", Stopping(0), resume=True)
    assert figures(found) == figures(first)
    assert found.table() == first.table()
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_resume_begins_where_nothing_was_begun(tmp_path):
    assert figures(run(tmp_path / "out", resume=True)) == figures(run(None))


def test_pieces_without_a_header_are_nobodys(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run(out, Stopping(9), protocol="continual", batch_size=5)
    # as if the process had been killed while it threw the run away
    (out / UNFINISHED / "run.json").unlink()
    (out / ".results.json.123.tmp").write_text("half")
    assert figures(run(out, resume=True)) == figures(run(None))
    assert names(out) == FILES


# -- two runs, full disks, kill ----------------------------------------------------------


def test_two_runs_into_one_folder(tmp_path):
    out = tmp_path / "out"

    class Second(FakeAdapter):
        tried = 0

        def forward(self, images):
            if not self.tried:
                self.tried += 1
                for options in ({"resume": True}, {"overwrite": True}, {}):
                    with pytest.raises(InputError, match="another run is writing"):
                        run(out, **options)
            return super().forward(images)

    net = Second()
    found = run(out, net)
    assert net.tried == 1
    assert figures(found) == figures(run(None))
    run(out)  # and afterwards it is free again


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_disk_that_fills_up(after, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    left = after
    original = os.fsync

    def full(handle):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        run(out, protocol="reset-per-cell")
    now = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert now == before
    assert not [p for p in out.rglob("*") if p.suffix == ".tmp"]
    monkeypatch.undo()
    again = Stopping()
    assert figures(run(out, again, resume=True)) == figures(run(None))
    assert names(out) == FILES
    if after > 2:  # the header, then a piece of each method
        assert again.forwards < sum(COUNTS.values())


def test_killed_and_resumed_on_the_command_line(tmp_path, make_model, capsys):
    small = ("ttt_resnet26", {"width": 8, "depth": 8, "groups": 4})
    model = save_with_model(make_model("groupnorm"), *small, tmp_path / "model")
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "test.parquet", 24, 3)
    _write_npz(folder)
    argv = ["benchmark", str(model), "--method", "tent", "--data-dir", str(folder)]
    argv += ["--corruption", "fog", "snow", "--severity", "1", "5", "--batch-size", "4"]
    argv += ["--protocol", "continual", "--seed", "0", "1", "--lr", "0.01", "--threads", "1"]
    out = tmp_path / "out"
    running = forked.start(main, [*argv, "--out", str(out)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.is_alive():
        if len(list(out.glob(f"{UNFINISHED}/method0*/0*.safetensors"))) >= 3:
            break
        time.sleep(0.002)
    running.kill()
    running.join()
    assert running.exitcode == -signal.SIGKILL
    assert names(out) == [UNFINISHED]
    assert main([*argv, "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*argv, "--out", str(out), "--resume"]) == 0
    assert main([*argv, "--out", str(tmp_path / "unbroken")]) == 0
    resumed, unbroken = (
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("out", "unbroken")
    )
    for found in (resumed, unbroken):
        for method in found["methods"]:
            del method["averages"]["seconds"]
            for cell in method["cells"]:
                del cell["seconds"], cell["peak_memory"]
    assert resumed["methods"] == unbroken["methods"]
    assert resumed["settings"] == unbroken["settings"]
    assert resumed["settings"]["seeds"] == [0, 1]
    assert main([*argv, "--out", str(out), "--resume", "--batch-size", "5"]) == 2
    assert "batch_size differs" in capsys.readouterr().err


def _write_npz(folder):
    import numpy as np
    from benchmark_fakes import random_cell

    rng = np.random.default_rng(0)
    for name in ("fog", "snow"):
        images = random_cell(rng, 24)[0]
        np.savez(folder / f"{name}.npz", severity_1=images[:12], severity_5=images)


# -- pieces that are not to be trusted -----------------------------------------------------


@pytest.mark.parametrize("place", [0.0, 0.2, 0.5, 0.8, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("name", ["0000.safetensors", "0001.safetensors", "state.safetensors"])
def test_a_flipped_bit_costs_time_only(name, place, tmp_path):
    unbroken = run(None, protocol="continual")
    with pytest.raises(Stopped):
        run(tmp_path / "out", Stopping(12), protocol="continual")
    (folder,) = (tmp_path / "out" / UNFINISHED).glob("method0*")
    content = bytearray((folder / name).read_bytes())
    content[round(place * (len(content) - 1))] ^= 4
    (folder / name).write_bytes(content)
    resumed = run(tmp_path / "out", protocol="continual", resume=True)
    assert figures(resumed) == figures(unbroken)


def test_a_flipped_bit_in_the_clean_accuracy(tmp_path):
    try:
        bridge.import_robustbench()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    data = memory_data(COUNTS, clean=20)
    unbroken = run(None, data=data)
    with pytest.raises(Stopped):
        run(tmp_path / "out", Stopping(9), data=data)
    file = tmp_path / "out" / UNFINISHED / "method0-clean.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    assert figures(run(tmp_path / "out", data=data, resume=True)) == figures(unbroken)


def test_overwriting_trusts_no_piece_that_stayed(tmp_path, monkeypatch):
    counts = {("fog", 1): 20, ("fog", 5): 30}
    given = memory_data(counts)
    others = {cell: given.load(cell)[torch.arange(n).flip(0)] for cell, n in counts.items()}
    other = dataclasses.replace(given, load=others.__getitem__)
    with pytest.raises(Stopped):
        run(tmp_path / "out", Stopping(7), data=given, protocol="continual")
    # Files of another user, say: they cannot be deleted, and that is no error.
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    again = run(tmp_path / "out", data=other, protocol="continual", overwrite=True)
    expected = run(None, data=other, protocol="continual")
    assert figures(again) == figures(expected)
    assert figures(again) != figures(run(None, data=given, protocol="continual"))


def test_pieces_of_another_run_of_the_same_settings(tmp_path):
    given = memory_data(COUNTS)
    others = {cell: given.load(cell)[torch.arange(n).flip(0)] for cell, n in COUNTS.items()}
    other = dataclasses.replace(given, load=others.__getitem__)
    for name, data in (("given", given), ("other", other)):
        with pytest.raises(Stopped):
            run(tmp_path / name, Stopping(9), data=data, protocol="continual")
    (source,) = (tmp_path / "given" / UNFINISHED).glob("method0*")
    (target,) = (tmp_path / "other" / UNFINISHED).glob("method0*")
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    resumed = run(tmp_path / "other", data=other, protocol="continual", resume=True)
    assert figures(resumed) == figures(run(None, data=other, protocol="continual"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"settings": ' * 100_000, "[]", "3", "\udcff"])
@pytest.mark.parametrize("file", [f"{UNFINISHED}/run.json", "results.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_header_that_is_no_header(text, file, resume, tmp_path):
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=r"other settings.*format differs"):
        run(tmp_path / "out", resume=resume)
    assert figures(run(tmp_path / "out", overwrite=True)) == figures(run(None))


@pytest.mark.parametrize("versions", ["3", "[]", "{}", '{"torch": []}'])
def test_a_header_without_versions(versions, tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path / "out", Stopping(9))
    file = tmp_path / "out" / UNFINISHED / "run.json"
    header = json.loads(file.read_text()) | {"versions": json.loads(versions)}
    file.write_text(json.dumps(header))
    with pytest.raises(InputError, match=r"other versions.*--overwrite"):
        run(tmp_path / "out", resume=True)


def test_a_folder_whose_name_is_not_unicode(tmp_path):
    out = tmp_path / os.fsdecode(b"out-\xff-\x1b[31m")
    unbroken = run(None, protocol="continual", model_name=f"{out}/m")
    with pytest.raises(Stopped):
        run(out, Stopping(9), protocol="continual", model_name=f"{out}/m")
    again = Stopping()
    resumed = run(out, again, protocol="continual", model_name=f"{out}/m", resume=True)
    assert figures(resumed) == figures(unbroken)
    assert again.forwards < sum(COUNTS.values())
    assert (out / "results.json").is_file()
