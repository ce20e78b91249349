"""Training of a network by gradient descent, for any loss."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..benchmark.evaluate import accuracy
from ..core.schedules import schedule_factor
from ..data.images import LabelledImages
from .common import steps_per_epoch
from .epochs import Epoch, Recipe, Training, check_convergence

__all__ = ["NetworkTraining"]


class NetworkRecipe(Recipe, Protocol):
    """The fields of a recipe that `NetworkTraining` reads."""

    @property
    def batch_size(self) -> int:
        """Number of images in each step."""
        ...

    @property
    def ema(self) -> float:
        """Decay of the weights' moving average per step, in [0, 1]; 0 disables the average."""
        ...


class NetworkTraining(Training):
    """Epochs of gradient descent, with a moving average of the weights.

    Attributes:
        net: the module that is trained.
        average: the moving average of its weights and buffers.
        optimizers: optimizers whose learning rates are the peaks of their schedules.
        schedules: learning rate schedules, one per optimizer.
        images: uint8 training images (N, C, H, W) on the network's device.
        labels: int64 classes (N,) on the same device.
    """

    def __init__(
        self,
        recipe: NetworkRecipe,
        net: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        schedule: tuple[str, float],
        train: LabelledImages,
        device: torch.device,
    ):
        """Set up the average and the schedules.

        Args:
            recipe: recipe of the training.
            net: the module to train, already on ``device``.
            optimizers: optimizers of the parameters of ``net``.
            schedule: name of the schedule, and the fraction of the steps in which it warms up.
            train: labelled images to train on.
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
        self.images, self.labels = train.images.to(device), train.labels.to(device)

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

    def accuracy(self, model: nn.Module, normalise: nn.Module, data: LabelledImages) -> float:
        """Accuracy in [0, 1], in eval mode."""
        model.eval()
        return accuracy(lambda x: model(normalise(x)), data, device=self.device)

    @abstractmethod
    def entry(self, means: list[float]) -> dict[str, float]:
        """The log's entry for an epoch, from means over its steps."""

    def run(self, epoch: Epoch) -> dict[str, float]:
        """Train for one epoch."""
        self.prepare(epoch)
        self.net.train()
        totals = torch.zeros((), device=self.images.device)
        for rows in epoch.rows(len(self.images), self.batch_size, self.steps):
            loss, numbers = self.loss(self.images[rows], self.labels[rows], epoch.generator)
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
