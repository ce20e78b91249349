"""``.eval_results/*.yaml``: figures for the leaderboards of benchmark data sets on the Hub.

The Hub takes such an entry only for a data set that is registered as a benchmark there, so a file
is written for runs that name one (``benchmark``, ``task_id``), beside the card's model-index:
https://huggingface.co/docs/hub/eval-results and hub-docs' ``eval_results.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResultEntry, constants, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from ..errors import ArtifactError
from .folder import RESULTS, Artifact
from .measured import titles

__all__ = ["PATTERN", "evaluation_files", "for_benchmark"]

#: The files of ours in a repository.
PATTERN = ".eval_results/ttt_plugins-*.yaml"
_BENCHMARK = re.compile(r"([\w.\-]{1,96}/[\w.\-]{1,96})(?::([\w.\-]{1,96}))?", re.ASCII)
_TASK = "default"


def for_benchmark(results: Mapping[str, Any] | None, benchmark: str) -> dict[str, Any]:
    """Results whose runs are all for the leaderboard of one benchmark.

    Args:
        results: results as in `ttt_plugins.artifacts.measured`.
        benchmark: ``"ORG/NAME"`` or ``"ORG/NAME:TASK"``, the task as in its ``eval.yaml``.

    Raises:
        ArtifactError: there are no results, or this is no name of a data set.
    """
    if not results:
        raise ArtifactError("a benchmark is named, but there are no results to publish for it")
    named = _BENCHMARK.fullmatch(benchmark)
    if named is None:
        raise ArtifactError(
            f"{benchmark[:200]!r} names no benchmark: it must be ORG/NAME or ORG/NAME:TASK"
        )
    own = {"benchmark": named[1], "task_id": named[2] or _TASK}
    return {**results, "runs": [{**run, **own} for run in results["runs"]]}


def evaluation_files(artifact: Artifact, repository: str) -> dict[str, str]:
    """The files of an artifact's own figures, by path in its repository; one for each run.

    Args:
        artifact: the artifact.
        repository: ``org/name`` that the artifact is published as, the source of the figures.
    """
    method, network = artifact.config["method"], artifact.config["backbone"].get("name")
    files = {}
    for number, run in enumerate((artifact.results or {"runs": []})["runs"], 1):
        if "benchmark" not in run or method not in run["accuracy"]:
            continue
        entry = EvalResultEntry(
            dataset_id=run["benchmark"],
            task_id=run.get("task_id", _TASK),
            value=round(run["accuracy"][method], 6),
            source_url=f"{constants.ENDPOINT}/{repository}/blob/main/{RESULTS}",
            source_name=f"{RESULTS} of ttt_plugins",
            notes=titles(run, method, network)[0],
        )
        path = PATTERN.replace("*", str(number))
        files[path] = yaml_dump(eval_result_entries_to_yaml([entry]))
    return files
