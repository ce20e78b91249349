"""Meta-training of MGG's optimizer (arXiv 2412.16901, section 3.3).

The model adapts to a sequence of corrupted batches with the same step that adaptation uses
(`core.online`), while the graph of the learned optimizer is kept. The parameters after an update
are evaluated on the next batch. That batch's gradient, which the next update needs anyway, is the
derivative of the outer loss, so the only cost of meta-training beyond adaptation is one
vector-Jacobian product through 164 weights. The optimizer treats network gradients as constants
(the released code detaches them too).

Options that the paper does not have: a labelled outer loss, truncation over more than one update,
larger batches and more sequences, parameters restored at each sequence, and several classifiers
that share one optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter
from ..artifacts.tensor_files import fingerprint
from ..benchmark.evaluate import accuracy
from ..benchmark.protocols import shuffled
from ..core import gradient_memory
from ..core.objectives import all_finite
from ..core.online import Loss, Objective, Online, evaluate
from ..data.images import LabelledImages, to_float
from ..errors import InputError
from ..utils.checks import check_integer, check_number, check_seed
from ..wrapping import wrap
from .epochs import Epoch, Training, checkpoint_file, epoch_generator, train_epochs

__all__ = ["MGGRecipe", "stream_accuracy", "train_mgg", "untrained"]


@dataclass(frozen=True)
class MGGRecipe:
    """How an optimizer is meta-trained; the defaults are the paper's, with two exceptions.

    The paper uses 128 fixed images; here every epoch draws from all images. The paper does not
    choose the step size from a ``grid``.

    Attributes:
        epochs: number of epochs; a checkpoint is written after each epoch.
        sequences: number of sequences per classifier in an epoch, each starting with an empty
            memory.
        length: number of batches in a sequence.
        batch_size: number of images in a batch.
        alpha: step size during meta-training.
        meta_lr: Adam's learning rate for the slow weights.
        decay: whether ``meta_lr`` falls linearly to 0.
        labelled: whether the outer loss is the next batch's cross-entropy instead of the loss
            without labels.
        truncation: number of updates that the meta-gradient passes through.
        restore: whether every sequence starts from the source parameters; in the released code it
            starts from the parameters at the end of the previous sequence.
        per_image: whether a corruption is drawn for every image rather than for every sequence.
        clip: largest norm of the slow weights' gradient; 0 for no limit.
        grid: step sizes of at least 0 that validation tries; the artifact stores the best.
        validate_every: number of epochs between validations on whole streams; validation chooses
            the checkpoint.
        seed: seed for initial weights and image order.
    """

    epochs: int = 40
    sequences: int = 1
    length: int = 64
    batch_size: int = 2
    alpha: float = 1e-4
    meta_lr: float = 1e-2
    decay: bool = False
    labelled: bool = False
    truncation: int = 1
    restore: bool = False
    per_image: bool = True
    clip: float = 0.0
    grid: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    validate_every: int = 1
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "sequences", "length", "batch_size", "truncation"):
            check_integer(self, name, 1)
        check_integer(self, "validate_every", 1)
        for name in ("alpha", "meta_lr", "clip"):
            check_number(self, name, 0)
        if not self.grid:
            raise InputError("MGGRecipe.grid must hold at least one step size")
        for lr in self.grid:
            if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 <= lr < math.inf:
                raise InputError(f"MGGRecipe.grid must hold step sizes of at least 0, got {lr!r}")
        check_seed(self.seed, "MGGRecipe.seed")


def stream_accuracy(
    net: Adapter, data: LabelledImages, batch_size: int = 64, seed: int = 0
) -> float:
    """Accuracy in [0, 1] of an adapter on one shuffled stream, starting from a reset."""
    net.reset()
    return accuracy(net, data[shuffled(len(data), seed)], batch_size, net.backbone.device)


def _batches(recipe: MGGRecipe, data: Mapping[str, LabelledImages], generator):
    """One sequence of ``length`` + 1 batches: the last update needs a batch to evaluate it."""
    names = list(data)
    count = (recipe.length + 1) * recipe.batch_size
    available = min(len(images) for images in data.values())
    # A sequence that needs more images than there are repeats them in another order.
    orders = [torch.randperm(available, generator=generator) for _ in range(-(-count // available))]
    rows = torch.cat(orders)[:count]
    kinds = torch.randint(len(names), (count if recipe.per_image else 1,), generator=generator)
    kinds = kinds.expand(count)
    images = torch.stack([data[names[k]].images[r] for k, r in zip(kinds, rows, strict=True)])
    labels = torch.stack([data[names[k]].labels[r] for k, r in zip(kinds, rows, strict=True)])
    yield from zip(images.split(recipe.batch_size), labels.split(recipe.batch_size), strict=True)


def _outer_loss(
    algorithm: Online, params: dict[str, Tensor], images: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy at ``params`` and its gradient: the labelled outer loss."""
    objective = Objective("cross-entropy", lambda logits, *_: Loss(F.cross_entropy(logits, labels)))
    result = evaluate(algorithm.backbone, objective, params, images)
    return result.loss, result.grads


def run_sequence(
    algorithm: Online,
    params: dict[str, Tensor],
    batches,
    slow: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    recipe: MGGRecipe,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Adapt to the batches of one sequence and train the slow weights while doing so.

    Returns:
        the adapted parameters at the end, and the outer loss () of every update.
    """
    backbone = algorithm.backbone
    state, losses = algorithm.init(), []
    # Sum over the window of <parameters after an update, gradient of the outer loss at them>.
    surrogate: Tensor | None = None
    window, updated = 0, False
    for images, labels in batches:
        images = to_float(images.to(backbone.device)).to(backbone.dtype)
        first = evaluate(backbone, algorithm.objective, params, images)
        if not first.finite:
            # The rest of the sequence is useless; the next one starts from the source.
            return dict(algorithm.source), losses
        if updated:
            loss, grads = first.loss, first.grads
            if recipe.labelled:
                loss, grads = _outer_loss(algorithm, params, images, labels.to(backbone.device))
            losses.append(loss)
            product = torch.stack([(params[n] * grads[n]).sum() for n in params]).sum()
            surrogate = product if surrogate is None else surrogate + product
            window += 1
            if window == recipe.truncation:
                _descend(surrogate, slow, optimizer, recipe.clip)
                surrogate, window = None, 0
                params = {n: p.detach() for n, p in params.items()}
                state = {n: t.detach() for n, t in state.items()}
        params, state = algorithm.rule.step(params, state, first, algorithm.situation(images))
        updated = True
    if surrogate is not None:
        _descend(surrogate, slow, optimizer, recipe.clip)
    return {n: p.detach() for n, p in params.items()}, losses


def _descend(surrogate: Tensor, slow: dict[str, Tensor], optimizer, clip: float) -> None:
    optimizer.zero_grad()
    surrogate.backward()
    if clip:
        nn.utils.clip_grad_norm_(slow.values(), clip)
    grads = [p.grad for p in slow.values() if p.grad is not None]
    if all_finite(*grads):
        optimizer.step()


def untrained(model: str | nn.Module, *, seed: int = 0, **options) -> Adapter:
    """An MGG adapter with an untrained (random) optimizer; ``options`` are those of `wrap`."""
    slow = gradient_memory.init_slow(torch.Generator().manual_seed(seed))
    return wrap(model, "mgg", tensors=_named(slow), **options)


def _named(slow: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slow weights under their names in an artifact."""
    return {f"memory.{name}": tensor for name, tensor in slow.items()}


class _OptimizerTraining(Training):
    """Meta-training of an optimizer on the classifiers of several adapters, in turn."""

    recipe: MGGRecipe
    title = "meta-epoch"

    def __init__(
        self, recipe: MGGRecipe, nets: Sequence[Adapter], data: Mapping[str, LabelledImages]
    ):
        super().__init__(recipe, nets[0].backbone.device)
        self.nets, self.data = nets, data
        slow = gradient_memory.init_slow(torch.Generator().manual_seed(recipe.seed))
        self.slow = {n: t.to(self.device).requires_grad_() for n, t in slow.items()}
        self.optimizer = torch.optim.Adam(self.slow.values(), lr=recipe.meta_lr)
        self.algorithms = [
            net.with_tensors(replace(net.config, lr=recipe.alpha)).algorithm(_named(self.slow))
            for net in nets
        ]
        self.params = [a.source for a in self.algorithms]
        self.best: dict[str, Any] | None = None

    def generator(self, epoch: int) -> torch.Generator:
        return epoch_generator(self.recipe.seed, epoch + 1)  # on the CPU, where the images are

    def made_by(self) -> dict[str, Any]:
        made_by = {
            "recipe": asdict(self.recipe),
            "configs": [asdict(net.config) for net in self.nets],
            "models": [fingerprint(net.backbone.source_state_dict()) for net in self.nets],
            "objectives": [algorithm.objective.name for algorithm in self.algorithms],
        }
        return {"made_by": made_by}

    def state(self) -> dict[str, Any]:
        return {
            "slow": {n: t.detach() for n, t in self.slow.items()},
            "optimizer": self.optimizer.state_dict(),
            "params": self.params,
            "best": self.best,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.slow.items():
                tensor.copy_(saved["slow"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.params, self.best = self.on_device((saved["params"], saved["best"]))

    def run(self, epoch: Epoch) -> dict[str, Any]:
        recipe = self.recipe
        if recipe.decay:
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.meta_lr * (1 - epoch.number / recipe.epochs)
        losses: list[Tensor] = []
        turns = range(recipe.sequences * len(self.algorithms))
        for i in (turn % len(self.algorithms) for turn in epoch.bar(turns)):
            algorithm = self.algorithms[i]
            start = algorithm.source if recipe.restore else self.params[i]
            batches = _batches(recipe, self.data, epoch.generator)
            self.params[i], outer_losses = run_sequence(
                algorithm, start, batches, self.slow, self.optimizer, recipe
            )
            losses += outer_losses
        total = torch.stack(losses).double().sum().item() if losses else 0.0
        entry: dict[str, Any] = {"outer_loss": total / max(1, len(losses))}
        number = epoch.number + 1
        if number % recipe.validate_every == 0 or number == recipe.epochs:
            entry |= self._validate(number)
        return entry

    def adapter(self, net: Adapter, lr: float, weights: Mapping[str, Tensor]) -> Adapter:
        """An adapter like ``net`` with a different step size and optimizer."""
        return net.with_tensors(replace(net.config, lr=lr), _named(weights))

    def _validate(self, epoch: int) -> dict[str, Any]:
        """Measure the mean accuracy over corruptions at every step size; keep the best weights."""
        weights = {n: t.detach().clone() for n, t in self.slow.items()}
        by_classifier = {}
        for lr in self.recipe.grid:
            trials = [self.adapter(net, lr, weights) for net in self.nets]
            by_classifier[lr] = [
                sum(stream_accuracy(trial, images) for images in self.data.values())
                / len(self.data)
                for trial in trials
            ]
        scores = {lr: sum(each) / len(each) for lr, each in by_classifier.items()}
        lr = max(scores, key=scores.__getitem__)
        if self.best is None or scores[lr] > self.best["accuracy"]:
            self.best = {"accuracy": scores[lr], "lr": lr, "epoch": epoch, "slow": weights}
        entry: dict[str, Any] = {"accuracy": {f"{lr:g}": score for lr, score in scores.items()}}
        if len(self.nets) > 1:
            entry["by_classifier"] = {f"{lr:g}": each for lr, each in by_classifier.items()}
        return entry


def train_mgg(
    recipe: MGGRecipe,
    net: Adapter | Sequence[Adapter],
    data: Mapping[str, LabelledImages],
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> tuple[Adapter, dict]:
    """Meta-train an optimizer on corrupted images.

    After every epoch ``out/checkpoint.pt`` holds everything that is needed to resume. Labels are
    used to choose the checkpoint and the step size; the outer loss uses them only if
    ``recipe.labelled`` is set.

    Args:
        recipe: how the optimizer is trained.
        net: an MGG adapter around the classifier to train on, such as `untrained` returns. Its
            config (except for the step size) and its source statistics are used, but not its own
            optimizer; the adapter is not changed. Several adapters on one device share the
            optimizer: they take turns sequence by sequence, and validation averages over them.
        data: labelled images by the name of their corruption; row i of each must come from the
            same clean image.
        out: folder for the checkpoint; created if it is missing.
        resume: whether to resume from the checkpoint, if there is one; the result is the same as
            that of an uninterrupted run.
        progress: whether to show progress bars and print the log.

    Returns:
        an adapter with the best optimizer and step size, around the first ``net``, and the log.

    Raises:
        InputError: there is no adapter, no data or too little for one batch, or the checkpoint is
            of another recipe.
        DataError: a checkpoint cannot be written.
    """
    checkpoint = checkpoint_file(out)
    if not data or min(map(len, data.values())) < recipe.batch_size:
        raise InputError("meta-training needs at least one batch of corrupted images")
    nets = [net] if isinstance(net, Adapter) else list(net)
    if not nets:
        raise InputError("meta-training needs at least one classifier")
    training = _OptimizerTraining(recipe, nets, data)
    log = train_epochs(training, checkpoint, resume=resume, progress=progress)
    best = training.best
    assert best is not None  # the last epoch is always validated
    chosen = {k: best[k] for k in ("accuracy", "lr", "epoch")}
    return training.adapter(nets[0], best["lr"], best["slow"]), {"epochs": log, "chosen": chosen}
