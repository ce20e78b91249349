"""Selecting the tensors that adapt, running a backbone with them, and flattening them.

An adapted tensor is either a parameter of the model (``"model.<name>"``), or a factor of a low-rank
change to a parameter (``"lora.<name>.A"`` and ``".B"``). `call` runs the backbone with them.

Adapted tensors have at least single precision, because usual steps are smaller than the distance
between neighbouring numbers in half precision. `call` casts them to the model's type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from ..backbones.backbone import Backbone
from ..backbones.norms import norm_parameters
from ..backbones.stages import classifier_names
from ..errors import InputError
from ..utils.precision import single, single_dtype

__all__ = [
    "are_few",
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

#: Largest number of scalars in tensors that are joined into one vector; see `are_few`.
_FEW = 1 << 20

#: Rank of low-rank changes if a method does not define one.
LORA_RANK = 4


def select(
    backbone: Backbone,
    params: str | Collection[str],
    eligible: Collection[str] | None = None,
) -> list[str]:
    """Names (relative to the user's model) of the parameters that adapt.

    Args:
        backbone: the classifier.
        params: ``"norm"`` (affine parameters of norm layers; in networks without norms the gains of
            their convolutions), ``"all"`` (all floating-point parameters), ``"lora"`` (weights of
            linear layers and 1x1 convolutions except the classifier's), a regular expression that
            is searched for in the names, or a collection of names.
        eligible: names of the parameters that the method can adapt; None for all.

    Raises:
        InputError: nothing is selected, a name does not exist or is not eligible, or the regular
            expression is invalid.
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
    """Names that a keyword or a regular expression selects."""
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
            f"params={params!r} is neither 'norm', 'all', 'lora' nor a valid regular "
            f"expression ({error})"
        ) from error
    return {n for n in named if pattern.search(n)}


def _listed(params: Collection[str], named: list[str], limits: set[str] | None) -> set[str]:
    """The given names, if the model has them and the method can adapt them."""
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
            f"params: {outside[0]!r} is not among the parameters that this method can adapt; the "
            f"first of those are {[n for n in named if n in limits][:5]}"
        )
    return chosen


def _matrices(model: nn.Module) -> set[str]:
    """Weights of linear layers and ungrouped 1x1 convolutions, except the classifier's."""
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
    """Initial values of the tensors that adapt, under the names that `call` uses.

    These are the backbone's own tensors, not copied, but in float32 if they are of half precision.
    With ``lora_rank`` they are two factors of a change to each tensor: A (rank, inputs), drawn from
    ``seed``, and B (outputs, rank), which is zero, so that the initial model is unchanged.
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
    """Adapted tensors -> the adapted parameters of the model, by their full names.

    They have the precision in which they adapt, float32 for a model in half precision.
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
    "the model saves memory by computing activations twice (torch.utils.checkpoint), but the "
    "second time it would use the source's parameters, not the adapted ones: switch that off"
)


@contextmanager
def no_recomputation() -> Iterator[None]:
    """Refuse models whose gradients would silently be those at other parameters.

    `call` exchanges the model's parameters only during the forward pass; activations that are
    computed again during the backward pass would use the model's own parameters.

    Raises:
        InputError: raised at the end of the block if the model did so.
    """
    with ExitStack() as stack:
        # A caller's own hooks on saved tensors, for example to offload them, do not recompute.
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
    """Run the backbone with adapted tensors.

    Args:
        backbone: the classifier.
        params: adapted tensors; those that are not part of the model are ignored.
        images: images (B, C, H, W) in [0, 1].
        pooled: whether to return pooled features, the input of the last layer, instead of logits.
        replaced: parameters and buffers that take precedence over ``params``, by their names in
            the user's model.

    Returns:
        logits (B, classes), or pooled features (B, D).
    """
    tensors = materialise(backbone, params)
    tensors |= {_PREFIX + n: t for n, t in (replaced or {}).items()}
    tensors = _in_own_precision(backbone, tensors)
    # Without tie_weights: if a module is registered in several places, functional_call would
    # exchange its tensors twice, and then restore those of the first exchange.
    tensors |= {
        n: tensors[first]
        for first in backbone.tied
        if first in tensors
        for n in backbone.tied[first]
    }
    return backbone(images, pooled, tensors)


def _in_own_precision(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their full names, cast to half precision if those of the model have it."""
    named = dict(backbone.named_parameters(remove_duplicate=False)) | dict(
        backbone.named_buffers(remove_duplicate=False)
    )
    # Any other difference is the caller's choice.
    return {
        n: t.to(named[n].dtype) if n in named and t.dtype == single_dtype(named[n].dtype) else t
        for n, t in tensors.items()
    }


def moved(params: Mapping[str, Tensor], fn: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Adapted tensors after a move or cast ``fn``; after a cast to half precision in float32."""
    results = {n: fn(t) for n, t in params.items()}
    return {
        n: params[n].to(t.device, single_dtype(t.dtype))
        if t.is_floating_point() and t.dtype != single_dtype(t.dtype)
        else t
        for n, t in results.items()
    }


def are_few(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an operation on all of these tensors is cheaper on one vector that joins them.

    It is for the parameters of norms, which are tens of small tensors. Larger tensors are not
    copied, and tensors of several types or with other memory layouts are not joined.
    """
    first = next(iter(tensors.values()), None)
    return (
        first is not None
        and first.dtype == single_dtype(first.dtype)
        and sum(t.numel() for t in tensors.values()) <= _FEW
        and all(t.dtype == first.dtype and t.is_contiguous() for t in tensors.values())
    )


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors -> one vector (n,) in the mapping's order, in at least single precision.

    In half precision the squared gradients of update rules would underflow or overflow.
    """
    return single(torch.cat([t.reshape(-1) for t in tensors.values()]))


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One vector (n,) -> views of it with the shapes and names of ``like``."""
    parts = vector.split([t.numel() for t in like.values()])
    return {name: part.view_as(t) for (name, t), part in zip(like.items(), parts, strict=True)}
