"""What is shown while something runs: a progress bar on a terminal, lines of training."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm.auto import tqdm

__all__ = ["progress_bar", "write_entry"]


def progress_bar(
    items: Iterable | None = None,
    title: str | None = None,
    total: int | None = None,
    *,
    show: bool = True,
    unit: str = "it",
    leave: bool = False,
) -> tqdm:
    """A progress bar of one line, on a terminal or in a notebook.

    Elsewhere, as in a log file, nothing is shown: every refresh would be a line of its own.

    Args:
        items: what to iterate over, or None for a bar that is advanced by ``update``.
        title: text before the bar.
        total: number of items, if ``items`` does not tell it.
        show: False for no bar at all.
        unit: what is counted.
        leave: whether the bar stays when it has finished.
    """
    shown = show and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    return tqdm(items, title, total, disable=not shown, leave=leave, unit=unit, dynamic_ncols=True)


def write_entry(entry: Mapping[str, Any]) -> None:
    """Print a log entry as one line above the progress bar.

    Values other than numbers and dicts of numbers are omitted.
    """
    words = [f"epoch {entry['epoch']:3d}"]
    for name, value in entry.items():
        if isinstance(value, float):
            words.append(f"{name.replace('_', ' ')} {value:.4f}")
        elif isinstance(value, Mapping) and all(isinstance(v, float) for v in value.values()):
            numbers = (f"{key}: {number:.4f}" for key, number in value.items())
            words.append(f"{name.replace('_', ' ')} {', '.join(numbers)}")
    tqdm.write("  ".join(words))
