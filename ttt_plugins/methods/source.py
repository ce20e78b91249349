"""No adaptation: the wrapped model as it is, the baseline of everything."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.registry import Method, register
from ..utils.checks import check_choice, check_number

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """The unadapted model.

    Attributes:
        statistics: BatchNorm on ``"source"`` (default), ``"batch"`` or ``"mix"`` statistics; with
            ``"batch"`` this is the batch-statistics baseline (Nado et al., arXiv 2006.10963).
        prior: images the source statistics count for in ``"mix"``.
    """

    statistics: str = "source"
    prior: float = 16.0

    def __post_init__(self):
        check_choice(self, "statistics", ("source", "batch", "mix"))
        check_number(self, "prior", 0)


register(Method("source", Source, None))
