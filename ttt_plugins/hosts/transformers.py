"""An adapter as a model of Hugging Face transformers, for its image classification pipeline.

transformers' models take ``pixel_values`` by name, return an output object and carry a
configuration with the labels' names. `Classifier` gives an adapter that form, and
`image_classification` builds the pipeline around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..adapter import Adapter
from ..errors import InputError, MissingDependencyError

try:
    from transformers import (
        AutoConfig,
        AutoModelForImageClassification,
        ImageClassificationPipeline,
        PretrainedConfig,
        PreTrainedModel,
        ViTImageProcessor,
    )
    from transformers.modeling_outputs import ImageClassifierOutput
except ImportError as error:
    raise MissingDependencyError(
        f"this needs Hugging Face transformers: pip install transformers ({error})"
    ) from error

__all__ = ["Classifier", "image_classification"]


class ClassifierConfig(PretrainedConfig):
    """The labels' names; the settings of adaptation are in the adapter's own config."""

    model_type = "ttt_plugins"


class Classifier(PreTrainedModel):
    """An adapter with the interface of a transformers model.

    Args:
        net: the adapter.
        labels: names of the classes, in the order of the logits; by default ``LABEL_0``,
            ``LABEL_1``, …

    Attributes:
        net: the adapter; call ``net.reset()`` before each new stream.

    Raises:
        InputError: the number of classes is unknown, or differs from the number of labels.
    """

    config_class = ClassifierConfig
    main_input_name = "pixel_values"

    def __init__(self, net: Adapter, labels: Sequence[str] | None = None):
        classes = len(labels or ()) or net.num_classes
        if classes is None:
            raise InputError("the model does not say how many classes it has: give labels=")
        if net.num_classes not in (None, classes):
            raise InputError(f"{classes} labels were given, but the model has {net.num_classes}")
        names = [f"LABEL_{i}" for i in range(classes)] if labels is None else labels
        config = ClassifierConfig(
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type="single_label_classification",
        )
        super().__init__(config)
        self.net = net

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Map images (B, C, H, W) in [0, 1] to logits (B, classes), and a loss if labels are given.

        The loss is the cross-entropy of the logits, for evaluation; adaptation never uses labels.
        """
        logits = self.net(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, save_directory: str | Path, **records: Any) -> None:
        """Write the adapter's own artifact, which `ttt_plugins.from_pretrained` loads."""
        self.net.save_pretrained(save_directory, **records)


AutoConfig.register(ClassifierConfig.model_type, ClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(ClassifierConfig, Classifier, exist_ok=True)


def image_classification(
    net: Adapter, labels: Sequence[str] | None = None, **options: Any
) -> ImageClassificationPipeline:
    """The image classification pipeline of transformers for an adapter.

    The pipeline passes images through the model one at a time unless it is called with a
    ``batch_size``; the online methods then adapt to batches of that size.

    Args:
        net: the adapter.
        labels: names of the classes, in the order of the logits.
        **options: options of `transformers.ImageClassificationPipeline`; an ``image_processor``
            must return images in [0, 1]. Without one, images are resized to the model's input size.

    Returns:
        the pipeline; ``pipeline.model.net`` is the adapter.
    """
    height, width = net.input_size[1:]
    if "image_processor" not in options:
        known = height is not None and width is not None
        size = {"size": {"height": height, "width": width}} if known else {}
        options["image_processor"] = ViTImageProcessor(do_resize=known, do_normalize=False, **size)
    return ImageClassificationPipeline(model=Classifier(net, labels), **options)
