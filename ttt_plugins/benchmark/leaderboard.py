"""RobustBench's two result files: ``unaggregated_results.csv`` and ``<Name>.json``.

The schema is that of RobustBench 1.1.1 (``utils.ModelInfo``, ``eval.corruptions_evaluation``).
RobustBench's rules exclude models with an optimization loop, so the files of an adapter are for
comparison and say so.
"""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from .cells import DATASETS
from .records import MethodRecord, Results

__all__ = ["INELIGIBLE", "leaderboard_files", "model_info", "unaggregated_csv"]

INELIGIBLE = "not leaderboard-eligible: optimizes at test time"


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
        accuracy = {(c.corruption, c.severity): c.accuracy for c in method.cells}
        writer.writerow([method.name, *(accuracy.get(cell, "") for cell in columns)])
    return text.getvalue()


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
        "corruptions_mce": None,
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
    images = f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else str(counts[0] if counts else 0)
    config = ", ".join(f"{k}={v}" for k, v in method.config.items())
    forwards, backwards = method.per_image("forwards"), method.per_image("backwards")
    parts = [] if method.method == "source" else [INELIGIBLE]
    parts += [
        f"method {method.method} ({config})",
        f"protocol {settings['protocol']}",
        f"batch size {settings['batch_size']}",
        f"order: {circumstances['order']}",
        f"seed {settings['seed']}",
        f"{len(run)} of {5 * len(corruptions)} cells, {images} images each",
        f"{forwards:.2f} forward and {backwards:.2f} backward passes an image",
    ]
    for other in results.methods[1:]:
        clean, corrupted = _percent(other.clean_accuracy), _percent(other.mean(corruptions))
        parts.append(f"unadapted base model on the same cells: {corrupted} (clean: {clean})")
    if circumstances["clean"] is None:
        parts.append("clean accuracy not measured: no clean images in the data folder")
    if circumstances["data_note"]:
        parts.append(circumstances["data_note"])
    return "; ".join([*parts, f"ttt_plugins {circumstances['versions']['ttt_plugins']}"])
