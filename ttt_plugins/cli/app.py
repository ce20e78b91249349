"""The command ``app``: a page to try an adapter in the browser."""

from __future__ import annotations

import argparse
import copy
import functools
from pathlib import Path

from ..adapter import Adapter
from ..app.page import build_page, launch
from ..app.session import offered_methods
from ..app.space import export_space
from ..artifacts import hub
from ..artifacts.folder import read_config
from ..errors import InputError
from ..utils.text import printable
from .models import adapter_from_args, add_model_flags

__all__ = ["add_app"]

_MODEL = "bundled:mgg-resnet26-cifar10"


def add_app(commands) -> None:
    """Add the command ``app``."""
    add = commands.add_parser("app", help="try an adapter on pictures, on a page in the browser")
    add.set_defaults(run=_app, seed=0)
    add_model_flags(add, default=_MODEL)
    add.add_argument(
        "--images", metavar="SOURCE", help="labelled pictures to offer: class folders, parquet, npz"
    )
    add.add_argument("--host", help="address to listen on (default: this machine only)")
    add.add_argument("--port", type=int, help="port (default: 7860 or the next free one)")
    add.add_argument(
        "--export-space",
        type=Path,
        metavar="DIR",
        help="write the page as a Space for the Hugging Face Hub instead of serving it",
    )


def _app(args: argparse.Namespace) -> None:
    if args.export_space is not None:
        if args.images is not None or args.set or args.lr is not None:
            raise InputError("--export-space takes MODEL and --method only")
        folder = export_space(args.model, args.export_space, method=args.method)
        print(
            f"the Space is in {printable(str(folder))}: create one on the Hub and upload its files"
        )
        return
    place = hub.find(args.model)
    stored = None if place is None else read_config(place.folder, place.name).get("method")
    methods = offered_methods(args.method or stored)
    build = functools.cache(functools.partial(_build, args, methods[0]))
    page = build_page(
        lambda method: copy.deepcopy(build(method)),
        methods,
        title=args.model,
        source=args.images,
    )
    build(methods[0])  # what is wrong with the model is said here, not on the page
    print("open the address in a browser; Ctrl-C ends the page", flush=True)
    address = launch(page, host=args.host, port=args.port, wait=False)
    print(address, flush=True)
    page.block_thread()


def _build(args: argparse.Namespace, first: str, method: str) -> Adapter:
    """The adapter of a method; the fields on the command line are for the first method."""
    chosen = copy.copy(args)
    chosen.method = method
    if method != first:
        chosen.set, chosen.lr = [], None
    return adapter_from_args(chosen)
