"""Flags for MODEL and --method, and the adapter that they describe."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..adapter import Adapter
from ..artifacts import hub
from ..artifacts.folder import read_config
from ..core.registry import get_method
from ..hosts.tracking import TRACKERS, tracker
from ..utils.checks import check_device
from ..wrapping import from_pretrained, wrap
from .flags import add_field_flags, fields_from_pairs

__all__ = ["adapter_from_args", "add_model_flags", "add_track_flag", "tracked"]


def add_model_flags(add: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add MODEL and the flags for loading and adapting it; each command adds its own ``--seed``.

    With a ``default`` MODEL may be left out.
    """
    text = "model or artifact, as for wrap or from_pretrained"
    if default is None:
        add.add_argument("model", metavar="MODEL", help=text)
    else:
        text += " (default: %(default)s)"
        add.add_argument("model", metavar="MODEL", nargs="?", default=default, help=text)
    add.add_argument("--method", help="name of a method (default: the artifact's own)")
    add.add_argument("--device", help="torch device, such as cuda (default: cpu)")
    add.add_argument("--lr", type=float, help="short for --set lr=LR")
    add_field_flags(add)
    add.add_argument(
        "--model-dir", type=Path, default=Path("models"), help="folder with RobustBench's models"
    )
    add.add_argument("--pretrained", action="store_true", help="download timm's weights")


def adapter_from_args(args: argparse.Namespace, classes: Sequence[int] | None = None) -> Adapter:
    """Create the adapter of MODEL and --method, from an artifact or by wrapping a model.

    Args:
        args: the flags of `add_model_flags`, and ``seed``.
        classes: the classes to restrict the model to, as for `wrap`; then an artifact must carry
            its model.
    """
    check_device(args.device)
    common = {"device": args.device, "seed": args.seed}
    pairs = args.set if args.lr is None else [*args.set, ("lr", args.lr)]
    artifact = hub.find(args.model)
    config = {} if artifact is None else read_config(artifact.folder, artifact.name)
    stored = config.get("method")
    method = stored if args.method is None else args.method
    # --set accepts only fields of the config; all other arguments of wrap have their own flags.
    fields = {} if method is None else fields_from_pairs(pairs, get_method(method).config)
    if method == stored and classes is None:
        return from_pretrained(args.model, **common, **fields)
    model = args.model
    if config.get("backbone", {}).get("source", "artifact") not in ("artifact", "module"):
        model = from_pretrained(model, **common)  # an adapter for a model that is named in it
    return wrap(
        model,
        method,
        pretrained=args.pretrained,
        model_dir=args.model_dir,
        classes=classes,
        **common,
        **fields,
    )


def add_track_flag(add: argparse.ArgumentParser) -> None:
    """Add ``--track``, for `tracked`."""
    add.add_argument(
        "--track",
        choices=TRACKERS,
        help="write loss, entropy, guard, health and seconds of every batch to this tracker; "
        "TensorBoard's and wandb's files go beside OUT",
    )


@contextlib.contextmanager
def tracked(args: argparse.Namespace, *nets: Adapter | None) -> Iterator[None]:
    """A block in which the batches of adapters are written to the tracker of ``--track``.

    Args:
        args: the flags of `add_model_flags` and `add_track_flag`, and ``out``.
        nets: the adapters; None for none.
    """
    if args.track is None:
        yield
        return
    own = {"model": args.model, "command": args.command_line}
    own |= {f"{n.method}/{k}": repr(v) for n in nets if n for k, v in vars(n.config).items()}
    out: Path = args.out
    with tracker(args.track, out.with_name(f"{out.name}.track"), run=out.name, config=own) as track:
        for net in nets:
            if net is not None:
                net.on_batch = track
        yield
