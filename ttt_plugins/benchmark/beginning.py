"""The beginning of a run: what its folder holds already, and whether to go on with that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .output import check_folder, versions
from .progress import UNFINISHED, Progress
from .results import Results, finite

__all__ = ["begin_run", "join_run", "read_results"]


def begin_run(out: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> Results | None:
    """Make the results folder ready; the results in it if ``resume`` finds them finished.

    Raises:
        InputError: it holds another run, or an unfinished one that is not to be gone on with.
    """
    finished, unfinished = out / "results.json", Progress(out / UNFINISHED)
    for stray in out.glob(".*.tmp"):  # of a process killed while it wrote
        stray.unlink(missing_ok=True)
    if overwrite:
        unfinished.discard()
    else:
        check_folder(finished, settings)
        check_folder(unfinished.header, settings)
    if unfinished.header.exists():
        if not resume:
            raise InputError(
                f"{out} holds an unfinished run; go on with it (--resume) or begin anew "
                "(--overwrite)"
            )
        stored, now = json.loads(unfinished.header.read_text())["versions"], versions()
        if odd := [f"{n} {stored[n]}, now {now[n]}" for n in stored if stored[n] != now[n]]:
            raise InputError(
                f"{out} was begun by other versions ({'; '.join(odd)}), whose figures may differ; "
                "begin anew (--overwrite)"
            )
        return None
    if resume and not overwrite and finished.exists():
        return read_results(finished)
    unfinished.begin({"settings": finite(settings), "versions": versions()})
    return None


def join_run(out: Path, settings: dict[str, Any]) -> Results | None:
    """What `begin_run` returned in the process that began; errors likewise."""
    header = Progress(out / UNFINISHED).header
    if header.exists():
        check_folder(header, settings)
        return None
    check_folder(out / "results.json", settings)  # the others were done before this one came
    return read_results(out / "results.json")


def read_results(file: Path) -> Results:
    """A ``results.json``.

    Raises:
        InputError: it is something else.
    """
    try:
        return Results.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a results.json of this version ({error})") from error
