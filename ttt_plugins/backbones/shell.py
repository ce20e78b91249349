"""The part of an adapter's interface that all modules around a backbone share."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from ..errors import InputError
from .backbone import Backbone

__all__ = ["Shell"]

T = TypeVar("T", bound="Shell")


class Shell(nn.Module):
    """A module around a `Backbone`, which is always in eval mode and whose weights are shared.

    Attributes:
        backbone: the classifier.
        origin: where the classifier came from, as recorded in artifacts.
    """

    backbone: Backbone
    origin: dict[str, Any]

    def __call__(self, *images: Any, **named: Any) -> Any:
        """Map images (B, C, H, W) to logits (B, classes).

        Raises:
            InputError: images are passed as ``pixel_values``, as transformers' pipelines do.
        """
        if "pixel_values" in named:
            raise InputError(
                "an adapter cannot be a pipeline's model, which gets pixel_values and must know "
                "labels: use ttt_plugins.hosts.transformers.image_classification"
            )
        return super().__call__(*images, **named)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if unknown (for a plain module before its first batch)."""
        return self.backbone.num_classes

    @property
    def input_size(self) -> tuple[int, int | None, int | None]:
        """Image size (C, H, W) of the model; H and W are None if it declares none."""
        return self.backbone.input_size

    @property
    def device(self) -> torch.device:
        """Device of the model, on which images must be."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's parameters, to which images are cast."""
        return self.backbone.dtype

    def train(self: T, mode: bool = True) -> T:  # noqa: ARG002 - nn.Module's signature
        """Do nothing: an adapter behaves the same in train and eval mode."""
        return super().train(False)

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Refuse: the weights are shared with the wrapped model, which is never changed."""
        raise InputError(
            "an adapter shares its model's weights: load them into the model before wrapping it, "
            "or use load_adaptation_state to restore adapted parameters"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse: ``torch.jit.script`` cannot express gradient steps."""
        raise InputError(
            "an adapter cannot be scripted, because its forward pass takes gradient steps: call "
            "export() and pass the module that it returns to torch.export or torch.jit.trace"
        )
