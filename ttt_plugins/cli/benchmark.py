"""The commands ``benchmark`` and ``compare``: measure an adapter on corrupted images."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch

from ..adapter import Adapter
from ..benchmark import (
    DATASETS,
    PROTOCOLS,
    Execution,
    compare,
    open_dataset,
    run_benchmark,
    worker_from_environment,
)
from ..benchmark.protocols import CONCENTRATION
from ..benchmark.resume import check_out
from ..errors import InputError
from ..utils.checks import check_seed
from ..utils.processes import Worker, place_from_environment
from ..utils.text import printable
from ..wrapping import wrap
from .models import adapter_from_args, add_model_flags

__all__ = ["add_benchmark", "add_compare"]

#: The largest number of threads; with far too many the system kills the process during the run.
_THREADS = 1024


def add_benchmark(commands) -> None:
    """Add the command ``benchmark``."""
    add = commands.add_parser("benchmark", help="measure an adapter on corrupted images")
    add.set_defaults(run=_benchmark)
    add_model_flags(add)
    _add_data_flags(add)
    add.add_argument("--out", type=Path, required=True, help="folder for the results")
    add.add_argument("--batch-size", type=int, default=64, metavar="B")
    add.add_argument("--protocol", choices=PROTOCOLS, default="reset-per-cell")
    add.add_argument(
        "--concentration",
        type=float,
        default=CONCENTRATION,
        metavar="DELTA",
        help="concentration of the Dirichlet distribution for --protocol correlated "
        "(default: %(default)s)",
    )
    add.add_argument(
        "--seed",
        type=int,
        nargs="+",
        help="seed for the order of the images in a cell and for the adapter's random draws "
        "(default: stored order, and 0); several seeds give means and standard errors",
    )
    add.add_argument("--overwrite", action="store_true", help="replace existing results in OUT")
    add.add_argument("--resume", action="store_true", help="resume the unfinished run in OUT")
    _add_execution_flags(add)


def _add_data_flags(add: argparse.ArgumentParser) -> None:
    add.add_argument("--dataset", choices=DATASETS, default="cifar10")
    add.add_argument("--data-dir", type=Path, required=True, help="folder with the images")
    levels = range(1, 6)
    add.add_argument(
        "--severity", type=int, nargs="+", choices=levels, help="severity levels (default: all)"
    )
    add.add_argument("--corruption", nargs="+", help="corruptions (default: the benchmark's own)")
    add.add_argument("--n-examples", type=int, metavar="N", help="images per cell (default: all)")
    add.add_argument("--labels", type=Path, help="parquet file with the labelled clean test images")
    add.add_argument("--no-download", action="store_true", help="fail if data is missing")


def _add_execution_flags(add: argparse.ArgumentParser) -> None:
    add.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    add.add_argument("--autocast", choices=("bfloat16", "float16"), help="reduced precision")
    add.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model with torch.compile (BACKEND: inductor)",
    )
    add.add_argument(
        "--threads", type=int, help="CPU threads (default: torch's default; 1 under torchrun)"
    )
    # Accepted without effect: locks of the system show which processes are alive.
    add.add_argument("--lease", type=float, help=argparse.SUPPRESS)


def _benchmark(args: argparse.Namespace) -> None:
    check_out(args.out)
    for seed in args.seed or ():
        check_seed(seed, "--seed")
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}")
        if args.threads > _THREADS:
            raise InputError(f"--threads must be at most {_THREADS}, got {args.threads}")
        torch.set_num_threads(args.threads)
    worker = worker_from_environment()
    if worker is None:
        _run(args, None)
        return
    place = place_from_environment()
    if args.device == "cuda" and torch.cuda.is_available():
        args.device = f"cuda:{place.local_rank % torch.cuda.device_count()}"
    # torchrun restarts all processes when one has died; finished work is on disk.
    args.resume |= place.restarts > 0
    try:
        _run(args, worker)
    finally:
        worker.leave()


def _run(args: argparse.Namespace, worker: Worker | None) -> None:
    execution = Execution(args.channels_last, args.autocast, args.compile)
    # Process 0 downloads; the others then find the files.
    with worker.main_process_first() if worker else contextlib.nullcontext(True):
        data = open_dataset(
            args.dataset,
            args.data_dir,
            corruptions=args.corruption,
            severities=args.severity,
            n_examples=args.n_examples,
            labels=args.labels,
            download=not args.no_download,
        )
    seeds, first = args.seed, args.seed[0] if args.seed else None
    args.seed = first  # the adapter's seed
    # A timm name without --pretrained means random weights, which must be the same for both models.
    with worker.main_process_first() if worker else contextlib.nullcontext(True):
        torch.manual_seed(first or 0)
        net = adapter_from_args(args)
        torch.manual_seed(first or 0)
        baseline = None if net.method == "source" else _unadapted(net, args.model_dir)
    speaks = worker is None or worker.rank == 0
    if speaks:
        print(net.describe(), flush=True)
    results = run_benchmark(
        net,
        data,
        baseline=baseline,
        out=args.out,
        protocol=args.protocol,
        concentration=args.concentration,
        batch_size=args.batch_size,
        seed=seeds,
        execution=execution,
        model_name=args.model,
        command=args.command_line,
        overwrite=args.overwrite,
        resume=args.resume,
        worker=worker,
    )
    if not speaks:
        return
    print(f"\naccuracy in %, {args.protocol}, batch size {args.batch_size}\n{results.table()}")
    for name, mce in results.circumstances["corruptions_mce"].items():
        if mce is not None:
            print(f"mCE of {name}: {100 * mce:.2f} % (AlexNet: 100 %)")
    if data.clean is None:
        print("clean accuracy not measured: no clean images in the data folder")
    if data.note:
        print(data.note)
    print(f"results.json, RobustBench's files and plot.png are in {printable(str(args.out))}")


def _unadapted(net: Adapter, model_dir: Path) -> Adapter:
    """The model of an adapter, loaded again with the same preprocessing."""
    normal = net.backbone.normalize
    return wrap(
        net.origin["name"],
        "source",
        pretrained=net.origin.get("pretrained", False),
        mean=net.backbone.mean.flatten().tolist() if normal else None,
        std=net.backbone.std.flatten().tolist() if normal else None,
        normalize=normal,
        model_dir=model_dir,
        device=net.backbone.device,
    )


def add_compare(commands) -> None:
    """Add the command ``compare``."""
    add = commands.add_parser("compare", help="compare the results of several benchmarks")
    add.set_defaults(run=_compare)
    add.add_argument(
        "folders", nargs="+", type=Path, metavar="OUT", help="results folder of a benchmark"
    )
    add.add_argument(
        "--html",
        type=Path,
        default=Path("comparison.html"),
        metavar="FILE",
        help="file for the report, an HTML page with its figures (default: %(default)s)",
    )


def _compare(args: argparse.Namespace) -> None:
    print(compare(args.folders, args.html))
    print(f"the report is {printable(str(args.html))}")
