"""Corruption benchmarks: streams of corrupted images, protocols, results and leaderboard files.

>>> from ttt_plugins.benchmark import open_dataset, run_benchmark
>>> data = open_dataset("cifar10", folder, severities=[5])
>>> results = run_benchmark(net, data, baseline=tp.wrap(model, "source"), out="out")
>>> print(results.table())
"""

from ..data.datasets import CORRUPTIONS, DATASETS, EXTRA_CORRUPTIONS
from ..utils.processes import Worker, worker_from_environment
from .cells import Cell, CorruptionData
from .comparison import compare, comparison_table
from .device import Execution
from .evaluate import evaluate_cell
from .field import FIELD, FieldStream, run_field
from .field_report import FieldResults
from .folders import load_stream, open_class_folders, open_dataset
from .protocols import PROTOCOLS
from .results import CellRecord, MethodRecord, Results
from .run import run_benchmark

__all__ = [
    "CORRUPTIONS",
    "DATASETS",
    "EXTRA_CORRUPTIONS",
    "FIELD",
    "PROTOCOLS",
    "Cell",
    "CellRecord",
    "CorruptionData",
    "Execution",
    "FieldResults",
    "FieldStream",
    "MethodRecord",
    "Results",
    "Worker",
    "compare",
    "comparison_table",
    "evaluate_cell",
    "load_stream",
    "open_class_folders",
    "open_dataset",
    "run_benchmark",
    "run_field",
    "worker_from_environment",
]
