"""Training steps for a user's own loop: predictions and a self-supervised loss, with their graph.

Tasks, losses and update rules are those of adaptation.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..adapter import Adapter
from ..core.online import Online, evaluate
from ..core.per_batch import PerBatch
from ..core.per_image import PerImage, descend, loss_and_gradient
from ..core.scope import call
from ..core.views import image_keys
from ..errors import InputError
from ..utils.attention import plain_attention

__all__ = ["joint_step", "memory_step", "meta_step"]

Tensors = dict[str, Tensor]
#: Adapted parameters and the update rule's state.
Sequence = tuple[Tensors, Tensors]


def joint_step(
    net: Adapter, model: nn.Module, heads: Mapping[str, Tensor], images: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """TTT, equation 1: logits (B, classes) of the model itself, and the rotation loss.

    The rotation loss is that of one view of each image. ``number`` is the number of the step, which
    gives every step its own random draws. In train mode the model's BatchNorms update their running
    statistics on the images; the rotation branch does not update them.
    """
    algorithm, backbone = _of(net, heads, (PerImage, PerBatch)), net.backbone
    # The branch that writes running statistics comes first, then the one whose graph uses them.
    logits = model((images - backbone.mean) / backbone.std if backbone.normalize else images)
    meta = {f"model.{n}": p for n, p in model.named_parameters()} | dict(heads)
    return logits, algorithm.task.loss(meta, *_views(algorithm, images, net.seed, number))


def meta_step(
    net: Adapter, model: nn.Module, heads: Mapping[str, Tensor], images: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """MT3, algorithm 1: logits (B, classes) and L_ss after one inner step on the batch as a task.

    The outer loss is the cross-entropy of the logits plus gamma times L_ss (0.1 in the paper).
    BatchNorm keeps its source statistics, as at test time, so a model with BatchNorm must already
    be trained.
    """
    if net.config.params == "lora":
        raise InputError("MT3 is meta-trained with params='all', 'norm' or names, not 'lora'")
    algorithm = _of(net, heads, PerImage)
    views = _views(algorithm, images, net.seed, number)
    meta = {f"model.{n}": p for n, p in model.named_parameters()} | dict(heads)
    # The inner step also changes frozen parameters, as adaptation does.
    adapted = {n: p for n, p in meta.items() if n in algorithm.source or n in heads}
    adapted = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in adapted.items()}
    with plain_attention():
        _, grads = loss_and_gradient(lambda p: algorithm.task.loss(meta | p, *views), adapted, True)
        after = meta | descend(adapted, grads, net.config.lr)
        return call(net.backbone, after, images), algorithm.task.loss(after, *views)


def memory_step(
    net: Adapter, heads: Mapping[str, Tensor], images: Tensor, sequence: Sequence | None
) -> tuple[Tensor, Tensor, Sequence | None]:
    """MGG: logits (B, classes) and the loss without labels after the optimizer's update on a batch.

    Only the optimizer's slow weights learn. ``sequence`` is the state of the sequence so far
    (adapted parameters and the update rule's state), None at its start; it is returned with the
    batch's update included. An update is evaluated on its own batch, because a training loop
    passes one batch at a time; `train.mgg` evaluates it on the next batch.
    """
    algorithm = _of(net, heads, Online)
    params, state = sequence or (dict(algorithm.source), algorithm.init())
    first = evaluate(net.backbone, algorithm.objective, params, images)
    adapted, state = algorithm.rule.step(params, state, first, algorithm.situation(images))
    with net.backbone.recording() as features:
        logits = call(net.backbone, adapted, images)
    features = features if algorithm.objective.needs_features else []
    loss = algorithm.objective.loss(logits, features, None).value
    if first.finite:
        sequence = _detached(adapted), _detached(state)
    return logits, loss, sequence


def _detached(tensors: Mapping[str, Tensor]) -> Tensors:
    return {n: t.detach() for n, t in tensors.items()}


def _of(net: Adapter, heads: Mapping[str, Tensor], kind: type | tuple[type, ...]):
    algorithm = net.algorithm(dict(heads))
    assert isinstance(algorithm, kind)
    return algorithm


def _views(algorithm: PerImage | PerBatch, images: Tensor, seed: int, number: int) -> list[Tensor]:
    drawn = algorithm.task.draw(images, image_keys(images, seed), number)
    return [view.flatten(0, 1) for view in drawn]
