"""The description of an artifact, made without downloading or creating its classifier."""

from __future__ import annotations

import math
import re
from pathlib import Path

from ..errors import ArtifactError
from . import hub
from .card import OURS, base_model
from .folder import is_bundled, read_artifact
from .hub_access import Access
from .measured import conditions

__all__ = ["describe"]


def describe(name: str | Path, access: Access) -> str:
    """Describe an artifact: its method, classifier, fingerprint, format, training and results.

    Args:
        name: name of the artifact, as for `ttt_plugins.from_pretrained`.
        access: how to reach the Hub.

    Raises:
        ArtifactError: there is no such artifact, or it is damaged.
    """
    place = hub.find(name, access)
    if place is None:
        raise ArtifactError(
            f"{str(name)[:200]!r} is neither a folder with a config.json nor ORG/NAME"
        )
    artifact = read_artifact(place.folder, place.name)
    config, backbone = artifact.config, artifact.config["backbone"]
    facts = config.get("card", {})
    if is_bundled(place.folder):
        facts = OURS | facts
    learned = sum(math.prod(t.shape) for t in artifact.tensors.values())
    rows = {
        "name": place.name,
        "format": f"{config['format_version']}, by ttt_plugins {config.get('ttt_plugins_version')}",
        "method": config["method"],
        "fields": ", ".join(f"{k}={v!r}" for k, v in sorted(config["fields"].items())),
        "learned": f"{learned:,} numbers in {len(artifact.tensors)} tensors",
        "classifier": f"{backbone['name']} ({backbone['source']})"
        if "name" in backbone
        else "none",
        "revision": backbone.get("revision"),
        "fits": "any classifier" if backbone.get("fits") == "any" else None,
        "fingerprint": backbone.get("fingerprint"),
        "base model": base_model(backbone),
        "classes": backbone.get("num_classes", config.get("num_classes")),
        "mean, std": f"{backbone['mean']}, {backbone['std']}" if backbone.get("mean") else None,
        "licence": facts.get("license"),
        "datasets": ", ".join(facts.get("datasets", [])),
        "made by": config.get("training", {}).get("command"),
        "note": config.get("training", {}).get("note"),
    }
    width = max(map(len, rows)) + 2
    said = {key: " ".join(str(value).split()) for key, value in rows.items() if value}
    lines = [f"{key + ':':<{width}}{value}" for key, value in said.items()]
    for run in (artifact.results or {"runs": []})["runs"]:
        lines.append(f"results on {run['dataset']}, {conditions(run)}:")
        lines += [f"  {m}: {100 * share:.2f} %" for m, share in run["accuracy"].items()]
    # An artifact may come from anybody, so control characters are replaced.
    return re.sub(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd]", "?", "\n".join(lines))
