"""Flags for sources of pictures, and reading of the images that training uses."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor

from ..adapter import Adapter
from ..benchmark import CorruptionData, open_class_folders
from ..core.pictures import picture_transform
from ..data.cifar10 import EXTRA_ROWS
from ..data.corruptions import TENSOR_CORRUPTIONS, corrupt
from ..data.datasets import DATASETS
from ..data.images import LabelledImages, to_float
from ..data.labelled import LabelledPictures
from ..data.labels import label_positions
from ..data.loading import ImageLoader, Transform
from ..data.on_demand import ImagesOnDemand, intact_rows
from ..data.opening import open_images
from ..data.parquet import read_parquet
from ..data.source import ImageSource, read_order
from ..data.transforms import evaluation_transform
from ..errors import DataError, InputError
from ..utils.progress import progress_bar
from ..utils.text import printable
from ..wrapping import wrap

__all__ = [
    "add_source_flags",
    "cells_by_rows",
    "corrupted_pictures",
    "folder_classes",
    "gather_pictures",
    "head_images",
    "in_class_folders",
    "named_sources",
    "open_source",
    "picture_cells",
    "pictures_on_demand",
    "statistics_images",
    "test_images",
    "training_images",
]

#: Largest fraction of this machine's memory that the pictures for training may take.
_SHARE_OF_MEMORY = 0.5
#: Severity of the corruptions that MGG is meta-trained on.
_SEVERITY = 5


def add_source_flags(add: argparse.ArgumentParser) -> None:
    """Add the flags that control how a source of pictures is read."""
    add.add_argument(
        "--image-size", type=int, metavar="S", help="side in pixels (default: the model's own)"
    )
    add.add_argument(
        "--image-column", help="column or array of images in parquet or npz (default: by its name)"
    )
    add.add_argument(
        "--label-column", help="column or array of labels in parquet or npz (default: by its name)"
    )
    add.add_argument(
        "--stream", action="store_true", help="stream hf:// data sets, do not download them first"
    )
    add.add_argument("--workers", type=int, metavar="N", help="number of decoding processes")
    add.add_argument("--skip-damaged", action="store_true", help="skip damaged pictures")


def open_source(args: argparse.Namespace, source: str) -> Any:
    """Open a source with the options that the flags set."""
    return open_images(
        source,
        image_column=args.image_column,
        label_column=args.label_column,
        stream=args.stream,
    )


def gather_pictures(
    args: argparse.Namespace,
    source: str,
    transform: Transform | None,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None, tuple[str, ...] | None]:
    """Read all pictures of a source into memory, as uint8 pixels (N, 3, S, S).

    Args:
        args: the flags of `add_source_flags`.
        source: a source of images, in any form that `open_images` accepts.
        transform: resizes and crops each picture.
        limit: largest number of pictures; None for all. They are drawn with the seed, except that
            a stream yields its first pictures.
        seed: seed for this draw.

    Returns:
        The pixels, labels (N,) if there are any, and the names of the classes if there are any.

    Raises:
        InputError: the pictures do not fit into memory.
        DataError: the source cannot be read.
    """
    opened = open_source(args, source)
    draw = isinstance(opened, ImageSource) and limit is not None and limit < len(opened)
    loader = ImageLoader(
        opened,
        transform=transform,
        workers=args.workers,
        seed=seed if draw else None,
        limit=limit,
        skip_damaged=args.skip_damaged,
    )
    images, labels, total = [], [], len(loader) if isinstance(opened, ImageSource) else limit
    for batch in progress_bar(loader, f"pictures of {source}"):
        if not images and total is not None:
            _check_memory(source, total * batch.images[0].numel())
        images.append(batch.images)
        labels.append(batch.labels)
    if not images:
        raise DataError(f"{source}: no pictures")
    if loader.skipped:
        print(f"skipped {len(loader.skipped)} damaged pictures, the first: {loader.skipped[0]}")
    numbers = None if None in labels else torch.cat(labels)
    return torch.cat(images), numbers, opened.classes


def _check_memory(source: str, size: int) -> None:
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > _SHARE_OF_MEMORY * memory:
        raise InputError(
            f"{source}: its pictures would take {size / 1e9:.1f} GB of this machine's "
            f"{memory / 1e9:.1f} GB; give --max-images or a smaller --image-size"
        )


def pictures_on_demand(
    args: argparse.Namespace,
    source: str,
    transform: Transform | None,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Tensor | ImagesOnDemand, Tensor | None]:
    """Pictures of a source that are decoded when they are used, as for `gather_pictures`.

    A stream can be read only once, so its pictures are kept in memory.

    Returns:
        The images, and labels (N,) if there are any.
    """
    opened = open_source(args, source)
    if not isinstance(opened, ImageSource):
        return gather_pictures(args, source, transform, limit=limit, seed=seed)[:2]
    draw = limit is not None and limit < len(opened)
    rows = read_order(opened, seed if draw else None)[:limit]
    if args.skip_damaged:
        rows, damaged = intact_rows(opened, transform, rows, args.workers)
        if damaged:
            print(f"skipped {len(damaged)} damaged pictures, the first: {damaged[0]}")
    images = ImagesOnDemand(opened, transform, rows=rows, workers=args.workers)
    return images, opened.read_labels()[rows] if opened.labelled else None


def corrupted_pictures(
    args: argparse.Namespace, net: Adapter, limit: int | None, seed: int
) -> tuple[dict[str, LabelledImages], str]:
    """Clean pictures of ``args.images``, corrupted in the four ways that MGG is trained on.

    Args:
        args: the flags of `add_source_flags`, and ``images``.
        net: the adapter to train, whose model's input size the pictures get.
        limit: largest number of pictures, which are kept in memory; by default as many as each of
            the benchmark's four extra files holds.
        seed: seed for the choice of pictures and for the noise.

    Returns:
        Images by corruption, all in the same order, and a phrase that says whose labels they have.
    """
    transform = picture_transform(net.backbone, args.image_size)
    limit = EXTRA_ROWS if limit is None else limit
    clean, labels, classes = gather_pictures(args, args.images, transform, limit=limit, seed=seed)
    positions = label_positions(net.num_classes, classes)
    origin = "the source's"
    if labels is not None and positions is not None and int(labels.max()) < len(positions):
        labels = torch.tensor(positions)[labels]
    else:
        labels, origin = _predictions(net, clean), "the unadapted model's on the clean pictures"
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for name in TENSOR_CORRUPTIONS:
        batches = (batch.to(net.backbone.device) for batch in clean.split(64))
        images = [corrupt(batch, name, _SEVERITY, generator=generator).cpu() for batch in batches]
        data[name] = LabelledImages(torch.cat(images), labels)
    return data, origin


@torch.inference_mode()
def _predictions(net: Adapter, images: Tensor) -> Tensor:
    batches = (to_float(batch.to(net.backbone.device)) for batch in images.split(64))
    return torch.cat([net.backbone(batch).argmax(1).cpu() for batch in batches])


# -- pictures for a benchmark --------------------------------------------------------------------


def named_sources(args: argparse.Namespace) -> dict[str, Any]:
    """The sources of --images by name: NAME in NAME=SOURCE, otherwise the last part of the address.

    Raises:
        InputError: two sources have the same name.
    """
    sources: dict[str, Any] = {}
    for text in args.images:
        name, equals, source = text.partition("=")
        if not equals or not name or re.search(r"[/\\:]", name) or Path(text).exists():
            name, source = re.split(r"[/\\]", text.rstrip("/\\"))[-1], text
        if name in sources:
            raise InputError(f"two sources are named {name}; give each a name, as in NAME={source}")
        sources[name] = open_source(args, source)
    return sources


def folder_classes(sources: Mapping[str, Any], net: Adapter) -> list[int] | None:
    """Positions of the folders' classes among a model's; None if each of its classes has a folder.

    Raises:
        InputError: the sources' classes differ, have no names, or are not among the model's.
    """
    classes = {source.classes for source in sources.values()}
    if len(classes) > 1 or None in classes:
        raise InputError("--classes folder needs sources whose named classes are the same")
    names = classes.pop()
    if len(names) == net.num_classes:
        return None
    positions = label_positions(net.num_classes, names)
    if positions is None:
        raise InputError(
            f"--classes folder: {', '.join(names[:3])}, … are not all among the model's "
            f"{net.num_classes} classes; name the folders by ImageNet's WordNet identifiers or "
            "words"
        )
    return positions


def picture_cells(
    args: argparse.Namespace, sources: Mapping[str, Any], net: Adapter, count: int | None
) -> CorruptionData:
    """The cells of a benchmark on labelled pictures.

    Args:
        args: the flags of `add_source_flags`, ``corrupt``, ``severity`` and ``device``.
        sources: from `named_sources`.
        net: an adapter on the model, which defines the input size and the classes.
        count: largest number of pictures of each source.

    Raises:
        InputError, DataError: as for `LabelledPictures`.
    """
    transform = picture_transform(net.backbone, args.image_size)
    pictures = {
        name: LabelledPictures(
            source,
            transform,
            net.num_classes,
            count=count,
            workers=args.workers,
            skip_damaged=args.skip_damaged,
        )
        for name, source in sources.items()
    }
    for name, source in pictures.items():
        if source.skipped:
            print(f"{printable(name)}: left out {source.skipped} damaged pictures", flush=True)
    return CorruptionData.from_pictures(
        pictures, args.corrupt or (), args.severity or range(1, 6), args.device or "cpu"
    )


def in_class_folders(args: argparse.Namespace) -> bool:
    """Whether the benchmark's data set is stored in class folders."""
    return args.images is None and DATASETS[args.dataset].layout == "folders"


def cells_by_rows(
    args: argparse.Namespace, sources: Mapping[str, Any] | None, net: Adapter, count: int | None
) -> CorruptionData:
    """The cells of a data set of class folders, or of sources, at the model's input size."""
    if sources is not None:
        return picture_cells(args, sources, net, count)
    return open_class_folders(
        args.dataset,
        args.data_dir,
        net,
        corruptions=args.corruption,
        n_examples=count,
        size=args.image_size,
        workers=args.workers,
        skip_damaged=args.skip_damaged,
    )


# -- images for training -------------------------------------------------------------------------


def training_images(args: argparse.Namespace, recipe: Any) -> LabelledImages:
    """The images of --images, or those of ``train.parquet`` without MGG's meta-training rows.

    MGG is compared with models trained on that file, which must not have seen those rows.
    """
    if args.images is not None:
        return _labelled_pictures(args, recipe, args.images, args.max_images)
    file = args.data_dir / "train.parquet"
    images = read_parquet(file)[:-EXTRA_ROWS]
    if not len(images):
        raise DataError(f"{file}: no images before the last {EXTRA_ROWS}, which are held out")
    return images


def _labelled_pictures(
    args: argparse.Namespace, recipe: Any, source: str, limit: int | None
) -> LabelledImages:
    """Labelled pictures at the input size of the recipe's architecture."""
    model = SimpleNamespace(pretrained_cfg=None)
    settings = get_pretrained_cfg(recipe.arch) if is_model(recipe.arch) else None
    if settings is not None:
        model.pretrained_cfg = settings.to_dict()
    transform = evaluation_transform(model, args.image_size)
    images, labels = pictures_on_demand(args, source, transform, limit=limit, seed=recipe.seed)
    if labels is None:
        raise InputError(f"{source}: pictures without labels; give a folder of class folders")
    return LabelledImages(images, labels)  # pyright: ignore[reportArgumentType]


def test_images(args: argparse.Namespace, recipe: Any) -> LabelledImages:
    """The images of --val-images, or those of ``test.parquet``."""
    if args.images is not None:
        if args.val_images is None:
            raise InputError("--images needs --val-images, labelled pictures to test on")
        return _labelled_pictures(args, recipe, args.val_images, None)
    file = args.data_dir / "test.parquet"
    images = read_parquet(file)
    if not len(images):
        raise DataError(f"{file}: no images")
    return images


def head_images(args: argparse.Namespace, seed: int) -> Tensor | ImagesOnDemand:
    """Unlabelled images to train a head on, at its classifier's input size."""
    if args.images is None:
        return training_images(args, None).images
    net = wrap(
        args.model, "source", pretrained=args.pretrained, model_dir=args.model_dir, seed=seed
    )
    transform = picture_transform(net.backbone, args.image_size)
    return pictures_on_demand(args, args.images, transform, limit=args.max_images, seed=seed)[0]


def statistics_images(args: argparse.Namespace, net: Adapter) -> Tensor | ImagesOnDemand:
    """Clean images that an adapter's source statistics are measured on."""
    if args.images is not None:
        transform = picture_transform(net.backbone, args.image_size)
        return pictures_on_demand(args, args.images, transform, limit=args.statistics_images)[0]
    folder = args.data_dir if (args.data_dir / "train.parquet").is_file() else None
    clean = read_parquet((folder or args.data_dir / "cifar10") / "train.parquet")
    return clean.images[:-EXTRA_ROWS][: args.statistics_images]
