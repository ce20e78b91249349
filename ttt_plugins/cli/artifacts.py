"""The commands that show, describe, publish and convert artifacts."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..artifacts import info
from ..artifacts.card import refresh
from ..artifacts.folder import list_bundled
from ..artifacts.hub_access import Access
from ..artifacts.publish import publish
from ..artifacts.search import search
from ..core.registry import list_methods
from ..data.datasets import DATASETS
from ..errors import InputError
from ..train.released import convert_mgg, convert_mt3, convert_ttt

__all__ = ["add_artifacts", "add_convert", "add_list"]


def add_artifacts(commands) -> None:
    """Add the commands ``publish``, ``info`` and ``card``."""
    add = commands.add_parser("publish", help="publish an artifact on the Hugging Face Hub")
    add.set_defaults(run=_publish)
    add.add_argument("folder", type=Path, metavar="FOLDER")
    add.add_argument("repository", metavar="ORG/NAME", help="created if it does not exist")
    add.add_argument("--private", action="store_true", help="make the new repository private")
    add.add_argument("--results", type=Path, metavar="FILE", help="a benchmark's results.json")
    add.add_argument(
        "--benchmark",
        metavar="ORG/NAME[:TASK]",
        help="benchmark data set on the Hub whose leaderboard the results are for (.eval_results)",
    )
    add.add_argument("--revision", metavar="BRANCH", help="publish on a branch, created if missing")
    add.add_argument("--tag", help="name the commit")
    add.epilog = "Log in with `hf auth login` first, or set HF_TOKEN."
    add = commands.add_parser("info", help="describe an artifact without loading its classifier")
    add.set_defaults(run=_info)
    add.add_argument("name", metavar="NAME_OR_FOLDER", help="artifact, as for from_pretrained")
    add.add_argument("--revision", help="branch, tag or commit on the Hub")
    add = commands.add_parser("card", help="rewrite an artifact's card (README.md)")
    add.set_defaults(run=_card)
    add.add_argument("folder", type=Path, nargs="+", metavar="FOLDER")
    add.add_argument("--results", type=Path, metavar="FILE", help="a benchmark's results.json")
    add.add_argument("--license", help="license identifier of the Hub, such as apache-2.0")
    add.add_argument("--datasets", nargs="+", metavar="NAME", help="data set identifiers")
    add.add_argument("--note", help="a sentence for the card's section on limits")


def _publish(args: argparse.Namespace) -> None:
    commit, new = publish(
        args.folder,
        args.repository,
        private=args.private or None,
        measured=args.results,
        benchmark=args.benchmark,
        revision=args.revision,
        tag=args.tag,
    )
    done = "published" if new else "unchanged, no commit made"
    print(f"{args.repository}@{commit}: {done}")
    named = args.tag or args.revision
    where = f"{args.repository}@{named}" if named else args.repository
    print(f'load it with tp.from_pretrained("{where}")')


def _info(args: argparse.Namespace) -> None:
    print(info.describe(args.name, Access(args.revision)))


def _card(args: argparse.Namespace) -> None:
    facts = {"license": args.license, "datasets": args.datasets, "note": args.note}
    for folder in args.folder:
        print(refresh(folder, measured=args.results, facts=facts) / "README.md")


def add_convert(commands) -> None:
    """Add the command ``convert``."""
    add = commands.add_parser("convert", help="convert the papers' released weights into artifacts")
    add.set_defaults(run=_convert)
    add.add_argument("kind", choices=("mgg", "mt3", "ttt"))
    add.add_argument(
        "checkpoint", help="file of MGG or TTT, or the prefix of MT3's TensorFlow checkpoint"
    )
    add.add_argument(
        "--statistics", type=Path, help="MGG: the file of a classifier's source statistics"
    )
    add.add_argument(
        "--model", help="with --statistics: the classifier that they were measured on, as for wrap"
    )
    add.add_argument("--pretrained", action="store_true", help="with --model: load timm's weights")
    add.add_argument(
        "--groups", type=int, help="TTT: number of groups of the group norms (default: 8)"
    )
    add.add_argument("--out", type=Path, required=True, help="folder for the artifact")


def _convert(args: argparse.Namespace) -> None:
    owners = {"statistics": "mgg", "model": "mgg", "pretrained": "mgg", "groups": "ttt"}
    for flag, kind in owners.items():
        if getattr(args, flag) and args.kind != kind:
            raise InputError(f"--{flag} can only be used with convert {kind}")
    if args.statistics and not args.model:
        raise InputError(
            "--statistics needs --model, the classifier that they were measured on, because they "
            "fit only its weights (for the released statistics: --model vit_base_patch16_224 "
            "--pretrained)"
        )
    if args.kind == "mt3":
        folder = convert_mt3(args.checkpoint, args.out)
    elif args.kind == "ttt":
        folder = convert_ttt(
            args.checkpoint, args.out, groups=8 if args.groups is None else args.groups
        )
    else:
        options = {"pretrained": True} if args.pretrained else {}
        folder = convert_mgg(args.checkpoint, args.out, args.statistics, args.model, **options)
    print(f"the artifact is in {folder}")


def add_list(commands) -> None:
    """Add the commands ``list`` and ``search``."""
    add = commands.add_parser("list", help="list the methods, data sets and bundled artifacts")
    add.set_defaults(run=_list)
    add.add_argument("--hub", action="store_true", help="also the adapters published on the Hub")
    add = commands.add_parser("search", help="find adapters on the Hub, with their figures")
    add.set_defaults(run=_search)
    add.add_argument("--method", help="only of this method")
    add.add_argument("--base-model", metavar="ORG/NAME", help="only around this classifier")
    add.add_argument("--dataset", metavar="NAME", help="only with this data set in their card")


def _search(args: argparse.Namespace) -> None:
    found = search(args.method, args.base_model, args.dataset)
    print("\n".join(adapter.describe() for adapter in found) or "no adapter on the Hub fits this")


def _list(args: argparse.Namespace) -> None:
    print("methods:", *list_methods(), sep="\n  ")
    print("datasets:", *(f"{name}: {spec.title}" for name, spec in DATASETS.items()), sep="\n  ")
    print("bundled:", *(f"bundled:{name}" for name in list_bundled()), sep="\n  ")
    if args.hub:
        found = [text for adapter in search() for text in adapter.describe().splitlines()]
        print("hub:", *(found or ["none"]), sep="\n  ")
