"""Command line flags: their creation from dataclasses, and the parsing of their values."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import typing
from collections.abc import Iterable
from typing import Any, NoReturn

from ..errors import InputError

__all__ = [
    "PROGRAM",
    "Parser",
    "add_dataclass_flags",
    "add_field_flags",
    "dataclass_from_args",
    "fields_from_pairs",
    "key_value",
]

PROGRAM = "ttt-plugins"

#: Python's spelling of values, which users copy, and the spelling in JSON.
PYTHON_SPELLINGS = {"True": "true", "False": "false", "None": "null"}


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in the same form as the other errors of the command line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def _documented(cls: type) -> dict[str, str]:
    """Texts by field from the Attributes sections in the docstrings of a class and its bases."""
    texts: dict[str, str] = {}
    for base in cls.__bases__:
        texts |= _documented(base)
    lines = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].splitlines()
    names: list[str] = []
    for line in lines:
        if line and not line.startswith(" "):
            break  # the next section
        if entry := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            texts |= dict.fromkeys(names, entry[2])
        elif line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def _json_object(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}") from error


def _number_or_word(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def add_dataclass_flags(parser: argparse.ArgumentParser, cls: type, prefix: str = "") -> None:
    """Add one flag per field: ``batch_size: int`` becomes ``--batch-size N``.

    The help is the field's entry in the docstring's Attributes section. Booleans become
    ``--flag`` and ``--no-flag``, tuples take several values, dictionaries take JSON.

    Args:
        parser: the parser to add the flags to; flags that it already has are not changed.
        cls: the dataclass.
        prefix: text put before each help text.
    """
    help_of = _documented(cls)
    types = typing.get_type_hints(cls)
    existing = {action.dest for action in parser._actions}
    for field in dataclasses.fields(cls):
        if field.name in existing:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = help_of.get(field.name, "").rstrip(".").replace("``", "").replace("%", "%%")
        # A flag that is not given is left out, so that the dataclass's default applies.
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": prefix + text}
        if default is dataclasses.MISSING:
            options["required"] = True
        elif default is not None:  # for None the docstring describes the default
            options["help"] += f" (default: {str(default).replace('%', '%%')})"
        options |= _value_options(types[field.name])
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _value_options(kind: Any) -> dict[str, Any]:
    """Options that make argparse read values of a field's type."""
    kinds = [t for t in typing.get_args(kind) if t is not type(None)]
    origin = typing.get_origin(kind)
    if origin in (tuple, list):
        return {"nargs": "+", "type": kinds[0]}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if dict in (kind, origin, *kinds):
        return {"type": _json_object, "metavar": "JSON"}
    if set(kinds) == {int, str}:
        return {"type": _number_or_word}
    return {"type": kinds[0] if kinds else kind}


def dataclass_from_args(args: argparse.Namespace, cls: type) -> Any:
    """Create the dataclass from the flags of `add_dataclass_flags`; others keep their defaults."""
    names = [f.name for f in dataclasses.fields(cls) if hasattr(args, f.name)]
    values = {name: getattr(args, name) for name in names}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def add_field_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--set KEY=VALUE …``; `fields_from_pairs` converts the collected pairs."""
    parser.add_argument(
        "--set",
        type=key_value,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="fields of the method's config",
    )


def key_value(text: str) -> tuple[str, Any]:
    """Split ``KEY=VALUE``; the value is read as JSON if possible, otherwise as a string.

    Python's spellings ``True``, ``False`` and ``None`` are accepted too.

    Raises:
        argparse.ArgumentTypeError: there is no key or no equals sign.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(PYTHON_SPELLINGS.get(value, value))
    except ValueError:
        return key, value


def fields_from_pairs(pairs: Iterable[tuple[str, Any]], config: type) -> dict[str, Any]:
    """Convert pairs of key and value into fields of a method's config.

    Raises:
        InputError: a field is given twice, or the config has no such field.
    """
    fields = [field.name for field in dataclasses.fields(config)]
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(
                f"--set {name}=…: {config.__name__} has no field {name!r}; its fields are "
                f"{', '.join(sorted(fields))}.{hint}"
            )
        if name in values:
            raise InputError(f"{name} is given twice: {values[name]!r} and {value!r}")
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise InputError(f"--set {name}=…: the number has more than 64 bits")
        values[name] = value
    return values
