"""Copying the modules of a model while sharing its tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import InputError
from .quirks import caches, derived

__all__ = [
    "deep_copy",
    "forward_hooks",
    "leave_inference_mode",
    "ordinary",
    "share_structure",
    "tied_parameters",
]


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was created in inference mode and cannot be part of a graph."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def leave_inference_mode(model: nn.Module) -> None:
    """Replace a module's tensors that were created in inference mode; tied tensors stay tied."""
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


def forward_hooks(model: nn.Module) -> list[tuple[dict[int, Any], int, object]]:
    """Each forward hook's dict, its key there, and the object if it is a method, otherwise None."""
    return [
        (hooks, key, getattr(getattr(hook, "func", hook), "__self__", None))
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
    ]


_Model = TypeVar("_Model", bound=nn.Module)


def deep_copy(model: _Model, memo: Mapping[int, object]) -> _Model:
    """``copy.deepcopy``, except that attributes that cannot be copied, such as locks, are shared.

    Args:
        model: the module to copy.
        memo: objects to use instead of copies, by the id of the original.
    """
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:  # a class that is not designed to be copied may raise any error
        shared = dict(memo)
    torchs = vars(nn.Module())  # parameters, modules and hooks are always copied
    for module in model.modules():
        own = [value for name, value in vars(module).items() if name not in torchs]
        for value in tree_leaves(own):
            if isinstance(value, (nn.Module, Tensor)):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                shared[id(value)] = value
    return copy.deepcopy(model, shared)


def share_structure(model: nn.Module, drop: type | None = None) -> nn.Module:
    """Copy the modules of ``model``, sharing the storage of every tensor.

    Tensors created in inference mode are copied, because they cannot be differentiated. Hooks are
    shared unless they are methods of a module that is copied.

    Args:
        model: the user's model, or the one inside an adapter.
        drop: class whose methods are removed from the hooks if their object is not in ``model``.

    Raises:
        InputError: ``copy.deepcopy`` returns a module itself instead of a copy.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        # A separate Parameter object, so that `.to()` does not change the user's.
        memo[id(parameter)] = nn.Parameter(ordinary(parameter.detach()), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = ordinary(buffer.detach())
    # A cache may contain tensors of a graph, which cannot be copied.
    memo |= {id(cache): {} for cache in caches(model)}
    # So may the tensors that a hook computes before every forward pass.
    memo |= {id(t): ordinary(t.detach()) for _, _, t in derived(model)}
    inside = {id(module) for module in model.modules()}
    kept = [hooks[key] for hooks, key, owner in forward_hooks(model) if id(owner) not in inside]
    memo |= {id(hook): hook for hook in kept}
    copied = deep_copy(model, memo)
    if same := next((m for m in copied.modules() if id(m) in inside), None):
        raise InputError(
            f"copy.deepcopy returns the same {type(same).__name__}, so an adapter would change "
            "your model; let that class's __deepcopy__ create a new object, or remove it"
        )
    leave_inference_mode(copied)  # tensors that are plain attributes
    own = {id(module) for module in copied.modules()}
    for hooks, key, owner in forward_hooks(copied):
        if drop and isinstance(owner, drop) and id(owner) not in own:
            del hooks[key]
    return copied


def tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """The other names of each tied parameter, by its first name.

    Parameters of a module that is registered in several places are not tied.
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
