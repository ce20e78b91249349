"""Which tensors of a backbone adapt, and the flat vector an update rule sees them as."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .backbone import Backbone, late_norms, norm_modules
from .errors import InputError

__all__ = ["flatten", "select", "unflatten"]

_PREFIX = "model."  # Backbone keeps the user's model under this name


def select(backbone: Backbone, params: str | Collection[str], skip_late: bool = False) -> list[str]:
    """Names (relative to the user's model) of the parameters that adapt.

    Args:
        params: ``"norm"`` (affine parameters of norm-like layers), ``"all"`` (every floating-point
            parameter), a regular expression searched in the names, or a collection of names.
        skip_late: leave out the norms of the last stage or blocks (SAR); with ``"norm"`` only.

    Raises:
        InputError: nothing was selected, a name does not exist, or the expression is malformed.
    """
    named = {n: p for n, p in backbone.model.named_parameters() if p.is_floating_point()}
    if isinstance(params, str):
        if params == "norm":
            late = late_norms(backbone.model) if skip_late else set()
            chosen = {
                f"{module}.{name}" if module else name
                for module, layer in norm_modules(backbone.model).items()
                if module not in late
                for name in layer._parameters
            }
        elif params == "all":
            chosen = set(named)
        else:
            try:
                pattern = re.compile(params)
            except re.error as error:
                raise InputError(
                    f"params={params!r} is neither 'norm' nor 'all' nor a regular expression "
                    f"({error})"
                ) from error
            chosen = {n for n in named if pattern.search(n)}
    else:
        try:
            chosen = set(params)
        except TypeError as error:
            raise InputError(f"params must be a string or names, got {params!r}") from error
        if not all(isinstance(n, str) for n in chosen):
            raise InputError(f"params must be a string or names, got {params!r}")
        if unknown := sorted(chosen - set(named)):
            raise InputError(
                f"params: the model has no floating-point parameter {unknown[0]!r}; its first ones "
                f"are {list(named)[:5]}"
            )
    names = [n for n in named if n in chosen]
    if not names:
        raise InputError(
            f"params={params!r} selects nothing in {type(backbone.model).__name__}; pass "
            f"params='all', a regular expression or names, such as {list(named)[:3]}"
        )
    return names


def parameters(backbone: Backbone, names: Collection[str]) -> dict[str, Tensor]:
    """The backbone's own tensors under the names ``functional_call`` wants, without copying."""
    named = dict(backbone.model.named_parameters())
    return {_PREFIX + n: named[n].detach() for n in names}


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors -> one vector (n,) of at least single precision, in the mapping's order.

    In half precision the rules' squared gradients would underflow.
    """
    vector = torch.cat([t.reshape(-1) for t in tensors.values()])
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One vector (n,) -> views of it, shaped and named as ``like``."""
    parts = vector.split([t.numel() for t in like.values()])
    return {name: part.view_as(t) for (name, t), part in zip(like.items(), parts, strict=True)}
