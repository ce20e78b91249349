"""A network's norm layers: which there are, which adapt, and whose features are compared.

Everything here asks a module what it is (its class, its parameters, timm's ``feature_info``);
nothing asks for a model by name.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from .stages import _listed_stages, _sized

__all__ = [
    "batch_norms",
    "channel_axis",
    "channels",
    "fixed_norms",
    "gain_modules",
    "late_norms",
    "named_late_norms",
    "norm_modules",
    "norm_parameters",
    "tapped_modules",
]

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
#: Norms that take channels first whatever their shape.
_CHANNELS_FIRST = (*BATCH_NORMS, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_CHANNELS_FIRST += _CONVOLUTIONS
#: Norms whose class says so, whatever their parameters look like.
_NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_NORM_NAME = re.compile(r"norm|affine|^(bn|frn|gn|grn|ln|rms)(\dd)?$", re.IGNORECASE)


# -- norm layers -------------------------------------------------------------------------------


def _one_axis(tensor: Tensor) -> bool:
    return tensor.numel() == max(tensor.shape, default=1)


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Norm-like modules that own affine parameters, by name, in registration order.

    Chosen by what a module is: its class is called a norm (or an affine layer that stands in for
    one), no module inside it has parameters, and each of its own varies along a single axis
    (PyTorch's own LayerNorm may normalise over several).
    """
    found = {}
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not own or any(_sized(child) for child in module.children()):
            continue
        called = _NORM_NAME.search(type(module).__name__) and all(_one_axis(p) for p in own)
        if called or isinstance(module, _NORMS):
            found[name] = module
    return found


def gain_modules(model: nn.Module) -> dict[str, list[str]]:
    """Convolutions with a gain for each output channel beside weight and bias: which parameters.

    The weight-standardised convolutions of NF-nets have them where others have a norm.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            gains = [
                n
                for n, p in module._parameters.items()
                if n not in ("weight", "bias")
                and p is not None
                and _one_axis(p)
                and p.numel() == module.out_channels
            ]
            if gains:
                found[name] = gains
    return found


def norm_parameters(model: nn.Module) -> dict[str, list[str]]:
    """What adapts as ``"norm"``: module name -> full names of its parameters, in order.

    The norms' affine parameters; the gains of convolutions in networks without any.
    """
    own = {
        name: [n for n, p in module._parameters.items() if p is not None]
        for name, module in norm_modules(model).items()
    } or gain_modules(model)
    return {m: [f"{m}.{n}" if m else n for n in names] for m, names in own.items()}


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm layers (timm's fused norm-activations too) that carry running statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    }


def fixed_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Other layers with running statistics: frozen BatchNorm, EvoNorm B. They always use those."""
    chosen = batch_norms(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name not in chosen and module._buffers.get("running_var") is not None
    }


def late_norms(model: nn.Module) -> set[str]:
    """Names of the norms in the last quarter of the stages or blocks, and of all after them.

    For a ViT with 12 blocks these are blocks 9-11 and the final norm, for a ResNet layer4: what
    SAR leaves out. Models without timm's ``feature_info`` lose the last quarter of their norms.
    """
    norms = list(norm_parameters(model))
    listed = _listed_stages(model)
    if listed:
        first = listed[-max(1, len(listed) // 4)] + "."
        for position, name in enumerate(norms):
            if position and name.startswith(first):
                return set(norms[position:])
    return set(norms[len(norms) - len(norms) // 4 :])


def named_late_norms(model: nn.Module) -> set[str]:
    """Names of the norms that SAR's released code leaves out, by their names alone."""
    parts = ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm.")
    return {n for n in norm_parameters(model) if n == "norm" or any(part in n for part in parts)}


def tapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose features are compared with the source (MGTTA, arXiv 2412.16901).

    Block transformers: the first norm of every block but the first, and the final norm, as MGTTA
    has it. Everything else: three norms, a third, two thirds and all of the way through (BatchNorms
    where there are any, because each carries its source statistics). Reading the features of all
    would cost a good part of a step, and a step of MGG may cost no more than one of Tent. Networks
    without norms: three convolutions instead.
    """
    layers = batch_norms(model)
    if not layers:
        # A norm of a single scalar does not say how many channels it sees.
        layers = {n: m for n, m in norm_modules(model).items() if channels(m) > 1}
        starts = [n for n in layers if re.fullmatch(r"(.*\.)?blocks\.\d+\.norm1", n)]
        if len(starts) > 1:
            after = list(layers)[list(layers).index(starts[-1]) + 1 :]
            final = [n for n in after if "blocks." not in n]
            return {n: layers[n] for n in (*starts[1:], *final)}
    if not layers:
        named = dict(model.named_modules())
        layers = {n: named[n] for n in gain_modules(model)} or {
            n: m for n, m in named.items() if isinstance(m, _CONVOLUTIONS)
        }
    names = list(layers)
    places = {round(i * (len(names) - 1) / 3) for i in (1, 2, 3)} if names else set()
    return {n: layers[n] for i, n in enumerate(names) if i in places}


def channels(module: nn.Module) -> int:
    """How many channels a norm or convolution puts out."""
    for attribute in ("num_features", "num_channels", "out_channels"):
        if isinstance(size := getattr(module, attribute, None), int):
            return size
    if isinstance(shape := getattr(module, "normalized_shape", None), tuple) and shape:
        return shape[0]
    return max((p.numel() for p in module.parameters()), default=0)


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """Which axis of a norm's or convolution's output ``x`` holds its channels.

    Told by the kind of the layer, else by which axis has as many entries as there are channels,
    else (a map as wide as deep) by what the layer is called: the norms for NCHW maps end in "2d".
    """
    if isinstance(module, _CHANNELS_FIRST) or x.ndim == 2:
        return 1
    if isinstance(axis := getattr(module, "channel_dim", None), int):
        return axis % x.ndim
    shape = getattr(module, "normalized_shape", ())
    if isinstance(shape, tuple) and len(shape) > 1:
        return x.ndim - len(shape)
    size = channels(module)
    if (x.shape[1] == size) != (x.shape[-1] == size):
        return 1 if x.shape[1] == size else x.ndim - 1
    return 1 if "2d" in type(module).__name__ else x.ndim - 1
