"""SAR: sharpness-aware and reliable entropy minimization.

Paper: Niu et al., ICLR 2023, arXiv 2302.12400.

A step, in the paper's order
    first forward: keep the samples whose entropy is below the margin; gradient of their mean
    climb: move the parameters along the gradient by the radius
    second forward: of those samples keep the ones still below the margin; gradient there
    descend: one step of SGD with momentum from the parameters before the climb
    recover: return to the source if the moving average of the second loss is too small
    return the logits of the first forward

Equation -> function
    2  keep samples with entropy < E0          -> `objectives.reliable`
    4-6  gradient at theta + rho g / ||g||     -> `updates.SharpnessAware`
    recovery when the moving average of the loss < e0 -> `updates.SharpnessAware`

Deviations from the released code (`updates.SharpnessAware` has two more):
1. The excluded norms are found by structure: those of the last quarter of the stages or blocks and
   all after them. The released code finds them by name, as ``exclude="names"`` does: those in
   ``layer4``, ``blocks.9`` to ``blocks.11``, ``norm.`` and a module called ``norm``. For ResNets
   with four stages and timm's ViTs with 12 blocks both rules agree; for other networks the names
   exclude fewer. Number of tensors that adapt, by structure and by name: ResNet-18 30 and 30,
   ResNet-26 with three stages 32 and 48, torchvision's ViT with 12 blocks 38 and 50.
2. Batches of fewer than ``window`` images are collected for one update (released: one update for
   every batch).
3. The guard softens or resets updates that hurt; ``guard=False`` disables it (`core.guard`).
4. BatchNorm uses an estimate over the stream; ``statistics="batch"`` for the batch's own, as
   released (`backbones.stream`).
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

    Statistics, window and guard are fields of `ttt_plugins.core.window.OnlineFields`.

    Attributes:
        lr: learning rate of SGD, at least 0. The paper uses 1e-3 (ViT) and 2.5e-4 (ResNet, batches
            of 64).
        momentum: momentum of SGD, in [0, 1].
        margin: fraction of ln(classes), in [0, 1]; only samples with an entropy below it count
            (0.4 in the paper).
        radius: length of the ascent step, at least 0 (rho = 0.05 in the paper).
        recovery: entropy in nats, at least 0; the parameters return to the source when the moving
            average of the filtered entropy falls below it (0.2 in the paper).
        skip_late: whether to exclude the norms of the last stage or blocks, as the paper does; this
            applies only to ``params="norm"``.
        exclude: how those norms are found: ``"stages"`` by structure, as the last quarter of the
            stages or blocks, or ``"names"`` by the names in the released code.
        params: parameters that adapt, by default the norm layers'; see `ttt_plugins.wrap`.
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
    """Online entropy minimisation over reliable samples with the sharpness-aware rule."""

    def filtered_entropy(logits: Tensor, _: list[Feature], first: Evaluation | None) -> Loss:
        entropies = entropy(logits)
        kept = reliable(entropies.detach(), logits.shape[1], config.margin)
        if first is not None and first.kept is not None:
            kept = (
                kept & first.kept
            )  # the second pass selects from the samples that the first one kept
        return Loss((entropies * kept).sum() / kept.sum().clamp_min(1), kept)

    rule = SharpnessAware(config.lr, config.momentum, config.radius, config.recovery)
    objective = Objective("mean entropy of the reliable samples", filtered_entropy)
    return Online(backbone, objective, rule, source)


def eligible(config: SAR, backbone: Backbone) -> list[str]:
    """All parameters except those of the late norms, which SAR does not adapt."""
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
