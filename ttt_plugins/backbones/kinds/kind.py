"""What is known about a kind of model, such as those of transformers: the seam for other kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import InputError
from ...utils.pictures import Pictures

__all__ = ["ModelKind", "Output", "Settings", "check_output"]

#: Which part of what a model returns holds the logits: a key or an attribute, or a position.
Output = str | int


@dataclass(frozen=True)
class Settings:
    """What a model of some kind says about its input and its output; None where it says nothing.

    Attributes:
        mean: mean of the pixels in [0, 1], one number a channel.
        std: their standard deviation.
        normalize: False if the model gets pixels in [0, 1] unchanged.
        pictures: how pictures are resized and cropped for it.
        input_size: size (H, W) of its images, if pictures do not tell.
        fixed_size: whether it accepts no images of another size.
        num_classes: number of classes.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    normalize: bool = True
    pictures: Pictures | None = None
    input_size: tuple[int, int] | None = None
    fixed_size: bool = False
    num_classes: int | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Size (H, W) of the images that the model was made for."""
        return (self.pictures.size if self.pictures is not None else None) or self.input_size

    def with_preprocessing(self, other: Settings) -> Settings:
        """These settings with another's normalisation and pictures."""
        return replace(
            self,
            mean=other.mean,
            std=other.std,
            normalize=other.normalize,
            pictures=other.pictures or self.pictures,
        )


class ModelKind:
    """A kind of model: a subclass in a file of this folder, with an instance called ``KIND``.

    Nothing else has to be changed for a new kind. Its library is imported inside the methods only,
    and may be missing.

    Attributes:
        prefix: of names such as ``"torchvision:resnet18"``; empty if its models have no names.
    """

    prefix = ""

    def owns(self, model: nn.Module) -> bool:
        """Whether this is a model of this kind. Its library need not be imported to know."""
        raise NotImplementedError

    def settings(self, model: nn.Module) -> Settings:
        """What a model of this kind says about itself."""
        del model
        return Settings()

    def read(self, preprocess: Any) -> Settings | None:
        """The preprocessing that an object of this kind's library describes, None for others.

        Raises:
            InputError: it is of this library, but nothing that an adapter can do.
        """
        del preprocess
        return None

    def classifier(self, model: nn.Module, labels: Sequence[str] | None) -> nn.Module:
        """A classifier for a model of this kind, which may be none itself.

        Args:
            model: a model of this kind.
            labels: names of the classes, for a model that compares images with texts.

        Raises:
            InputError: labels are missing, or of no use for this kind.
        """
        if labels is not None:
            raise InputError(
                f"labels= is for models that compare images with texts; {type(model).__name__} "
                "has classes of its own"
            )
        return model

    def named(self, name: str, pretrained: bool) -> nn.Module:
        """The model of a name without the prefix, by the library's own loader.

        Only a user's own words get here; a name in an artifact never does.

        Raises:
            InputError: there is no such model.
        """
        raise NotImplementedError

    def repository(self, config: Mapping[str, Any]) -> bool:
        """Whether a Hub repository with this ``config.json`` holds a model of this kind."""
        del config
        return False

    def ready(self) -> None:
        """Import what `build` needs, before its time and memory are limited.

        Raises:
            MissingDependencyError: the library is not installed.
        """

    def build(self, config: Mapping[str, Any], weights: Mapping[str, Any] | None) -> nn.Module:
        """The model of a repository; ``config.json`` may come from anybody, and is data.

        Args:
            config: the parsed ``config.json``.
            weights: the tensors in ``model.safetensors``; None to build it with random weights
                on PyTorch's meta device, to learn its size.

        Raises:
            ValueError: the description is no model of this kind, or asks for anything but one, or
                the weights do not fit.
        """
        raise NotImplementedError


def check_output(output: Any) -> Output | None:
    """Return ``output`` if it can say where the logits are.

    Raises:
        InputError: it is neither None, a name, nor a position from 0 to 63.
    """
    if isinstance(output, str) and output.isidentifier() and not output.startswith("_"):
        return output
    if output is None or (type(output) is int and 0 <= output < 64):
        return output
    raise InputError(
        f"output= is the key, the attribute or the position (0, 1, …) of the logits in what the "
        f"model returns, got {output!r}"
    )
