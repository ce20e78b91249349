"""Makes the installed RobustBench importable with ``import robustbench``.

    import ttt_plugins.hosts.robustbench
    import robustbench                       # and its submodules, such as robustbench.data

RobustBench 1.1.1 imports ``autoattack``, which its dependency installs under another name, so that
it cannot be imported unchanged. Importing this module imports RobustBench once; later imports,
including those in repositories that use RobustBench, then succeed.

Raises:
    MissingDependencyError: RobustBench is not installed, or does not import beside the installed
        versions of other packages.
"""

from __future__ import annotations

from ..utils.robustbench import import_robustbench

import_robustbench()
