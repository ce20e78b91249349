"""The gain from MT3's step on fixed validation images, measured while a model trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..artifacts.tensor_files import fingerprint
from ..benchmark.evaluate import accuracy
from ..data.images import LabelledImages
from ..methods.mt3 import MT3
from ..wrapping import wrap

__all__ = ["StepGap"]

#: Number of images passed to an adapter at once.
_BATCH = 64


class StepGap:
    """Accuracy before and after MT3's step, on the same images every time.

    The images must have corruptions that no test uses and must not be trained on, because these
    measurements choose the checkpoint.
    """

    def __init__(self, extras: Mapping[str, LabelledImages], config: MT3):
        """Store the images.

        Args:
            extras: labelled images by the name of their corruption.
            config: config of the adapter whose step is measured.
        """
        self.held = LabelledImages(
            torch.cat([corrupted.images for corrupted in extras.values()]),
            torch.cat([corrupted.labels for corrupted in extras.values()]),
        )
        self.config = config
        #: What distinguishes these measurements from others: images, labels and config.
        self.mark = f"{fingerprint(vars(self.held))} {config}"

    def measure(self, model: nn.Module, head: Mapping[str, Tensor]) -> dict[str, float]:
        """Measure the accuracy, in [0, 1].

        Args:
            model: the classifier in eval mode; it is not changed.
            head: tensors of projector and predictor, and factors on the inner rate if there are
                any.

        Returns:
            ``extras_before`` without the step and ``extras_after`` with it.
        """
        nets = {
            "extras_before": wrap(model, "source"),
            "extras_after": wrap(model, self.config, tensors=dict(head)),
        }
        return {
            name: accuracy(net, self.held, _BATCH, net.backbone.device)
            for name, net in nets.items()
        }
