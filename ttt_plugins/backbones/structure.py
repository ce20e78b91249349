"""What a network is made of: its norm layers, stages, classifier and pooled features.

Everything here asks a module what it is (its class, its parameters, timm's ``feature_info``);
nothing asks for a model by name.
"""

from __future__ import annotations

import copy
import inspect
import re

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = [
    "batch_norms",
    "biased_attention",
    "caches",
    "channel_axis",
    "channels",
    "classifier_name",
    "classifier_names",
    "describe_split",
    "feature_width",
    "fixed_norms",
    "gain_modules",
    "image_size",
    "inner",
    "late_norms",
    "norm_modules",
    "norm_parameters",
    "pooled_features",
    "recurrent",
    "share_structure",
    "stages",
    "tapped_modules",
    "tied_parameters",
    "trunk",
]

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
#: Norms that take channels first whatever their shape.
_CHANNELS_FIRST = (*BATCH_NORMS, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_CHANNELS_FIRST += _CONVOLUTIONS
#: Norms whose class says so, whatever their parameters look like.
_NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_NORM_NAME = re.compile(r"norm|affine|^(bn|frn|gn|grn|ln|rms)(\dd)?$", re.IGNORECASE)


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


def biased_attention(model: nn.Module) -> list[nn.Module]:
    """Attention layers of timm whose fused kernel gets a mask that depends on the queries (SAM).

    PyTorch takes another kernel where the mask needs a gradient, which rounds otherwise.
    """
    return [
        module
        for module in model.modules()
        if getattr(module, "fused_attn", False) and getattr(module, "rel_pos_h", None) is not None
    ]


def recurrent(model: nn.Module) -> bool:
    """Whether it has recurrent layers, which have no batching rule: ``vmap`` cannot run them."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def caches(model: nn.Module) -> list[dict]:
    """Dicts in which modules keep what they computed from parameters in eval mode.

    LeViT and its kin look attention biases up that way, for ever. With other parameters that is
    the wrong value, and of a function's transform (``grad``, ``vmap``) not even a value.
    """
    return [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, dict) and name.endswith("cache") and not name.startswith("_")
    ]


def _sized(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def inner(model: nn.Module) -> tuple[str, nn.Module]:
    """The timm network inside modules that only wrap it, and its name's prefix.

    A wrapper has no parameters of its own and one child that has any, such as
    ``nn.Sequential(normalize, network)``. A model without a timm network inside is returned
    itself, with the prefix ``""``.
    """
    prefix, level = "", model
    while not hasattr(level, "feature_info") and not hasattr(level, "forward_features"):
        sized = [(n, child) for n, child in level.named_children() if _sized(child)]
        if len(sized) != 1 or any(True for _ in level.parameters(recurse=False)):
            return "", model
        prefix, level = f"{prefix}{sized[0][0]}.", sized[0][1]
    return prefix, level


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


def tapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose features are compared with the source (methods.md, section 3).

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


# -- classifier and pooled features ------------------------------------------------------------


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) that a network with position embeddings was made for, None if it does not say.

    It need not be ``pretrained_cfg``'s: ``timm.create_model(name, img_size=64)``.
    """
    for module in (model, *model.children()):
        size = getattr(module, "img_size", None)
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def input_channels(model: nn.Module) -> int:
    """Channels of the images a model takes, by its first convolution."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            return module.in_channels
    return 3


def _makes_logits(module: nn.Module) -> bool:
    pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear) or pointwise


def classifier_names(model: nn.Module) -> list[str]:
    """Names of all modules that turn pooled features into logits, in order.

    More than one in distilled models, in CrossViT (one for each branch) and in ensembles. What
    timm's ``pretrained_cfg`` says, else the last linear layer or 1x1 convolution and, where that
    sits in one of several networks of an ``nn.ModuleList``, its like in the others.

    Raises:
        InputError: there is none.
    """
    modules = dict(model.named_modules())
    prefix, net = inner(model)
    named = (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
    named = [prefix + n for n in ((named,) if isinstance(named, str) else named)]
    named = [n for n in named if n in modules and not isinstance(modules[n], nn.Identity)]
    if named:
        return named
    linear = [name for name, m in modules.items() if _makes_logits(m)]
    if not linear:
        raise InputError(
            f"{type(model).__name__} has no linear layer in front of its logits, so its pooled "
            "features cannot be found"
        )
    last = linear[-1]
    parts = last.split(".")
    for i, part in enumerate(parts):
        members = modules[".".join(parts[:i])]
        if part.isdigit() and isinstance(members, nn.ModuleList) and i + 1 < len(parts):
            like = [".".join([*parts[:i], n, *parts[i + 1 :]]) for n, _ in members.named_children()]
            shape = modules[last].weight.shape
            if all(n in linear and modules[n].weight.shape == shape for n in like):
                return like
    return [last]


def classifier_name(model: nn.Module) -> str:
    """Name of the module that turns pooled features into logits, the first if there are several.

    Raises:
        InputError: there is none.
    """
    return classifier_names(model)[0]


def feature_width(model: nn.Module) -> int | None:
    """D of the pooled features, None where the classifier does not tell."""
    if _has_pooling(model) and isinstance(getattr(model, "head_hidden_size", None), int):
        return model.head_hidden_size
    weights = [getattr(model.get_submodule(n), "weight", None) for n in classifier_names(model)]
    if not all(isinstance(w, Tensor) and w.ndim >= 2 for w in weights):
        return None
    return weights[0].shape[1] if _has_pooling(model) else sum(w.shape[1] for w in weights)


def _has_pooling(model: nn.Module) -> bool:
    """Whether timm's uniform way to pooled features is there."""
    head = getattr(model, "forward_head", None)
    return (
        hasattr(model, "forward_features")
        and head is not None
        and "pre_logits" in inspect.signature(head).parameters
    )


def pooled_features(model: nn.Module, x: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) -> what the classifier sees, (B, D).

    Of several classifiers of an ensemble: what they see side by side.

    Raises:
        InputError: the model has no classifier, or does not use it.
    """
    if _has_pooling(model):
        return _flat(model.forward_head(model.forward_features(x), pre_logits=True))
    seen: dict[str, Tensor] = {}
    names = classifier_names(model)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
        for name in names
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise InputError(f"{type(model).__name__} does not use its last linear layer")
    return torch.cat([_flat(seen[n]) for n in names if n in seen], 1)


def _flat(features: Tensor) -> Tensor:
    """Maps (B, D, H, W) -> their means (B, D); anything else as it is."""
    return features.flatten(2).mean(2) if features.ndim == 4 else features


# -- stages and the trunk ----------------------------------------------------------------------


def _listed_stages(model: nn.Module) -> list[str]:
    """Modules with parameters that timm's ``feature_info`` lists, in order."""
    prefix, net = inner(model)
    info = getattr(net, "feature_info", None)
    named = [e.get("module") for e in info] if isinstance(info, list) else []
    modules = dict(net.named_modules())
    return [prefix + n for n in dict.fromkeys(named) if n and n in modules and _sized(modules[n])]


def stages(model: nn.Module) -> list[str]:
    """Names of the stages or blocks, in order, without the classifier.

    Those of timm's ``feature_info`` that have parameters; else the top-level modules that have,
    looking inside lists of blocks, and inside the only one that is more than a single layer.
    """
    listed = _listed_stages(model)
    if len(listed) > 1:
        return listed
    try:
        heads = tuple(f"{n}." for n in classifier_names(model))
    except InputError:
        heads = ()

    def parts(prefix: str, module: nn.Module) -> dict[str, nn.Module]:
        """Children with parameters that are not only the classifier's."""
        found = {prefix + n: child for n, child in module.named_children()}
        return {
            n: child
            for n, child in found.items()
            if any(not f"{n}.{p}".startswith(heads) for p, _ in child.named_parameters())
        }

    prefix, level = "", model
    while True:
        children = parts(prefix, level)
        nested = {n: m for n, m in children.items() if parts(f"{n}.", m)}
        if len(nested) != 1:
            break
        prefix, level = f"{next(iter(nested))}.", next(iter(nested.values()))
    if not nested:
        return list(children)

    def is_list(name: str, module: nn.Module) -> bool:
        members = parts(f"{name}.", module)
        deep = all(parts(f"{n}.", m) for n, m in members.items())
        return isinstance(module, (nn.ModuleList, nn.Sequential)) and len(members) > 1 and deep

    lists = [n for n, m in nested.items() if is_list(n, m)]
    found = []
    for name, module in nested.items():
        # Several sequences are stages (a ResNet's layers); a single one is a list of blocks.
        opened = name in lists and (isinstance(module, nn.ModuleList) or len(lists) == 1)
        found += parts(f"{name}.", module) if opened else [name]
    return found


def trunk(model: nn.Module, split: int | str) -> tuple[list[str], list[str]]:
    """Names of the parameters before and after a place in the network.

    Modules are taken to run in the order in which they are registered, which holds for all but a
    few networks (Twins and CoaT register all patch embeddings first).

    Args:
        split: how many stages belong to the trunk, counted from the end if negative (``-1``: all
            but the last); the name of the last module that does; or ``"end"``: everything but
            the classifier.

    Returns:
        the trunk's parameters, and those between trunk and logits without the classifier's.

    Raises:
        InputError: there is no such place.
    """
    heads = tuple(f"{n}." for n in classifier_names(model))
    names = [n for n, _ in model.named_parameters() if not n.startswith(heads)]
    if split == "end":
        return names, []
    found = stages(model)
    if isinstance(split, str):
        last = split
        if not any(n.startswith(f"{last}.") for n in names):
            raise InputError(
                f"split={split!r} is neither 'end' nor a module with parameters; the stages are "
                f"{found}"
            )
    else:
        count = len(found)
        if count < 2:
            raise InputError(
                f"split={split!r}: {type(model).__name__} has no stages to split between "
                f"({found}); pass split='end' or a module's name"
            )
        if isinstance(split, bool) or not isinstance(split, int) or not -count < split < count:
            raise InputError(
                f"split must be a number of stages from 1 to {count - 1} (negative: from the "
                f"end), a module's name or 'end', got {split!r}; the stages are {found}"
            )
        if split == 0:
            raise InputError("split=0 leaves no trunk; the smallest is 1")
        last = found[split - 1 if split > 0 else count + split - 1]
    # What follows the split's last one is rest.
    cut = max(i for i, n in enumerate(names) if n.startswith(f"{last}.")) + 1
    return names[:cut], names[cut:]


def describe_split(model: nn.Module, split: int | str) -> str:
    """A line on where the trunk ends and how much lies on either side."""
    named = dict(model.named_parameters())
    before, after = (sum(named[n].numel() for n in names) for names in trunk(model, split))
    if split == "end":
        return f"split: the trunk is everything but {', '.join(classifier_names(model))}"
    found = stages(model)
    last = found[split - 1] if isinstance(split, int) else split
    return (
        f"split: the trunk ends with {last!r} ({before:,} parameters; {after:,} between it and "
        f"the classifier); stages: {', '.join(found)}"
    )
