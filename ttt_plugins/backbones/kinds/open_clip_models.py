"""open_clip's models as zero-shot classifiers: images are compared with the classes' names.

The class weights are the texts' embeddings, normalised to length one (Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, section 3.1): the
logits are cosine similarities times the model's learned temperature. The text half is used once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...utils.pictures import Pictures
from . import attach
from .kind import ModelKind, Settings

__all__ = ["ZeroShot", "zero_shot"]

#: Mean and standard deviation of the images that CLIP's models are trained on, its own default.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ZeroShot(nn.Module):
    """A classifier of normalised images (B, C, H, W) -> logits (B, classes).

    Attributes:
        visual: the image half of the model.
        head: a linear layer whose weights are the classes' embeddings, times the temperature.
    """

    def __init__(self, visual: nn.Module, weights: Tensor, bias: Tensor | None):
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(weights.shape[1], len(weights), bias=bias is not None)
        self.head.weight = nn.Parameter(weights)
        if bias is not None:
            self.head.bias = nn.Parameter(bias)
        self.num_classes = len(weights)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised -> logits (B, classes)."""
        features = self.visual(images)
        features = features[0] if isinstance(features, (tuple, list)) else features
        return self.head(F.normalize(features, dim=-1))


@torch.no_grad()
def zero_shot(
    model: nn.Module,
    labels: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> nn.Module:
    """A classifier over a list of class names, from an open_clip model.

    Args:
        model: a model of open_clip, whose image half is shared and whose text half is run once.
        labels: names of the classes.
        templates: sentences with ``{}`` where the name goes; their embeddings are averaged.
        tokenizer: of the model; unless given, CLIP's own (``open_clip.get_tokenizer(NAME)``
            returns another where a model needs one).

    Returns:
        the classifier, a module to `ttt_plugins.wrap`.

    Raises:
        InputError: this is no open_clip model, or a template has no ``{}``.
    """
    text = getattr(model, "encode_text", None)
    visual = getattr(model, "visual", None)
    if text is None or not isinstance(visual, nn.Module):
        raise InputError(f"{type(model).__name__} is no open_clip model with a text half")
    if isinstance(templates, str) or not templates or not all("{}" in t for t in templates):
        raise InputError("templates are sentences with {} where the name of a class goes")
    if tokenizer is None:
        import open_clip

        tokenizer = open_clip.tokenize
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    rows = []
    try:
        for name in labels:
            tokens = tokenizer([t.format(name) for t in templates]).to(device)
            rows.append(F.normalize(F.normalize(text(tokens), dim=-1).mean(0), dim=0))
    finally:
        model.train(training)
    scale: Any = getattr(model, "logit_scale", None)
    bias: Any = getattr(model, "logit_bias", None)
    weights = torch.stack(rows) * (1.0 if scale is None else scale.exp())
    made = ZeroShot(visual, weights, None if bias is None else bias.detach().expand(len(rows)))
    attach(made, KIND.settings(model))
    return made.eval()


class _OpenClip(ModelKind):
    def owns(self, model: nn.Module) -> bool:
        named = any(c.__module__.split(".")[0] == "open_clip" for c in type(model).__mro__)
        return named and hasattr(model, "encode_text")

    def settings(self, model: nn.Module) -> Settings:
        visual: Any = model.visual
        told = getattr(visual, "preprocess_cfg", None) or {}
        mean = told.get("mean") or getattr(visual, "image_mean", None) or _MEAN
        std = told.get("std") or getattr(visual, "image_std", None) or _STD
        size = told.get("size") or getattr(visual, "image_size", None)
        size = (size, size) if isinstance(size, int) else size
        size = (int(size[0]), int(size[1])) if size else None
        pictures = None
        if size is not None:
            filling = told.get("resize_mode", "shortest") == "shortest" and size[0] == size[1]
            filter_ = str(told.get("interpolation") or "bicubic")
            pictures = Pictures(size[0] if filling else size, size if filling else None, filter_)
        return Settings(
            tuple(map(float, mean)), tuple(map(float, std)), pictures=pictures, fixed_size=True
        )

    def classifier(self, model: nn.Module, labels: Sequence[str] | None) -> nn.Module:
        if labels is None:
            raise InputError(
                "a model of open_clip compares images with texts: give the names of the classes, "
                'labels=["cat", "dog"]'
            )
        return zero_shot(model, labels)


KIND = _OpenClip()
