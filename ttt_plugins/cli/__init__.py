"""The command line ``ttt-plugins``."""

from .main import main

__all__ = ["main"]
