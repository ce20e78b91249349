"""Which tensors of a backbone adapt, and the flat vector an update rule sees them as.

An adapted tensor is either a parameter of the model (``"model.<name>"``), or one factor of a
low-rank change to one (``"lora.<name>.A"`` and ``".B"``). `call` runs the backbone on them.

Adapted tensors are of single precision at least, because usual steps are smaller than the distance
between neighbouring numbers in half precision. `call` casts them to the dtype of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..backbones.backbone import Backbone
from ..backbones.norms import norm_parameters
from ..backbones.stages import classifier_names
from ..errors import InputError
from ..utils.precision import single, single_dtype

__all__ = [
    "call",
    "flatten",
    "gradients",
    "materialise",
    "moved",
    "no_recomputation",
    "parameters",
    "select",
    "unflatten",
]

_PREFIX = "model."  # Backbone keeps the user's model under this name
_LORA = "lora."

#: Rank of low-rank changes where a method has no field of its own for it.
LORA_RANK = 4


def select(
    backbone: Backbone,
    params: str | Collection[str],
    eligible: Collection[str] | None = None,
) -> list[str]:
    """Names (relative to the user's model) of the parameters that adapt.

    Args:
        backbone: the classifier.
        params: ``"norm"`` (affine parameters of norm-like layers; in networks without norms the
            gains of their convolutions), ``"all"`` (every floating-point parameter), ``"lora"``
            (weights of linear layers and 1x1 convolutions, the classifier's left out), a regular
            expression searched in the names, or a collection of names.
        eligible: the method's own limits, names outside it are left out; None for no limits.

    Raises:
        InputError: nothing was selected, a name does not exist or is outside the method's limits,
            or the expression is malformed.
    """
    named = [n for n, p in backbone.model.named_parameters() if p.is_floating_point()]
    limits = None if eligible is None else set(eligible)
    if isinstance(params, str):
        chosen = _described(backbone.model, params, named)
        chosen = chosen if limits is None else chosen & limits
    else:
        chosen = _listed(params, named, limits)
    names = [n for n in named if n in chosen]
    if not names:
        known = [n for n in named if limits is None or n in limits]
        why = ""
        if params == "norm" and not norm_parameters(backbone.model):
            why = " (its norm layers are frozen or have no affine parameters)"
            if not backbone.has_batch_norm and not backbone.fixed_norms:
                why = " (it has no norm layers)"
        raise InputError(
            f"params={params!r} selects nothing in {type(backbone.model).__name__}{why}; pass "
            f"params='all', a regular expression or names, such as {known[:3]}"
        )
    return names


def _described(model: nn.Module, params: str, named: list[str]) -> set[str]:
    """What a word or a regular expression selects."""
    if params == "norm":
        return {n for names in norm_parameters(model).values() for n in names}
    if params == "all":
        return set(named)
    if params == "lora":
        return _matrices(model)
    try:
        pattern = re.compile(params)
    except re.error as error:
        raise InputError(
            f"params={params!r} is neither 'norm', 'all' nor 'lora' nor a regular "
            f"expression ({error})"
        ) from error
    return {n for n in named if pattern.search(n)}


def _listed(params: Collection[str], named: list[str], limits: set[str] | None) -> set[str]:
    """The given names, if the model has them and the method adapts them."""
    try:
        chosen = set(params)
    except TypeError as error:
        raise InputError(f"params must be a string or names, got {params!r}") from error
    if not all(isinstance(n, str) for n in chosen):
        raise InputError(f"params must be a string or names, got {params!r}")
    if unknown := sorted(chosen - set(named)):
        raise InputError(
            f"params: the model has no floating-point parameter {unknown[0]!r}; its first ones "
            f"are {named[:5]}"
        )
    if limits is not None and (outside := sorted(chosen - limits)):
        raise InputError(
            f"params: {outside[0]!r} lies outside what this method adapts; the first it can "
            f"are {[n for n in named if n in limits][:5]}"
        )
    return chosen


def _matrices(model: nn.Module) -> set[str]:
    """Weights of linear layers and ungrouped 1x1 convolutions, but the classifier's."""
    try:
        classifiers = classifier_names(model)
    except InputError:
        classifiers = []
    return {
        f"{name}.weight"
        for name, m in model.named_modules()
        if name not in classifiers
        and (
            isinstance(m, nn.Linear)
            or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1)
        )
    }


def parameters(
    backbone: Backbone, names: Collection[str], lora_rank: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """The tensors that adapt, at their start, under the names `call` wants.

    The backbone's own tensors, not copied, or in float32 where they are of half precision; or, with
    ``lora_rank``, the two factors of a change to each: A (rank, inputs) drawn from ``seed``, B
    (outputs, rank) zero, so that the start is the model itself.
    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1.
    """
    named = dict(backbone.model.named_parameters())
    if not lora_rank:
        return {_PREFIX + n: single(named[n].detach()) for n in names}
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in names:
        rows, columns = named[name].shape[:2]
        rank = min(lora_rank, rows, columns)
        a = torch.randn(rank, columns, generator=generator) / columns**0.5
        like = single(named[name].detach())
        factors[f"{_LORA}{name}.A"] = a.to(like)
        factors[f"{_LORA}{name}.B"] = like.new_zeros(rows, rank)
    return factors


def materialise(backbone: Backbone, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapted tensors -> the model's parameters that differ from its own, by their full names.

    They keep the precision in which they adapt, float32 for a model in half precision.
    """
    whole = {n: t for n, t in params.items() if n.startswith(_PREFIX)}
    factors = [n.removesuffix(".A") for n in params if n.startswith(_LORA) and n.endswith(".A")]
    if factors:
        named = dict(backbone.model.named_parameters())
        for factor in factors:
            name = factor.removeprefix(_LORA)
            change = params[f"{factor}.B"] @ params[f"{factor}.A"]
            weight = named[name].detach()
            whole[_PREFIX + name] = weight + change.view(weight.shape)
    return whole


_RECOMPUTED = (
    "the model saves memory by computing activations twice (torch.utils.checkpoint); the second "
    "time it would do so with the source's parameters, not with the adapted ones: switch that off"
)


@contextmanager
def no_recomputation() -> Iterator[None]:
    """Refuse models that would silently give the gradient of other parameters.

    `call` lends a model its parameters for the forward pass; what is computed again during the
    backward pass finds the model's own.

    Raises:
        InputError: on leaving, the model did so.
    """
    with ExitStack() as stack:
        # A caller's own hooks on saved tensors, say to keep them elsewhere, are no recomputation.
        with suppress(RuntimeError):
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTED))
        try:
            yield
        except RuntimeError as error:
            if _RECOMPUTED in str(error) or "torch.utils.checkpoint" in str(error):
                raise InputError(_RECOMPUTED) from error
            raise


def gradients(
    loss: Tensor, leaves: Mapping[str, Tensor], create_graph: bool = False
) -> dict[str, Tensor]:
    """The gradient of a loss () for each tensor, zero where the loss does not depend on one.

    Raises:
        InputError: it depends on none of the model's (a self-supervised head may adapt as well).
    """
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if loss.requires_grad:
        tensors = list(leaves.values())
        found = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True)
    own = [name.startswith((_PREFIX, _LORA)) for name in leaves]
    reached = [mine and grad is not None for mine, grad in zip(own, found, strict=True)]
    if any(own) and not any(reached):
        raise InputError(
            "no gradient reaches the parameters that adapt: the model computes its logits without "
            "a graph (torch.no_grad, detach) or without these parameters; choose others by params="
        )
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def call(
    backbone: Backbone,
    params: Mapping[str, Tensor],
    images: Tensor,
    pooled: bool = False,
    replaced: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The backbone's logits (B, classes), or pooled features (B, D), at ``params``.

    Args:
        backbone: the classifier.
        params: adapted tensors; names that are no part of the model are passed over.
        images: (B, C, H, W) in [0, 1].
        pooled: whether to return the features that the classifier sees.
        replaced: parameters and buffers to use whatever ``params`` says, by their names in the
            user's model.
    """
    tensors = materialise(backbone, params)
    tensors |= {_PREFIX + n: t for n, t in (replaced or {}).items()}
    tensors = _in_own_precision(backbone, tensors)
    # functional_call's own ties would put a module's tensors back wrongly where that module is
    # registered in several places: it exchanges them twice and restores the first exchange.
    tensors |= {
        n: tensors[first]
        for first in backbone.tied
        if first in tensors
        for n in backbone.tied[first]
    }
    return functional_call(backbone, tensors, (images, pooled), tie_weights=False)


def _in_own_precision(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their full names, cast to half precision where the model has it."""
    named = dict(backbone.named_parameters(remove_duplicate=False)) | dict(
        backbone.named_buffers(remove_duplicate=False)
    )
    # Any other difference is the caller's choice.
    return {
        n: t.to(named[n].dtype) if n in named and t.dtype == single_dtype(named[n].dtype) else t
        for n, t in tensors.items()
    }


def moved(params: Mapping[str, Tensor], fn: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Adapted tensors after a move or cast ``fn``; a cast to half precision leaves float32."""
    results = {n: fn(t) for n, t in params.items()}
    return {
        n: t if t.dtype == single_dtype(t.dtype) else params[n].to(t.device, single_dtype(t.dtype))
        for n, t in results.items()
    }


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors -> one vector (n,) of at least single precision, in the mapping's order.

    In half precision the rules' squared gradients would underflow or overflow.
    """
    return single(torch.cat([t.reshape(-1) for t in tensors.values()]))


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One vector (n,) -> views of it, shaped and named as ``like``."""
    parts = vector.split([t.numel() for t in like.values()])
    return {name: part.view_as(t) for (name, t), part in zip(like.items(), parts, strict=True)}
