"""Joint training of a classifier with BYOL's loss; MT3's meta-training can start from the result.

The loss is the mean cross-entropy of labelled images plus a weight times BYOL's loss on two views
of each. Network, projector and predictor are trained together, without an inner step. Heads, views
and batch augmentation are those of MT3's tasks (arXiv 2103.16201, the baseline "JT").

Deviations from the released code:
1. The targets of BYOL's loss are the same network's projections under a stopped gradient, as in
   MT3's tasks, and not those of a moving average of the network.
2. The batch augmentation is drawn for every ``task_images`` images, as in MT3's tasks, and not once
   for the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.stages import pooled_features
from ..core.heads import init_byol
from ..core.per_image import check_square
from ..core.schedules import SCHEDULES
from ..data.images import LabelledImages
from ..errors import InputError
from ..methods.mt3 import MT3, features_loss
from ..utils.checks import check_choice, check_integer, check_number
from .common import initial_model, read_start
from .epochs import checkpoint_file, train_epochs
from .gap import StepGap
from .mt3_step import default_model_args, draw_tasks
from .network import NetworkRecipe, NetworkTraining

__all__ = ["ByolModel", "ByolRecipe", "train_byol"]


@dataclass(frozen=True)
class ByolRecipe(NetworkRecipe):
    """How classifier, projector and predictor are trained together.

    The defaults are the authors', except ``task_images``: theirs is the whole batch.

    Attributes:
        model_args: keyword arguments for the architecture's constructor; by default those of MT3's
            network for ttt_resnet26, and none for any other architecture.
        task_images: number of images that share one draw of the batch augmentation; it must
            divide ``batch_size``.
        schedule: ``"constant"``, ``"cosine"`` (after a warm-up of a twentieth), ``"step"``,
            ``"one-cycle"`` (up for 30 % of training, then down to 0) or ``"constant-then-decay"``
            (down to 0 in the last quarter).
        self_supervised: weight of BYOL's loss.
        views: fraction of each batch's tasks, in (0, 1], from whose images views are drawn for
            BYOL's loss; one half makes a step a third cheaper.
    """

    epochs: int = 200
    weight_decay: float = 0.0
    task_images: int = 8
    schedule: str = "constant"
    self_supervised: float = 0.1
    views: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_integer(self, "task_images", 1)
        check_number(self, "self_supervised", 0)
        check_number(self, "views", 0, 1)
        check_choice(self, "schedule", SCHEDULES)
        if self.batch_size % self.task_images:
            raise InputError(
                f"ByolRecipe.batch_size must be a multiple of task_images ({self.task_images}), "
                f"got {self.batch_size}"
            )
        if not self.views:
            raise InputError("ByolRecipe.views must be above 0, got 0: BYOL's loss needs views")

    def _default_model_args(self) -> dict[str, Any]:
        return default_model_args(self.arch)


class ByolModel(nn.Module):
    """A classifier with BYOL's projector and predictor on its pooled features."""

    def __init__(self, model: nn.Module, generator: torch.Generator):
        super().__init__()
        self.model = model
        tensors = init_byol(model, generator)
        for head in ("projector", "predictor"):
            layers = nn.ModuleDict()
            for name in ("in", "out"):
                outputs, inputs = tensors[f"{head}.{name}.weight"].shape
                layers[name] = nn.Linear(inputs, outputs)
            self.add_module(head, layers)
        self.load_state_dict(tensors, strict=False)

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors of projector and predictor under the names that MT3 uses for them."""
        return {n: t for n, t in self.named_parameters() if not n.startswith("model.")}

    def byol_loss(self, x1: Tensor, x2: Tensor) -> Tensor:
        """BYOL's loss of two normalised views (N, C, S, S) of each image, in one pass."""
        return features_loss(self.head_tensors(), pooled_features(self.model, torch.cat([x1, x2])))


class _ByolTraining(NetworkTraining):
    """Joint training of a classifier with BYOL's loss."""

    recipe: ByolRecipe

    def __init__(
        self,
        recipe: ByolRecipe,
        config: MT3,
        train: LabelledImages,
        test: LabelledImages,
        gap: StepGap | None,
        device: torch.device,
    ):
        model = initial_model(recipe, config, train, read_start(recipe.init))
        net = ByolModel(model, torch.Generator().manual_seed(recipe.seed))
        net = net.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.gap = gap
        optimizer = torch.optim.SGD(
            net.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
        )
        schedule = (recipe.schedule, 0.05)
        super().__init__(recipe, net, model, [optimizer], schedule, train, test, device)
        self.parts = {"net": net, "average": self.average}
        self.parts |= {"optimizer": optimizer, "schedule": self.schedules[0]}

    def loss(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        x1, x2, x, y = draw_tasks(images, labels, recipe.task_images, generator)
        viewed_tasks = max(1, round(recipe.views * len(x1)))
        logits = self.net.model(self._ready(x))
        main = F.cross_entropy(logits, y.flatten())
        byol = self.net.byol_loss(self._ready(x1[:viewed_tasks]), self._ready(x2[:viewed_tasks]))
        correct = (logits.argmax(1) == y.flatten()).float().mean()
        numbers = torch.stack([main.detach(), byol.detach(), correct])
        return main + recipe.self_supervised * byol, numbers

    def _ready(self, tasks: Tensor) -> Tensor:
        """Normalise the images of tasks: (T, N, C, S, S) in [0, 1] -> (T * N, C, S, S)."""
        flat = self.normalise(tasks.flatten(0, 1))
        return flat.contiguous(memory_format=torch.channels_last)

    def entry(self, means: list[float]) -> dict[str, float]:
        final = self.final.eval()
        entry = {
            "cross_entropy": means[0],
            "byol_loss": means[1],
            "accuracy": means[2],
            "test_accuracy": self.accuracy(final.model),
        }
        return entry | self.gap.measure(final.model, _detached(final)) if self.gap else entry


def _detached(net: ByolModel) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in net.head_tensors().items()}


def train_byol(
    recipe: ByolRecipe,
    train: LabelledImages,
    test: LabelledImages,
    out: str | Path,
    *,
    config: MT3 | None = None,
    gap: StepGap | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, Tensor], dict]:
    """Train a timm model, its projector and its predictor together.

    After every epoch ``out/checkpoint.pt`` holds everything that is needed to resume.

    Args:
        recipe: the architecture and how it is trained.
        train: labelled images to train on.
        test: labelled images; the log holds the accuracy on them after every epoch.
        out: folder for the checkpoint; created if it is missing.
        config: config of the adapter that will use the model; checked before training starts.
        gap: measures the accuracy before and after the adapter's step, for the log of every epoch.
        device: device to train on.
        resume: whether to resume from the checkpoint, if there is one; the result is the same as
            that of an uninterrupted run.
        progress: whether to show progress bars and print the log.

    Returns:
        the model in eval mode, the tensors of the heads, and the log.

    Raises:
        InputError: the architecture is unknown, the images are not square, do not suit it or are
            too few, the config selects no parameters, or the checkpoint is of another recipe.
        DataError: a checkpoint cannot be written.
    """
    check_square(train.images, "MT3")
    checkpoint = checkpoint_file(out)
    training = _ByolTraining(recipe, config or MT3(), train, test, gap, torch.device(device))
    log = train_epochs(training, checkpoint, resume=resume, progress=progress)
    net = training.final.eval()
    return net.model, _detached(net), {"epochs": log}
