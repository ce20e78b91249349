"""Copies of this process, for tests that kill it or change its environment.

A copy has imported everything already, which takes a new interpreter five seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["start"]


def _run(
    work: Callable[..., Any], arguments: tuple, output: Path, environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Unlike pytest's own, these write to the file.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.exit(work(*arguments))


def start(
    work: Callable[..., Any],
    *arguments: Any,
    output: Path | str = os.devnull,
    environment: Mapping[str, str] | None = None,
) -> multiprocessing.Process:
    """Run a function in a copy of this process, and return the process.

    Args:
        work: the function; what it returns is the exit code.
        *arguments: its arguments.
        output: file for what it prints, errors included.
        environment: changes of the environment variables.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(work, arguments, Path(output), environment or {})
    )
    process.start()
    return process
