"""What the benchmark costs beyond the model, what a second process gains, and how busy a GPU is.

    python examples/benchmark_speed.py overhead --data-dir DIR
    python examples/benchmark_speed.py processes --data-dir DIR
    python examples/benchmark_speed.py full --device cuda [--autocast bfloat16] [--trace FILE]

``overhead``: the whole benchmark (reading, counting, writing) compared with a bare loop over the
same images in memory, and with the adapter's own share of its time. ``processes``: the command in
one process on one core compared with torchrun with two processes. ``full``: 75 cells of 10,000
images (the package's sample, repeated) compared with the plain model on the same images, and a
profile of how much of the time the GPU is busy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import ttt_plugins as tp
from ttt_plugins.benchmark import (
    CORRUPTIONS,
    CorruptionData,
    Execution,
    open_dataset,
    run_benchmark,
)
from ttt_plugins.data.images import LabelledImages, to_float
from ttt_plugins.demo import load_sample


def synthetic(cells: int, rows: int) -> CorruptionData:
    """Cells of repeated sample images, in memory."""
    sample = load_sample()
    names = list(sample.images)
    images_of = {}
    for number in range(cells):
        images = sample.images[names[number % len(names)]]
        places = torch.arange(rows) % len(images)
        cell = (CORRUPTIONS[number // 5 % len(CORRUPTIONS)], number % 5 + 1)
        images_of[cell] = LabelledImages(images[places], sample.labels[places])
    return CorruptionData.from_arrays(images_of)


# -- overhead ----------------------------------------------------------------------------


def bare_loop(net: nn.Module, parts: Sequence[LabelledImages], batch_size: int) -> float:
    """Seconds for only adapting to the images of some cells, with a reset before each."""
    start = time.perf_counter()
    for part in parts:
        net.reset()
        for rows in torch.arange(len(part)).split(batch_size):
            with torch.no_grad():
                net(to_float(part.images[rows]))
    return time.perf_counter() - start


@contextlib.contextmanager
def timed_calls(net: nn.Module) -> Iterator[list[float]]:
    """Collect the seconds of every call of ``net`` inside the block."""
    taken: list[float] = []
    device = net.backbone.device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    hooks = [
        net.register_forward_pre_hook(lambda *_: taken.append(-now())),
        net.register_forward_hook(lambda *_: taken.append(taken.pop() + now())),
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def overhead(
    net: nn.Module, data_dir: Path, batch_size: int = 64, rounds: int = 3, **cells
) -> dict[str, float]:
    """Seconds of the bare loop and of the benchmark, in turns, and the benchmark's extra share.

    Each is the median over the rounds. ``overhead`` compares the benchmark with the loop that ran
    next to it, which is unreliable on a machine whose speed varies; ``outside`` compares it with
    the calls of the adapter within the same run, which is reliable. ``cells`` are options of
    `open_dataset`. The benchmark opens the folder, reads it, evaluates, and writes all its files,
    including those for resuming.
    """
    data = open_dataset("cifar10", data_dir, **cells)
    parts = [data.load(cell) for cell in data.counts]
    first = parts[0][torch.arange(min(batch_size, len(parts[0])))]
    bare_loop(net, [first], batch_size)  # warms up, and completes all imports
    with tempfile.TemporaryDirectory() as folder:
        warm = CorruptionData.from_arrays({("fog", 5): first})
        run_benchmark(net, warm, out=Path(folder) / "out", batch_size=batch_size, progress=False)

    def benchmark() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder, timed_calls(net) as calls:
            start = time.perf_counter()
            data = dataclasses.replace(open_dataset("cifar10", data_dir, **cells), clean=None)
            run_benchmark(net, data, out=Path(folder) / "out", batch_size=batch_size)
            return time.perf_counter() - start, sum(calls)

    times = []
    for number in range(rounds):
        if number % 2:
            whole, inside = benchmark()
        bare = bare_loop(net, parts, batch_size)
        if not number % 2:
            whole, inside = benchmark()
        times.append((bare, whole, inside))
    return {
        "bare_s": statistics.median(b for b, _, _ in times),
        "benchmark_s": statistics.median(w for _, w, _ in times),
        "overhead": statistics.median(w / b - 1 for b, w, _ in times),
        "outside": statistics.median(w / i - 1 for _, w, i in times),
    }


# -- processes ---------------------------------------------------------------------------


def _seconds(command: list[str], cores: set[int] | None) -> float:
    def hold() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        env=environment,
        preexec_fn=hold,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def processes(arguments: Sequence[str], count: int = 2) -> dict[str, float]:
    """Seconds of ``ttt-plugins benchmark`` with these arguments, in one process and in two.

    Both include the start of Python, which matters less in a longer run.
    """
    core = min(os.sched_getaffinity(0))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    python = [sys.executable, "-W", "ignore"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "ttt_plugins", "benchmark", *arguments, "--threads", "1", "--out"]
        one = _seconds([*python, *command, f"{folder}/one"], {core})
        shared = _seconds([*python, *torchrun, *command, f"{folder}/shared"], None)
        alone, shared_out = (
            Path(folder) / n / "unaggregated_results.csv" for n in ("one", "shared")
        )
        if alone.read_text() != shared_out.read_text():
            raise AssertionError("one process and several do not agree")
    return {"one_s": one, "shared_s": shared, "speedup": one / shared}


# -- a full run --------------------------------------------------------------------------


def full(
    net: nn.Module,
    plain: nn.Module,
    cells: int = 75,
    rows: int = 10_000,
    batch_size: int = 64,
    execution: Execution | None = None,
) -> dict[str, float]:
    """Images per second of the whole benchmark, of its loop alone, and of the plain model.

    The loop's time is the sum of the cells' seconds; the plain model runs in the same benchmark
    with the same options. A short run beforehand, in which kernels are compiled and chosen, is not
    counted.
    """
    data, speeds = synthetic(cells, rows), {}
    for name, each in (("plain", plain), ("adapting", net)):
        options = {"batch_size": batch_size, "execution": execution, "progress": False}
        run_benchmark(each, synthetic(1, 4 * batch_size), **options)
        # Setting these options again would compile the model again.
        options["execution"] = None if execution is None else _keep(execution)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            results = run_benchmark(each, data, out=Path(folder) / "out", **options)
            wall = time.perf_counter() - start
        record = results.methods[0]
        images = sum(cell.n for cell in record.cells)
        speeds[f"{name}_images_per_s"] = images / sum(cell.seconds for cell in record.cells)
        speeds[f"{name}_images_per_s_in_all"] = images / wall
        speeds[f"{name}_wall_s"] = wall
    return speeds


def _keep(execution: Execution) -> Execution:
    """The options that a prepared adapter does not already have."""
    return dataclasses.replace(execution, compile=None)


def profile(
    net: nn.Module,
    batch_size: int = 64,
    batches: int = 20,
    execution: Execution | None = None,
    trace: Path | None = None,
) -> dict[str, float]:
    """Share of the time in which the device (without a GPU, the CPU) runs a kernel, in [0, 1].

    It is computed from torch.profiler's events over ``batches`` batches of the benchmark's loop. A
    Chrome trace is written to ``trace``. Profiling slows the host, so the share is a lower bound.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    device = net.backbone.device
    data = synthetic(1, batch_size * batches)
    run_benchmark(net, synthetic(1, 4 * batch_size), batch_size=batch_size, execution=execution)
    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    options = {"batch_size": batch_size, "progress": False}
    options["execution"] = None if execution is None else _keep(execution)
    with torch.profiler.profile(activities=kinds) as profiler:
        run_benchmark(net, data, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    wanted = DeviceType.CUDA if device.type == "cuda" else None
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in profiler.events()
        if wanted is None or e.device_type == wanted
    )
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {"busy": busy / (end - spans[0][0]), "kernels_per_batch": len(spans) / batches}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("overhead", "processes", "full"))
    parser.add_argument("--data-dir", type=Path, help="as for ttt-plugins benchmark")
    parser.add_argument("--model", default="bundled:mgg-resnet26-cifar10")
    parser.add_argument("--source", default="bundled:source-resnet26-cifar10")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--n-examples", type=int, default=1000)
    parser.add_argument("--corruption", nargs="+", default=CORRUPTIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=75)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--autocast")
    parser.add_argument("--compile", nargs="?", const="inductor")
    parser.add_argument("--trace", type=Path, help="file for a Chrome trace of the profile")
    args = parser.parse_args(argv)
    if args.what == "full":
        execution = Execution(args.channels_last, args.autocast, args.compile)
        net = tp.from_pretrained(args.model, device=args.device)
        plain = tp.wrap(args.source, "source", device=args.device)
        figures = full(net, plain, args.cells, args.rows, args.batch_size, execution)
        net = tp.from_pretrained(args.model, device=args.device)
        figures |= profile(net, args.batch_size, execution=execution, trace=args.trace)
    elif args.data_dir is None:
        parser.error("--data-dir is needed")
    elif args.what == "overhead":
        net = tp.from_pretrained(args.model, device=args.device)
        cells = {"corruptions": args.corruption, "severities": [5], "n_examples": args.n_examples}
        figures = overhead(net, args.data_dir, args.batch_size, args.rounds, **cells)
    else:
        arguments = [args.model, "--data-dir", str(args.data_dir), "--severity", "5"]
        arguments += ["--corruption", *args.corruption, "--n-examples", str(args.n_examples)]
        figures = processes([*arguments, "--batch-size", str(args.batch_size)])
    for name, value in figures.items():
        print(f"{name:32s} {value:.4g}", flush=True)


if __name__ == "__main__":
    main()
