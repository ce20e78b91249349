"""The command ``train``: classifiers, self-supervised heads, meta-models and optimizers."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts.classifiers import refuse_random
from ..artifacts.folder import check_target
from ..artifacts.saving import save_learned, save_with_model
from ..benchmark import EXTRA_CORRUPTIONS, load_stream
from ..core.registry import configure
from ..data.cifar10 import EXTRA_ROWS
from ..data.images import LabelledImages, to_float
from ..errors import InputError
from ..methods import MGG, MT3, TTT
from ..train.byol import ByolRecipe, train_byol
from ..train.epochs import checkpoint_file
from ..train.gap import StepGap
from ..train.joint import HeadRecipe, JointRecipe, fit_rotation_head, train_joint
from ..train.mgg import MGGRecipe, train_mgg, untrained
from ..train.mt3 import MT3Recipe, train_mt3
from ..train.source import SourceRecipe, train_source
from ..utils.checks import check_device, check_seed
from ..utils.processes import device_of_process, place_from_environment
from .flags import add_dataclass_flags, add_field_flags, dataclass_from_args, fields_from_pairs
from .pictures import (
    add_source_flags,
    corrupted_pictures,
    head_images,
    statistics_images,
    test_images,
    training_images,
)

__all__ = ["add_train"]


def add_train(commands) -> None:
    """Add the command ``train`` with its subcommands."""
    add = commands.add_parser("train", help="train a classifier, head, meta-model or optimizer")
    kinds = add.add_subparsers(required=True, metavar="source|ttt|mt3|mgg")
    _add_source(kinds)
    _add_ttt(kinds)
    _add_mt3(kinds)
    _add_mgg(kinds)


# -- shared by all kinds of training -----------------------------------------------------------


def _add_common(add: argparse.ArgumentParser, folder: str, *recipes: type) -> None:
    """Add the flags that all kinds of training share, and those of the recipes."""
    data = add.add_mutually_exclusive_group(required=True)
    data.add_argument("--data-dir", type=Path, help=folder)
    data.add_argument(
        "--images",
        metavar="SOURCE",
        help="pictures from another source: class folders, parquet, npz, hf://datasets/ORG/NAME",
    )
    add.add_argument(
        "--max-images",
        type=int,
        metavar="N",
        help="with --images: largest number of images, drawn with the seed (default: all; for mgg, "
        f"which keeps them in memory, {EXTRA_ROWS})",
    )
    add_source_flags(add)
    add.add_argument("--out", type=Path, required=True, help="folder for the artifact")
    add.add_argument("--device", default="cpu", help="torch device, such as cuda (default: cpu)")
    add.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    add.add_argument("--note", default="", help="a sentence for the artifact's card")
    for recipe in recipes:
        add_dataclass_flags(add, recipe)


def _add_val_images(add: argparse.ArgumentParser) -> None:
    add.add_argument("--val-images", metavar="SOURCE", help="with --images: labelled test pictures")


def _work_folder(args: argparse.Namespace) -> Path:
    """The folder for checkpoints, beside the artifact's, which appears only when it is complete.

    Both folders are checked before anything is read or trained.
    """
    check_target(args.out)
    work = args.out.with_name(f"{args.out.name}-training")
    checkpoint_file(work)
    return work


def _recipe(args: argparse.Namespace, cls: type, other: type, reason: str) -> Any:
    """The recipe that the flags describe; a flag that only ``other`` has is an error."""
    known = {f.name for f in dataclasses.fields(cls)}
    for name in sorted({f.name for f in dataclasses.fields(other)} - known):
        if hasattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} has no effect {reason}; leave it out")
    return dataclass_from_args(args, cls)


def _record(args: argparse.Namespace, recipe: Any, **facts: Any) -> dict[str, Any]:
    """The facts about training that every trained artifact's config.json records."""
    device = args.device
    return {
        "command": args.command_line,
        "note": args.note,
        "recipe": dataclasses.asdict(recipe),
        "device": torch.cuda.get_device_name(device) if "cuda" in device else "cpu",
        **facts,
    }


def _save(
    args: argparse.Namespace,
    recipe: Any,
    model: nn.Module,
    train: LabelledImages,
    log: dict[str, Any],
    config: Any = None,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write an artifact that carries its model, and what the method learned with it."""
    save_with_model(
        model,
        recipe.arch,
        recipe.model_args,
        args.out,
        config=config,
        tensors=tensors,
        training=_record(args, recipe, images=len(train), **log),
    )


# -- source ------------------------------------------------------------------------------------


def _add_source(kinds) -> None:
    add = kinds.add_parser("source", help="a classifier to adapt")
    add.set_defaults(run=_train_source)
    _add_common(add, "folder with train.parquet and test.parquet", SourceRecipe)
    _add_val_images(add)


def _train_source(args: argparse.Namespace) -> None:
    work = _work_folder(args)
    recipe = dataclass_from_args(args, SourceRecipe)
    check_device(args.device)
    train, test = training_images(args, recipe), test_images(args, recipe)
    model, log = train_source(recipe, train, test, work, device=args.device, resume=args.resume)
    _save(args, recipe, model, train, log)
    print(f"the model is in {args.out}, the checkpoint of its training in {work}")


# -- ttt ---------------------------------------------------------------------------------------


def _add_ttt(kinds) -> None:
    add = kinds.add_parser("ttt", help="a classifier with a rotation head, or the head alone")
    add.set_defaults(run=_train_ttt)
    add.add_argument(
        "--freeze-trunk",
        action="store_true",
        help="train only a rotation head, on the classifier that --model names (by default "
        "10 epochs of Adam at 1e-3)",
    )
    add.add_argument("--pretrained", action="store_true", help="with --model: load timm's weights")
    add.add_argument("--model", help="with --freeze-trunk: the classifier, as for wrap")
    add.add_argument(
        "--model-dir", type=Path, default=Path("models"), help="folder with RobustBench's models"
    )
    add_field_flags(add)
    _add_common(add, "folder with train.parquet and test.parquet", JointRecipe)
    _add_val_images(add)


def _train_ttt(args: argparse.Namespace) -> None:
    check_target(args.out)
    check_device(args.device)
    if "split" in dict(args.set):
        raise InputError("the split is part of the training: give --split instead of --set split=")
    config = configure(TTT(), fields_from_pairs(args.set, TTT))
    if args.freeze_trunk:
        _train_head(args, config)
        return
    if args.model:
        raise InputError("--model needs --freeze-trunk; joint training takes --arch or --init")
    work = _work_folder(args)
    recipe = dataclass_from_args(args, JointRecipe)
    config = dataclasses.replace(config, split=recipe.split)
    train, test = training_images(args, recipe), test_images(args, recipe)
    model, head, log = train_joint(
        recipe, train, test, work, config=config, device=args.device, resume=args.resume
    )
    _save(args, recipe, model, train, log, config, head)
    print(f"model and rotation head are in {args.out}, the checkpoint of their training in {work}")


def _train_head(args: argparse.Namespace, config: TTT) -> None:
    recipe = _recipe(args, HeadRecipe, JointRecipe, "with --freeze-trunk")
    check_seed(recipe.seed, "--seed")
    if not args.model:
        raise InputError("--freeze-trunk needs --model, the classifier that is not changed")
    if args.resume:
        raise InputError("--freeze-trunk writes no checkpoint to resume from")
    refuse_random(args.model, args.pretrained)
    images = head_images(args, recipe.seed)
    net, log = fit_rotation_head(
        args.model,
        images,
        recipe,
        config=config,
        device=args.device,
        model_dir=args.model_dir,
        pretrained=args.pretrained,
    )
    record = _record(args, recipe, images=len(images), **log)
    net.save_pretrained(args.out, training=record)
    print(f"the rotation head is in {args.out}")


# -- mt3 ---------------------------------------------------------------------------------------


def _add_mt3(kinds) -> None:
    add = kinds.add_parser("mt3", help="a meta-model that one self-supervised step improves")
    add.set_defaults(run=_train_mt3)
    add.add_argument(
        "--joint",
        action="store_true",
        help="train classifier, projector and predictor jointly with BYOL's loss and no inner "
        "step (by default 200 epochs of SGD at 0.1); meta-training can start from the result with "
        "--init",
    )
    add.add_argument(
        "--extras",
        type=Path,
        metavar="DIR",
        help="folder of the four extra corruptions, <corruption>.npz: after every epoch the "
        "accuracy is measured on some of their images, and the best meta-model is kept",
    )
    add.add_argument(
        "--extras-images",
        type=int,
        default=64,
        metavar="N",
        help="with --extras: number of images of each corruption (default: %(default)s)",
    )
    add_field_flags(add)
    _add_common(add, "folder with train.parquet, and test.parquet with --joint", MT3Recipe)
    add_dataclass_flags(add, ByolRecipe, prefix="with --joint: ")
    _add_val_images(add)


def _train_mt3(args: argparse.Namespace) -> None:
    work = _work_folder(args)
    if args.joint:
        _train_byol(args, work)
        return
    recipe = _recipe(args, MT3Recipe, ByolRecipe, "without --joint")
    device, place = args.device, place_from_environment()
    if device == "cuda":
        device = str(device_of_process(device))
    check_device(device)
    if recipe.init and (hasattr(args, "arch") or hasattr(args, "model_args")):
        raise InputError("--init has its own architecture; leave out --arch and --model-args")
    resume = args.resume or place.restarts > 0
    fields = fields_from_pairs(args.set, MT3)
    config = configure(MT3(lr=recipe.inner_lr, steps=recipe.inner_steps), fields)
    gap = _gap(args, config)
    train = training_images(args, recipe)
    model, head, log = train_mt3(
        recipe, train, work, config=config, gap=gap, device=device, resume=resume
    )
    if place.rank:
        return
    # With --init the trained architecture is the artifact's, not the recipe's.
    recipe = dataclasses.replace(recipe, arch=log["architecture"], model_args=log["model_args"])
    args.device = device
    _save(args, recipe, model, train, log, config, head)
    print(f"the meta-model is in {args.out}, the checkpoint of its training in {work}")


def _train_byol(args: argparse.Namespace, work: Path) -> None:
    recipe = _recipe(args, ByolRecipe, MT3Recipe, "with --joint")
    check_device(args.device)
    config = configure(MT3(), fields_from_pairs(args.set, MT3))
    gap = _gap(args, config)
    train, test = training_images(args, recipe), test_images(args, recipe)
    model, head, log = train_byol(
        recipe, train, test, work, config=config, gap=gap, device=args.device, resume=args.resume
    )
    _save(args, recipe, model, train, log, config, head)
    print(f"model, projector and predictor are in {args.out}, their checkpoint in {work}")
    print(f"start the meta-training with: ttt-plugins train mt3 --init {args.out}")


def _gap(args: argparse.Namespace, config: MT3) -> StepGap | None:
    """The measurement of the step on the extra corruptions, if their folder is given."""
    if args.extras is None:
        return None
    if args.extras_images < 1:
        raise InputError(f"--extras-images must be at least 1, got {args.extras_images}")
    extras = {name: load_stream(args.extras, name) for name in EXTRA_CORRUPTIONS}
    return StepGap({name: images[: args.extras_images] for name, images in extras.items()}, config)


# -- mgg ---------------------------------------------------------------------------------------


def _add_mgg(kinds) -> None:
    add = kinds.add_parser("mgg", help="MGG's optimizer, meta-trained on corrupted images")
    add.set_defaults(run=_train_mgg)
    add.add_argument(
        "--model",
        required=True,
        nargs="+",
        help="the classifier, as for wrap; with several, the optimizer fits any classifier",
    )
    add.add_argument(
        "--model-dir", type=Path, default=Path("models"), help="folder with RobustBench's models"
    )
    add.add_argument(
        "--entropy-alone",
        action="store_true",
        help="also train on every classifier without source statistics",
    )
    add.add_argument(
        "--statistics-images",
        type=int,
        default=4096,
        metavar="N",
        help="number of clean images to measure source statistics on (default: %(default)s)",
    )
    add_field_flags(add)
    _add_common(add, "folder that holds cifar10 and cifar10c", MGGRecipe)


def _train_mgg(args: argparse.Namespace) -> None:
    work = _work_folder(args)
    recipe = dataclass_from_args(args, MGGRecipe)
    fields = fields_from_pairs(args.set, MGG)
    if "lr" in fields:
        raise InputError(
            f"--set lr: the step size is chosen from those of --grid; to use only this one, give "
            f"--grid {fields['lr']}"
        )
    configure(MGG(), fields)  # refuses a bad value before anything is read
    if args.statistics_images < 1:
        raise InputError(f"--statistics-images must be at least 1, got {args.statistics_images}")
    check_device(args.device)
    if args.images is None:
        data = {name: load_stream(args.data_dir, name) for name in EXTRA_CORRUPTIONS}
        labels_from = "the data set's"
        nets, measured = _untrained_adapters(args, fields)
    else:
        nets, measured = _untrained_adapters(args, fields)
        data, labels_from = corrupted_pictures(args, nets[0], args.max_images, recipe.seed)
    trained, log = train_mgg(recipe, nets, data, work, resume=args.resume)
    record = _record(
        args,
        recipe,
        corruptions=list(data),
        images=min(map(len, data.values())),
        labels="used by the outer loss and to choose the checkpoint and the step size"
        if recipe.labelled
        else "used only to choose the checkpoint and the step size",
        labels_from=labels_from,
        statistics_images=measured,
        **log,
    )
    if len(args.model) == 1:
        trained.save_pretrained(args.out, training=record)
    else:
        # Only the optimizer is saved, without a classifier, because it fits any classifier.
        slow = {n: t for n, t in trained.learned_tensors().items() if n.startswith("memory.")}
        record["classifiers"] = [str(model) for model in args.model]
        save_learned(trained.config, slow, {"source": "module"}, args.out, training=record)
    print(f"the optimizer is in {args.out}, the checkpoint of its training in {work}")


def _untrained_adapters(args: argparse.Namespace, fields: dict[str, Any]) -> tuple[list, int]:
    """Adapters to train an optimizer on, and how many images their statistics are measured on."""
    nets, measured = [], 0
    for model in args.model:
        net = untrained(model, device=args.device, model_dir=args.model_dir, **fields)
        if not net.backbone.has_batch_norm:
            # BatchNorm models carry source statistics; others are measured on clean images.
            if args.entropy_alone:
                nets.append(net.with_tensors(net.config))
            images = statistics_images(args, net)
            measured = len(images)
            net.fit_source_statistics(to_float(batch) for batch in images.split(500))
        nets.append(net)
    return nets, measured
