"""Tent: fully test-time adaptation by entropy minimization.

Paper: Wang et al., ICLR 2021, arXiv 2006.10726.

A step, in the paper's order
    forward the batch, with BatchNorm on the batch's statistics
    take the mean entropy of the predictions, and its gradient
    move the norm layers' gamma and beta by one step of the optimizer
    return the logits from before the step

Equation -> function
    H(y) = - sum_c p(y_c) log p(y_c)      -> `objectives.entropy`
    gradient step on gamma and beta       -> `online.Online`, `updates.Adam`, `updates.SGD`

Deviations from the released code:
1. Batches of fewer than ``window`` images are collected for one update (released: one update for
   every batch).
2. An update that is not finite is discarded together with its state (`online.Online`).
3. BatchNorm uses an estimate over the stream; ``statistics="batch"`` for the batch's own, as
   released (`backbones.stream`).
4. The guard softens or resets updates that hurt; ``guard=False`` disables it (`core.guard`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..backbones.backbone import Backbone
from ..core.algorithm import Tensors
from ..core.objectives import entropy
from ..core.online import Loss, Objective, Online
from ..core.registry import Method, register
from ..core.updates import SGD, Adam
from ..core.window import OnlineFields
from ..utils.checks import check_choice, check_number

__all__ = ["Tent"]


@dataclass(frozen=True)
class Tent(OnlineFields):
    """Entropy minimisation over the norm layers' affine parameters.

    Statistics, window and guard are fields of `ttt_plugins.core.window.OnlineFields`.

    Attributes:
        lr: learning rate, at least 0. The paper uses 1e-3 with Adam on CIFAR, and on ImageNet
            2.5e-4 (BatchNorm, batches of 64) or 1e-3 (ViT) with SGD.
        optimizer: ``"adam"`` or ``"sgd"``.
        momentum: momentum of SGD, in [0, 1].
        params: parameters that adapt, by default the norm layers'; see `ttt_plugins.wrap`.
    """

    lr: float = 1e-3
    optimizer: str = "adam"
    momentum: float = 0.9
    params: str | tuple[str, ...] = "norm"

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "lr", 0)
        check_choice(self, "optimizer", ("adam", "sgd"))
        check_number(self, "momentum", 0, 1)


def mean_entropy(logits: Tensor, *_: object) -> Loss:
    """The objective of Tent and of custom update rules."""
    return Loss(entropy(logits).mean())


def build(config: Tent, backbone: Backbone, source: Tensors, *_: object) -> Online:
    """Online entropy minimisation with Adam or SGD."""
    rule = Adam(config.lr) if config.optimizer == "adam" else SGD(config.lr, config.momentum)
    return Online(backbone, Objective("mean entropy", mean_entropy), rule, source)


register(
    Method(
        "tent",
        Tent,
        build,
        "Wang et al., Tent: Fully Test-Time Adaptation by Entropy Minimization, ICLR 2021, "
        "arXiv:2006.10726",
    )
)
