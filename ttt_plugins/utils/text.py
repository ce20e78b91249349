"""Text for the terminal: names that came from outside, and tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["align", "printable"]


def printable(text: str) -> str:
    r"""The text on one line, with everything escaped that a terminal would obey or cannot show.

    Names of folders, models and corruptions may hold control characters (``\x1b`` begins a
    sequence that a terminal obeys) and bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
