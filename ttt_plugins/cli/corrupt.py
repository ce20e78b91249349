"""The command ``corrupt``: writes corrupted copies of pictures in the benchmarks' layouts."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchvision.transforms._presets import ImageClassification

from ..data.corrupted_copies import CorruptedCopies, layout_of
from ..data.datasets import CORRUPTIONS, DATASETS
from ..data.published_corruptions import PUBLISHED_CORRUPTIONS
from ..data.source import ImageSource
from ..data.transforms import evaluation_transform
from ..errors import InputError
from ..utils.checks import check_seed
from ..utils.text import printable
from .pictures import add_source_flags, open_source

__all__ = ["add_corrupt"]

_LEVELS = (1, 2, 3, 4, 5)
#: The data sets whose layout can be written: those with the fifteen corruptions.
_LAYOUTS = ("imagenet", "cifar10", "cifar100")


def add_corrupt(commands) -> None:
    """Add the command ``corrupt``."""
    add = commands.add_parser(
        "corrupt",
        help="write corrupted copies of pictures, as a data set for benchmark",
        epilog="To resume, run the same command again: files that exist are kept.",
    )
    add.set_defaults(run=_corrupt)
    add.add_argument(
        "images", metavar="SOURCE", help="folder, parquet, npz, hf://datasets/ORG/NAME"
    )
    add_source_flags(add)
    add.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder in which ImageNet-C, CIFAR-10-C or CIFAR-100-C is created",
    )
    add.add_argument(
        "--corruption",
        nargs="+",
        choices=PUBLISHED_CORRUPTIONS,
        default=CORRUPTIONS,
        metavar="NAME",
        help="corruptions, including the extra ones if named (default: the benchmark's fifteen)",
    )
    add.add_argument(
        "--severity",
        type=int,
        nargs="+",
        choices=_LEVELS,
        default=_LEVELS,
        help="severity levels (default: all)",
    )
    add.add_argument(
        "--dataset",
        choices=_LAYOUTS,
        help="data set whose layout and parameters are used (default: for pictures of 32x32 "
        "pixels cifar10, or cifar100 if there are 100 classes; otherwise imagenet)",
    )
    add.add_argument("--limit", type=int, metavar="N", help="use only the first N pictures")
    add.add_argument("--seed", type=int, default=0, help="seed for the noise (default: 0)")


def _corrupt(args: argparse.Namespace) -> None:
    check_seed(args.seed, "--seed")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be at least 1, got {args.limit}")
    source = open_source(args, args.images)
    if not isinstance(source, ImageSource):
        raise InputError(f"{source.location} is a stream: leave out --stream")
    spec = DATASETS[args.dataset or layout_of(source)]
    transform = None
    if spec.layout == "pictures":
        # As for ImageNet-C: the short side is resized bilinearly to 8/7, and the centre is cropped.
        transform = evaluation_transform(ImageClassification(crop_size=224), args.image_size)
    copies = CorruptedCopies(
        source,
        spec,
        tuple(dict.fromkeys(args.corruption)),
        tuple(sorted(set(args.severity))),
        transform,
        args.seed,
        args.limit,
        args.skip_damaged,
    )
    report = copies.write(args.out, args.workers)
    if report.skipped:
        print(f"skipped {len(report.skipped)} damaged pictures, the first: {report.skipped[0]}")
    print(
        f"{report.written} files were written and {report.kept} kept, of {report.images} pictures, "
        f"in {printable(str(args.out / spec.title))}"
    )
    if spec.layout == "npy" and report.images < spec.rows:
        print(
            f"the rows after the first {report.images} of each severity are empty: benchmark with "
            f"--n-examples {report.images}"
        )
