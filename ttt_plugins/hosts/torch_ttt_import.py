"""The import of torch-ttt; a failure is reported in one line with cause and remedy."""

from __future__ import annotations

from importlib import metadata

from torch import nn

from ..errors import MissingDependencyError

__all__ = ["BaseEngine", "register"]


def _explain(error: Exception) -> str:
    """Cause and remedy of a failed import, in one line."""
    install = 'pip install "ttt-plugins[torch-ttt]"'
    try:
        version = metadata.version("torch-ttt")
    except metadata.PackageNotFoundError:
        return f"this needs torch-ttt, which is not installed: {install}"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if getattr(error, "name", None) == "einops":
        return f"torch-ttt {version} needs einops but does not install it: {install}"
    return f"torch-ttt {version} is broken or too old; 0.0.2 is known to work ({reason}): {install}"


try:
    from torch_ttt.engine.base_engine import BaseEngine
    from torch_ttt.engine_registry import EngineRegistry

    if not (issubclass(BaseEngine, nn.Module) and hasattr(BaseEngine, "ttt_forward")):
        raise TypeError("BaseEngine is not a module with ttt_forward")
    if not (hasattr(EngineRegistry, "register") and hasattr(EngineRegistry, "get_engine")):
        raise TypeError("EngineRegistry has no register or no get_engine")
except Exception as error:  # torch-ttt imports all of its engines, which may raise any error
    raise MissingDependencyError(_explain(error)) from error


def register(name: str, engine: type) -> None:
    """Register an engine as ``ttt_plugins_<name>``, and as ``name`` if that is not taken."""
    for full_name in (f"ttt_plugins_{name}", name):
        if _is_free(full_name):
            EngineRegistry.register(full_name)(engine)


def _is_free(name: str) -> bool:
    try:
        EngineRegistry.get_engine(name)
    except ValueError:
        return True
    return False
