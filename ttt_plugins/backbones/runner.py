"""The copy of a model that forward passes run on, so that none leaves a trace on the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .quirks import caches, derived
from .stages import pooled_features

__all__ = ["Leftovers", "Runner"]


class Leftovers:
    """What modules keep from a forward pass and the next pass, with other tensors, must not see."""

    def __init__(self, model: nn.Module):
        self._caches, self._derived = caches(model), derived(model)

    def remove(self) -> None:
        """Drop them; tensors that hooks computed are put back as they were."""
        for cache in self._caches:
            cache.clear()
        for module, name, tensor in self._derived:
            setattr(module, name, tensor)


class Runner(nn.Module):
    """A structural copy of a model, on which forward passes are made.

    Args:
        model: the copy.
        written: names of the parameters and buffers that the model writes in a forward pass, each
            of which is copied for every pass. None if they are unknown: then all are copied, and
            `written` becomes the names of those that a pass changes.
    """

    def __init__(self, model: nn.Module, written: tuple[str, ...] | None):
        super().__init__()
        self.model, self.written = model, written
        #: Keys of the hooks of the model that this is a copy of.
        self.hooks: list[int] = []
        self._leftovers = Leftovers(model)
        self._places: dict[str, tuple[dict[str, Any], str]] = {
            f"{prefix}.{key}" if prefix else key: (held, key)
            for prefix, module in (model.named_modules() if written != () else ())
            for held in (module._parameters, module._buffers)
            for key, tensor in held.items()
            if tensor is not None and tensor.layout is torch.strided
        }
        if written is not None:
            self._places = {n: place for n, place in self._places.items() if n in written}

    def forward(self, x: Tensor, pooled: bool) -> Any:
        """The model's output for normalised images, or its pooled features."""
        given = {n: held[key] for n, (held, key) in self._places.items()}
        # By identity, because a tensor may be registered in several places.
        own = {id(t): _copied(t) for t in given.values()}
        try:
            for name, (held, key) in self._places.items():
                held[key] = own[id(given[name])]
            out = pooled_features(self.model, x) if pooled else self.model(x)
            if self.written is None:
                self._compare(given, own)
            return out
        finally:
            for name, (held, key) in self._places.items():
                held[key] = given[name]
            self._leftovers.remove()

    def _compare(self, given: dict[str, Tensor], own: dict[int, Tensor]) -> None:
        """Record which tensors a pass on copies has written or replaced."""
        self.written = tuple(
            name
            for name, (held, key) in self._places.items()
            if held.get(key) is not own[id(given[name])]
            or not torch.equal(given[name], own[id(given[name])])
        )


def _copied(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        return nn.Parameter(tensor.detach().clone(), requires_grad=False)
    return tensor.clone()
