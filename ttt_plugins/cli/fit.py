"""The command ``fit``: measures a classifier's feature statistics on clean pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.pictures import picture_transform
from ..core.registry import SOURCE_STATISTICS, get_method
from ..data.images import to_float
from ..data.loading import ImageLoader
from ..data.source import ImageSource
from ..errors import InputError
from ..utils.checks import check_seed
from ..utils.text import printable
from .models import adapter_from_args, add_model_flags
from .pictures import add_source_flags, open_source

__all__ = ["add_fit"]


def add_fit(commands) -> None:
    """Add the command ``fit``."""
    add = commands.add_parser(
        "fit",
        help="measure source statistics on clean pictures, and save the adapter that has them",
    )
    add.set_defaults(run=_fit)
    add_model_flags(add)
    add.add_argument("images", metavar="SOURCE", help="clean pictures, as for predict")
    add_source_flags(add)
    add.add_argument("--limit", type=int, metavar="N", help="use only N pictures, drawn at random")
    add.add_argument("--seed", type=int, default=0, help="seed for this draw (default: 0)")
    add.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the artifact"
    )


def _fit(args: argparse.Namespace) -> None:
    check_seed(args.seed, "--seed")
    net = adapter_from_args(args)
    if get_method(net.method).fits != SOURCE_STATISTICS:
        raise InputError(f"{net.method} compares no feature statistics; only mgg does")
    source = open_source(args, args.images)
    draw = isinstance(source, ImageSource) and args.limit is not None
    loader = ImageLoader(
        source,
        transform=picture_transform(net.backbone, args.image_size),
        workers=args.workers,
        seed=args.seed if draw else None,
        limit=args.limit,
        skip_damaged=args.skip_damaged,
    )
    count = 0

    def batches():
        nonlocal count
        for batch in loader:
            count += len(batch.images)
            yield to_float(batch.images)

    net.fit_source_statistics(batches())
    if loader.skipped:
        print(f"skipped {len(loader.skipped)} damaged pictures, the first: {loader.skipped[0]}")
    net.save_pretrained(
        args.out, training={"command": args.command_line, "statistics_images": count}
    )
    print(f"statistics of {count} pictures are in {printable(str(args.out))}")
