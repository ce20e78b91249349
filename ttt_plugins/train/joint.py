"""Training for TTT: a classifier and its rotation head together, or the head alone.

Joint training follows the paper (arXiv 1909.13231, section 2, equation 1): trunk, main head and
rotation head minimise the mean of the main cross-entropy plus the mean of the rotation's. The
rotation head is a copy of the classifier that shares the trunk's parameters and has its own copy
of the rest.

With a frozen trunk only the rotation head is trained, on the features of an unchanged model; this
is for users who have a classifier and want to adapt it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter
from ..backbones.stages import feature_width, pooled_features, trunk
from ..core.heads import ROTATIONS, init_linear
from ..core.per_image import check_square
from ..core.registry import get_method
from ..core.views import quarter_turns, random_crop, random_flip
from ..data.images import LabelledImages, to_float
from ..data.on_demand import ImagesOnDemand
from ..errors import InputError
from ..methods.ttt import TTT
from ..methods.ttt_head import HeadRecipe, fit_head, turned
from ..utils.checks import check_choice, check_integer
from ..wrapping import wrap
from .common import initial_model, read_start
from .epochs import checkpoint_file, train_epochs
from .network import NetworkRecipe, NetworkTraining

__all__ = ["HeadRecipe", "JointRecipe", "fit_rotation_head", "train_joint"]


@dataclass(frozen=True)
class JointRecipe(NetworkRecipe):
    """How classifier and rotation head are trained; the defaults are the paper's for CIFAR-10.

    Attributes:
        split: where the trunk ends, as in `TTT`.
        schedule: ``"step"`` (the rate falls to a tenth after half of training and to a hundredth
            after five sixths, as in the paper), ``"cosine"`` (a linear warm-up over a twentieth of
            training, then half a cosine down to 0) or ``"one-cycle"`` (half a cosine up for 30 %
            of training, then half a cosine down to 0).
        rotations: ``"all"`` for the four rotations of each image, which the paper calls "expand",
            or ``"random"`` for one of them, which makes a step 2.5 times cheaper.
        padding: zero padding before the random crop, in pixels.
    """

    epochs: int = 150
    split: int | str = -1
    schedule: str = "step"
    rotations: str = "all"
    padding: int = 4

    def __post_init__(self):
        super().__post_init__()
        check_integer(self, "padding", 0)
        check_choice(self, "schedule", ("step", "cosine", "one-cycle"))
        check_choice(self, "rotations", ("all", "random"))


class JointModel(nn.Module):
    """A classifier, its twin (shared trunk, separate later layers) and the rotation layer."""

    def __init__(self, model: nn.Module, split: int | str):
        super().__init__()
        width = feature_width(model)
        if width is None:
            raise InputError(f"the width of {type(model).__name__}'s pooled features is unknown")
        shared, self.rest = trunk(model, split)
        named, owners = dict(model.named_parameters()), {n.rpartition(".")[0] for n in self.rest}
        memo: dict[int, Tensor] = {id(named[n]): named[n] for n in shared}
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[0] not in owners:
                memo[id(buffer)] = buffer
        self.model, self.twin = model, copy.deepcopy(model, memo)
        self.rotation = nn.Linear(width, ROTATIONS)
        start = init_linear(width, ROTATIONS, torch.Generator().manual_seed(0))
        self.rotation.load_state_dict(start)

    def rotation_logits(self, x: Tensor) -> Tensor:
        """Logits (N, 4) of the rotations of normalised images (N, C, S, S)."""
        return self.rotation(pooled_features(self.twin, x))

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors of the rotation head under the names of `heads`."""
        state = self.twin.state_dict()
        owners = {n.rpartition(".")[0] for n in self.rest}
        rest = {
            f"rest.{n}": t.detach().clone()
            for n, t in state.items()
            if n in self.rest
            or (n.endswith(("running_mean", "running_var")) and n.rpartition(".")[0] in owners)
        }
        return rest | {f"head.{n}": t.clone() for n, t in self.rotation.state_dict().items()}


class _RotationTraining(NetworkTraining):
    """Joint training of a classifier and its rotation head."""

    recipe: JointRecipe

    def __init__(
        self,
        recipe: JointRecipe,
        config: TTT,
        train: LabelledImages,
        test: LabelledImages,
        device: torch.device,
    ):
        model = initial_model(recipe, config, train, read_start(recipe.init))
        # The model moves before its twin is made: moving gives every module new buffers, and the
        # trunk's buffers must stay shared.
        model = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        joint = JointModel(model, recipe.split).to(device)
        optimizer = torch.optim.SGD(
            joint.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
        )
        schedule = (recipe.schedule, 0.05)
        super().__init__(recipe, joint, model, [optimizer], schedule, train, test, device)
        self.parts = {"joint": joint, "average": self.average}
        self.parts |= {"optimizer": optimizer, "schedule": self.schedules[0]}

    def loss(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        x = random_flip(random_crop(images, self.recipe.padding, generator), generator)
        x = self.normalise(to_float(x)).contiguous(memory_format=torch.channels_last)
        main = F.cross_entropy(self.net.model(x), labels)
        rotated, quarters = turned(x, self.recipe.rotations, generator)
        rotated = rotated.contiguous(memory_format=torch.channels_last)
        rotation = F.cross_entropy(self.net.rotation_logits(rotated), quarters)
        return main + rotation, torch.stack([main.detach(), rotation.detach()])

    def entry(self, means: list[float]) -> dict[str, float]:
        final, images = self.final.eval(), self.test.images
        rotations = []
        for quarter in range(ROTATIONS):
            quarters = torch.full((len(images),), quarter)
            turned_images = LabelledImages(quarter_turns(images, quarters), quarters)
            rotations.append(self.accuracy(final.rotation_logits, turned_images))
        return {
            "main_loss": means[0],
            "rotation_loss": means[1],
            "test_accuracy": self.accuracy(final.model),
            "rotation_accuracy": sum(rotations) / ROTATIONS,
        }


def train_joint(
    recipe: JointRecipe,
    train: LabelledImages,
    test: LabelledImages,
    out: str | Path,
    *,
    config: TTT | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, Tensor], dict]:
    """Train a timm model and its rotation head together.

    After every epoch ``out/checkpoint.pt`` holds everything that is needed to resume.

    Args:
        recipe: the architecture and how it is trained.
        train: labelled images to train on.
        test: labelled images; the log holds the accuracy on them after every epoch.
        out: folder for the checkpoint; created if it is missing.
        config: config of the adapter that will use the model, except for its split, which is the
            recipe's; checked before training starts.
        device: device to train on.
        resume: whether to resume from the checkpoint, if there is one; the result is the same as
            that of an uninterrupted run.
        progress: whether to show progress bars and print the log.

    Returns:
        the model in eval mode, the tensors of the rotation head, and the log.

    Raises:
        InputError: the architecture is unknown, the model has no such split, the images are not
            square, do not suit the architecture or are too few, the config selects no parameters,
            or the checkpoint is of another recipe.
        DataError: a checkpoint cannot be written.
    """
    check_square(train.images, "rotation")
    checkpoint, device = checkpoint_file(out), torch.device(device)
    config = replace(config or TTT(), split=recipe.split)
    training = _RotationTraining(recipe, config, train, test, device)
    log = train_epochs(training, checkpoint, resume=resume, progress=progress)
    joint = training.final.eval()
    return joint.model, joint.head_tensors(), {"epochs": log}


def fit_rotation_head(
    model: str | nn.Module,
    images: Tensor | ImagesOnDemand,
    recipe: HeadRecipe | None = None,
    *,
    config: TTT | None = None,
    progress: bool = True,
    **options,
) -> tuple[Adapter, dict]:
    """Train a rotation head on an unchanged model.

    Args:
        model: the classifier, in any form that `wrap` accepts.
        images: unlabelled images (N, C, S, S), uint8 or floating point in [0, 1], or images that
            are read when they are used.
        recipe: how the head is trained.
        config: config of the adapter to return, except for its split, which is the recipe's.
        progress: whether to show a progress bar and print a line per epoch.
        **options: options of `wrap` (mean, std, device, …).

    Returns:
        a TTT adapter with the trained head, and the log.

    Raises:
        InputError: the images are not square, are too few, or have a type, range or size that
            `Adapter` does not accept, the model has no such split, or the loss is not finite.
    """
    recipe = recipe or HeadRecipe()
    config = replace(config or TTT(), split=recipe.split)
    plain = wrap(model, "source", **options)
    record, backbone = get_method("ttt"), plain.backbone
    record.select(config, backbone)  # a config that does not fit the model fails before training
    head, log = fit_head(backbone, images, recipe, progress)
    # The module that the head was trained on is reused: a name may mean new random weights.
    net = Adapter(backbone, record, config, tensors=head, origin=plain.origin, seed=plain.seed)
    return net, {"epochs": log}
