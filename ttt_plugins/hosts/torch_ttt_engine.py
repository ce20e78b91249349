"""An adapter under torch-ttt's contract; `ttt_plugins.hosts.torch_ttt` has the engines.

torch-ttt's own engines copy themselves in every call and adapt the copy. Here nothing is copied:
the adapter runs the model, whose weights it shares and never writes, on tensors of its own.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..core.registry import configure
from ..wrapping import wrap
from .torch_ttt_import import BaseEngine

__all__ = ["Engine"]


class Engine(BaseEngine):
    """Base of the engines; images are (B, C, H, W) in [0, 1].

    ``train()``: logits and loss with a graph, for a training loop over ``parameters()``, in which
    all that the method learns is from the start. ``eval()``: the adapter's logits and loss, under
    ``no_grad`` too; its stream starts anew when a weight or a setting has changed.

    Args:
        model: the classifier.
        optimization_parameters: fields of the method's config, and ``num_steps`` (0: no
            adaptation); it may be changed later.
        tensors: what the method learned beforehand; unless given, fresh heads, and for MGG a
            bundled optimizer.
        options: mean, std, normalize and seed as for `ttt_plugins.wrap`, and the config's fields.

    Raises:
        InputError: a field that the method does not have, or images of another shape or range.
    """

    method = ""

    def __init__(self, model: nn.Module, optimization_parameters=None, *, tensors=None, **options):
        super().__init__()
        self.model, self.optimization_parameters = model, optimization_parameters or {}
        fresh = self.fresh_heads(model, **options) if tensors is None else None
        net = wrap(model, self.method, tensors=tensors or fresh, **options)
        self.config = net.config
        fields = {f.name for f in dataclasses.fields(self.config)}
        self._options = {k: v for k, v in options.items() if k not in fields}
        self.heads = nn.Module()
        for name, tensor in net.learned_tensors().items():
            slashed = name.replace(".", "/")  # dots are PyTorch's own
            if "running_" in name or name.startswith("source."):
                self.heads.register_buffer(slashed, tensor)
            else:
                self.heads.register_parameter(slashed, nn.Parameter(tensor))
        self._untrained = _marks(self.heads) if fresh else None
        # In containers, so that the adapters' view of the model is no submodule.
        self._adapting, self._training = [None, None], [None, None]
        self.number, self.sequence = 0, None

    def fresh_heads(self, model: nn.Module, **options) -> dict[str, Tensor] | None:
        """Heads to train, by their names in artifacts; None where `wrap` has something better."""
        return None

    def learned(self) -> dict[str, Tensor]:
        """The heads by their names in artifacts, for ``tensors`` of `ttt_plugins.wrap`."""
        return {n.replace("/", "."): t for n, t in _tensors(self.heads).items()}

    def adapter(self) -> Adapter:
        """The adapter of the weights and settings as they are now, in its stream."""
        return self._hold(self._adapting, _marks(self), self._settings())

    def forward(self, inputs: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        """Images -> logits (B, classes) and a scalar loss."""
        if self.training:
            return self.ttt_forward(inputs, **kwargs)
        if self._untrained == _marks(self.heads):
            warnings.warn(f"{self.method}: the self-supervised head is untrained", stacklevel=3)
        net = self.adapter()
        repeats = self.optimization_parameters.get("num_steps", 1)
        for _ in range(1 if hasattr(self.config, "steps") else max(1, repeats)):
            logits = net(inputs)
        return logits, logits.new_zeros(()) if net.loss is None else net.loss

    def ttt_forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As in train mode, whatever the mode: (logits, loss) to differentiate."""
        settings = {k: v for k, v in self._settings().items() if k != "steps"}
        if hasattr(self.config, "copies"):
            settings["copies"] = 1  # of an image in a step; the batch has others
        # Weights that an optimizer wrote need no new adapter here: it shares or is given them.
        places = [place for place, _ in _marks(self)]
        net = self._hold(self._training, places, settings)
        net.check_images(inputs)
        self.number += 1
        return self.step(net, inputs)

    def reset(self) -> None:
        """Back to the source: the next batch begins a stream, or a sequence of MGG's training."""
        self._adapting, self.sequence = [None, None], None

    def _settings(self) -> dict:
        given = dict(self.optimization_parameters)
        steps = given.pop("num_steps", None)
        if steps is not None and (steps == 0 or hasattr(self.config, "steps")):
            given["steps"] = steps
        return given

    def _hold(self, held: list, marks: list, settings: dict) -> Adapter:
        if held[0] != (marks, settings):
            plain = settings.get("steps") == 0
            config = "source" if plain else configure(self.config, settings)
            learned = None if plain else {n: t.detach() for n, t in self.learned().items()}
            net = wrap(self.model, config, tensors=learned, **self._options)
            held[:] = (marks, settings), net
        return held[1]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _marks(module: nn.Module) -> list[tuple[int, int]]:
    """Where the tensors lie and how often they were written: other marks, other values."""
    with torch.inference_mode(False):
        return [(t.data_ptr(), t._version) for t in _tensors(module).values()]
