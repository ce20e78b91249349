"""RobustBench's two result files: ``unaggregated_results.csv`` and ``<Name>.json``.

The schema is that of RobustBench 1.1.1 (``utils.ModelInfo``, ``eval.corruptions_evaluation``).
RobustBench's rules exclude models with an optimization loop, so the files of an adapter are for
comparison and say so.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from importlib import resources
from statistics import fmean
from typing import Any

from .cells import DATASETS
from .records import MethodRecord
from .results import Results

__all__ = ["INELIGIBLE", "alexnet_errors", "leaderboard_files", "mean_corruption_error"]
__all__ += ["model_info", "unaggregated_csv"]

INELIGIBLE = "not leaderboard-eligible: optimizes at test time"

#: Where each protocol resets the adapter, in words.
RESETS = {
    "reset-per-cell": "before each cell",
    "reset-per-corruption": "before each corruption",
    "continual": "before the first cell only",
    "gradual": "before the first cell only; severities go up and down again",
    "mixed": "before the first image only",
    "correlated": "before each cell",
}


def leaderboard_files(results: Results) -> dict[str, str]:
    """Contents of the two files by file name."""
    three_d = results.settings["dataset"] == "imagenet3dcc"
    name = re.sub(r"[^\w.-]+", "_", results.methods[0].name)
    return {
        f"unaggregated_results{'_3d' if three_d else ''}.csv": unaggregated_csv(results),
        f"{name}.json": json.dumps(model_info(results), indent=2) + "\n",
    }


def unaggregated_csv(results: Results) -> str:
    """Two header rows (corruption, severity), then one row a model; accuracies in [0, 1].

    The columns are always all of the benchmark's cells; those that were not run are blank, and
    corruptions that the benchmark does not have are left out.
    """
    columns = [
        (corruption, severity)
        for corruption in DATASETS[results.settings["dataset"]].corruptions
        for severity in range(1, 6)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *(corruption for corruption, _ in columns)])
    writer.writerow(["", *(severity for _, severity in columns)])
    for method in results.methods:
        accuracy = method.accuracies()
        writer.writerow([method.name, *(accuracy.get(cell, "") for cell in columns)])
    return text.getvalue()


@functools.cache
def alexnet_errors() -> dict[str, float]:
    """AlexNet's error rate for each corruption of ImageNet-C; the source is in the data file."""
    file = resources.files(__package__) / "alexnet_imagenetc.json"
    return json.loads(file.read_text(encoding="utf-8"))["error"]


def mean_corruption_error(method: MethodRecord, dataset: str) -> float | None:
    """mCE, 1 for AlexNet itself: the mean over corruptions of error over AlexNet's error.

    Both errors are means of the five severities (arXiv 1903.12261, section 4.2). None where a
    cell is missing, or AlexNet's figures are: they are at hand for ImageNet-C only.
    """
    accuracy, alexnet = method.accuracies(), alexnet_errors()
    wanted = [(name, severity) for name in alexnet for severity in range(1, 6)]
    if dataset != "imagenet" or not accuracy.keys() >= set(wanted):
        return None
    return fmean(
        (1 - fmean(accuracy[name, severity] for severity in range(1, 6))) / error
        for name, error in alexnet.items()
    )


def _percent(accuracy: float | None) -> str | None:
    return None if accuracy is None else str(round(100 * accuracy, 2))


def model_info(results: Results) -> dict[str, Any]:
    """RobustBench's description of the adapter, its protocol in the ``footnote``."""
    settings, method = results.settings, results.methods[0]
    dataset = settings["dataset"]
    accuracy = _percent(method.mean(DATASETS[dataset].corruptions))
    three_d = dataset == "imagenet3dcc"
    return {
        "link": None,
        "name": method.name,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": round(method.per_image("forwards")),
        "dataset": "imagenet" if three_d else dataset,
        "venue": None,
        "architecture": settings["model"],
        "eps": None,
        "clean_acc": _percent(method.clean_accuracy),
        "reported": None,
        "corruptions_acc": None if three_d else accuracy,
        "corruptions_acc_3d": accuracy if three_d else None,
        "corruptions_mce": _percent(mean_corruption_error(method, dataset)),
        "corruptions_mce_3d": None,
        "autoattack_acc": None,
        "footnote": footnote(results, method),
    }


def footnote(results: Results, method: MethodRecord) -> str:
    """How the figures came about: protocol, batches, order, cells, cost, the source beside it."""
    settings, circumstances = results.settings, results.circumstances
    corruptions = DATASETS[settings["dataset"]].corruptions
    run = [c for c in method.cells if c.corruption in corruptions]
    counts = sorted({c.n for c in run})
    cells = len({(c.corruption, c.severity) for c in run})
    images = f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else str(counts[0] if counts else 0)
    config = ", ".join(f"{k}={v}" for k, v in method.config.items())
    forwards, backwards = method.per_image("forwards"), method.per_image("backwards")
    parts = [] if method.method == "source" else [INELIGIBLE]
    parts += [
        f"method {method.method} ({config})",
        f"protocol {settings['protocol']}",
        f"batch size {settings['batch_size']}",
        f"order: {circumstances['order']}",
        f"resets: {RESETS[settings['protocol']]}",
        f"seeds {', '.join(map(str, settings['seeds']))}",
        f"{cells} of {5 * len(corruptions)} cells, {images} images each",
        f"{forwards:.2f} forward and {backwards:.2f} backward passes an image",
    ]
    if (error := method.standard_error(corruptions)) is not None:
        parts.append(f"standard error over the seeds {_percent(error)}")
    parts += [f"{name} {value}" for name, value in settings["execution"].items() if value]
    if mean_corruption_error(method, settings["dataset"]) is not None:
        parts.append("mCE relative to the AlexNet errors published with ImageNet-C")
    for other in results.methods[1:]:
        clean, corrupted = _percent(other.clean_accuracy), _percent(other.mean(corruptions))
        parts.append(f"unadapted base model on the same cells: {corrupted} (clean: {clean})")
    if circumstances["clean"] is None:
        parts.append("clean accuracy not measured: no clean images in the data folder")
    if circumstances["data_note"]:
        parts.append(circumstances["data_note"])
    return "; ".join([*parts, f"ttt_plugins {circumstances['versions']['ttt_plugins']}"])
