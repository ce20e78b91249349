"""A network's stages, classifier, pooled features, and where its trunk ends."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = [
    "classifier_names",
    "describe_split",
    "feature_width",
    "image_size",
    "inner",
    "input_channels",
    "pooled_features",
    "stages",
    "trunk",
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


# -- classifier and pooled features ------------------------------------------------------------
def image_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) that a network with position embeddings was made for, None if it does not say.

    It need not be ``pretrained_cfg``'s: ``timm.create_model(name, img_size=64)``. torchvision's
    networks have ``image_size``, a side.
    """
    for module in (model, *model.children()):
        size = getattr(module, "img_size", None) or getattr(module, "image_size", None)
        size = (size, size) if isinstance(size, int) else size
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
            f"{type(model).__name__} has no linear layer before its logits, so its pooled "
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


def feature_width(model: nn.Module) -> int | None:
    """D of the pooled features, None where the classifier does not tell."""
    size = getattr(model, "head_hidden_size", None)
    if _has_pooling(model) and isinstance(size, int):
        return size
    widths = []
    for name in classifier_names(model):
        weight = getattr(model.get_submodule(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            return None
        widths.append(weight.shape[1])
    return widths[0] if _has_pooling(model) else sum(widths)


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
        network: Any = model  # timm's, whose methods torch's stubs do not know
        return _flat(network.forward_head(network.forward_features(x), pre_logits=True))
    seen: dict[str, Tensor] = {}
    names = classifier_names(model)

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0]

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in names
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
        model: the user's, or a wrapper of it.
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
