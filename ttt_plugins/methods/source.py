"""No adaptation: the wrapped model unchanged, the baseline for all methods."""

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
        prior: number of images that the source statistics count for in ``"mix"`` and ``"stream"``.
    """

    statistics: str = "source"


register(Method("source", Source, None))
