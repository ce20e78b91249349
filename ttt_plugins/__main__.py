"""``python -m ttt_plugins`` is the command ``ttt-plugins``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
