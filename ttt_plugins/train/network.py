"""Training of a network by gradient descent, for any loss."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..benchmark.evaluate import Predictor, accuracy
from ..core.schedules import schedule_factor
from ..data.images import LabelledImages
from ..data.on_demand import read_batches
from ..utils.checks import check_integer, check_number, check_seed
from .common import Normalise, steps_per_epoch
from .epochs import Epoch, Training, check_convergence

__all__ = ["NetworkRecipe", "NetworkTraining"]

#: Number of test images that are in memory at a time.
_TEST_BATCH = 500


@dataclass(frozen=True)
class NetworkRecipe:
    """How a network is trained with any loss.

    Attributes:
        arch: name of the timm architecture.
        model_args: keyword arguments for its constructor; none by default.
        init: artifact of the same architecture whose weights and preprocessing training starts
            from; by default the weights are initialised at random.
        epochs: number of passes over the training images.
        batch_size: number of images in each step.
        lr: peak learning rate of SGD with momentum 0.9.
        weight_decay: weight decay coefficient of all parameters.
        ema: decay of the weights' moving average per step, in [0, 1]; 0 disables the average.
        seed: seed for initialisation, image order and augmentation.
    """

    arch: str = "ttt_resnet26"
    model_args: dict | None = None
    init: str = ""
    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    ema: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.model_args is None:
            object.__setattr__(self, "model_args", self._default_model_args())
        for name in ("epochs", "batch_size"):
            check_integer(self, name, 1)
        for name in ("lr", "weight_decay"):
            check_number(self, name, 0)
        check_number(self, "ema", 0, 1)
        check_seed(self.seed, f"{type(self).__name__}.seed")

    def _default_model_args(self) -> dict[str, Any]:
        return {}


class NetworkTraining(Training):
    """Epochs of gradient descent, with a moving average of the weights.

    Attributes:
        net: the module that is trained.
        average: the moving average of its weights and buffers.
        optimizers: optimizers whose learning rates are the peaks of their schedules.
        schedules: learning rate schedules, one per optimizer.
        normalise: preprocessing of the classifier.
        images: uint8 training images (N, C, H, W) on the network's device.
        labels: int64 classes (N,) on the same device.
        test: labelled images to measure accuracy on.
    """

    def __init__(
        self,
        recipe: NetworkRecipe,
        net: nn.Module,
        classifier: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        schedule: tuple[str, float],
        train: LabelledImages,
        test: LabelledImages,
        device: torch.device,
    ):
        """Set up the average and the schedules.

        Args:
            recipe: recipe of the training.
            net: the module to train, already on ``device``.
            classifier: the timm model in it, or ``net`` itself.
            optimizers: optimizers of the parameters of ``net``.
            schedule: name of the schedule, and the fraction of the steps that warms up, in [0, 1].
            train: labelled images to train on.
            test: labelled images to measure accuracy on after every epoch.
            device: device to train on.
        """
        super().__init__(recipe, device)
        self.net: Any = net
        self.optimizers = optimizers
        self.batch_size, self.ema = recipe.batch_size, recipe.ema
        self.steps = steps_per_epoch(len(train), recipe.batch_size)
        steps, (name, warmup) = self.steps * recipe.epochs, schedule
        self.schedules = [
            LambdaLR(optimizer, lambda step: schedule_factor(name, step, steps, warmup))
            for optimizer in optimizers
        ]
        average = get_ema_multi_avg_fn(recipe.ema)
        self.average = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
        self.normalise = Normalise(classifier).to(device)
        self.images, self.labels = train.images.to(device), train.labels.to(device)
        self.test = test

    @property
    def final(self) -> Any:
        """The resulting network: the average, or the network itself if there is no average."""
        return self.average.module if self.ema else self.net

    def prepare(self, epoch: Epoch) -> None:
        """Prepare the network for an epoch; the default does nothing."""

    @abstractmethod
    def loss(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and the numbers (K,) whose means are passed to `entry`.

        Args:
            images: uint8 images (B, C, H, W).
            labels: int64 classes (B,).
            generator: random generator for the augmentation.
        """

    def accuracy(self, model: Predictor, data: LabelledImages | None = None) -> float:
        """Accuracy in [0, 1] of a model in eval mode that takes normalised images.

        Args:
            model: maps normalised images (B, C, H, W) to logits.
            data: labelled images; the test images by default.
        """
        data = self.test if data is None else data
        correct = 0
        batches = torch.arange(len(data)).split(_TEST_BATCH)
        for rows, images in zip(batches, read_batches(data.images, batches), strict=True):
            batch = LabelledImages(images, data.labels[rows])
            share = accuracy(lambda x: model(self.normalise(x)), batch, device=self.device)
            correct += round(share * len(rows))
        return correct / len(data)

    @abstractmethod
    def entry(self, means: list[float]) -> dict[str, float]:
        """The log's entry for an epoch, from the means of the loss's numbers over its steps."""

    def run(self, epoch: Epoch) -> dict[str, float]:
        """Train for one epoch."""
        self.prepare(epoch)
        self.net.train()
        totals = torch.zeros((), device=self.device)
        for rows, images in epoch.batches(self.images, self.batch_size, self.steps):
            loss, numbers = self.loss(images, self.labels[rows], epoch.generator)
            loss.backward()
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if self.ema:
                self.average.update_parameters(self.net)
            totals = totals + numbers
        check_convergence(totals, epoch.number, "a smaller lr")
        return self.entry([total / self.steps for total in totals.tolist()])
