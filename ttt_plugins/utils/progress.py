"""What training prints while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm

__all__ = ["write_entry"]


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
