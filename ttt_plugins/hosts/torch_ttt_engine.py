"""The base class of the engines in `ttt_plugins.hosts.torch_ttt`.

torch-ttt's own engines copy themselves in every call and adapt the copy. These engines copy
nothing: the adapter shares the model's weights and never changes them, but runs the model with
adapted tensors in their place.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..core.registry import configure
from ..errors import InputError
from ..wrapping import wrap
from .torch_ttt_import import BaseEngine

__all__ = ["Engine"]


class Engine(BaseEngine):
    """Base of the engines; images are (B, C, H, W) in [0, 1].

    After ``train()`` a call returns logits and loss with a graph, for a training loop over
    ``parameters()``, which include everything that the method learns. After ``eval()`` it returns
    the adapter's logits and loss, even under ``no_grad``. The stream restarts at the source when a
    weight or a setting has changed. A copied or unpickled engine continues its original's stream,
    and an engine that loads a state dict equal to its own continues its stream.

    Of torch-ttt's ``optimization_parameters`` these are supported: ``num_steps`` (0 means no
    adaptation); ``copy_model``, True to start every call at the source, False to keep what was
    learned in earlier calls; and ``optimizer_name``, which has no effect and causes a warning,
    because each method has its own update rule. All others are fields of the method's config.

    Args:
        model: the classifier.
        optimization_parameters: see above; they may be changed later.
        tensors: tensors that the method learned beforehand; by default untrained heads, and for
            MGG a bundled optimizer.
        options: mean, std, normalize and seed as for `ttt_plugins.wrap`, and the config's fields.

    Raises:
        InputError: the method does not have a field, or the images have another shape or range.
    """

    method = ""
    #: Settings with which calls keep what was learned; None for a method that never does.
    kept: ClassVar[Mapping[str, Any] | None] = None

    def __init__(self, model: nn.Module, optimization_parameters=None, *, tensors=None, **options):
        super().__init__()
        self.model, self.optimization_parameters = model, optimization_parameters or {}
        fresh = self.fresh_heads(model, options) if tensors is None else None
        net = wrap(model, self.method, tensors=tensors or fresh, **options)
        self.config = net.config
        fields = {f.name for f in dataclasses.fields(self.config)}
        self._options = {k: v for k, v in options.items() if k not in fields}
        self.heads = nn.Module()
        for name, tensor in net.learned_tensors().items():
            slashed = name.replace(".", "/")  # PyTorch does not allow dots in names
            if "running_" in name or name.startswith("source."):
                self.heads.register_buffer(slashed, tensor)
            else:
                self.heads.register_parameter(slashed, nn.Parameter(tensor))
        self._untrained = _marks(self.heads) if fresh else None
        # In containers, so that adapters, which share the model, are not registered as submodules.
        self._adapting: list[Any] = [None, None]
        self._training: list[Any] = [None, None]
        self._resumed: tuple[Any, dict[str, Tensor]] | None = None
        self.number, self.sequence = 0, None

    def fresh_heads(self, model: nn.Module, options: dict[str, Any]) -> dict[str, Tensor] | None:
        """Heads to train, by their names in artifacts; None if `wrap` supplies its own."""

    def step(self, net: Adapter, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss of one training step, with their graph."""
        raise NotImplementedError

    def learned(self) -> dict[str, Tensor]:
        """The heads by their names in artifacts, for ``tensors`` of `ttt_plugins.wrap`."""
        return {n.replace("/", "."): t for n, t in _tensors(self.heads).items()}

    def adapter(self) -> Adapter:
        """The adapter with the current weights and settings, at its position in the stream."""
        key = _marks(self), self._settings()
        net = self._hold(self._adapting, key)
        if self._resumed is not None:
            (resumed, state), self._resumed = self._resumed, None
            if resumed == key:
                net.load_adaptation_state(state)
        return net

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to logits (B, classes) and a scalar loss."""
        if self.training:
            return self.ttt_forward(inputs)
        if self._untrained is not None and self._untrained == _marks(self.heads):
            warnings.warn(f"{self.method}: the self-supervised head is untrained", stacklevel=3)
        net = self.adapter()
        if self.optimization_parameters.get("copy_model", False):
            net.reset()
        repeats = self.optimization_parameters.get("num_steps", 1)
        if hasattr(self.config, "steps"):
            repeats = 1  # the adapter takes all its steps within one call
        logits = net(inputs)
        for _ in range(repeats - 1):
            logits = net(inputs)
        return logits, logits.new_zeros(()) if net.loss is None else net.loss

    def ttt_forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss to differentiate, as in train mode, whichever mode is set."""
        settings = {k: v for k, v in self._settings().items() if k != "steps"}
        if hasattr(self.config, "copies"):
            settings["copies"] = (
                1  # one view per image and step, because the batch has other images
            )
        # Changed values need no new adapter: it shares the weights, and `step` passes the heads.
        addresses = [address for address, _ in _marks(self)]
        net = self._hold(self._training, (addresses, settings))
        net.check_images(inputs)
        self.number += 1
        return self.step(net, inputs)

    def reset(self) -> None:
        """Return to the source; the next batch starts a stream, or a sequence in MGG's training."""
        self._adapting, self._resumed, self.sequence = [None, None], None, None

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state dict as in PyTorch; one that changes no value does not reset the stream."""
        own = self.state_dict()
        unchanged = own.keys() == state_dict.keys() and all(
            t.dtype == state_dict[n].dtype and torch.equal(t, state_dict[n].to(t.device))
            for n, t in own.items()
        )
        self._drop_outdated()
        loaded = super().load_state_dict(state_dict, *args, **kwargs)
        if unchanged:
            self._update_marks()
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        """The state without adapters, which share the engine's weights; streams become tensors."""
        self._drop_outdated()
        state = self.__dict__ | {"_adapting": [None, None], "_training": [None, None]}
        key, net = self._adapting
        return state if net is None else state | {"_resumed": (key, net.adaptation_state())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, whose tensors are now at other addresses."""
        super().__setstate__(state)
        self._update_marks()

    def _drop_outdated(self) -> None:
        """Drop what was recorded for weights whose values have changed."""
        marks = _marks(self)
        if self._adapting[0] is not None and self._adapting[0][0] != marks:
            self._adapting = [None, None]
        if self._resumed is not None and self._resumed[0][0] != marks:
            self._resumed = None
        if self._untrained != _marks(self.heads):
            self._untrained = None

    def _update_marks(self) -> None:
        """Update the records for the weights' current addresses and versions."""
        marks = _marks(self)
        if self._adapting[0] is not None:
            self._adapting[0] = marks, self._adapting[0][1]
        if self._resumed is not None:
            (_, settings), stream = self._resumed
            self._resumed = (marks, settings), stream
        if self._untrained is not None:
            self._untrained = _marks(self.heads)

    def _settings(self) -> dict[str, Any]:
        """Fields of the method's config that ``optimization_parameters`` set."""
        fields = dict(self.optimization_parameters)
        steps = fields.pop("num_steps", None)
        if steps is not None and (steps == 0 or hasattr(self.config, "steps")):
            fields["steps"] = steps
        if fields.pop("optimizer_name", None) is not None:
            warnings.warn(
                f"optimizer_name has no effect: the update rule is {self.method}'s own",
                stacklevel=4,
            )
        if not fields.pop("copy_model", True):
            if self.kept is None:
                raise InputError(
                    f"copy_model=False keeps what was learned, but {self.method} always forgets: "
                    "leave copy_model out or set it to True"
                )
            fields = {**self.kept, **fields}
        return fields

    def _hold(self, cache: list, key: tuple[list, dict[str, Any]]) -> Adapter:
        """The adapter in ``cache`` if it has these weights and settings, otherwise a new one."""
        if cache[0] != key:
            settings = key[1]
            plain = settings.get("steps") == 0
            config = "source" if plain else configure(self.config, settings)
            learned = None if plain else {n: t.detach() for n, t in self.learned().items()}
            cache[:] = key, wrap(self.model, config, tensors=learned, **self._options)
        return cache[1]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _marks(module: nn.Module) -> list[tuple[int, int]]:
    """Addresses and versions of the tensors, which differ if values may have changed."""
    with torch.inference_mode(False):
        return [(t.data_ptr(), t._version) for t in _tensors(module).values()]
