"""torch-ttt, imported in one place: what is wrong with it is one clear line."""

from __future__ import annotations

from importlib import metadata

from torch import nn

from ..errors import MissingDependencyError

__all__ = ["BaseEngine", "register"]


def _explain(error: Exception) -> str:
    """Cause and remedy of a failed import, on one line."""
    install = 'pip install "ttt-plugins[torch-ttt]"'
    try:
        found = metadata.version("torch-ttt")
    except metadata.PackageNotFoundError:
        return f"this needs torch-ttt, which is not installed: {install}"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if getattr(error, "name", None) == "einops":
        return f"torch-ttt {found} needs einops and does not bring it: {install}"
    return f"torch-ttt {found} is broken or too old, 0.0.2 is known to work ({reason}): {install}"


try:
    from torch_ttt.engine.base_engine import BaseEngine
    from torch_ttt.engine_registry import EngineRegistry

    if not (issubclass(BaseEngine, nn.Module) and hasattr(BaseEngine, "ttt_forward")):
        raise TypeError("BaseEngine is no module with ttt_forward")
    EngineRegistry.register, EngineRegistry.get_engine
except Exception as error:  # it imports all of its engines, and they whatever they need
    raise MissingDependencyError(_explain(error)) from error


def register(name: str, engine: type) -> None:
    """Register an engine as ``ttt_plugins_<name>``, and as ``name`` where that is free."""
    for free in (f"ttt_plugins_{name}", name):
        try:
            EngineRegistry.get_engine(free)
        except ValueError:
            EngineRegistry.register(free)(engine)
