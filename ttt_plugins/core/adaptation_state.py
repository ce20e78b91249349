"""Checks of a saved adaptation state, and the description of what adapts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.precision import single
from .algorithm import Tensors

__all__ = ["describe_tensors", "matching_state", "parts", "resumed", "saved"]


def saved(
    batches: int, beside: Tensors, params: Tensors | None, rule: Tensors | None
) -> dict[str, Tensor]:
    """Copies of everything that changed since the source, as a flat dict.

    Args:
        batches: batches so far.
        beside: images that wait, a stream's statistics, and what the guard knows.
        params: the adapted tensors; None where nothing adapts.
        rule: the rule's state; None likewise.
    """
    state = {"batches": torch.tensor(batches)} | {n: t.clone() for n, t in beside.items()}
    with torch.inference_mode(False), torch.no_grad():
        state |= {f"params.{n}": t.clone() for n, t in (params or {}).items()}
        state |= {f"rule.{n}": t.clone().contiguous() for n, t in (rule or {}).items()}
    return state


def parts(
    state: object, checks: Mapping[str, Callable[[str, Tensor], None]], device: torch.device
) -> tuple[object, Tensors]:
    """Split a saved state into what every adapter's has, and copies of what is beside it.

    How many images wait, and whether there are statistics of a stream and a guard, differs from
    state to state. States from before there were such things hold none.

    Args:
        state: as `saved` made it.
        checks: for the names that begin with the key, a function of name and tensor that raises
            `InputError` where the tensor belongs to another adapter or is damaged.
        device: where the copies go.

    Raises:
        InputError: a check says so.
    """
    if not isinstance(state, dict):
        return state, {}
    beside = {}
    for name, tensor in state.items():
        prefix = next((p for p in checks if str(name).startswith(p)), None)
        if prefix is not None and isinstance(tensor, Tensor):
            checks[prefix](name, tensor)
            beside[name] = tensor
    rest = {n: t for n, t in state.items() if n not in beside}
    with torch.inference_mode(False):
        return rest, {n: t.detach().clone().to(device) for n, t in beside.items()}


def matching_state(expected: Tensors, state: object) -> Tensors:
    """Copies of a saved state's tensors, on the devices and in the order of the expected ones.

    Args:
        expected: the present adaptation state of the adapter.
        state: a state returned by `Adapter.adaptation_state`, with its names in any order. Tensors
            of half precision, saved by earlier versions, become float32.

    Raises:
        InputError: the state belongs to another method, model or choice of parameters, or is
            damaged.
    """
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError("an adaptation state must be a dict of tensors")
    if differing := sorted(expected.keys() ^ state.keys()):
        raise InputError(
            f"this adaptation state belongs to another adapter: {differing[0]!r} is "
            f"{'missing' if differing[0] in expected else 'unknown here'}"
        )
    halves = (torch.bfloat16, torch.float16)
    state = {n: single(t) if t.dtype in halves else t for n, t in state.items()}
    for name, own in expected.items():
        given = state[name]
        if given.shape != own.shape or given.dtype != own.dtype:
            raise InputError(
                f"this adaptation state belongs to another adapter: {name!r} is "
                f"{given.dtype} {tuple(given.shape)}, expected {own.dtype} {tuple(own.shape)}"
            )
        if name.startswith("params.") and not torch.isfinite(given).all():
            raise InputError(f"this adaptation state is damaged: {name!r} is not finite")
    if state["batches"] < 0:
        raise InputError("this adaptation state is damaged: a negative number of batches")
    with torch.inference_mode(False):
        # In the adapter's order, which a rule's flat tensors follow; a file may have sorted the
        # names.
        return {n: state[n].detach().clone().to(own.device) for n, own in expected.items()}


def resumed(expected: Tensors, state: object) -> tuple[int, Tensors, Tensors]:
    """Batches so far, adapted tensors and the rule's state, as `matching_state` checks them.

    Raises:
        InputError: as for `matching_state`.
    """
    moved = matching_state(expected, state)
    params, rule = (
        {n.removeprefix(prefix): t for n, t in moved.items() if n.startswith(prefix)}
        for prefix in ("params.", "rule.")
    )
    return int(moved["batches"]), params, rule


def describe_tensors(names: Sequence[str], source: Tensors, state: Tensors) -> tuple[str, str]:
    """Two lines on the scalars that adapt, and on the memory of the state.

    Args:
        names: names of the parameters that adapt.
        source: tensors that adapt.
        state: state of the method.
    """
    scalars = sum(t.numel() for t in source.values())
    bytes_beside, gradients = (
        sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in (state, source)
    )
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"adapts: {scalars:,} scalars in {len(source)} tensors ({shown})",
        f"state: {bytes_beside / 1e6:.2f} MB besides the adapted scalars, whose gradients take "
        f"{gradients / 1e6:.2f} MB during a step",
    )
