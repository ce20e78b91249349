"""The package's error types.

Every message names the input, the cause and the remedy. Each subclass also derives from a suitable
built-in exception.
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
    """An argument or a batch of images that cannot be used."""


class DataError(TTTError, FileNotFoundError):
    """A data folder or file that is missing, incomplete or of another layout."""

    def __str__(self) -> str:  # FileNotFoundError would print a tuple of OS fields
        return str(self.args[0]) if self.args else ""


class ArtifactError(TTTError, ValueError):
    """An adapter artifact (folder or Hub repository) that cannot be loaded or written."""


class HubError(ArtifactError, OSError):
    """The Hub refuses, cannot be reached, or sends something other than it announced."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingDependencyError(TTTError, ImportError):
    """An optional package is missing; the message names the extra that installs it."""


class DistributedError(TTTError, RuntimeError):
    """The processes of a run under torchrun cannot reach each other, or one of them failed."""
