"""The structure of a network: stages, classifier, pooled features and trunk."""

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
    """The timm network inside modules that only wrap it, and the prefix of its names.

    A wrapper has no parameters of its own, and exactly one child with parameters, such as
    ``nn.Sequential(normalize, network)``. If there is no timm network inside, the model itself is
    returned with the prefix ``""``.
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
    """Image size (H, W) of a network with position embeddings, None if it declares none.

    It may differ from ``pretrained_cfg``: ``timm.create_model(name, img_size=64)``. torchvision's
    networks declare ``image_size``, the side of a square.
    """
    for module in (model, *model.children()):
        size = getattr(module, "img_size", None) or getattr(module, "image_size", None)
        size = (size, size) if isinstance(size, int) else size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def input_channels(model: nn.Module) -> int:
    """Number of channels of the images that a model accepts, from its first convolution."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            return module.in_channels
    return 3


def _makes_logits(module: nn.Module) -> bool:
    pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear) or pointwise


def classifier_names(model: nn.Module) -> list[str]:
    """Names of all modules that compute logits from pooled features, in order.

    There are several in distilled models, in CrossViT (one for each branch) and in ensembles. They
    are those of timm's ``pretrained_cfg``, or else the last linear layer or 1x1 convolution and, if
    that is in one of several networks of an ``nn.ModuleList``, the same layer in the others.

    Raises:
        InputError: there is no such module.
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
    """Width D of the pooled features, None if the classifier does not determine it."""
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
    """Whether the model has timm's uniform interface for pooled features."""
    head = getattr(model, "forward_head", None)
    return (
        hasattr(model, "forward_features")
        and head is not None
        and "pre_logits" in inspect.signature(head).parameters
    )


def pooled_features(model: nn.Module, x: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) -> pooled features (B, D), the input of the classifier.

    If there are several classifiers, their inputs are concatenated.

    Raises:
        InputError: the model has no classifier, or does not use it.
    """
    if _has_pooling(model):
        network: Any = model  # torch's stubs do not know the methods of timm's models
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
    """Maps (B, D, H, W) -> their means (B, D); other tensors unchanged."""
    return features.flatten(2).mean(2) if features.ndim == 4 else features


# -- stages and the trunk ----------------------------------------------------------------------
def _listed_stages(model: nn.Module) -> list[str]:
    """Names of the modules in timm's ``feature_info`` that have parameters, in order."""
    prefix, net = inner(model)
    info = getattr(net, "feature_info", None)
    named = [e.get("module") for e in info] if isinstance(info, list) else []
    modules = dict(net.named_modules())
    return [prefix + n for n in dict.fromkeys(named) if n and n in modules and _sized(modules[n])]


def stages(model: nn.Module) -> list[str]:
    """Names of the stages or blocks, in order, without the classifier.

    They are the modules in timm's ``feature_info`` that have parameters, or else the top-level
    modules that have. Of lists of blocks the members are taken, and if only one module is more than
    a single layer, the modules inside it.
    """
    listed = _listed_stages(model)
    if len(listed) > 1:
        return listed
    try:
        heads = tuple(f"{n}." for n in classifier_names(model))
    except InputError:
        heads = ()

    def parts(prefix: str, module: nn.Module) -> dict[str, nn.Module]:
        """Children that have parameters other than the classifier's."""
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
        # Several sequences are stages, such as a ResNet's layers; a single one is a list of blocks.
        opened = name in lists and (isinstance(module, nn.ModuleList) or len(lists) == 1)
        found += parts(f"{name}.", module) if opened else [name]
    return found


def trunk(model: nn.Module, split: int | str) -> tuple[list[str], list[str]]:
    """Split the parameters of a network into those of its trunk and those after it.

    This assumes that modules run in the order in which they are registered, which is true except
    for a few networks (Twins and CoaT register all patch embeddings first).

    Args:
        model: the user's model, or a wrapper of it.
        split: number of stages in the trunk, counted from the end if negative (``-1`` for all but
            the last); or the name of the last module of the trunk; or ``"end"`` for everything
            except the classifier.

    Returns:
        names of the trunk's parameters, and of those between the trunk and the classifier.

    Raises:
        InputError: the network cannot be split there.
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
                f"split must be a number of stages from 1 to {count - 1} (negative to count from "
                f"the end), a module's name or 'end', got {split!r}; the stages are {found}"
            )
        if split == 0:
            raise InputError("split=0 leaves no trunk; the smallest is 1")
        last = found[split - 1 if split > 0 else count + split - 1]
    # Everything after the last parameter of the trunk belongs to the rest.
    cut = max(i for i, n in enumerate(names) if n.startswith(f"{last}.")) + 1
    return names[:cut], names[cut:]


def describe_split(model: nn.Module, split: int | str) -> str:
    """A line on where the trunk ends, and on the number of parameters on either side."""
    named = dict(model.named_parameters())
    before, after = (sum(named[n].numel() for n in names) for names in trunk(model, split))
    if split == "end":
        return f"split: the trunk is everything except {', '.join(classifier_names(model))}"
    found = stages(model)
    last = found[split - 1] if isinstance(split, int) else split
    return (
        f"split: the trunk ends with {last!r} ({before:,} parameters; {after:,} between it and "
        f"the classifier); stages: {', '.join(found)}"
    )
