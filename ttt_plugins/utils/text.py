"""Text that came from outside, made fit to be shown."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    r"""The text on one line, with everything escaped that a terminal would obey or cannot show.

    Names of folders, models and corruptions may hold control characters (``\x1b`` begins a
    sequence that a terminal obeys) and bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
