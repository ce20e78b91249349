"""Supervised training of the source classifiers that the adapters start from.

A short modern recipe for 32x32 images: crop, flip, cutout, CutMix, label smoothing, warm-up,
cosine schedule, and an exponential moving average of the weights; for transformers also Muon on
the matrices of the blocks, and dropping of patches in the first part of training. None of the
augmentations is one of CIFAR-10-C's fifteen corruptions, so the benchmark remains a test of unseen
shifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.views import cutmix_, cutout_, random_crop, random_flip
from ..data.images import LabelledImages, to_float
from ..errors import InputError
from ..methods import Source
from ..utils.checks import check_choice, check_integer, check_number
from .common import initial_model, read_start
from .epochs import Epoch, checkpoint_file, train_epochs
from .network import NetworkRecipe, NetworkTraining

__all__ = ["SourceRecipe", "train_source"]


@dataclass(frozen=True)
class SourceRecipe(NetworkRecipe):
    """How a source network is trained; its artifact records the recipe.

    Attributes:
        optimizer: ``"sgd"`` (Nesterov, momentum 0.9), ``"adamw"``, or ``"muon"`` (Muon on the
            matrices of the blocks, AdamW at a tenth of the rate on everything else).
        lr: peak learning rate.
        weight_decay: weight decay coefficient of matrices and kernels; norms and biases have none.
        warmup: fraction of the steps, in [0, 1], in which the rate rises linearly; then it falls
            along half a cosine.
        label_smoothing: fraction of each target that is spread over all classes, in [0, 1].
        padding: zero padding before the random crop, in pixels.
        cutout: side of the erased square in pixels; 0 erases nothing.
        cutmix: fraction of the batches that are mixed, with Beta(1, 1), in [0, 1].
        patch_drop: fraction of a vision transformer's patches, in [0, 1), that is dropped in the
            first part of training.
        patch_drop_until: fraction of the epochs, in [0, 1], in which patches are dropped.
        ema: decay of the weights' moving average per step, in [0, 1]; the average is the result.
            0 disables the average.
        autocast: whether to compute in bfloat16 where the device supports it.
    """

    lr: float = 0.2
    ema: float = 0.998
    optimizer: str = "sgd"
    warmup: float = 0.1
    label_smoothing: float = 0.1
    padding: int = 4
    cutout: int = 8
    cutmix: float = 0.0
    patch_drop: float = 0.0
    patch_drop_until: float = 0.8
    autocast: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("padding", "cutout"):
            check_integer(self, name, 0)
        for name in ("warmup", "label_smoothing", "cutmix", "patch_drop", "patch_drop_until"):
            check_number(self, name, 0, 1)
        if self.patch_drop == 1:
            raise InputError(
                "SourceRecipe.patch_drop must be below 1, got 1: no patch would remain"
            )
        check_choice(self, "optimizer", ("sgd", "adamw", "muon"))


def _optimizers(model: nn.Module, recipe: SourceRecipe) -> list[torch.optim.Optimizer]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    vectors = [p for _, p in named if p.ndim < 2]
    if recipe.optimizer == "sgd":
        groups = [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)]
    muon = recipe.optimizer == "muon"
    hidden = [p for name, p in named if muon and p.ndim == 2 and "block" in name]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if p.ndim >= 2 and id(p) not in taken]
    adam = torch.optim.AdamW(
        [
            {"params": rest, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.lr / 10 if muon else recipe.lr,
        betas=(0.9, 0.95),
    )
    if not muon:
        return [adam]
    if not hasattr(torch.optim, "Muon"):
        raise InputError("optimizer 'muon' needs torch >= 2.9; use 'adamw' or a newer torch")
    if not hidden:
        raise InputError(f"{recipe.arch} has no matrices in blocks for 'muon'; use 'sgd'")
    decay = recipe.weight_decay
    return [adam, torch.optim.Muon(hidden, lr=recipe.lr, weight_decay=decay, momentum=0.95)]


def _augment(
    images: Tensor, labels: Tensor, classes: int, recipe: SourceRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Turn uint8 images and labels into augmented images in [0, 1] and target probabilities."""
    x = random_flip(random_crop(images, recipe.padding, generator), generator)
    x = to_float(x).contiguous()
    target = F.one_hot(labels, classes).float()
    mix = torch.rand((), generator=generator, device=generator.device) < recipe.cutmix
    if recipe.cutout:
        cutout_(x, recipe.cutout, x.mean((0, 2, 3)), generator)
    if mix:
        _, partner, share = cutmix_(x, 1.0, generator)
        target = share[:, None] * target + (1 - share[:, None]) * target[partner]
    smooth = recipe.label_smoothing
    return x, target * (1 - smooth) + smooth / classes


class _SourceTraining(NetworkTraining):
    """Supervised training of a classifier."""

    recipe: SourceRecipe

    def __init__(
        self,
        recipe: SourceRecipe,
        train: LabelledImages,
        test: LabelledImages,
        device: torch.device,
    ):
        dropout = {"patch_drop_rate": recipe.patch_drop} if recipe.patch_drop else {}
        model = initial_model(recipe, Source(), train, read_start(recipe.init), **dropout)
        self.classes = int(train.labels.max()) + 1
        model = model.to(device)
        if train.images.shape[2] >= 32 and not recipe.patch_drop:
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        optimizers, schedule = _optimizers(model, recipe), ("cosine", recipe.warmup)
        super().__init__(recipe, model, model, optimizers, schedule, train, test, device)
        self.parts = {"model": model, "average": self.average}
        self.parts |= {f"optimizer{i}": o for i, o in enumerate(self.optimizers)}
        self.parts |= {f"schedule{i}": s for i, s in enumerate(self.schedules)}

    def prepare(self, epoch: Epoch) -> None:
        torch.manual_seed(epoch.generator.initial_seed())  # timm drops patches with this generator
        if self.recipe.patch_drop:
            dropping = epoch.number < self.recipe.patch_drop_until * self.recipe.epochs
            self.net.patch_drop.prob = self.recipe.patch_drop if dropping else 0.0

    def loss(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        x, target = _augment(images, labels, self.classes, self.recipe, generator)
        x = self.normalise(x)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            logits = self.net(x)
        loss = F.cross_entropy(logits.float(), target)
        return loss, loss.detach()[None]

    def entry(self, means: list[float]) -> dict[str, float]:
        return {"loss": means[0], "test_accuracy": self.accuracy(self.final.eval())}


def train_source(
    recipe: SourceRecipe,
    train: LabelledImages,
    test: LabelledImages,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, dict]:
    """Train a timm model with labels.

    After every epoch ``out/checkpoint.pt`` holds everything that is needed to resume.

    Args:
        recipe: the architecture and how it is trained.
        train: labelled images to train on.
        test: labelled images; the log holds the accuracy on them after every epoch.
        out: folder for the checkpoint; created if it is missing.
        device: device to train on.
        resume: whether to resume from the checkpoint, if there is one; the result is the same as
            that of an uninterrupted run.
        progress: whether to show progress bars and print the log.

    Returns:
        the model in eval mode (the average unless ``ema`` is 0), and the log.

    Raises:
        InputError: the architecture is unknown, the images do not suit it or are too few, or the
            checkpoint is of another recipe.
        DataError: a checkpoint cannot be written.
    """
    checkpoint = checkpoint_file(out)
    training = _SourceTraining(recipe, train, test, torch.device(device))
    log = train_epochs(training, checkpoint, resume=resume, progress=progress)
    model = training.final.eval()
    if recipe.patch_drop:
        model.patch_drop.prob = 0.0
    return model, {"epochs": log}
