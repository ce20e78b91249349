"""What an artifact may hold: everything is checked before it is used, sizes before allocation.

An artifact comes from a stranger. Its JSON is parsed strictly, its safetensors header is compared
with the file's length before a tensor is made, names cannot leave the folder, and a model it
describes is built under a budget that its own weights set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError

__all__ = ["BACKBONE_SOURCES", "TIMM_KEYS", "check_config"]


# -- config.json -----------------------------------------------------------------------------

#: The keys that make a folder a timm repository too.
TIMM_KEYS = ("architecture", "num_classes", "num_features", "model_args", "pretrained_cfg")

_NAME = r"[A-Za-z0-9_][\w.\-]{0,95}"
_COMMIT = r"[0-9a-f]{40}"
_SHA256 = r"sha256:[0-9a-f]{64}"

#: ``config["backbone"]["source"]`` -> what the name beside it looks like. A folder's path is
#: absolute, as it is saved, so that no name of a folder can be one that timm parses as a source.
BACKBONE_SOURCES = {
    "artifact": _NAME,
    "bundled": rf"bundled:{_NAME}",
    "folder": r"(?:/|[A-Za-z]:[\\/])[^\0\n]{0,4096}",
    "hub": rf"{_NAME}/{_NAME}",
    "module": r"[\w.<>\-]{1,200}",
    "robustbench": rf"robustbench:{_NAME}/{_NAME}",
    "timm": _NAME,
}


def _is(kind: type | tuple[type, ...], low: float | None = None, high: float | None = None):
    def check(value: Any) -> bool:
        if isinstance(value, bool) and kind is not bool:
            return False
        return isinstance(value, kind) and (
            low is None or (low <= value and (high is None or value <= high))
        )

    return check


def _text(pattern: str):
    expression = re.compile(pattern, re.ASCII)
    return lambda value: isinstance(value, str) and expression.fullmatch(value) is not None


def _or_none(check):
    return lambda value: value is None or check(value)


def _numbers(low: float, most: int):
    number = _is((int, float), low, 1e9)

    def check(value: Any) -> bool:
        return isinstance(value, list) and 1 <= len(value) <= most and all(map(number, value))

    return check


def _plain(value: Any, depth: int = 0) -> bool:
    """JSON scalars, and lists of them at most two deep, of sizes that a model can have."""
    if isinstance(value, list):
        return depth < 2 and len(value) <= 256 and all(_plain(v, depth + 1) for v in value)
    if isinstance(value, str):
        return re.fullmatch(r"[\w.\-+ ]{0,64}", value, re.ASCII) is not None
    return value is None or isinstance(value, bool) or abs(value) <= 1 << 14


def _arguments(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _text(r"[a-z]\w{0,63}")(key) and not isinstance(v, dict) and _plain(v)
        for key, v in value.items()
    )


_CLASSES = _is(int, 1, 10**6)
_PRETRAINED = {
    "input_size": _numbers(1, 3),
    "mean": _numbers(-1e6, 64),
    "std": _numbers(1e-12, 64),
    "interpolation": _text(r"\w{1,32}"),
    "crop_pct": _is((int, float), 0.01, 10),
    "num_classes": _CLASSES,
    "first_conv": lambda v: _plain(v) and isinstance(v, (str, list)),
    "classifier": lambda v: _plain(v) and isinstance(v, (str, list)),
}
_BACKBONE = {
    "source": lambda v: isinstance(v, str) and v in BACKBONE_SOURCES,
    "name": lambda v: isinstance(v, str),
    "revision": _or_none(_text(_COMMIT)),
    "pretrained": _is(bool),
    "timm": _text(r"[\w.+\-]{1,64}"),
    "num_classes": _or_none(_CLASSES),
    "normalize": _is(bool),
    "mean": _or_none(_numbers(-1e6, 64)),
    "std": _or_none(_numbers(1e-12, 64)),
    "fingerprint": _text(_SHA256),
    "fits": lambda v: v == "any",
}
_CARD = {
    "license": _text(r"[a-z0-9.\-]{1,64}"),
    "datasets": lambda v: (
        isinstance(v, list) and len(v) <= 32 and all(map(_text(r"[\w.\-]+(/[\w.\-]+)?"), v))
    ),
    "note": lambda v: isinstance(v, str),
}
_CONFIG = {
    "format_version": lambda v: type(v) is int,
    "ttt_plugins_version": lambda v: isinstance(v, str) and len(v) <= 64,
    "method": _text(r"\w{1,64}"),
    "fields": lambda v: isinstance(v, dict) and all(map(_field, v.values())),
    "backbone": lambda v: isinstance(v, dict),
    "training": lambda v: isinstance(v, dict),
    "card": lambda v: isinstance(v, dict),
    "learned": _text(_SHA256),
    "architecture": _text(_NAME),
    "num_classes": _CLASSES,
    "num_features": _is(int, 1, 10**6),
    "model_args": _arguments,
    "pretrained_cfg": lambda v: isinstance(v, dict),
}


def _field(value: Any) -> bool:
    scalars = value if isinstance(value, list) else [value]
    return all(not isinstance(v, (list, dict)) for v in scalars)


def _check_object(
    value: Mapping[str, Any], known: Mapping[str, Any], needed: tuple[str, ...], where: str
) -> None:
    for key in needed:
        if key not in value:
            raise ArtifactError(f"{where}: {key!r} is missing")
    for key, content in value.items():
        if key not in known:
            raise ArtifactError(
                f"{where}: unknown key {key[:80]!r}; known are {sorted(known)}. A newer artifact "
                "needs a newer ttt_plugins."
            )
        if not known[key](content):
            raise ArtifactError(f"{where}: {key!r} cannot be {_short(content)}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_params(params: Any, where: str) -> None:
    """Refuse a regular expression that could keep the matcher busy for hours.

    Raises:
        ArtifactError: it is long, repeats a group, refers back, or repeats more than three times.
    """
    if not isinstance(params, str):
        return
    repeats = len(re.findall(r"[*+{]", params))
    if len(params) > 200 or repeats > 3 or re.search(r"\)[*+?{]|\(\?(?!:)|\\[1-9]", params):
        raise ArtifactError(f"{where}: the expression {_short(params)} is not accepted as params")


def check_config(config: Any, where: str | Path) -> None:
    """Keys, types and ranges of a ``config.json`` whose format version is known.

    Raises:
        ArtifactError: the first thing that is wrong, with its key.
    """
    _check_object(config, _CONFIG, ("format_version", "method", "fields", "backbone"), str(where))
    backbone = config["backbone"]
    _check_object(backbone, _BACKBONE, ("source",), f"{where}: backbone")
    name, source = backbone.get("name"), backbone["source"]
    if name is not None and not _text(BACKBONE_SOURCES[source])(name):
        raise ArtifactError(f"{where}: backbone: {_short(name)} is no name of a {source} model")
    if (backbone.get("mean") is None) != (backbone.get("std") is None):
        raise ArtifactError(f"{where}: backbone: mean and std belong together")
    if not backbone.get("normalize", True) and backbone.get("mean") is not None:
        raise ArtifactError(f"{where}: backbone: normalize is false, but there is a mean")
    check_params(config["fields"].get("params"), where)
    if "card" in config:
        _check_object(config["card"], _CARD, (), f"{where}: card")
    carries = source == "artifact"
    if carries:
        check_timm_part(config, where)
    elif extra := sorted(set(TIMM_KEYS) & config.keys()):
        raise ArtifactError(f"{where}: {extra[0]!r} is there, but no weights of a model are")


def check_timm_part(config: Mapping[str, Any], where: str | Path) -> None:
    """The keys of a timm repository, of ours or anybody's.

    Raises:
        ArtifactError: one is missing or of the wrong kind.
    """
    known = {key: _CONFIG[key] for key in TIMM_KEYS}
    part = {key: config[key] for key in TIMM_KEYS if key in config}
    _check_object(part, known, ("architecture", "num_classes"), str(where))
    settings = part.get("pretrained_cfg", {})
    settings = {key: settings[key] for key in _PRETRAINED if settings.get(key) is not None}
    _check_object(settings, _PRETRAINED, (), f"{where}: pretrained_cfg")


def pretrained_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing in ``pretrained_cfg``: nothing in it names a file or an address."""
    found = config.get("pretrained_cfg", {})
    found = {key: found[key] for key in _PRETRAINED if found.get(key) is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
