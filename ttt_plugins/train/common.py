"""What all trainings share: the start, draws, checkpoints, schedule, accuracy, normalisation."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapter import Adapter
from ..artifacts.folder import OWN_WEIGHTS, Artifact, checked_text, common_config, timm_config
from ..artifacts.hub import read_named
from ..artifacts.schema import pretrained_settings
from ..backbones.backbone import Backbone
from ..core.registry import get_method
from ..data.images import LabelledImages, to_float
from ..errors import DataError, InputError
from ..methods import Source

__all__ = [
    "Normalise",
    "accuracy",
    "check_convergence",
    "check_outcome",
    "checkpoint_file",
    "create_model",
    "epoch_generator",
    "load_checkpoint",
    "make_folder",
    "rate",
    "read_start",
    "save_checkpoint",
    "write_entry",
]


def read_start(name: str) -> Artifact:
    """The artifact whose model a training starts from.

    Raises:
        InputError: it carries none.
    """
    found = read_named(name)
    if found.weights is None:
        raise InputError(f"{name} carries no model to start from")
    return found


def check_convergence(sums: Tensor, epoch: int, remedy: str) -> None:
    """Raise `InputError` if an epoch's sums (of losses, say) are not all finite.

    To be called before the epoch's checkpoint is written: the last good one stays.
    """
    if not torch.isfinite(sums).all():
        raise InputError(
            f"training diverged in epoch {epoch}; go on from the last checkpoint, if there is one, "
            f"with {remedy}"
        )


def create_model(
    arch: str, classes: int, arguments: Mapping, start: Artifact | None = None
) -> nn.Module:
    """A timm model, fresh from torch's global generator or with an artifact's weights.

    The preprocessing comes with the weights: they were trained behind it.

    Raises:
        InputError: timm cannot create it, or the weights are another architecture's.
    """
    settings = None if start is None else pretrained_settings(start.config)
    try:
        model = timm.create_model(
            arch, num_classes=classes, pretrained_cfg_overlay=settings, **arguments
        )
    except Exception as error:  # whatever a constructor does with arguments that it cannot take
        reason = str(error) or type(error).__name__
        raise InputError(f"timm could not create {arch!r} with {arguments} ({reason})") from error
    if start is not None:
        try:
            model.load_state_dict(start.weights)
        except RuntimeError as error:
            # A line on top, then one for every tensor: the first of them says enough.
            reason = "".join(str(error).splitlines()[1:2]).strip() or error
            raise InputError(f"the weights to start from do not fit {arch}: {reason}") from error
    return model


def check_outcome(
    config: Any, model: nn.Module, arch: str, arguments: Mapping, images: Tensor
) -> None:
    """What would keep a model from its training, or its adapter from being made or loaded again.

    Args:
        config: the method's.
        model: the model to train, made by timm of ``arch`` and ``arguments``; it stays as it is.
        images: uint8 images to train on; one of them passes through the model.

    Raises:
        InputError: the config's ``params`` select nothing in the model, or it takes no such images.
        ArtifactError: an artifact may not hold such fields or arguments.
    """
    record = get_method(config)
    backbone = Backbone(model, statistics=config.statistics, prior=config.prior)
    Adapter(backbone, record, config)  # chooses what adapts
    try:
        # Unadapted: the method's heads are yet to be trained.
        Adapter(backbone, get_method("source"), Source())(to_float(images[:1]).to(backbone.device))
    except InputError as error:
        raise InputError(
            f"{error}; train on images that {arch} takes, or give it model_args that fit these "
            "(many architectures take img_size)"
        ) from error
    described = {"source": OWN_WEIGHTS, "name": arch}
    written = common_config(record.name, config, described)
    written |= timm_config(model, arch, dict(arguments))
    checked_text(written, Path("the artifact"))


def epoch_generator(seed: int, epoch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """For all that an epoch draws: a resumed run draws what an unbroken one would have drawn."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


def write_entry(entry: Mapping[str, float]) -> None:
    """A line above the progress bar."""
    shown = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in entry.items() if k != "epoch")
    tqdm.write(f"epoch {entry['epoch']:3d}  {shown}")


class Normalise(nn.Module):
    """Images in [0, 1] -> ``(image - mean) / std``, by channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak rate: linear warm-up, then half a cosine down to zero."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@torch.inference_mode()
def accuracy(model: nn.Module, normalise: nn.Module, data: LabelledImages, device) -> float:
    """Share of right predictions, in [0, 1], in eval mode."""
    model.eval()
    right = 0
    for images, labels in zip(data.images.split(500), data.labels.split(500), strict=True):
        logits = model(normalise(to_float(images.to(device))))
        right += (logits.argmax(1) == labels.to(device)).sum().item()
    return right / len(data)


def checkpoint_file(folder: str | Path) -> Path:
    """``checkpoint.pt`` in a training's folder, which need not be there yet.

    Raises:
        InputError: something else is in the place of either.
    """
    file = Path(folder) / "checkpoint.pt"
    try:
        if file.parent.exists() and not file.parent.is_dir():
            raise InputError(
                f"{folder} is to hold the training's checkpoints and is no folder; move it away or "
                "train into another place"
            )
        if file.exists() and not file.is_file():
            raise InputError(f"{file} is no file; move it away or train into another place")
    except OSError as error:
        raise InputError(f"{file} cannot be looked at ({error.strerror})") from error
    return file


def make_folder(checkpoint: Path) -> None:
    """Make the folder of a checkpoint, once nothing is left that could be refused.

    Raises:
        DataError: the disk refuses.
    """
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{checkpoint.parent} cannot be made ({error})") from error


def save_checkpoint(file: Path, saved: dict) -> None:
    """Write all or nothing: an interrupted save leaves the last checkpoint.

    Raises:
        DataError: the disk refuses.
    """
    aside = file.with_suffix(".tmp")
    try:
        torch.save(saved, aside)
        os.replace(aside, file)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{file} cannot be written ({reason}); the last one stays") from error
    finally:
        # On a full disk even this may fail; the first error is the one to tell.
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def load_checkpoint(file: Path, made_by: object, device, key: str = "made_by") -> dict | None:
    """The checkpoint to go on from, None when there is none yet.

    Raises:
        InputError: it is damaged, or was made by something else than ``made_by``.
    """
    if not file.is_file():
        return None
    damage = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch guesses about a file that is none
            saved = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # of the archive, the unpickler or the system
        saved, damage = None, error
    if not isinstance(saved, dict):
        raise InputError(
            f"{file} is damaged or no checkpoint of a training; delete it, or leave --resume out, "
            "to begin anew"
        ) from damage
    if saved.get(key) != made_by:
        raise InputError(f"{file} was made by another recipe, config or model: {saved.get(key)}")
    return saved
