"""The schema of ``config.json``: its keys, types and ranges, and the form of the names in it.

An artifact may come from anybody, so everything is checked before it is used. This module reads no
files; `folder` does, and lists which module checks what.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from timm.data.config import resolve_model_data_config
from torch import nn

from ..backbones.kinds import check_output, kinds
from ..errors import ArtifactError, InputError
from ..version import __version__

__all__ = [
    "BACKBONE_SOURCES",
    "FORMAT_VERSION",
    "OWN_WEIGHTS",
    "check_config",
    "check_params",
    "check_timm_part",
    "common_config",
    "pretrained_settings",
    "timm_config",
    "timm_part",
]

Check = Callable[[Any], bool]


# -- names -----------------------------------------------------------------------------------

FORMAT_VERSION = 1

#: ``config["backbone"]["source"]`` when the model's weights are in the artifact itself.
OWN_WEIGHTS = "artifact"

#: The keys that make a folder a timm repository as well.
TIMM_KEYS = ("architecture", "num_classes", "num_features", "model_args", "pretrained_cfg")

_NAME = r"[A-Za-z0-9_][\w.\-]{0,95}"
_COMMIT = r"[0-9a-f]{40}"
_SHA256 = r"sha256:[0-9a-f]{64}"

#: ``config["backbone"]["source"]`` -> pattern of the name beside it. The path of a folder is saved
#: as an absolute path, so it cannot be a name that timm parses as another source.
BACKBONE_SOURCES = {
    OWN_WEIGHTS: _NAME,
    "bundled": rf"bundled:{_NAME}",
    "folder": r"(?:/|[A-Za-z]:[\\/])[^\0\n]{0,4096}",
    "hub": rf"{_NAME}/{_NAME}",
    "module": r"[\w.<>\-]{1,200}",
    "robustbench": rf"robustbench:{_NAME}/{_NAME}",
    "timm": _NAME,
    # Named for the reader only: such a model is loaded when the user names it.
    **{k.prefix: rf"{k.prefix}:{_NAME}" for k in kinds() if k.prefix},
}


# -- checks of one value ---------------------------------------------------------------------


def _is(
    kind: type | tuple[type, ...], low: float | None = None, high: float | None = None
) -> Check:
    def check(value: Any) -> bool:
        if isinstance(value, bool) and kind is not bool:
            return False
        return isinstance(value, kind) and (
            low is None or (low <= value and (high is None or value <= high))
        )

    return check


def _text(pattern: str) -> Check:
    expression = re.compile(pattern, re.ASCII)
    return lambda value: isinstance(value, str) and expression.fullmatch(value) is not None


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _numbers(low: float, most: int, high: float = 1e9) -> Check:
    number = _is((int, float), low, high)

    def check(value: Any) -> bool:
        return isinstance(value, list) and 1 <= len(value) <= most and all(map(number, value))

    return check


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is a scalar or a list at most two deep, of sizes that models have."""
    if isinstance(value, list):
        return depth < 2 and len(value) <= 256 and all(_plain(v, depth + 1) for v in value)
    if isinstance(value, str):
        return re.fullmatch(r"[\w.\-+ ]{0,64}", value, re.ASCII) is not None
    return value is None or (isinstance(value, (int, float)) and abs(value) <= 1 << 14)


def _arguments(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _text(r"[a-z]\w{0,63}")(key) and not isinstance(v, dict) and _plain(v)
        for key, v in value.items()
    )


def _positions(value: Any) -> bool:
    position = _is(int, 0, 10**6)
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 10**6
        and all(map(position, value))
        and len(set(value)) == len(value)
    )


def _output(value: Any) -> bool:
    try:
        return check_output(value) is not None and len(str(value)) <= 64
    except InputError:
        return False


_CLASSES = _is(int, 1, 10**6)
_PRETRAINED = {
    "input_size": _numbers(1, 3, 1 << 12),
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
    "classes": _or_none(_positions),
    "output": _output,
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
    "fields": lambda v: isinstance(v, dict),
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


def _check_object(
    value: Mapping[str, Any], known: Mapping[str, Any], needed: tuple[str, ...], where: str
) -> None:
    for key in needed:
        if key not in value:
            raise ArtifactError(f"{where}: {key!r} is missing")
    for key, content in value.items():
        if key not in known:
            raise ArtifactError(
                f"{where}: unknown key {key[:80]!r}; the known keys are {sorted(known)}. A newer "
                "artifact needs a newer ttt_plugins."
            )
        if not known[key](content):
            raise ArtifactError(f"{where}: {key!r} cannot be {_short(content)}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


# -- fields of a method ----------------------------------------------------------------------

#: Largest values of fields that cost time or memory; users may override them with larger ones.
_FIELD_LIMITS = {
    "copies": 1 << 10,
    "steps": 1 << 10,
    "chunk_size": 1 << 12,
    "rank": 1 << 12,
    "window": 1 << 12,
}
_MAX_INTEGER, _MAX_NUMBER = 10**6, 1e9
#: Largest number of views in the gradient steps of one image, 200 times that of the papers.
_MAX_VIEWS = 1 << 16
_MAX_NAMES, _MAX_TEXT = 1 << 16, 1 << 10


def _check_fields(fields: Mapping[str, Any], where: str) -> None:
    """Check that the method's fields are scalars or lists of them, of acceptable sizes."""
    for key, value in fields.items():
        limit = _FIELD_LIMITS.get(key, _MAX_INTEGER)
        values = value if isinstance(value, list) else [value]
        if len(values) > _MAX_NAMES or not all(_scalar(v, limit) for v in values):
            raise ArtifactError(
                f"{where}: {key[:80]!r} cannot be {_short(value)}: an artifact may hold numbers up "
                f"to {limit:,}, short texts and lists of them; give from_pretrained a larger value "
                "as an override"
            )
    check_params(fields.get("params"), where)
    # Booleans and texts cost nothing; the method's own checks refuse them.
    copies, steps = (v if type(v) is int else 1 for v in map(fields.get, ("copies", "steps")))
    if copies * steps > _MAX_VIEWS:
        raise ArtifactError(
            f"{where}: {steps} steps on {copies} copies are {copies * steps:,} views of every "
            f"image; an artifact may have {_MAX_VIEWS:,} at most"
        )


def _scalar(value: Any, limit: int) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    if isinstance(value, float):
        return abs(value) <= _MAX_NUMBER
    return value is None or (isinstance(value, int) and abs(value) <= limit)


def check_params(params: Any, where: str) -> None:
    """Refuse a regular expression that could take long to match.

    An accepted expression takes time of at most the cube of a name's length: each repetition
    multiplies the number of ways to match by that length, each alternative or optional part by
    two. Repeated groups, backreferences and assertions can take much longer.

    Args:
        params: the field ``params``; names, or None, are always accepted.
        where: name of the artifact in error messages.

    Raises:
        ArtifactError: the expression has more than 200 characters, a repeated group, a
            backreference or an assertion, or it has too many repetitions (which count twice) and
            alternatives or optional parts (which count once): more than four in all.
    """
    if not isinstance(params, str):
        return
    plain = params.replace("(?:", "(")
    cost = 2 * len(re.findall(r"[*+{]", plain)) + len(re.findall(r"[?|]", plain))
    if len(params) > 200 or cost > 4 or re.search(r"\)[*+?{]|\(\?|\\[1-9]", plain):
        raise ArtifactError(
            f"{where}: the expression {_short(params)} is not accepted as params; list the names"
        )


# -- config.json -----------------------------------------------------------------------------


def check_config(config: Mapping[str, Any], where: str | Path) -> None:
    """Check the keys, types and ranges of a ``config.json`` whose format version is known.

    Args:
        config: the parsed ``config.json``, an object.
        where: name of the file in error messages.

    Raises:
        ArtifactError: something is wrong; the message names the first key that is.
    """
    _check_object(config, _CONFIG, ("format_version", "method", "fields", "backbone"), str(where))
    backbone = config["backbone"]
    _check_object(backbone, _BACKBONE, ("source",), f"{where}: backbone")
    name, source = backbone.get("name"), backbone["source"]
    if name is not None and not _text(BACKBONE_SOURCES[source])(name):
        raise ArtifactError(
            f"{where}: backbone: {_short(name)} is not the name of a {source} model"
        )
    if (backbone.get("mean") is None) != (backbone.get("std") is None):
        raise ArtifactError(f"{where}: backbone: mean and std belong together")
    if not backbone.get("normalize", True) and backbone.get("mean") is not None:
        raise ArtifactError(f"{where}: backbone: normalize is false, but there is a mean")
    _check_fields(config["fields"], f"{where}: fields")
    if "card" in config:
        _check_object(config["card"], _CARD, (), f"{where}: card")
    if source == OWN_WEIGHTS:
        check_timm_part(config, where)
    elif extra := sorted(set(TIMM_KEYS) & config.keys()):
        raise ArtifactError(f"{where}: {extra[0]!r} is present, but no weights of a model are")


def check_timm_part(config: Mapping[str, Any], where: str | Path) -> None:
    """Check the keys of a timm repository of any author.

    Args:
        config: the parsed ``config.json``.
        where: name of the file in error messages.

    Raises:
        ArtifactError: a key is missing, or its value is of the wrong kind.
    """
    known = {key: _CONFIG[key] for key in TIMM_KEYS}
    part = {key: config[key] for key in TIMM_KEYS if key in config}
    _check_object(part, known, ("architecture", "num_classes"), str(where))
    settings = part.get("pretrained_cfg", {})
    settings = {key: settings[key] for key in _PRETRAINED if settings.get(key) is not None}
    _check_object(settings, _PRETRAINED, (), f"{where}: pretrained_cfg")


def pretrained_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing settings of ``pretrained_cfg``; none of them names a file or address."""
    settings = config.get("pretrained_cfg", {})
    settings = {key: settings[key] for key in _PRETRAINED if settings.get(key) is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


# -- writing ---------------------------------------------------------------------------------


def common_config(method: str, config: Any, backbone: dict[str, Any]) -> dict[str, Any]:
    """The part of ``config.json`` that every artifact has.

    Args:
        method: name of the method.
        config: the method's config, a dataclass.
        backbone: description of the classifier.
    """
    return {
        "format_version": FORMAT_VERSION,
        "ttt_plugins_version": __version__,
        "method": method,
        "fields": dataclasses.asdict(config),
        "backbone": backbone,
    }


def timm_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a ``config.json`` that makes its folder a timm repository as well."""
    return {key: config[key] for key in TIMM_KEYS if key in config}


def timm_config(model: nn.Module, architecture: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """The keys for a new folder that is to be a timm repository as well."""
    settings = resolve_model_data_config(model)
    names = ("input_size", "mean", "std", "interpolation", "crop_pct")
    pretrained = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    pretrained = {k: pretrained[k] for k in names if k in pretrained}
    own = cast("Any", model)  # a timm model has these; nn.Module's stubs call them tensors
    pretrained["num_classes"] = own.num_classes
    for key in ("first_conv", "classifier"):
        if value := own.pretrained_cfg.get(key):
            pretrained[key] = list(value) if isinstance(value, tuple) else value
    return {
        "architecture": architecture,
        "num_classes": own.num_classes,
        "num_features": own.num_features,
        "model_args": model_args,
        "pretrained_cfg": pretrained,
    }
