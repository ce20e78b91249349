"""Labelled pictures that are read row by row, so that they are never in memory as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, InputError
from .images import LabelledImages
from .labels import label_positions
from .loading import ImageLoader, Transform
from .on_demand import intact_rows
from .source import ImageSource

__all__ = ["LabelledPictures"]

#: Seed for drawing pictures if not all are used.
_SEED = 0


class LabelledPictures:
    """The pictures of a source that has labels, as uint8 images of one size.

    Args:
        source: a source that `open_images` returns.
        transform: resizes and crops pictures.
        num_classes: number of the model's classes; None if unknown. Labels become positions
            among them, see `label_positions`.
        count: largest number of pictures to use, drawn with a fixed seed and kept in the source's
            order; all of them by default.
        workers: number of decoding processes, as for `ImageLoader`.
        skip_damaged: whether to leave out damaged pictures, which requires decoding all of them.

    Attributes:
        labels: int64 classes (N,).
        side: height and width of the images in pixels.
        skipped: number of damaged pictures that are left out.

    Raises:
        DataError: the source cannot be read, or has no labels.
        InputError: the source is a stream, its classes are not among the model's, or it has no
            8-bit pictures.
    """

    def __init__(
        self,
        source: Any,
        transform: Transform | None,
        num_classes: int | None,
        *,
        count: int | None = None,
        workers: int | None = None,
        skip_damaged: bool = False,
    ):
        if not isinstance(source, ImageSource):
            raise InputError(
                f"{source.location} is a stream, which cannot be read by row; give a folder, "
                "files, arrays or a data set"
            )
        if not source.labelled:
            raise DataError(
                f"{source.location}: pictures without labels; give a folder of class folders, or "
                "name the column of labels"
            )
        self._source, self._transform, self._workers = source, transform, workers
        self._rows = torch.arange(len(source))
        self.skipped = 0
        if skip_damaged:
            self._rows, damaged = intact_rows(source, transform, self._rows, workers)
            self.skipped = len(damaged)
        if count is not None:
            generator = torch.Generator().manual_seed(_SEED)
            drawn = torch.randperm(len(self._rows), generator=generator)[:count]
            self._rows = self._rows[drawn.sort().values]
        self.labels = _labels(source, num_classes)[self._rows]
        self.side = tuple(self.read(torch.zeros(1, dtype=torch.int64)).images.shape[2:])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Tensor) -> LabelledImages:
        """Read the pictures at ``rows`` (N,), in this order.

        Raises:
            DataError: the source cannot be read, or a picture is damaged or of another size.
        """
        # Files and blocks of rows are fastest to read in their own order.
        order = rows.argsort()
        loader = ImageLoader(
            self._source,
            transform=self._transform,
            workers=self._workers,
            rows=self._rows[rows[order]],
        )
        images = torch.cat([batch.images for batch in loader])
        if images.dtype != torch.uint8:
            raise InputError(f"{self._source.location}: images must be uint8, not {images.dtype}")
        return LabelledImages(images[order.argsort()], self.labels[rows])


def _labels(source: ImageSource, num_classes: int | None) -> Tensor:
    """The labels of all rows, as positions among a model's classes."""
    labels = source.read_labels()
    if num_classes is None:
        return labels
    positions = label_positions(num_classes, source.classes)
    if positions is None:
        raise InputError(
            f"{source.location} has {len(source.classes or ())} classes and the model "
            f"{num_classes}, and their names do not say which are which; name the folders by "
            "ImageNet's WordNet identifiers or words, or have one folder for each of the model's "
            "classes"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= len(positions):
        raise DataError(
            f"{source.location}: labels must be from 0 to {len(positions) - 1}, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    return torch.tensor(positions)[labels]
