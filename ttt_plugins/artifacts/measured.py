"""``results.json`` of an artifact: the measured results that its card shows.

    {"format_version": 1,
     "runs": [{"dataset": "CIFAR-10-C", "severities": [5], "corruptions": ["fog", ...],
               "images": 2000, "protocol": "reset-per-corruption", "batch_size": 64,
               "seeds": [0, 1, 2],
               "accuracy": {"mgg": 0.7334, "source": 0.667},
               "clean_accuracy": {...}, "standard_error": {...}, "by_corruption": {"fog": {...}},
               "network": "resnet26", "benchmark": "ORG/NAME", "task_id": "default",
               "note": "...", "command": "...", "versions": {...}}]}

Accuracies are in [0, 1], by method, averaged over the given corruptions and severities;
``images`` is the number of images of each corruption at each severity. ``clean_accuracy`` and
everything after it is optional; ``benchmark`` is the data set on the Hub whose leaderboard the
figures are for (`ttt_plugins.artifacts.evaluations`). A benchmark's ``results.json`` is reduced to
this form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..data.datasets import DATASETS
from ..errors import ArtifactError
from .strict_json import read_json

__all__ = [
    "check_measured",
    "conditions",
    "eval_results",
    "load_measured",
    "reduce_benchmark",
    "titles",
]

_VERSION = 1
_NEEDED = {
    "dataset": str,
    "severities": list,
    "corruptions": list,
    "images": int,
    "protocol": str,
    "batch_size": int,
    "seeds": list,
    "accuracy": dict,
}
_OPTIONAL = {
    "clean_accuracy": dict,
    "standard_error": dict,
    "by_corruption": dict,
    "network": str,
    "benchmark": str,
    "task_id": str,
    "note": str,
    "command": str,
    "versions": dict,
}


def load_measured(
    results: str | Path | Mapping[str, Any], where: str = "results"
) -> dict[str, Any]:
    """Load results in the form above, or reduce those of a benchmark to it.

    Args:
        results: the results, or the file that holds them.
        where: name of the results in error messages, unless they are in a file.

    Raises:
        ArtifactError: the results have neither form, or the file cannot be read.
    """
    content: Any = results
    if isinstance(results, (str, Path)):
        where, content = str(results), read_json(Path(results))
    if isinstance(content, Mapping) and "methods" in content and "settings" in content:
        content = reduce_benchmark(content, where)
    check_measured(content, where)
    return dict(content)


def _shares(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(k, str)
        and isinstance(v, (int, float))
        and not isinstance(v, bool)
        and math.isfinite(v)
        and 0 <= v <= 1
        for k, v in value.items()
    )


def check_measured(results: Any, where: str) -> None:
    """Raise `ArtifactError` unless ``results`` has the form above."""
    runs = results.get("runs") if isinstance(results, Mapping) else None
    if runs is None or results.get("format_version") != _VERSION or not isinstance(runs, list):
        raise ArtifactError(
            f"{where} holds no results: it must be a benchmark's results.json, or an object with "
            f"format_version {_VERSION} and a list of runs"
        )
    for run in runs:
        if not isinstance(run, Mapping):
            raise ArtifactError(f"{where}: a run must be an object")
        if missing := sorted(_NEEDED.keys() - run.keys()):
            raise ArtifactError(f"{where}: a run has no {missing[0]!r}")
        known = _NEEDED | _OPTIONAL
        for key, value in run.items():
            if key not in known:
                raise ArtifactError(
                    f"{where}: unknown key {key!r}; the known keys are {sorted(known)}"
                )
            if not isinstance(value, known[key]) or isinstance(value, bool):
                raise ArtifactError(f"{where}: {key!r} must be a {known[key].__name__}")
        tables = [run.get(k, {}) for k in ("accuracy", "clean_accuracy", "standard_error")]
        if not all(map(_shares, (*tables, *run.get("by_corruption", {}).values()))):
            raise ArtifactError(f"{where}: accuracies must be numbers from 0 to 1, by method")
        numbers = [*run["severities"], *run["seeds"], run["images"], run["batch_size"]]
        words = [*run["corruptions"]]
        if not all(type(n) is int for n in numbers) or not all(isinstance(w, str) for w in words):
            raise ArtifactError(
                f"{where}: severities, seeds, images and batch_size must be integers, and "
                "corruptions must be names"
            )


def reduce_benchmark(results: Mapping[str, Any], where: str = "results") -> dict[str, Any]:
    """Reduce a benchmark's ``results.json`` to the form above, without single cells and batches.

    Raises:
        ArtifactError: these are not the results of a benchmark.
    """
    try:
        settings, methods = results["settings"], results["methods"]
        known = DATASETS.get(settings["dataset"])
        cells = [(c["corruption"], c["severity"]) for c in methods[0]["cells"]]
        # Version 1 of that file has one seed, version 2 a list; None is the stored order.
        seeds = settings["seeds"] if "seeds" in settings else [settings["seed"]]
        run = {
            "dataset": settings["dataset"] if known is None else known.title,
            "severities": sorted({severity for _, severity in cells}),
            "corruptions": list(dict.fromkeys(name for name, _ in cells)),
            "images": max(c["n"] for c in methods[0]["cells"]),
            "protocol": settings["protocol"],
            "batch_size": settings["batch_size"],
            "seeds": [seed for seed in seeds if seed is not None],
            "accuracy": {m["method"]: m["averages"]["accuracy"] for m in methods},
            "by_corruption": {},
        }
        for method in methods:
            for name, share in method["averages"]["by_corruption"].items():
                run["by_corruption"].setdefault(name, {})[method["method"]] = share
        errors = {m["method"]: m["averages"].get("standard_error") for m in methods}
        if errors := {name: error for name, error in errors.items() if error is not None}:
            run["standard_error"] = errors
        clean = {m["method"]: m.get("clean_accuracy") for m in methods}
        if clean := {name: share for name, share in clean.items() if share is not None}:
            run["clean_accuracy"] = clean
        for key, source in (("note", "data_note"), ("command", "command")):
            if isinstance(results.get(source), str) and results[source]:
                run[key] = results[source]
        if isinstance(settings.get("model"), str):
            run["network"] = re.split(r"[/:\\]", settings["model"].rstrip("/\\"))[-1]
        if isinstance(results.get("versions"), Mapping):
            run["versions"] = dict(results["versions"])
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{where} is not a benchmark's results.json ({error!r})") from error
    return {"format_version": _VERSION, "runs": [run]}


def conditions(run: Mapping[str, Any]) -> str:
    """The conditions of a run, in one line."""
    severities = ", ".join(map(str, run["severities"]))
    seeds = f", seeds {', '.join(map(str, run['seeds']))}" if run["seeds"] else ""
    return (
        f"severity {severities}, {len(run['corruptions'])} corruptions, {run['images']} images "
        f"each, {run['protocol']}, batch {run['batch_size']}{seeds}"
    )


def titles(run: Mapping[str, Any], method: str, network: str | None) -> tuple[str, str]:
    """What the mean and the clean accuracy of a run are of: network, method and conditions.

    Args:
        run: a run in the form above.
        method: method of the figures.
        network: the artifact's own network, for a run that names none; None if it has none.
    """
    named = run.get("network") or network
    what = method if named is None else f"{method} on {named}"
    return (
        f"Mean accuracy of {what} ({conditions(run)})",
        f"Accuracy of {what} on clean images ({run['protocol']}, batch {run['batch_size']})",
    )


def eval_results(
    results: Mapping[str, Any], method: str, network: str | None = None
) -> list[EvalResult]:
    """Results of the artifact's own method for the card's metadata.

    Args:
        results: results in the form above.
        method: method of the artifact.
        network: the artifact's network, for runs that name none.
    """
    found = []
    for run in results["runs"]:
        severities = "-".join(map(str, run["severities"]))
        mean, clean = titles(run, method, network)
        for accuracies, config, name in (
            (run["accuracy"], f"severity-{severities}", mean),
            (run.get("clean_accuracy", {}), "clean", clean),
        ):
            if method in accuracies:
                found.append(
                    EvalResult(
                        task_type="image-classification",
                        task_name="Image classification",
                        dataset_type=run["dataset"].lower().replace(" ", "-"),
                        dataset_name=run["dataset"],
                        dataset_config=config,
                        dataset_split="test",
                        metric_type="accuracy",
                        metric_name=name,
                        metric_value=round(accuracies[method], 6),
                    )
                )
    return found
