"""Names of the methods; tests, the command line and the Hub code enumerate this registry."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import InputError

__all__ = ["Method", "configure", "get_method", "list_methods", "register"]


@dataclass(frozen=True)
class Method:
    """What the library knows of a method.

    Attributes:
        name: as users type it.
        config: frozen dataclass of the method's fields.
        build: ``(config, backbone, source, tensors, seed) -> algorithm`` with ``init()``,
            ``adapt(params, state, images)`` and ``describe()``, where ``source`` are the
            parameters that adapt; None for a method that does not adapt.
        citation: reference of the method's paper.
        default_artifact: ``model -> bundled name`` whose learned tensors `wrap` takes when it is
            given none; None where there is no such thing.
        check: ``(config, backbone, tensors, where) -> tensors`` validates learned tensors by name,
            shape and value; None for methods that learn nothing beforehand.
        eligible: ``(config, backbone) -> names`` of the parameters that may adapt at all; None
            for no limits.
        fits_any: ``(config, tensors) -> bool``, whether what was learned serves any classifier;
            None for methods whose artifacts belong to the weights they were made for.
    """

    name: str
    config: type
    build: Callable[..., Any] | None
    citation: str = ""
    default_artifact: Callable[..., str] | None = None
    check: Callable[..., dict[str, Tensor]] | None = None
    eligible: Callable[..., list[str]] | None = None
    fits_any: Callable[..., bool] | None = None


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method; a second registration of the same name replaces the first."""
    _METHODS[method.name] = method
    return method


def list_methods() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(_METHODS)


def get_method(method: str | object) -> Method:
    """The record of a method given by name or by a config object.

    Raises:
        InputError: unknown; the message names the closest ones.
    """
    if isinstance(method, str):
        if method in _METHODS:
            return _METHODS[method]
        close = difflib.get_close_matches(method, _METHODS, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"unknown method {method!r}; there are {list_methods()}.{hint}")
    for record in _METHODS.values():
        if type(method) is record.config:
            return record
    raise InputError(
        f"method must be one of {list_methods()} or a config object such as tp.MGG(), "
        f"got {type(method).__name__}"
    )


def configure(config: Any, overrides: dict[str, Any]) -> Any:
    """``config`` with fields replaced.

    Raises:
        InputError: a field does not exist, or the config refuses its value.
    """
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name in overrides:
        if name not in fields:
            raise InputError(
                f"{type(config).__name__} has no field {name!r}; its fields are {sorted(fields)}"
            )
    return dataclasses.replace(config, **overrides)


def check_number(owner: object, name: str, low: float, high: float = float("inf")) -> None:
    """Raise `InputError` unless the field is a real number in [low, high]."""
    value = getattr(owner, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value == float("inf"):
        upper = "" if high == float("inf") else f" and at most {high:g}"
        raise InputError(
            f"{type(owner).__name__}.{name} must be a number of at least {low:g}{upper}, "
            f"got {value!r}"
        )


def check_integer(owner: object, name: str, low: int) -> None:
    """Raise `InputError` unless the field is an integer of at least ``low``."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(
            f"{type(owner).__name__}.{name} must be an integer of at least {low}, got {value!r}"
        )


def check_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise `InputError` unless the field is one of ``choices``."""
    value = getattr(owner, name)
    if value not in choices:
        raise InputError(f"{type(owner).__name__}.{name} must be one of {choices}, got {value!r}")
