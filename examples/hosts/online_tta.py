"""MGG, MT3 and TTT in a checkout of mariodoebler/test-time-adaptation that stays as it is.

    python examples/hosts/online_tta.py CHECKOUT/classification --cfg CFG [KEY VALUE]...

runs its ``test_time.py`` with our methods registered. CFG is one of its own files or of
``ttt_plugins/hosts/cfgs``; what our section of the configuration holds is in the docstring of
`ttt_plugins.hosts.online_tta`. Setting single values works on the command line and in a file:

    ... --cfg ttt_plugins/hosts/cfgs/cifar10_c/ttt.yaml TTT_PLUGINS.FIELDS.mode online
    ... --cfg ttt_plugins/hosts/cfgs/cifar10_c/mgg.yaml OPTIM.LR 0.005 SETTING reset_each_shift
"""

import importlib
import os
import runpy
import sys
from pathlib import Path


def main(folder, arguments):
    """Run ``test_time.py`` of a checkout's folder ``classification``."""
    folder = Path(folder).resolve()
    if "--cfg" in arguments:  # relative to where the command was given
        place = arguments.index("--cfg") + 1
        arguments[place] = str(Path(arguments[place]).resolve())
    os.chdir(folder)  # its lists of images are named relative to it
    sys.path.insert(0, str(folder))
    importlib.import_module("ttt_plugins.hosts.online_tta")
    sys.argv = ["test_time.py", *arguments]
    runpy.run_path("test_time.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
