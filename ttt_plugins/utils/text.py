"""Text for the terminal: escaping of untrusted names, and tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["align", "printable"]


def printable(text: str) -> str:
    r"""The text on one line, with control characters and unprintable characters escaped.

    Names of folders, models and corruptions may contain control characters (``\x1b`` starts a
    terminal command) and bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column is left-aligned, the others are right-aligned."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
