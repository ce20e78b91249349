"""What a network is made of: its norm layers, stages, classifier and pooled features.

Everything here asks a module what it is (its class, its parameters, timm's ``feature_info``);
nothing asks for a model by name.
"""

from __future__ import annotations

import copy
import re

from torch import Tensor, nn

from .errors import InputError

__all__ = [
    "batch_norms",
    "classifier_name",
    "feature_width",
    "late_norms",
    "norm_modules",
    "pooled_features",
    "share_structure",
    "stages",
    "tapped_norms",
    "trunk",
]

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_NORM_NAME = re.compile(r"norm|affine|evo|filterresponse", re.IGNORECASE)


def share_structure(model: nn.Module) -> nn.Module:
    """Copy the module objects of ``model`` while sharing the storage of every tensor."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        # A Parameter object of its own: `.to()` rebinds our data, not the user's.
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Norm-like modules that own affine parameters, by name, in registration order.

    Chosen by what a module is: its class is called a norm (or an affine layer that stands in for
    one), and each parameter of its own varies along a single axis.
    """
    found = {}
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not own or not _NORM_NAME.search(type(module).__name__):
            continue
        if all(p.numel() == max(p.shape, default=1) for p in own):
            found[name] = module
    return found


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm layers (timm's fused norm-activations too) that carry running statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    }


def late_norms(model: nn.Module) -> set[str]:
    """Names of the norms in the last quarter of the stages or blocks, and of all after them.

    For a ViT with 12 blocks these are blocks 9-11 and the final norm, for a ResNet layer4: what
    SAR leaves out. Models without timm's ``feature_info`` lose the last quarter of their norms.
    """
    norms = list(norm_modules(model))
    info = getattr(model, "feature_info", None)
    stages = [entry["module"] for entry in info] if isinstance(info, list) else []
    if stages:
        first = stages[-max(1, len(stages) // 4)] + "."
        for position, name in enumerate(norms):
            if name.startswith(first):
                return set(norms[position:])
    return set(norms[len(norms) - len(norms) // 4 :])


def tapped_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms whose features are compared with the source (methods.md, section 3).

    Block transformers: the first norm of every block but the first, and the final norm, as MGTTA
    has it. Everything else: four norms evenly spaced from the first to the last (BatchNorms where
    there are any, because each carries its source statistics): reading the features of all would
    cost a good part of a step, and a step of MGG may cost no more than one of Tent.
    """
    norms = batch_norms(model)
    if not norms:
        norms = norm_modules(model)
        starts = [n for n in norms if re.fullmatch(r"(.*\.)?blocks\.\d+\.norm1", n)]
        if len(starts) > 1:
            after = list(norms)[list(norms).index(starts[-1]) + 1 :]
            final = [n for n in after if "blocks." not in n]
            return {n: norms[n] for n in (*starts[1:], *final)}
    names = list(norms)
    places = {round(i * (len(names) - 1) / 3) for i in range(4)} if names else set()
    return {n: norms[n] for i, n in enumerate(names) if i in places}


def input_channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            return module.in_channels
    return 3


def classifier_name(model: nn.Module) -> str:
    """Name of the module that turns pooled features into logits.

    What timm's ``pretrained_cfg`` says, else the last linear layer or 1x1 convolution.

    Raises:
        InputError: there is none.
    """
    modules = dict(model.named_modules())
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    named = named[0] if isinstance(named, (tuple, list)) and named else named
    if named in modules and not isinstance(modules[named], nn.Identity):
        return named
    linear = [
        name
        for name, m in modules.items()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    ]
    if not linear:
        raise InputError(
            f"{type(model).__name__} has no linear layer in front of its logits, so its pooled "
            "features cannot be found"
        )
    return linear[-1]


def feature_width(model: nn.Module) -> int | None:
    """D of the pooled features, None where the classifier does not tell."""
    weight = getattr(model.get_submodule(classifier_name(model)), "weight", None)
    return weight.shape[1] if isinstance(weight, Tensor) and weight.ndim >= 2 else None


def pooled_features(model: nn.Module, x: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) -> what the classifier sees, (B, D)."""
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(x), pre_logits=True)
    seen = []
    classifier = model.get_submodule(classifier_name(model))
    handle = classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(x)
    finally:
        handle.remove()
    if not seen:
        raise InputError(f"{type(model).__name__} does not use its last linear layer")
    features = seen[-1]
    return features.flatten(2).mean(2) if features.ndim == 4 else features


def stages(model: nn.Module) -> list[str]:
    """Names of the stages or blocks, in order.

    Those of timm's ``feature_info`` that have parameters; else the top-level modules that have,
    looking inside when all but one of them are single layers (a container of blocks).
    """
    modules = dict(model.named_modules())
    info = getattr(model, "feature_info", None)
    named = [entry.get("module") for entry in info] if isinstance(info, list) else []
    named = [n for n in dict.fromkeys(named) if n in modules and _sized(modules[n])]
    if len(named) > 1:
        return named
    prefix, level = "", model
    while True:
        children = {n: m for n, m in level.named_children() if _sized(m)}
        nested = [n for n, m in children.items() if any(_sized(c) for c in m.children())]
        if len(nested) != 1:
            return [prefix + n for n in (nested or children)]
        prefix, level = f"{prefix}{nested[0]}.", children[nested[0]]


def _sized(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def trunk(model: nn.Module, split: int | str) -> tuple[list[str], list[str]]:
    """Names of the parameters before and after a place in the network.

    Args:
        split: how many stages belong to the trunk, counted from the end if negative (``-1``: all
            but the last); the name of the last module that does; or ``"end"``: everything but
            the classifier.

    Returns:
        the trunk's parameters, and those between trunk and logits without the classifier's.

    Raises:
        InputError: there is no such place, or nothing would be left on one side of it.
    """
    classifier = classifier_name(model) + "."
    names = [n for n, _ in model.named_parameters() if not n.startswith(classifier)]
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
        if isinstance(split, bool) or not isinstance(split, int) or not -count < split < count:
            raise InputError(
                f"split must be a number of stages from 1 to {count - 1} (negative: from the "
                f"end), a module's name or 'end', got {split!r}; the stages are {found}"
            )
        if split == 0:
            raise InputError("split=0 leaves no trunk; the smallest is 1")
        last = found[split - 1 if split > 0 else count + split - 1]
    # Modules are registered in the order they run in; what follows the split's last one is rest.
    cut = max(i for i, n in enumerate(names) if n.startswith(f"{last}.")) + 1
    return names[:cut], names[cut:]
