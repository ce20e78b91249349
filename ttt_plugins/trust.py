"""What an artifact may hold: everything is checked before it is used, sizes before allocation.

An artifact comes from a stranger. Its JSON is parsed strictly, its safetensors header is compared
with the file's length before a tensor is made, names cannot leave the folder, and a model it
describes is built under a budget that its own weights set.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ArtifactError

__all__ = [
    "BACKBONE_SOURCES",
    "TIMM_KEYS",
    "BuildBudget",
    "TensorInfo",
    "check_config",
    "parse_json",
    "read_bytes",
    "read_json",
    "tensor_header",
]

MAX_JSON = 4 << 20  # bytes; the largest config.json of ours has 5 KB
MAX_CARD = 1 << 20
MAX_WEIGHTS = 16 << 30  # a classifier's
MAX_LEARNED = 1 << 30  # what a method learned beside it
_MAX_HEADER = 16 << 20
_MAX_DEPTH = 32

#: Type names of safetensors -> (bytes, torch's type).
_DTYPES = {
    "F64": (8, torch.float64),
    "F32": (4, torch.float32),
    "F16": (2, torch.float16),
    "BF16": (2, torch.bfloat16),
    "I64": (8, torch.int64),
    "I32": (4, torch.int32),
    "I16": (2, torch.int16),
    "I8": (1, torch.int8),
    "U8": (1, torch.uint8),
    "BOOL": (1, torch.bool),
}


# -- JSON ------------------------------------------------------------------------------------


def read_bytes(file: Path, limit: int) -> bytes:
    """A small regular file's content.

    Raises:
        ArtifactError: missing, not a regular file (a pipe would block), or above ``limit`` bytes.
    """
    try:
        if file.exists() and not file.is_file():
            raise ArtifactError(f"{file} is not a regular file")
        with open(file, "rb") as stream:
            content = stream.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{file} cannot be read ({reason})") from error
    if len(content) > limit:
        raise ArtifactError(f"{file} is larger than the {limit:,} bytes such a file may have")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def _not_json(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:20]}... is too large a number")
    return int(text)


def parse_json(content: bytes, where: str | Path) -> Any:
    """Strict JSON: no NaN or infinity, no key twice, no abyss of brackets, no broken Unicode.

    Raises:
        ArtifactError: it is anything else.
    """
    try:
        text = content.decode("utf-8")
        depth = deepest = 0
        for bracket in re.findall(r"[\[{\]}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
            depth += 1 if bracket in "[{" else -1
            deepest = max(deepest, depth)
        if deepest > _MAX_DEPTH:
            raise ValueError(f"nested {deepest} deep; {_MAX_DEPTH} is the limit")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_not_json,
            parse_float=_finite,
            parse_int=_integer,
        )
        # Lone surrogates parse but can be written nowhere.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not valid JSON ({error})") from error
    return value


def read_json(file: Path) -> Any:
    """`parse_json` of a file of at most 4 MB."""
    return parse_json(read_bytes(file, MAX_JSON), file)


# -- safetensors -----------------------------------------------------------------------------


class TensorInfo(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def tensor_header(file: Path, limit: int = MAX_WEIGHTS) -> dict[str, TensorInfo]:
    """Types and shapes in a safetensors file, none of whose tensors is read.

    The header must account for every byte of the file, and for no byte that is not there.

    Raises:
        ArtifactError: not a safetensors file, truncated, padded, or above ``limit`` bytes.
    """
    try:
        if not file.is_file():
            raise ArtifactError(f"{file} is missing")
        with open(file, "rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_MAX_HEADER, total - 8):
                raise ArtifactError(
                    f"{file} is not a safetensors file, or truncated: its header would have "
                    f"{length:,} bytes, the file has {total:,}"
                )
            content = stream.read(length)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror or error})") from error
    if total > limit:
        raise ArtifactError(f"{file} has {total:,} bytes; more than {limit:,} are not read")
    header = parse_json(content, f"the header of {file}")
    if not isinstance(header, dict):
        raise ArtifactError(f"the header of {file} is not a JSON object")
    header.pop("__metadata__", None)
    spans, found = [], {}
    for name, entry in header.items():
        span, found[name] = _entry(entry, f"{file}: tensor {name[:80]!r}")
        spans.append(span)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ArtifactError(f"{file}: tensors overlap or leave gaps at byte {begin:,}")
        position = end
    if position != total - 8 - length:
        raise ArtifactError(
            f"{file}: the header accounts for {position:,} bytes of tensors, the file holds "
            f"{total - 8 - length:,}: it is truncated or damaged"
        )
    return found


def _entry(entry: Any, where: str) -> tuple[tuple[int, int], TensorInfo]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where} is not described by dtype, shape and data_offsets")
    shape, span = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ArtifactError(f"{where} has the unknown type {str(entry['dtype'])[:40]!r}")
    for numbers in (shape, span):
        good = isinstance(numbers, list) and len(numbers) <= 16
        if not good or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise ArtifactError(f"{where} has a shape or offsets that are no sizes")
    size, dtype = _DTYPES[entry["dtype"]]
    if len(span) != 2 or span[1] - span[0] != size * math.prod(shape):
        raise ArtifactError(f"{where}: its shape {tuple(shape)} and its bytes do not agree")
    return (span[0], span[1]), TensorInfo(dtype, tuple(shape))


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


# -- building a model that an artifact describes ---------------------------------------------


class BuildBudget(TorchDispatchMode):
    """Stops a constructor that asks for much more than the weights at hand could fill.

    Every tensor operation is looked at before it runs, so what is refused was never allocated.

    Args:
        elements: numbers in the weights file.
        tensors: tensors in it.

    Raises:
        ArtifactError: (inside the block) more than sixteen times that many numbers and 64 MB, or
            more than a hundred operations a tensor.
    """

    def __init__(self, elements: int, tensors: int):
        super().__init__()
        self._elements = 16 * elements + (16 << 20)
        self._calls = 100 * tensors + 20_000

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._calls -= 1
        if not func.is_view and not func._schema.is_mutable:
            self._elements -= _asked_for(args)
        if self._calls < 0 or self._elements < 0:
            raise ArtifactError("the model described is far larger than the weights beside it")
        return func(*args, **(kwargs or {}))


def _asked_for(args: tuple) -> int:
    """An upper bound of the numbers an operation creates, from its arguments alone."""
    given = [a.numel() for a in args if isinstance(a, torch.Tensor)]
    sizes = [a for a in args if isinstance(a, (list, tuple))]
    for part in sizes:
        given += [a.numel() for a in part if isinstance(a, torch.Tensor)]
    shapes = [a.shape for a in args if isinstance(a, torch.Tensor)]
    if len(shapes) > 1:
        try:
            given.append(math.prod(torch.broadcast_shapes(*shapes)))
        except RuntimeError:
            given.append(sum(given))
    counts = [math.prod(p) for p in sizes if p and all(type(n) is int and n >= 0 for n in p)]
    if not given:  # arange and linspace take numbers
        counts += [int(abs(a)) for a in args if isinstance(a, (int, float)) and math.isfinite(a)]
    return max(given, default=1) * max(counts, default=1) if counts else max(given, default=1)
