"""The methods. Importing this package fills the registry; one line a method."""

from .mgg import MGG
from .sar import SAR
from .source import Source
from .tent import Tent

__all__ = ["MGG", "SAR", "Source", "Tent"]
