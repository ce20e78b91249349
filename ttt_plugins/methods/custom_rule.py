"""An update rule as a method of its own: online entropy minimisation with that rule.

A rule that turns gradients into new parameters is registered in one call, and can then be used
with `wrap`, the command line, artifacts and the tests of the contract.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backbones.backbone import Backbone
from ..core.algorithm import Tensors
from ..core.online import Objective, Online
from ..core.registry import Method, register
from ..core.updates import UpdateRule
from .tent import mean_entropy

__all__ = ["register_update_rule"]


def register_update_rule(
    name: str, config: type, make: Callable[[Any], UpdateRule], citation: str = ""
) -> Method:
    """Register a method that adapts to each batch by one step of a rule on the mean entropy.

    Args:
        name: name of the method: letters, digits and underscores.
        config: frozen dataclass of the rule's settings, each with a default. If it has fields
            ``params``, ``statistics``, ``prior``, ``window``, ``guard`` or ``pull``, as one that
            inherits from `ttt_plugins.core.window.OnlineFields` does, they mean the same as in
            `Tent`. Without ``window`` there is an update on every batch, without ``guard`` none is
            checked.
        make: ``config -> rule``, a pair of pure functions as in `ttt_plugins.core.updates`.
        citation: reference of the rule's paper.

    Returns:
        the record of the method, which has been registered.

    Raises:
        InputError: as for `ttt_plugins.core.registry.register`.
    """

    def build(fields: Any, backbone: Backbone, source: Tensors, *_: object) -> Online:
        return Online(backbone, Objective("mean entropy", mean_entropy), make(fields), source)

    return register(Method(name, config, build, citation))
