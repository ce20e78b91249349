"""RobustBench's two result files: ``unaggregated_results.csv`` and ``<Name>.json``.

The schema is that of RobustBench 1.1.1 (``utils.ModelInfo``, ``eval.corruptions_evaluation``).
RobustBench's rules exclude models with an optimization loop, so an adapter's files are meant for
comparison only and are marked as ineligible.
"""

from __future__ import annotations

import csv
import io
import json
import re
from statistics import fmean
from typing import Any

from ..data.datasets import DATASETS, Dataset, robustbench_dataset
from ..utils.text import printable
from .protocols import PROTOCOLS
from .results import MethodRecord, Results

__all__ = ["INELIGIBLE", "leaderboard_files", "mean_corruption_error", "model_info"]
__all__ += ["unaggregated_csv"]

INELIGIBLE = "not leaderboard-eligible: optimizes at test time"


def mean_corruption_error(method: MethodRecord, dataset: str) -> float | None:
    """mCE: the mean over corruptions of the error divided by AlexNet's error (1 for AlexNet).

    Both errors are means over the five severities (arXiv 1903.12261, section 4.2).

    Args:
        method: record of the method.
        dataset: a key of `DATASETS`, or `PICTURES`.

    Returns:
        the mCE; None if a cell is missing, or if AlexNet's errors are not published.
    """
    spec, accuracy = robustbench_dataset(dataset), method.accuracies()
    if spec is None or spec.reference_errors is None or not accuracy.keys() >= set(spec.cells):
        return None
    return fmean(
        (1 - fmean(accuracy[name, severity] for severity in spec.severities)) / error
        for name, error in spec.reference_errors.items()
    )


def _suffix(spec: Dataset) -> str:
    """RobustBench's suffix for names of files and fields: ``"_3d"`` for ImageNet-3DCC."""
    assert spec.robustbench is not None
    return spec.robustbench.threat.removeprefix("corruptions")


def leaderboard_files(results: Results) -> dict[str, str]:
    """The contents of the two files by file name; none for data sets that RobustBench lacks."""
    spec = robustbench_dataset(results.settings["dataset"])
    if spec is None:
        return {}
    suffix = _suffix(spec)
    name = re.sub(r"[^\w.-]+", "_", results.methods[0].name)
    return {
        f"unaggregated_results{suffix}.csv": unaggregated_csv(results),
        f"{name}.json": json.dumps(model_info(results), indent=2) + "\n",
    }


def unaggregated_csv(results: Results) -> str:
    """Two header rows (corruption, severity), then one row per model; accuracies in [0, 1].

    The columns are always all of the benchmark's cells; cells that were not evaluated are blank,
    and corruptions that are not in the benchmark are omitted.
    """
    columns = DATASETS[results.settings["dataset"]].cells
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *(corruption for corruption, _ in columns)])
    writer.writerow(["", *(severity for _, severity in columns)])
    for method in results.methods:
        accuracy = method.accuracies()
        writer.writerow([printable(method.name), *(accuracy.get(cell, "") for cell in columns)])
    return text.getvalue()


def _percent(accuracy: float | None) -> str | None:
    return None if accuracy is None else str(round(100 * accuracy, 2))


def model_info(results: Results) -> dict[str, Any]:
    """RobustBench's description of the adapter, with the protocol in the ``footnote``."""
    settings, method = results.settings, results.methods[0]
    spec = DATASETS[settings["dataset"]]
    assert spec.robustbench is not None
    info = {
        "link": None,
        "name": method.name,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": round(method.per_image("forwards")),
        "dataset": spec.robustbench.name,
        "venue": None,
        "architecture": settings["model"],
        "eps": None,
        "clean_acc": _percent(method.clean_accuracy),
        "reported": None,
        "corruptions_acc": None,
        "corruptions_acc_3d": None,
        "corruptions_mce": None,
        "corruptions_mce_3d": None,
        "autoattack_acc": None,
        "footnote": footnote(results, method),
    }
    info[f"corruptions_acc{_suffix(spec)}"] = _percent(method.mean(spec.corruptions))
    mce = mean_corruption_error(method, settings["dataset"])
    info[f"corruptions_mce{_suffix(spec)}"] = _percent(mce)
    return info


def footnote(results: Results, method: MethodRecord) -> str:
    """Conditions of the figures: protocol, batches, order, cells, cost, and the source model."""
    settings, circumstances = results.settings, results.circumstances
    spec = DATASETS[settings["dataset"]]
    run = [c for c in method.cells if c.corruption in spec.corruptions]
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
        f"resets: {PROTOCOLS[settings['protocol']].resets}",
        f"seeds {', '.join(map(str, settings['seeds']))}",
        f"{cells} of {len(spec.cells)} cells, {images} images each",
        f"{forwards:.2f} forward and {backwards:.2f} backward passes per image",
    ]
    if (error := method.standard_error(spec.corruptions)) is not None:
        parts.append(f"standard error over the seeds {_percent(error)}")
    parts += [f"{name} {value}" for name, value in settings["execution"].items() if value]
    if mean_corruption_error(method, settings["dataset"]) is not None:
        parts.append("mCE relative to the AlexNet errors published with ImageNet-C")
    for other in results.methods[1:]:
        clean, corrupted = _percent(other.clean_accuracy), _percent(other.mean(spec.corruptions))
        parts.append(f"unadapted base model on the same cells: {corrupted} (clean: {clean})")
    if circumstances["clean"] is None:
        parts.append("clean accuracy not measured: no clean images in the data folder")
    if circumstances["data_note"]:
        parts.append(circumstances["data_note"])
    return "; ".join([*parts, f"ttt_plugins {circumstances['versions']['ttt_plugins']}"])
