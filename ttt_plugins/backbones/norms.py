"""The norm layers of a network, those that adapt, and those whose features are compared.

Modules are recognised by their class, their parameters and timm's ``feature_info``, never by the
name of the model.
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
#: Layers whose channels are always the second dimension.
_CHANNELS_FIRST = (*BATCH_NORMS, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_CHANNELS_FIRST += _CONVOLUTIONS
#: Classes that are norms whatever the shapes of their parameters.
_NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_NORM_NAME = re.compile(r"norm|affine|^(bn|frn|gn|grn|ln|rms)(\dd)?$", re.IGNORECASE)


# -- norm layers -------------------------------------------------------------------------------


def _one_axis(tensor: Tensor) -> bool:
    return tensor.numel() == max(tensor.shape, default=1)


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Norm layers with affine parameters, by name, in registration order.

    A module counts as one if the name of its class says norm (or affine, for a layer that replaces
    one), no module inside it has parameters, and each of its own parameters varies along one axis;
    PyTorch's own LayerNorm may normalise over several.
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
    """Convolutions with gains for their output channels -> names of those parameters.

    The weight-standardised convolutions of NF-nets have such gains instead of norms.
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
    """The parameters that adapt with ``params="norm"``: module name -> full parameter names.

    These are the affine parameters of norms or, in networks without norms, gains of convolutions.
    """
    own = {
        name: [n for n, p in module._parameters.items() if p is not None]
        for name, module in norm_modules(model).items()
    } or gain_modules(model)
    return {m: [f"{m}.{n}" if m else n for n in names] for m, names in own.items()}


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm layers with running statistics, including timm's fused norm-activations."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    }


def fixed_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Other layers with running statistics (frozen BatchNorm, EvoNorm B), which always use them."""
    chosen = batch_norms(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name not in chosen and module._buffers.get("running_var") is not None
    }


def late_norms(model: nn.Module) -> set[str]:
    """Names of the norms in the last quarter of the stages or blocks, and of all norms after them.

    SAR excludes them. For a ViT with 12 blocks they are those of blocks 9 to 11 and the final norm,
    for a ResNet those of layer4. For a model without timm's ``feature_info`` they are the last
    quarter of its norms.
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

    In block transformers these are the first norm of every block but the first, and the final norm,
    as in MGTTA. In other networks they are three norms: one third and two thirds of the way through
    the network, and the last (BatchNorms if there are any, because each stores its source
    statistics). Reading the features of all norms would take a considerable part of a step, but a
    step of MGG should cost no more than one of Tent. In networks without norms three convolutions
    are used.
    """
    layers = batch_norms(model)
    if not layers:
        # The number of channels of a norm with a single scalar is unknown.
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
    """Number of output channels of a norm or convolution."""
    for attribute in ("num_features", "num_channels", "out_channels"):
        if isinstance(size := getattr(module, attribute, None), int):
            return size
    if isinstance(shape := getattr(module, "normalized_shape", None), tuple) and shape:
        return shape[0]
    return max((p.numel() for p in module.parameters()), default=0)


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """The axis of the channels in the output ``x`` of a norm or convolution.

    It follows from the class of the layer, or from the size of the axes. If the second and the last
    axis both have as many entries as there are channels, it follows from the name of the class:
    norms for NCHW maps end in "2d".
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
