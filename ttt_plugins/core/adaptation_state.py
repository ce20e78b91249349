"""What a stream's state holds, and what a saved one has to be to be resumed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.precision import single
from .algorithm import Tensors

__all__ = ["describe_tensors", "matching_state"]


def matching_state(expected: Tensors, state: object) -> Tensors:
    """Copies of a saved state's tensors, on the devices and in the order of the expected ones.

    Args:
        expected: an adaptation state of the adapter that is to resume.
        state: a state as `Adapter.adaptation_state` made it, its names in any order. Tensors of
            half precision, from versions that adapted in the model's own, become float32.

    Raises:
        InputError: it belongs to another method, model or parameter choice, or is damaged.
    """
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError("an adaptation state is a dict of tensors")
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
        # In the adapter's order: a rule's flat tensors follow the order of the parameters, and a
        # file may have sorted the names.
        return {n: state[n].detach().clone().to(own.device) for n, own in expected.items()}


def describe_tensors(names: Sequence[str], source: Tensors, state: Tensors) -> tuple[str, str]:
    """Two lines: which scalars adapt, and the memory that the state beside them takes.

    Args:
        names: the parameters that adapt.
        source: the tensors that adapt.
        state: the rule's state.
    """
    scalars = sum(t.numel() for t in source.values())
    bytes_beside, gradients = (
        sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in (state, source)
    )
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"adapts: {scalars:,} scalars in {len(source)} tensors ({shown})",
        f"state: {bytes_beside / 1e6:.2f} MB beside the adapted scalars, whose gradients take "
        f"{gradients / 1e6:.2f} MB during a step",
    )
