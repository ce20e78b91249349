"""Strict JSON: bounded in size and depth, no key twice, no NaN."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import ArtifactError

__all__ = ["MAX_CARD", "MAX_JSON", "parse_json", "read_bytes", "read_json"]


MAX_JSON = 4 << 20  # bytes; the largest config.json of ours has 5 KB
MAX_CARD = 1 << 20
_MAX_DEPTH = 32


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
