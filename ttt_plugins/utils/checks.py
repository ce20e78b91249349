"""Checks of numbers, choices, devices and seeds given by users."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError

__all__ = ["check_choice", "check_device", "check_integer", "check_number", "check_seed"]


#: One more than the largest seed that all generators accept: numpy's RandomState has 32 bits.
_SEEDS = 1 << 32


def check_device(device: Any) -> None:
    """Raise `InputError` unless tensors can be created on the device; None is torch's default."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here ({reason})") from error


def check_seed(seed: Any, name: str = "seed") -> None:
    """Raise `InputError` unless all generators accept the seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        raise InputError(f"{name} must be an integer from 0 to {_SEEDS - 1}, got {seed!r}")


def check_number(owner: object, name: str, low: float, high: float = float("inf")) -> None:
    """Raise `InputError` unless the field is a finite real number in [low, high]."""
    value = getattr(owner, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value == float("inf"):
        upper = "" if high == float("inf") else f" and at most {high:g}"
        raise InputError(
            f"{type(owner).__name__}.{name} must be a number of at least {low:g}{upper}, "
            f"got {value!r}"
        )


def check_integer(owner: object, name: str, low: int) -> None:
    """Raise `InputError` unless the field is an integer from ``low`` to a billion."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(
            f"{type(owner).__name__}.{name} must be an integer of at least {low}, got {value!r}"
        )
    if value > 10**9:
        raise InputError(f"{type(owner).__name__}.{name} must be at most {10**9:,}, got {value:,}")


def check_choice(owner: object, name: str, choices: tuple[object, ...]) -> None:
    """Raise `InputError` unless the field is one of ``choices``."""
    value = getattr(owner, name)
    if value not in choices:
        raise InputError(f"{type(owner).__name__}.{name} must be one of {choices}, got {value!r}")
