"""No adaptation: the wrapped model as it is, the baseline of everything."""

from __future__ import annotations

from dataclasses import dataclass

from ..backbones.statistics import StatisticsFields
from ..core.registry import Method, register

__all__ = ["Source"]


@dataclass(frozen=True)
class Source(StatisticsFields):
    """The unadapted model.

    Attributes:
        statistics: BatchNorm on ``"source"`` (default), ``"batch"``, ``"mix"`` or ``"stream"``
            statistics; with ``"batch"`` this is the batch-statistics baseline (Nado et al., arXiv
            2006.10963).
        prior: images the source statistics count for in ``"mix"``.
    """

    statistics: str = "source"


register(Method("source", Source, None))
