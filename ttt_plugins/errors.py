"""The package's error types.

Every error names the input, the cause and the remedy. Each subclass is also the built-in a
caller would think of catching.
"""

__all__ = [
    "ArtifactError",
    "DataError",
    "DistributedError",
    "HubError",
    "InputError",
    "MissingDependencyError",
    "TTTError",
]


class TTTError(Exception):
    """Base of every error that ttt_plugins raises on purpose."""


class InputError(TTTError, ValueError):
    """An argument or a batch of images that cannot be used as it is."""


class DataError(TTTError, FileNotFoundError):
    """A data folder or file that is missing, incomplete or of another layout."""

    def __str__(self) -> str:  # FileNotFoundError would print a tuple of OS fields
        return str(self.args[0]) if self.args else ""


class ArtifactError(TTTError, ValueError):
    """An adapter artifact (folder or Hub repository) that cannot be loaded or written."""


class HubError(ArtifactError, OSError):
    """The Hub refuses, cannot be reached, or sends something else than it promised."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingDependencyError(TTTError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


class DistributedError(TTTError, RuntimeError):
    """The processes of a sharded run can no longer reach each other."""
