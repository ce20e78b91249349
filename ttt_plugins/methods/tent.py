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
1. Batches of fewer than ``window`` images gather for one update (released: one for every batch).
2. An update that is not finite is dropped, together with its state (`online.Online`).
3. The guard softens or resets updates that hurt; ``guard=False`` for none (`core.guard`).
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

    Attributes:
        lr: learning rate. The paper: 1e-3 with Adam on CIFAR; 2.5e-4 (BatchNorm, batch 64) or
            1e-3 (ViT) with SGD on ImageNet.
        optimizer: ``"adam"`` or ``"sgd"`` (momentum ``momentum``).
        momentum: of SGD, in [0, 1].
        statistics: BatchNorm statistics, ``"batch"`` as in the paper, ``"source"``, ``"mix"`` or
            ``"stream"``.
        prior: number of images that the source statistics count for in ``"mix"`` and ``"stream"``.
        window: images per update; smaller batches are predicted at once and gather until there
            are as many (`ttt_plugins.core.window`).
        guard: whether updates are softened or reset where signals without labels say that they hurt
            (`ttt_plugins.core.guard`).
        pull: how far the parameters go back to the source after every update, in [0, 1].
        params: what adapts unless `wrap` is told otherwise.
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
    """The objective of Tent, of custom rules, and of MGG where nothing can be compared."""
    return Loss(entropy(logits).mean())


def build(config: Tent, backbone: Backbone, source: Tensors, *_: object) -> Online:
    """Online entropy minimisation by a hand-made optimizer."""
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
