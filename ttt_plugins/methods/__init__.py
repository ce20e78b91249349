"""The methods. Importing this package fills the registry; one line a method."""

from .__init__.mgg import MGG
from .__init__.mt3 import MT3
from .__init__.rules import register_update_rule
from .__init__.sar import SAR
from .__init__.source import Source
from .__init__.tent import Tent
from .__init__.ttt import TTT

__all__ = ["MGG", "MT3", "SAR", "Source", "TTT", "Tent", "register_update_rule"]
