"""The commands ``benchmark`` and ``compare``: measure an adapter on corrupted images."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter
from ..benchmark import (
    DATASETS,
    FIELD,
    PROTOCOLS,
    CorruptionData,
    Execution,
    compare,
    open_dataset,
    run_benchmark,
    run_field,
    worker_from_environment,
)
from ..benchmark.folders import has_extra_corruptions
from ..benchmark.protocols import CONCENTRATION
from ..benchmark.resume import check_out
from ..core.registry import get_method
from ..data.corruptions import TENSOR_CORRUPTIONS
from ..data.labels import dataset_positions
from ..errors import InputError
from ..utils.checks import check_seed
from ..utils.processes import Worker, device_of_process, place_from_environment
from ..utils.text import printable
from ..wrapping import wrap
from .flags import fields_from_pairs, key_value
from .models import adapter_from_args, add_model_flags, add_track_flag, tracked
from .pictures import (
    add_source_flags,
    cells_by_rows,
    folder_classes,
    in_class_folders,
    named_sources,
)

__all__ = ["add_benchmark", "add_compare"]

#: Largest number of threads; with far more, the system would kill the process during the run.
_THREADS = 1024
_PROTOCOL = "reset-per-cell"
#: Default number of images of each corruption in the field.
_FIELD_IMAGES = 256


def add_benchmark(commands) -> None:
    """Add the command ``benchmark``."""
    add = commands.add_parser("benchmark", help="measure an adapter on corrupted images")
    add.set_defaults(run=_benchmark)
    add_model_flags(add)
    _add_data_flags(add)
    add.add_argument("--out", type=Path, required=True, help="folder for the results")
    add.add_argument("--batch-size", type=int, default=64, metavar="B")
    add.add_argument("--protocol", choices=PROTOCOLS, default=_PROTOCOL)
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
        help="seeds for the order of the images in a cell and for the adapter's random draws "
        "(default: stored order, and 0; with --images or --field 0 for both); several give means "
        "and standard errors",
    )
    add.add_argument("--overwrite", action="store_true", help="replace existing results in OUT")
    add.add_argument("--resume", action="store_true", help="resume the unfinished run in OUT")
    add_track_flag(add)
    _add_execution_flags(add)
    _add_field_flags(add)


def _add_data_flags(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--dataset",
        choices=DATASETS,
        metavar="NAME",
        default="cifar10",
        help="one of the data sets that `list` names (default: %(default)s)",
    )
    data = add.add_mutually_exclusive_group(required=True)
    data.add_argument("--data-dir", type=Path, help="folder with the images of a data set")
    data.add_argument(
        "--images",
        nargs="+",
        metavar="[NAME=]SOURCE",
        help="labelled pictures instead, with one cell per source: class folders, parquet, npz, "
        "hf://datasets/ORG/NAME; they are shuffled with the seed",
    )
    levels = range(1, 6)
    add.add_argument(
        "--severity", type=int, nargs="+", choices=levels, help="severity levels (default: all)"
    )
    add.add_argument("--corruption", nargs="+", help="corruptions (default: the benchmark's own)")
    add.add_argument("--n-examples", type=int, metavar="N", help="images per cell (default: all)")
    add.add_argument("--labels", type=Path, help="parquet file with the labelled clean test images")
    add.add_argument("--no-download", action="store_true", help="do not download missing data")
    add.add_argument(
        "--corrupt",
        nargs="+",
        choices=TENSOR_CORRUPTIONS,
        help="with --images: create the cells by corrupting the pictures of one source, at the "
        "levels of --severity",
    )
    add.add_argument(
        "--classes",
        choices=("folder",),
        help="with --images: restrict the model to the classes for which the source has folders",
    )
    add_source_flags(add)


def _add_field_flags(add: argparse.ArgumentParser) -> None:
    field = add.add_argument_group(
        "the field: many streams (batch sizes, orders, shifts that come and go) in one command"
    )
    field.add_argument(
        "--field",
        nargs="*",
        choices=FIELD,
        metavar="STREAM",
        help=f"measure these streams, by default all: {', '.join(FIELD)}; the corruptions are by "
        f"default the extra ones if the data has them, with {_FIELD_IMAGES} images each",
    )
    field.add_argument(
        "--methods",
        nargs="+",
        default=["source,tent,sar,mgg"],
        metavar="METHOD[:FIELD=VALUE…]",
        help="methods to compare, with fields of their configs (default: source,tent,sar,mgg)",
    )
    field.add_argument(
        "--long",
        type=int,
        default=10_000,
        metavar="N",
        help="smallest number of images of the stream 'long', which repeats the images with fresh "
        "noise, or with fresh flips and crops (default: %(default)s)",
    )


def _add_execution_flags(add: argparse.ArgumentParser) -> None:
    add.add_argument("--channels-last", action="store_true", help="use the NHWC memory layout")
    add.add_argument(
        "--autocast", choices=("bfloat16", "float16"), help="run the model in reduced precision"
    )
    add.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model with torch.compile (default BACKEND: inductor)",
    )
    add.add_argument(
        "--threads", type=int, help="number of CPU threads (default: torch's; 1 under torchrun)"
    )
    # Accepted for older scripts, without effect: the system's locks show which processes are alive.
    add.add_argument("--lease", type=float, help=argparse.SUPPRESS)


def _benchmark(args: argparse.Namespace) -> None:
    check_out(args.out)
    if args.field is not None and (args.method or args.set or args.lr is not None):
        raise InputError("--field takes --methods METHOD:FIELD=VALUE, not --method, --set or --lr")
    if args.field is not None and args.protocol != _PROTOCOL:
        raise InputError("--field has a protocol for each stream: leave out --protocol")
    if args.field is not None and args.track:
        raise InputError("--track follows one adapter, not the methods of --field")
    if args.images is None and (args.corrupt or args.classes):
        raise InputError("--corrupt and --classes can only be used with --images")
    if args.images is not None and (args.corruption or args.labels):
        raise InputError("--corruption and --labels need --data-dir; with --images use --corrupt")
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
    if args.device == "cuda":
        args.device = str(device_of_process(args.device, shared=True))
    # torchrun restarts all processes when one has died; finished work is on the disk.
    args.resume |= place.restarts > 0
    try:
        _run(args, worker)
    finally:
        worker.leave()


def _first(worker: Worker | None) -> contextlib.AbstractContextManager[bool]:
    """A block that process 0 runs before the others, which then find what it has downloaded."""
    return worker.main_process_first() if worker else contextlib.nullcontext(True)


def _open(args: argparse.Namespace, worker: Worker | None) -> CorruptionData:
    """The cells of a data folder."""
    corruptions, count = args.corruption, args.n_examples
    if args.field is not None:
        count = count or _FIELD_IMAGES
        if corruptions is None and has_extra_corruptions(args.dataset, args.data_dir):
            corruptions = DATASETS[args.dataset].extra_corruptions
    with _first(worker):
        data = open_dataset(
            args.dataset,
            args.data_dir,
            corruptions=corruptions,
            severities=args.severity,
            n_examples=count,
            labels=args.labels,
            download=not args.no_download,
        )
    return dataclasses.replace(data, device=args.device or "cpu")


def _adapter(args: argparse.Namespace, sources: Mapping[str, Any] | None) -> Adapter:
    """The adapter, restricted to the data set's classes, or on request to those of the pictures.

    A timm name without --pretrained means random weights, which must be the same for all methods.
    """
    torch.manual_seed(args.seed or 0)
    net = adapter_from_args(args)
    classes = None
    if args.classes is not None and sources is not None:
        classes = folder_classes(sources, net)
    elif in_class_folders(args):
        classes = dataset_positions(DATASETS[args.dataset], net.num_classes)
    if classes is None:
        return net
    torch.manual_seed(args.seed or 0)
    return adapter_from_args(args, classes)


def _run(args: argparse.Namespace, worker: Worker | None) -> None:
    execution = Execution(args.channels_last, args.autocast, args.compile)
    data = sources = None
    by_rows = args.images is not None or in_class_folders(args)
    if by_rows:
        args.seed = args.seed or [0]  # the stored order is often by class
    if args.images is not None:
        with _first(worker):
            sources = named_sources(args)
    elif not by_rows:
        data = _open(args, worker)
    if args.field is not None:
        _run_field(args, data, sources, execution, worker)
        return
    seeds, first = args.seed, args.seed[0] if args.seed else None
    args.seed = first  # the adapter's seed
    with _first(worker):
        net = _adapter(args, sources)
        torch.manual_seed(first or 0)
        baseline = None if net.method == "source" else _unadapted(net, args.model_dir)
    data = data or cells_by_rows(args, sources, net, args.n_examples)
    prints = worker is None or worker.rank == 0
    if prints:
        print(net.describe(), flush=True)
    with tracked(args, net, baseline):
        results = run_benchmark(
            net,
            data,
            baseline=baseline,
            protocol=args.protocol,
            concentration=args.concentration,
            **_common(args, seeds, execution, worker),
        )
    if not prints:
        return
    print(f"\naccuracy in %, {args.protocol}, batch size {args.batch_size}\n{results.table()}")
    for name, mce in results.circumstances["corruptions_mce"].items():
        if mce is not None:
            print(f"mCE of {name}: {100 * mce:.2f} % (AlexNet: 100 %)")
    if data.clean is None and not by_rows:
        print("clean accuracy not measured: no clean images in the data folder")
    if data.note:
        print(data.note)
    files = "results.json" if by_rows else "results.json, RobustBench's files"
    print(f"{files} and plot.png are in {printable(str(args.out))}")


def _common(
    args: argparse.Namespace, seeds: Any, execution: Execution, worker: Worker | None
) -> dict[str, Any]:
    """The arguments that `run_benchmark` and `run_field` have in common."""
    return {
        "batch_size": args.batch_size,
        "seed": seeds,
        "out": args.out,
        "execution": execution,
        "model_name": args.model,
        "command": args.command_line,
        "overwrite": args.overwrite,
        "resume": args.resume,
        "worker": worker,
    }


def _run_field(
    args: argparse.Namespace,
    data: CorruptionData | None,
    sources: Mapping[str, Any] | None,
    execution: Execution,
    worker: Worker | None,
) -> None:
    seeds = args.seed or [0]
    methods: dict[str, Any] = {}
    for label in (label for text in args.methods for label in text.split(",")):
        name, *fields = label.split(":")
        try:
            pairs = [key_value(pair) for pair in fields]
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--methods {label}: {error}") from error
        # An unknown method or field is reported before anything is measured.
        fields_from_pairs(pairs, get_method(name).config)
        changed = {"method": name, "set": pairs, "seed": seeds[0]}
        method_args = argparse.Namespace(**{**vars(args), **changed})
        methods[label] = functools.partial(_adapter, method_args, sources)
    first = next(iter(methods))
    with _first(worker):
        net = methods[first] = methods[first]()
    data = data or cells_by_rows(args, sources, net, args.n_examples or _FIELD_IMAGES)
    results = run_field(
        methods,
        data,
        streams=args.field or None,
        long=args.long,
        **_common(args, seeds, execution, worker),
        progress=True,
    )
    if worker is None or worker.rank == 0:
        print(f"\n{results.table()}")
        print(f"field.json, field.md and field.html are in {printable(str(args.out))}")


def _unadapted(net: Adapter, model_dir: Path) -> Adapter:
    """The model of an adapter, loaded again with the same preprocessing."""
    normalize = net.backbone.normalize
    return wrap(
        net.origin["name"],
        "source",
        pretrained=net.origin.get("pretrained", False),
        mean=net.backbone.mean.flatten().tolist() if normalize else None,
        std=net.backbone.std.flatten().tolist() if normalize else None,
        normalize=normalize,
        classes=net.backbone.classes,
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
