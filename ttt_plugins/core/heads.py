"""The heads of self-supervised tasks, as named tensors.

A head is a dict of tensors that exists before adaptation, so that it can be trained, saved and
checked like other learned tensors. The rotation head is a copy of the layers behind the split
(``rest.<name>``) and a linear map to four classes (``head.weight``, ``head.bias``). BYOL's
projector and predictor are two linear layers each (``projector.in.weight`` …
``predictor.out.bias``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.backbone import Backbone
from ..backbones.stages import feature_width, trunk
from ..errors import ArtifactError, InputError
from .scope import call

__all__ = [
    "byol_shapes",
    "check_head",
    "init_byol",
    "init_linear",
    "init_rotation",
    "project",
    "rest_tensors",
    "rotation_logits",
]

ROTATIONS = 4
_BYOL_HIDDEN, _BYOL_OUT = 256, 128


def rest_tensors(model: nn.Module, split: int | str) -> dict[str, Tensor]:
    """The model's tensors behind the split: parameters and running statistics."""
    _, rest = trunk(model, split)
    owners = {name.rpartition(".")[0] for name in rest}
    named = {n: p.detach() for n, p in model.named_parameters() if n in set(rest)}
    for name, buffer in model.named_buffers():
        owner, _, kind = name.rpartition(".")
        if owner in owners and kind in ("running_mean", "running_var"):
            named[name] = buffer.detach()
    return named


def init_linear(
    inputs: int, outputs: int, generator: torch.Generator, bias: bool = True
) -> dict[str, Tensor]:
    """Weight (outputs, inputs) and bias (outputs,), initialised as in ``nn.Linear``."""
    bound = inputs**-0.5
    tensors = {"weight": torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)}
    if bias:
        tensors["bias"] = torch.empty(outputs).uniform_(-bound, bound, generator=generator)
    return tensors


def init_rotation(
    model: nn.Module, split: int | str, generator: torch.Generator
) -> dict[str, Tensor]:
    """An untrained rotation head: a copy of the layers behind the split, and a random linear map.

    Raises:
        InputError: there is no such split, or the width of the pooled features is unknown.
    """
    width = feature_width(model)
    if width is None:
        raise InputError(f"the width of {type(model).__name__}'s pooled features is unknown")
    head = {f"head.{n}": t for n, t in init_linear(width, ROTATIONS, generator).items()}
    return head | {f"rest.{n}": t.clone() for n, t in rest_tensors(model, split).items()}


def rotation_logits(
    backbone: Backbone,
    params: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    images: Tensor,
) -> Tensor:
    """Images (N, C, H, W) -> logits (N, 4) of the number of quarter turns of each."""
    rest = {n.removeprefix("rest."): t for n, t in head.items() if n.startswith("rest.")}
    features = call(backbone, params, images, pooled=True, replaced=rest)
    # A head that adapts is in single precision even if the model is not.
    features = features.to(head["head.weight"].dtype)
    return F.linear(features, head["head.weight"], head["head.bias"])


def byol_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of projector and predictor for features of a given width.

    Each is a linear layer with 256 outputs, a ReLU, and a linear layer with 128 outputs, without a
    norm (Bartler et al., arXiv 2103.16201).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part, inputs in (("projector", width), ("predictor", _BYOL_OUT)):
        for layer, rows, columns in (
            ("in", _BYOL_HIDDEN, inputs),
            ("out", _BYOL_OUT, _BYOL_HIDDEN),
        ):
            shapes |= {f"{part}.{layer}.weight": (rows, columns), f"{part}.{layer}.bias": (rows,)}
    return shapes


def init_byol(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """An untrained projector and predictor for a model's pooled features.

    Raises:
        InputError: the width of the pooled features is unknown.
    """
    width = feature_width(model)
    if width is None:
        raise InputError(f"the width of {type(model).__name__}'s pooled features is unknown")
    tensors: dict[str, Tensor] = {}
    for name, (rows, columns) in (
        (n, s) for n, s in byol_shapes(width).items() if n.endswith("weight")
    ):
        layer = init_linear(columns, rows, generator)
        tensors |= {f"{name.removesuffix('weight')}{n}": t for n, t in layer.items()}
    return tensors


def project(head: Mapping[str, Tensor], part: str, x: Tensor) -> Tensor:
    """Apply ``part`` ("projector" or "predictor") to features (N, D); returns (N, 128)."""
    x = x.to(head[f"{part}.in.weight"].dtype)
    x = F.linear(x, head[f"{part}.in.weight"], head[f"{part}.in.bias"]).relu()
    return F.linear(x, head[f"{part}.out.weight"], head[f"{part}.out.bias"])


def check_head(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Check the tensors of a head, and return them in the expected order.

    Args:
        expected: shapes by name.
        tensors: tensors by name.
        where: name of their artifact in error messages.

    Raises:
        ArtifactError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    for name in sorted(expected.keys() ^ tensors.keys()):
        state = "missing" if name in expected else "unexpected"
        raise ArtifactError(f"{where}: tensor {name!r} of the self-supervised head is {state}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise ArtifactError(
                f"{where}: {name!r} has shape {tuple(tensors[name].shape)}, this model needs "
                f"{tuple(shape)}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise ArtifactError(f"{where}: {name!r} holds non-finite values")
    return {name: tensors[name] for name in expected}
