"""Makes the installed RobustBench importable with ``import robustbench``.

    import ttt_plugins.hosts.robustbench
    import robustbench                       # and its submodules, such as robustbench.data

RobustBench 1.1.1 imports ``autoattack``, which its dependency installs under another name, so it
cannot be imported directly. Importing this module imports RobustBench once; later imports,
including those in repositories that use RobustBench, then succeed.

Raises:
    MissingDependencyError: RobustBench is not installed, or cannot be imported with the installed
        versions of other packages.
"""

from __future__ import annotations

from ..utils.robustbench import import_robustbench

import_robustbench()
