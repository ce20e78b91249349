"""Corruption benchmarks: streams of corrupted images, protocols, records, leaderboard files.

>>> from ttt_plugins.benchmark import open_dataset, run_benchmark
>>> data = open_dataset("cifar10", folder, severities=[5])
>>> results = run_benchmark(net, data, baseline=tp.wrap(model, "source"), out="out")
>>> print(results.table())
"""

from .__init__.cells import CORRUPTIONS, DATASETS, EXTRA_CORRUPTIONS, Cell, CorruptionData
from .__init__.compare import compare, comparison_table
from .__init__.evaluate import evaluate_cell
from .__init__.execution import Execution
from .__init__.protocols import PROTOCOLS
from .__init__.records import CellRecord, MethodRecord
from .__init__.results import Results
from .__init__.run import run_benchmark
from .__init__.sharding import Worker, worker_from_environment
from .__init__.streams import load_stream, open_dataset

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
