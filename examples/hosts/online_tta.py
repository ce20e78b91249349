"""MGG, MT3 and TTT in an unchanged checkout of mariodoebler/test-time-adaptation.

    python examples/hosts/online_tta.py CHECKOUT/classification --cfg CFG [KEY VALUE]...

runs its ``test_time.py`` with our methods registered. CFG is one of its own files or one from
``ttt_plugins/hosts/cfgs``; the docstring of `ttt_plugins.hosts.online_tta` describes our section of
the configuration. Single values can be set on the command line or in a file:

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
    if "--cfg" in arguments:  # its path is relative to the current folder
        index = arguments.index("--cfg") + 1
        arguments[index] = str(Path(arguments[index]).resolve())
    os.chdir(folder)  # the repository's paths of image lists are relative to it
    sys.path.insert(0, str(folder))
    importlib.import_module("ttt_plugins.hosts.online_tta")
    sys.argv = ["test_time.py", *arguments]
    runpy.run_path("test_time.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
