"""Handling of interruption (SIGINT) and termination (SIGTERM) on the command line.

This module imports nothing large, because it is needed while everything else is being imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Terminated", "exit_on_interrupt", "raise_on_interrupt", "raising_on_sigterm"]


def _is_command_line() -> bool:
    """Whether this process was started as ``ttt-plugins`` or ``python -m ttt_plugins``."""
    name, words = Path(sys.argv[0]).stem, sys.orig_argv
    if name == "-m":  # until Python has found the package's __main__
        return words[words.index("-m") + 1 :][:1] == ["ttt_plugins"]
    return name == "ttt-plugins"


def _exit(number: int, _: object) -> None:
    # Nothing has been started yet, so nothing needs to be cleaned up.
    os.write(2, b"ttt-plugins: stopped: before anything was done\n")
    os._exit(128 + number)


def exit_on_interrupt() -> None:
    """End the process with one line on Ctrl-C or SIGTERM while the command line is starting.

    This has no effect if the package is imported by another program.
    """
    if _is_command_line() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _exit)
        signal.signal(signal.SIGTERM, _exit)


def raise_on_interrupt() -> None:
    """Undo `exit_on_interrupt`: Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Terminated(BaseException):
    """SIGTERM asked the process to end; like KeyboardInterrupt, this is not an error."""


@contextlib.contextmanager
def raising_on_sigterm(advice: str) -> Iterator[None]:
    """Let SIGTERM raise `Terminated` inside the block, so that files and progress bars are closed.

    This has no effect outside the main thread, because only the main thread may handle signals.

    Args:
        advice: what the user can do next; the text of the exception.

    Yields:
        nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Terminated(advice)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
