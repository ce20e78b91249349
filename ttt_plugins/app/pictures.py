"""The pictures of the page: the bundled sample, a source on the disk, or dropped files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ..adapter import Adapter
from ..core.pictures import picture_transform
from ..data.cifar10 import CIFAR10_CLASSES
from ..data.labels import class_names, label_positions
from ..data.loading import ImageLoader
from ..data.opening import open_images
from ..data.source import ImageStream
from ..data.transforms import evaluation_transform
from ..demo.sample import load_sample
from ..errors import DataError, InputError

__all__ = ["Pictures", "dropped_pictures", "sample_pictures", "source_pictures"]

#: Side in pixels for models that do not say which size they expect.
_SIDE = 224


@dataclass(frozen=True)
class Pictures:
    """Pictures in the size that a model expects.

    Attributes:
        images: uint8 images (N, 3, H, W).
        labels: int64 positions (N,) among the model's classes; None if they are unknown.
        names: names of the model's classes; None if they are unknown.
        skipped: one line for each damaged picture that was left out.
    """

    images: Tensor
    labels: Tensor | None
    names: Sequence[str] | None
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)


def _transform(net: Adapter) -> Any:
    return picture_transform(net.backbone) or evaluation_transform(net.backbone.model, _SIDE)


def sample_pictures(net: Adapter, kind: str, count: int | None = None) -> Pictures:
    """The bundled CIFAR-10 images of one kind, ``clean`` or a corruption.

    Their labels are used for models of ten classes, which are taken for CIFAR-10's.

    Raises:
        InputError: there is no such kind, or the count is out of range.
    """
    sample = load_sample(n=count)
    if kind not in sample.images:
        raise InputError(f"the sample has {', '.join(sample.images)}, not {kind!r}")
    images = sample.images[kind]
    if None not in net.input_size and tuple(net.input_size) != tuple(images.shape[1:]):
        transform = _transform(net)
        images = torch.stack([transform(to_pil_image(image)) for image in images])
    fits = net.num_classes == len(CIFAR10_CLASSES)
    names = CIFAR10_CLASSES if fits else class_names(net.num_classes)
    return Pictures(images, sample.labels if fits else None, names)


def source_pictures(net: Adapter, source: Any, count: int, seed: int = 0) -> Pictures:
    """The first ``count`` pictures of a shuffled source.

    Args:
        net: the adapter that the pictures are for.
        source: what `open_images` opens.
        count: largest number of pictures.
        seed: seed of the order, because folders are stored by class.

    Raises:
        DataError: there are no pictures, or the source cannot be read.
        InputError: as for `ImageLoader`.
    """
    opened = open_images(source)
    loader = ImageLoader(
        opened,
        transform=_transform(net),
        workers=0,
        seed=None if isinstance(opened, ImageStream) else seed,
        limit=count,
        skip_damaged=True,
    )
    images, labels = [], []
    for batch in loader:
        images.append(batch.images)
        labels.append(batch.labels)
    if not sum(map(len, images)):
        raise DataError(f"{opened.location}: no picture that can be read")
    positions = label_positions(net.num_classes, opened.classes)
    known = None
    if positions is not None and all(part is not None for part in labels):
        known = torch.tensor(positions)[torch.cat(labels)]
    names = class_names(net.num_classes, opened.classes)
    return Pictures(torch.cat(images), known, names, tuple(loader.skipped))


def dropped_pictures(net: Adapter, files: Sequence[str | Path], count: int) -> Pictures:
    """Unlabelled pictures from single files, in their order.

    Raises:
        DataError: there are no pictures, or none can be read.
    """
    if not files:
        raise DataError("no pictures yet: drop some, or choose the bundled sample")
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(files[:count]):
            link = Path(folder) / f"{number:05d}{Path(file).suffix.lower()}"
            link.symlink_to(Path(file).resolve())
        return source_pictures(net, folder, count)
