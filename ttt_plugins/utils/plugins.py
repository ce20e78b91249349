"""Entry points of other packages; a plugin that fails is skipped with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

__all__ = ["use_plugins"]


def use_plugins(group: str, use: Callable[[metadata.EntryPoint], Any], stacklevel: int = 4) -> None:
    """Use every entry point of a group, in the order of their names.

    Args:
        group: name of the group.
        use: loads an entry point and registers what it contains; if it raises an error, it must
            not leave anything registered.
        stacklevel: ``stacklevel`` of the warning about an entry point that fails.
    """
    for point in sorted(metadata.entry_points(group=group), key=lambda p: (p.name, p.value)):
        try:
            use(point)
        except (Exception, SystemExit) as error:  # noqa: PERF203
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"the plugin {point.name!r} ({point.value}, of the package {package}) is not "
                f"used: {reason}",
                RuntimeWarning,
                stacklevel=stacklevel,
            )
