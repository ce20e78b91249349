"""SAR: sharpness-aware and reliable entropy minimization.

Paper: Niu et al., ICLR 2023, arXiv 2302.12400.

A step, in the paper's order
    first forward: keep the samples whose entropy is below the margin; gradient of their mean
    climb: move the parameters along the gradient by the radius
    second forward: keep, of those samples, the ones still below the margin; gradient there
    descend: one step of SGD with momentum from where the parameters were
    recover: back to the source once the moving average of the second loss is too small
    return the logits of the first forward

Equation -> function
    2  keep samples with entropy < E0          -> `objectives.reliable`
    4-6  gradient at theta + rho g / ||g||     -> `updates.SharpnessAware`
    recovery when the moving average of the loss < e0 -> `updates.SharpnessAware`

Deviations from the released code (`updates.SharpnessAware` has two more):
1. The norms left out are those of the last quarter of the stages or blocks and all after them,
   by structure. The released code leaves them out by name, which ``exclude="names"`` does too:
   those in ``layer4``, ``blocks.9`` to ``blocks.11``, ``norm.`` and a module called ``norm``. On
   ResNets with four stages and timm's ViTs with 12 blocks both rules agree; elsewhere the names
   leave out fewer. Tensors that adapt, by structure and by name: ResNet-18 30 and 30, ResNet-26
   with three stages 32 and 48, torchvision's ViT with 12 blocks 38 and 50.
2. Batches of fewer than ``window`` images gather for one update (released: one for every batch).
3. The guard softens or resets updates that hurt; ``guard=False`` for none (`core.guard`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.norms import late_norms, named_late_norms
from ..backbones.statistics import Feature
from ..core.algorithm import Tensors
from ..core.objectives import entropy, reliable
from ..core.online import Loss, Objective, Online
from ..core.registry import Method, register
from ..core.updates import Evaluation, SharpnessAware
from ..core.window import OnlineFields
from ..utils.checks import check_choice, check_number

__all__ = ["SAR"]


@dataclass(frozen=True)
class SAR(OnlineFields):
    """Sharpness-aware entropy minimisation over reliable samples.

    Attributes:
        lr: learning rate of SGD. The paper: 1e-3 (ViT), 2.5e-4 (ResNet, batch 64).
        momentum: momentum of SGD, in [0, 1].
        margin: share of ln(classes), in [0, 1], below which the entropy of a sample has to be for
            it to count (the paper's 0.4).
        radius: length of the ascent step, at least 0 (the paper's rho = 0.05).
        recovery: entropy in nats, at least 0: everything starts over when the moving average of
            the filtered entropy falls below it (the paper's 0.2).
        skip_late: leave out the norms of the last stage or blocks, as the paper does; with
            ``params="norm"`` only.
        exclude: how those are found: ``"stages"`` by structure, the last quarter of the stages or
            blocks, or ``"names"`` by the names of the released code.
        statistics: BatchNorm statistics, ``"batch"`` as in the paper, ``"source"``, ``"mix"`` or
            ``"stream"``.
        prior: number of images that the source statistics count for in ``"mix"`` and ``"stream"``.
        window: images per update; smaller batches are predicted at once and gather until there
            are as many (`ttt_plugins.core.window`). The paper: 64.
        guard: whether updates are softened or reset where signals without labels say that they hurt
            (`ttt_plugins.core.guard`).
        pull: how far the parameters go back to the source after every update, in [0, 1].
        params: what adapts unless `wrap` is told otherwise.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    margin: float = 0.4
    radius: float = 0.05
    recovery: float = 0.2
    skip_late: bool = True
    exclude: str = "stages"
    params: str | tuple[str, ...] = "norm"

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "lr", 0)
        check_number(self, "momentum", 0, 1)
        check_number(self, "margin", 0, 1)
        check_number(self, "radius", 0)
        check_number(self, "recovery", 0)
        check_choice(self, "skip_late", (True, False))
        check_choice(self, "exclude", ("stages", "names"))


def build(config: SAR, backbone: Backbone, source: Tensors, *_: object) -> Online:
    """Online entropy minimisation over reliable samples by the sharpness-aware rule."""

    def filtered_entropy(logits: Tensor, _: list[Feature], first: Evaluation | None) -> Loss:
        entropies = entropy(logits)
        kept = reliable(entropies.detach(), logits.shape[1], config.margin)
        if first is not None and first.kept is not None:
            kept = kept & first.kept  # the second pass chooses among those the first one kept
        return Loss((entropies * kept).sum() / kept.sum().clamp_min(1), kept)

    rule = SharpnessAware(config.lr, config.momentum, config.radius, config.recovery)
    objective = Objective("mean entropy of the reliable samples", filtered_entropy)
    return Online(backbone, objective, rule, source)


def eligible(config: SAR, backbone: Backbone) -> list[str]:
    """Everything but the late norms, which SAR leaves where they are."""
    find = late_norms if config.exclude == "stages" else named_late_norms
    late = find(backbone.model) if config.skip_late and config.params == "norm" else set()
    named = (n for n, _ in backbone.model.named_parameters())
    return [n for n in named if n.rpartition(".")[0] not in late]


register(
    Method(
        "sar",
        SAR,
        build,
        "Niu et al., Towards Stable Test-Time Adaptation in Dynamic Wild World, ICLR 2023, "
        "arXiv:2302.12400",
        eligible=eligible,
    )
)
