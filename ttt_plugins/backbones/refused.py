"""Models that cannot be wrapped or cannot be adapted, recognised by their layers."""

from __future__ import annotations

import re
from itertools import chain

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import InputError

__all__ = ["check_adaptable", "check_wrappable"]

#: Modules of quantized layers; those of quantization-aware training are differentiable.
_QUANTIZED = re.compile(r"torch\.(ao\.)?nn\.(intrinsic\.)?quantized(\.|$)")

#: Wrappers that split batches or weights among devices; some are not importable everywhere.
_REPLICAS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SHARDS = ("FullyShardedDataParallel", "DeepSpeedEngine")


def check_wrappable(model: nn.Module) -> None:
    """Raise `InputError` for TorchScript, replicas on several devices, and unset lazy layers."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "a TorchScript module runs with its own parameters only: wrap the Python module that "
            "it was made from"
        )
    for name, module in model.named_modules():
        if isinstance(module, _REPLICAS) or type(module).__name__ in _SHARDS:
            raise InputError(
                f"{name or 'the model'} is a {type(module).__name__}, which runs copies of its "
                "module on several devices: wrap the module inside it (.module), one adapter a "
                "process"
            )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(
                f"{name} of {type(model).__name__} is not initialised yet (a lazy layer): pass a "
                "batch of images through the model before wrapping it"
            )


def check_adaptable(model: nn.Module) -> None:
    """Raise `InputError` if gradients cannot pass through a layer, or the model has no layers."""
    for name, module in model.named_modules():
        kind = type(module)
        if _QUANTIZED.match(kind.__module__):
            raise InputError(
                f"{name or 'the model'} is a quantized {kind.__name__}, through which no gradient "
                "passes: adapt the model before quantizing it, and quantize what export() returns"
            )
        if isinstance(module, torch.fx.GraphModule) and any(
            isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
        ):
            raise InputError(
                f"{name or 'the model'} is the module of an exported program, whose layers have "
                "become operations of a graph: adapt the module that was exported"
            )
