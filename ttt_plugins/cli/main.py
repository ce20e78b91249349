"""The command line; a user's mistake is reported in one line, with exit code 2."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from pathlib import Path

from ..demo import run_demo, run_per_image
from ..errors import TTTError
from ..utils.signals import Terminated, raise_on_interrupt, raising_on_sigterm
from ..utils.text import printable
from .app import add_app
from .artifacts import add_artifacts, add_convert, add_list
from .benchmark import add_benchmark, add_compare
from .corrupt import add_corrupt
from .fit import add_fit
from .flags import PROGRAM, Parser
from .predict import add_predict
from .train import add_train

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        the exit code: 0 for success, 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.command_line = shlex.join([PROGRAM, *argv])
    advice = "before the command was finished"
    if hasattr(args, "resume"):
        advice = "to resume, run the same command with --resume"
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            raise_on_interrupt()
            with raising_on_sigterm(advice):
                args.run(args)
        except TTTError as error:
            _say("error", error)
            return 2
        except OSError as error:  # an error of a file or the network that nothing else has handled
            _say("error", str(error).strip() or type(error).__name__)
            return 2
        except KeyboardInterrupt:
            _say("stopped", advice)
            return 130
        except Terminated as stop:
            _say("stopped", stop)
            return 143
    return 0


def _say(kind: str, text: object) -> None:
    print(f"{PROGRAM}: {kind}: {printable(' '.join(str(text).split()))}", file=sys.stderr)


def _show_warning(message, *_, **__) -> None:
    _say("warning", message)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Test-time training for image classifiers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    add_app(commands)
    add_benchmark(commands)
    add_compare(commands)
    add_fit(commands)
    add_predict(commands)
    add_corrupt(commands)
    add_train(commands)
    add_artifacts(commands)
    add_convert(commands)
    add_list(commands)
    return parser


def _add_demo(commands) -> None:
    add = commands.add_parser("demo", help="compare methods on real images: tables and a figure")
    add.set_defaults(run=_demo)
    add.add_argument(
        "--out", type=Path, default=Path("ttt-plugins-demo"), help="folder for the figure"
    )
    add.add_argument("--images", type=int, metavar="N", help="images per corruption (default: all)")
    add.add_argument(
        "--per-image",
        action="store_true",
        help="also TTT and MT3, which adapt to each image on its own (about a minute more)",
    )


def _demo(args: argparse.Namespace) -> None:
    batches, frames = run_demo(args.out, n=args.images)
    print(
        f"{batches.sentence()}\n\n"
        "A small network, trained on clean CIFAR-10 images, classifies corrupted ones: without\n"
        "adaptation (source), and with three methods, each at the learning rate that was best on\n"
        "four other corruptions (RESULTS.md). In batches, with a reset before each corruption:\n\n"
        f"{batches.table()}\n\n"
        f"Image after image, {frames.kinds[0][1]} of each kind, without a reset:\n\n"
        f"{frames.table()}",
        flush=True,
    )
    if args.per_image:
        few = run_per_image(n=args.images)
        count = len(few.sample.labels)
        print(
            f"\nAdapting to each image separately, the first {count} of each kind, each method\n"
            f"beside its own network without adaptation:\n\n{few.table()}"
        )
    print(f"\nthe picture is {Path(args.out) / 'demo.png'}")
