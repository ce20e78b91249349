"""The methods. Importing this package registers them, one line for each."""

from .custom_rule import register_update_rule
from .mgg import MGG
from .mt3 import MT3
from .sar import SAR
from .source import Source
from .tent import Tent
from .ttt import TTT

__all__ = ["MGG", "MT3", "SAR", "TTT", "Source", "Tent", "register_update_rule"]
