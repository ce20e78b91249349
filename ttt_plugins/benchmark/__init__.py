"""Corruption benchmarks: streams of corrupted images, protocols, records, leaderboard files.

>>> from ttt_plugins.benchmark import open_dataset, run_benchmark
>>> data = open_dataset("cifar10", folder, severities=[5])
>>> results = run_benchmark(net, data, baseline=tp.wrap(model, "source"), out="out")
>>> print(results.table())
"""

from .cells import CORRUPTIONS, DATASETS, EXTRA_CORRUPTIONS, Cell, CorruptionData
from .compare import compare, comparison_table
from .evaluate import evaluate_cell
from .execution import Execution
from .protocols import PROTOCOLS
from .records import CellRecord, MethodRecord
from .results import Results
from .run import run_benchmark
from .sharding import Worker, worker_from_environment
from .streams import load_stream, open_dataset

__all__ = [
    "CORRUPTIONS",
    "DATASETS",
    "EXTRA_CORRUPTIONS",
    "PROTOCOLS",
    "Cell",
    "CellRecord",
    "CorruptionData",
    "Execution",
    "MethodRecord",
    "Results",
    "Worker",
    "compare",
    "comparison_table",
    "evaluate_cell",
    "load_stream",
    "open_dataset",
    "run_benchmark",
    "worker_from_environment",
]
