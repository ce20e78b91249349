"""Strict JSON of limited size and depth, without duplicate keys and NaN, read in linear time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ArtifactError

__all__ = ["MAX_CARD", "MAX_JSON", "parse_json", "read_bytes", "read_json"]


MAX_JSON = 4 << 20  # bytes; the largest bundled config.json has 17 KB
MAX_CARD = 1 << 20
_MAX_DEPTH = 32
_MAX_CONTAINERS = 1 << 18  # lists and objects; the header of a large network's weights has 10,000
#: Characters of a number; Python's own shortest form of any float has 24.
_MAX_NUMBER = 64


def read_bytes(file: Path, limit: int) -> bytes:
    """The content of a small regular file.

    Args:
        file: the file.
        limit: largest size in bytes.

    Raises:
        ArtifactError: the file is missing, too large, or not a regular file (a pipe would block).
    """
    try:
        if file.exists() and not file.is_file():
            raise ArtifactError(f"{file} is not a regular file")
        with open(file, "rb") as stream:
            content = stream.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{file} cannot be read ({reason})") from error
    if len(content) > limit:
        raise ArtifactError(f"{file} is larger than {limit:,} bytes, the limit for such a file")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:80]!r} occurs twice")
            seen.add(name)
    return unique


def _not_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _number(kind: Callable[[str], Any], longest: int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if len(text) > longest:
            raise ValueError(f"the number {text[:20]}... has more than {longest} characters")
        value = kind(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]} is too large a number")
        return value

    return parse


def _check_depth(value: Any) -> None:
    """Refuse lists and objects nested deeper than 32; the parser itself allows about a thousand."""
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [v for v in level if isinstance(v, (list, dict))]
        if not level:
            return
        level = [v for held in level for v in (held.values() if isinstance(held, dict) else held)]
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def parse_json(content: bytes, where: str | Path) -> Any:
    """Parse strict JSON: without NaN, infinity, duplicate keys, deep nesting or broken Unicode.

    Args:
        content: the text in UTF-8.
        where: name of the text in error messages.

    Raises:
        ArtifactError: the text is not strict JSON.
    """
    try:
        if content.count(b"[") + content.count(b"{") > _MAX_CONTAINERS:
            raise ValueError(f"more than {_MAX_CONTAINERS:,} lists and objects")
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_not_json,
            parse_float=_number(float, _MAX_NUMBER),
            parse_int=_number(int, 20),
        )
        _check_depth(value)
        # Lone surrogates can be parsed but not written.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ArtifactError(f"{where} is not valid JSON (nested too deep)") from error
    except ValueError as error:
        raise ArtifactError(f"{where} is not valid JSON ({error})") from error
    return value


def read_json(file: Path) -> Any:
    """Parse a file of at most 4 MB; errors are those of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(file, MAX_JSON), file)
