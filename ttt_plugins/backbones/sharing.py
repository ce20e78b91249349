"""A copy of a model that shares every tensor with it."""

from __future__ import annotations

import copy

from torch import nn

from .quirks import caches

__all__ = ["share_structure", "tied_parameters"]


def share_structure(model: nn.Module) -> nn.Module:
    """Copy the module objects of ``model`` while sharing the storage of every tensor."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        # A Parameter object of its own: `.to()` rebinds our data, not the user's.
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    # A cache may hold tensors of a graph, which cannot be copied.
    memo |= {id(cache): {} for cache in caches(model)}
    return copy.deepcopy(model, memo)


def tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """First name of each tied parameter -> its names in further modules.

    A module that is registered in several places has its parameters once: those are no ties.
    """
    first: dict[int, str] = {}
    seen, tied = set(), {}
    for prefix, module in model.named_modules():
        for own, parameter in module._parameters.items():
            name = f"{prefix}.{own}" if prefix else own
            if parameter is None or (id(module), own) in seen:
                continue
            seen.add((id(module), own))
            start = first.setdefault(id(parameter), name)
            if start != name:
                tied.setdefault(start, []).append(name)
    return tied
