"""Sources of pictures on the command line: flags, and images gathered for a training."""

from __future__ import annotations

import argparse
import os
from types import SimpleNamespace
from typing import Any

import torch
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor
from tqdm.auto import tqdm

from ..adapter import Adapter
from ..core.pictures import picture_transform
from ..data.cifar10 import EXTRA_ROWS
from ..data.corruptions import TENSOR_CORRUPTIONS, corrupt
from ..data.images import LabelledImages, to_float
from ..data.labels import label_positions
from ..data.loading import ImageLoader, Transform
from ..data.opening import open_images
from ..data.parquet import read_parquet
from ..data.source import ImageSource
from ..data.transforms import evaluation_transform
from ..errors import DataError, InputError
from ..wrapping import wrap

__all__ = [
    "add_source_flags",
    "corrupted_pictures",
    "gather_pictures",
    "head_images",
    "open_source",
    "statistics_images",
    "test_images",
    "training_images",
]

#: Of this machine's memory, for the pictures of a training.
_SHARE_OF_MEMORY = 0.5
#: The severity that MGG is meta-trained at.
_SEVERITY = 5


def add_source_flags(add: argparse.ArgumentParser) -> None:
    """Add the flags that say how a source of pictures is read."""
    add.add_argument(
        "--image-size", type=int, metavar="S", help="side in pixels (default: the model's own)"
    )
    add.add_argument("--image-column", help="of parquet or npz (default: found by its name)")
    add.add_argument("--label-column", help="likewise")
    add.add_argument("--stream", action="store_true", help="do not download hf:// data sets first")
    add.add_argument("--workers", type=int, metavar="N", help="processes that decode pictures")
    add.add_argument("--skip-damaged", action="store_true", help="leave damaged pictures out")


def open_source(args: argparse.Namespace, source: str) -> Any:
    """A source as the flags describe it."""
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
    """The pictures of a source as uint8 pixels (N, 3, S, S), which a training keeps in memory.

    Args:
        args: the flags of `add_source_flags`.
        source: what `open_images` takes.
        transform: resizes and crops.
        limit: how many at most; drawn with the seed, but for a stream.
        seed: of that draw.

    Returns:
        The pixels, labels (N,) if there are any, and the names of the classes if there are any.

    Raises:
        InputError: they do not fit into memory.
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
    for batch in tqdm(loader, f"pictures of {source}", leave=False):
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
            f"{memory / 1e9:.1f} GB, and a training keeps them in memory; give --max-images or a "
            "smaller --image-size"
        )


def corrupted_pictures(
    args: argparse.Namespace, net: Adapter, limit: int | None, seed: int
) -> tuple[dict[str, LabelledImages], str]:
    """Clean pictures of ``args.images``, corrupted in the four ways that MGG is trained on.

    Args:
        args: the flags of `add_source_flags`, and ``images``.
        net: the adapter to train; its model's own size is used.
        limit: how many pictures at most.
        seed: of the choice and of the noise.

    Returns:
        Images by corruption, in the same order, and where their labels come from.
    """
    transform = picture_transform(net.backbone, args.image_size)
    clean, labels, classes = gather_pictures(args, args.images, transform, limit=limit, seed=seed)
    places = label_positions(net.num_classes, classes)
    origin = "the source's"
    if labels is not None and places is not None and int(labels.max()) < len(places):
        labels = torch.tensor(places)[labels]
    else:
        labels, origin = _predictions(net, clean), "the unadapted model's on the clean pictures"
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for name in TENSOR_CORRUPTIONS:
        moved = (part.to(net.backbone.device) for part in clean.split(64))
        parts = [corrupt(part, name, _SEVERITY, generator=generator).cpu() for part in moved]
        data[name] = LabelledImages(torch.cat(parts), labels)
    return data, origin


@torch.inference_mode()
def _predictions(net: Adapter, images: Tensor) -> Tensor:
    parts = (to_float(part.to(net.backbone.device)) for part in images.split(64))
    return torch.cat([net.backbone(part).argmax(1).cpu() for part in parts])


# -- images of a training ------------------------------------------------------------------------


def training_images(args: argparse.Namespace, recipe: Any) -> LabelledImages:
    """Those of --images; or of ``train.parquet`` except the last rows, MGG's meta-training's.

    MGG's results are compared with those of whatever is trained on that file.
    """
    if args.images is not None:
        return _labelled_pictures(args, recipe, args.images, args.max_images)
    file = args.data_dir / "train.parquet"
    images = read_parquet(file)[:-EXTRA_ROWS]
    if not len(images):
        raise DataError(f"{file}: no images beside the last {EXTRA_ROWS}, which are held out")
    return images


def _labelled_pictures(
    args: argparse.Namespace, recipe: Any, source: str, limit: int | None
) -> LabelledImages:
    """Pictures with labels in the size that the recipe's architecture was made for."""
    described = SimpleNamespace(pretrained_cfg=None)
    settings = get_pretrained_cfg(recipe.arch) if is_model(recipe.arch) else None
    if settings is not None:
        described.pretrained_cfg = settings.to_dict()
    transform = evaluation_transform(described, args.image_size)
    images, labels, _ = gather_pictures(args, source, transform, limit=limit, seed=recipe.seed)
    if labels is None:
        raise InputError(f"{source}: pictures without labels; give a folder of class folders")
    return LabelledImages(images, labels)


def test_images(args: argparse.Namespace, recipe: Any) -> LabelledImages:
    """Those of --val-images, or of ``test.parquet``."""
    if args.images is not None:
        if args.val_images is None:
            raise InputError("--images needs --val-images, labelled pictures to test on")
        return _labelled_pictures(args, recipe, args.val_images, None)
    file = args.data_dir / "test.parquet"
    images = read_parquet(file)
    if not len(images):
        raise DataError(f"{file}: no images")
    return images


def head_images(args: argparse.Namespace, seed: int) -> Tensor:
    """Unlabelled images for a head, as the classifier that it is for takes them."""
    if args.images is None:
        return training_images(args, None).images
    net = wrap(
        args.model, "source", pretrained=args.pretrained, model_dir=args.model_dir, seed=seed
    )
    transform = picture_transform(net.backbone, args.image_size)
    return gather_pictures(args, args.images, transform, limit=args.max_images, seed=seed)[0]


def statistics_images(args: argparse.Namespace, net: Adapter) -> Tensor:
    """Clean images that an adapter's source statistics are measured on."""
    if args.images is not None:
        transform = picture_transform(net.backbone, args.image_size)
        return gather_pictures(args, args.images, transform, limit=args.statistics_images)[0]
    folder = args.data_dir if (args.data_dir / "train.parquet").is_file() else None
    clean = read_parquet((folder or args.data_dir / "cifar10") / "train.parquet")
    return clean.images[:-EXTRA_ROWS][: args.statistics_images]
