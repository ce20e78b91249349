"""Ctrl-C while the command line starts, and SIGTERM while it works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from benchmark_fakes import random_cell, write_parquet

from ttt_plugins.benchmark.resume import UNFINISHED
from ttt_plugins.cli import main
from ttt_plugins.utils import signals

PROGRAM = [sys.executable, "-W", "ignore", "-m", "ttt_plugins"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _wait_for(ready, alive):
    deadline = time.monotonic() + 120
    while not ready() and alive() and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_torch_is_imported(number, code):
    process = subprocess.Popen(
        [*PROGRAM, "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    _wait_for(lambda: "libtorch" in maps.read_text(), lambda: process.poll() is None)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    said = "ttt-plugins: stopped: before anything was done\n"
    assert (process.returncode, out, err) == (code, "", said)


def test_ctrl_c_raises_again_once_a_command_runs(monkeypatch):
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in kinds]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ttt-plugins", "list"])
    try:
        signals.exit_on_interrupt()
        assert all(signal.getsignal(n) is not b for n, b in zip(kinds, before, strict=True))
        assert main(["list"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in zip(kinds, before, strict=True):
            signal.signal(number, handler)


def test_sigterm_is_handled_inside_the_block_only():
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with signals.raising_on_sigterm("resume it"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(signals.Terminated, match="resume it"):
        work()
    assert signal.getsignal(signal.SIGTERM) is before
    done = []

    def elsewhere():
        with signals.raising_on_sigterm("never"):
            done.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [True]


def test_sigterm_during_a_benchmark_says_how_to_resume(tmp_path):
    write_parquet(tmp_path / "test.parquet", 24, 3)
    for name in ("fog", "snow"):
        images = random_cell(np.random.default_rng(0), 24)[0]
        np.savez(tmp_path / f"{name}.npz", severity_1=images[:12], severity_5=images)
    argv = ["benchmark", "ttt_resnet26", "--method", "tent", "--data-dir", tmp_path]
    argv += ["--corruption", "fog", "snow", "--severity", 1, 5, "--batch-size", 2, "--threads", 1]
    out = tmp_path / "out"
    argv += ["--out", out, "--protocol", "continual"]
    process = forked.start(main, [str(word) for word in argv], output=tmp_path / "said")
    pieces = f"{UNFINISHED}/method0*/0*.safetensors"
    _wait_for(lambda: any(out.glob(pieces)), process.is_alive)
    process.terminate()
    process.join(120)
    err = (tmp_path / "said").read_text()
    assert process.exitcode == 143, err
    last = err.strip().splitlines()[-1]
    assert last == "ttt-plugins: stopped: to resume, run the same command with --resume"
    assert "Traceback" not in err
    assert list(out.glob(pieces))
    assert not list(out.rglob("*.tmp"))
