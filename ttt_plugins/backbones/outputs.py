"""The logits in whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError
from .kinds import Output

__all__ = ["are_probabilities", "logits_of"]


def logits_of(out: Any, output: Output | None, distilled: bool = False) -> Any:
    """The logits of what a model returned.

    Args:
        out: a tensor; or a mapping, an object or a sequence that holds it.
        output: its key, attribute or position; None where the logits are the only tensor, or are
            called so.
        distilled: whether outputs of equal shape are those of a distilled model's heads, which
            timm averages at inference.

    Returns:
        the logits, or what else was returned instead of a tensor.

    Raises:
        InputError: there is no such part, or several could be meant.
    """
    if isinstance(output, int):
        return _at(out, output)
    if isinstance(out, Tensor) and output is None:
        return out
    if (found := _named(out, output or "logits")) is not None:
        return found
    sequence = isinstance(out, (tuple, list))
    if sequence and output is None and distilled and len({o.shape for o in out}) == 1:
        return sum(out) / len(out)  # the heads' average, as timm has it at inference
    tensors = _tensors(out)
    if output is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if not tensors and output is None:
        return out
    held = ", ".join(f"{name!r} {tuple(t.shape)}" for name, t in tensors.items()) or "no tensor"
    wanted = "say which holds the logits" if output is None else f"there is no output={output!r}"
    raise InputError(f"the model returns a {type(out).__name__} of {held}: {wanted} with output=")


def _named(out: Any, name: str) -> Tensor | None:
    found = out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
    return found if isinstance(found, Tensor) else None


def _at(out: Any, position: int) -> Any:
    members = list(out.values()) if isinstance(out, Mapping) else out
    if isinstance(members, Tensor) or not isinstance(members, (tuple, list)):
        raise InputError(
            f"output={position} is a position, but the model returns a {type(out).__name__}"
        )
    if position >= len(members):
        raise InputError(f"output={position}: the model returns {len(members)} outputs")
    return members[position]


def _tensors(out: Any) -> dict[str | int, Tensor]:
    """The tensors that an output holds, by key, attribute or position."""
    if isinstance(out, Tensor):
        return {0: out}
    if isinstance(out, Mapping):
        named: Any = out.items()
    elif isinstance(out, (tuple, list)):
        named = enumerate(out)
    else:
        named = getattr(out, "__dict__", {}).items()
    return {name: t for name, t in named if isinstance(t, Tensor)}


def are_probabilities(out: Tensor) -> bool:
    """Whether outputs (B, classes) are probabilities: not negative, and each row's sum is one."""
    if out.ndim != 2 or out.shape[1] < 2 or not out.is_floating_point():
        return False
    whole = out.float()
    return bool((whole >= 0).all() and ((whole.sum(1) - 1).abs() < 1e-3).all())
