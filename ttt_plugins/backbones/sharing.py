"""A copy of a model that shares every tensor with it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .quirks import caches

__all__ = ["leave_inference_mode", "ordinary", "share_structure", "tied_parameters"]


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if it was created in inference mode: no graph takes those."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def leave_inference_mode(model: nn.Module) -> None:
    """Replace a module's tensors that were created in inference mode; ties are kept."""
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        places: Any = (module._parameters, module._buffers, vars(module))
        for held in places:
            for name, tensor in held.items():
                if not isinstance(tensor, Tensor) or not tensor.is_inference():
                    continue
                if id(tensor) not in replaced:
                    new = ordinary(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    replaced[id(tensor)] = new
                held[name] = replaced[id(tensor)]


def share_structure(model: nn.Module) -> nn.Module:
    """Copy the module objects of ``model`` while sharing the storage of every tensor.

    Tensors created in inference mode are copied, because adaptation could not differentiate.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        # A Parameter object of its own: `.to()` rebinds our data, not the user's.
        memo[id(parameter)] = nn.Parameter(ordinary(parameter.detach()), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = ordinary(buffer.detach())
    # A cache may hold tensors of a graph, which cannot be copied.
    memo |= {id(cache): {} for cache in caches(model)}
    copied = copy.deepcopy(model, memo)
    leave_inference_mode(copied)  # further tensors, which are attributes
    return copied


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
