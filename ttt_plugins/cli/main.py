"""The command line: parse, call, print. A user's mistake is one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from ..artifacts import hub
from ..artifacts.card import refresh
from ..artifacts.classifiers import refuse_random
from ..artifacts.folder import check_target, read_config
from ..core.registry import configure, get_method
from ..errors import DataError, InputError, TTTError
from ..utils.checks import check_device, check_seed
from .flags import (
    PROGRAM,
    Parser,
    add_dataclass_flags,
    dataclass_from_args,
    fields_from_pairs,
    key_value,
)

__all__ = ["main"]

#: At most; with very many the system refuses in the middle of a run, and not by an exception.
_THREADS = 1024


def _device(name: str | None) -> str | None:
    check_device(name)
    return name


def _adapter(args: argparse.Namespace) -> nn.Module:
    """The adapter of MODEL and --method: an artifact of that method, or a model to wrap."""
    from .. import from_pretrained, wrap

    common = {"device": _device(args.device), "seed": args.seed}
    pairs = args.set if args.lr is None else [*args.set, ("lr", args.lr)]
    found = hub.find(args.model)
    stored = None if found is None else read_config(found.folder, found.name)["method"]
    method = stored if args.method is None else args.method
    # Only fields of the config: whatever else wrap takes has a flag of its own.
    fields = {} if method is None else fields_from_pairs(pairs, get_method(method).config)
    if method == stored:
        return from_pretrained(args.model, **common, **fields)
    return wrap(
        args.model,
        method,
        pretrained=args.pretrained,
        model_dir=args.model_dir,
        **common,
        **fields,
    )


def _unadapted(net: nn.Module, model_dir: Path) -> nn.Module:
    """The model of an adapter, loaded anew and with the same preprocessing."""
    from .. import wrap

    normal = net.backbone.normalize
    return wrap(
        net.origin["name"],
        "source",
        pretrained=net.origin.get("pretrained", False),
        mean=net.backbone.mean.flatten().tolist() if normal else None,
        std=net.backbone.std.flatten().tolist() if normal else None,
        normalize=normal,
        model_dir=model_dir,
        device=net.backbone.device,
    )


def _benchmark(args: argparse.Namespace) -> None:
    from ..benchmark import worker_from_environment
    from ..benchmark.output import check_out

    check_out(args.out)
    for seed in args.seed or ():
        check_seed(seed, "--seed")
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}")
        if args.threads > _THREADS:
            raise InputError(f"--threads must be at most {_THREADS}, got {args.threads}")
        torch.set_num_threads(args.threads)
    worker = worker_from_environment(args.lease)
    if worker is None:
        _run_benchmark(args, None)
        return
    if args.device == "cuda" and torch.cuda.is_available():
        place = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        args.device = f"cuda:{place}"
    # torchrun starts all processes anew when one has died: what they had done is on disk.
    args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    try:
        _run_benchmark(args, worker)
    finally:
        worker.leave()


def _run_benchmark(args: argparse.Namespace, worker) -> None:
    from ..benchmark import Execution, open_dataset, run_benchmark

    execution = Execution(args.channels_last, args.autocast, args.compile)
    # What is downloaded is downloaded once.
    with worker.leader_first("data") if worker else contextlib.nullcontext(True):
        data = open_dataset(
            args.dataset,
            args.data_dir,
            corruptions=args.corruption,
            severities=args.severity,
            n_examples=args.n_examples,
            labels=args.labels,
            download=not args.no_download,
        )
    seeds, first = args.seed, args.seed[0] if args.seed else None
    args.seed = first  # of the adapter
    # A timm name without --pretrained means random weights: let them be the same ones twice.
    with worker.leader_first("weights") if worker else contextlib.nullcontext(True):
        torch.manual_seed(first or 0)
        net = _adapter(args)
        torch.manual_seed(first or 0)
        baseline = None if net.method == "source" else _unadapted(net, args.model_dir)
    speaks = worker is None or worker.rank == 0
    if speaks:
        print(net.describe(), flush=True)
    results = run_benchmark(
        net,
        data,
        baseline=baseline,
        out=args.out,
        protocol=args.protocol,
        concentration=args.concentration,
        batch_size=args.batch_size,
        seed=seeds,
        execution=execution,
        model_name=args.model,
        command=args.command_line,
        overwrite=args.overwrite,
        resume=args.resume,
        worker=worker,
    )
    if not speaks:
        return
    print(f"\naccuracy in %, {args.protocol}, batch size {args.batch_size}\n{results.table()}")
    for name, mce in results.circumstances["corruptions_mce"].items():
        if mce is not None:
            print(f"mCE of {name}: {100 * mce:.2f} % (AlexNet: 100 %)")
    if data.clean is None:
        print("clean accuracy not measured: no clean images in the data folder")
    if data.note:
        print(data.note)
    print(f"results.json, RobustBench's files and plot.png are in {args.out}")


def _compare(args: argparse.Namespace) -> None:
    from ..benchmark import compare

    print(compare(args.folders, args.html))
    print(f"the report is {args.html}")


def _demo(args: argparse.Namespace) -> None:
    from ..demo import run_demo

    print(
        "A small network, trained on clean CIFAR-10 images, meets corrupted ones: as it is\n"
        "(source), and adapting to them batch by batch, without labels (tent, sar, mgg). Then two\n"
        "that adapt to every image on its own (ttt, mt3), each beside its own network as it is.\n",
        flush=True,
    )
    batchwise, per_image = run_demo(args.out, n=args.images)
    print(f"{batchwise.table()}\n")
    print(f"every image on its own, the first {len(per_image.sample.labels)} of each kind")
    print(per_image.table())
    print(f"\nthe picture is {Path(args.out) / 'demo.png'}")


def _training_images(args: argparse.Namespace):
    """Those of ``train.parquet`` but the last rows, which belong to MGG's meta-training.

    MGG's results are compared with those of whatever is trained here.
    """
    from ..data.cifar10 import EXTRA_ROWS
    from ..data.parquet import read_parquet

    file = args.data_dir / "train.parquet"
    found = read_parquet(file)[:-EXTRA_ROWS]
    if not len(found):
        raise DataError(f"{file}: no images beside the last {EXTRA_ROWS}, which are held out")
    return found


def _test_images(args: argparse.Namespace):
    from ..data.parquet import read_parquet

    found = read_parquet(args.data_dir / "test.parquet")
    if not len(found):
        raise DataError(f"{args.data_dir / 'test.parquet'}: no images")
    return found


def _work_folder(args: argparse.Namespace) -> Path:
    """Where the training's checkpoints go, beside the artifact, which is written in one piece.

    Looked at before anything is read or trained, as is the artifact's own folder.
    """
    from ..train.common import checkpoint_file

    check_target(args.out)
    work = args.out.with_name(f"{args.out.name}-training")
    checkpoint_file(work)
    return work


def _train_source(args: argparse.Namespace) -> None:
    from ..artifacts.saving import save_with_model
    from ..train.source import SourceRecipe, train_source

    work = _work_folder(args)
    recipe = dataclass_from_args(args, SourceRecipe)
    device = _device(args.device)
    train, test = _training_images(args), _test_images(args)
    model, log = train_source(recipe, train, test, work, device=device, resume=args.resume)
    training = _training_record(args, recipe, device) | {"images": len(train), **log}
    save_with_model(model, recipe.arch, recipe.model_args, args.out, training=training)
    print(f"the model is in {args.out}, the checkpoint of its training in {work}")


def _train_ttt(args: argparse.Namespace) -> None:
    from ..artifacts.saving import save_with_model
    from ..methods import TTT
    from ..train.joint import HeadRecipe, JointRecipe, fit_rotation_head, train_joint

    check_target(args.out)
    device = _device(args.device)
    if "split" in dict(args.set):
        raise InputError("the split belongs to training: use --split")
    config = configure(TTT(), fields_from_pairs(args.set, TTT))
    if args.freeze_trunk:
        recipe = _recipe_of(args, HeadRecipe, JointRecipe, "--freeze-trunk")
        check_seed(recipe.seed, "--seed")
        if not args.model:
            raise InputError("--freeze-trunk needs --model, the classifier that stays as it is")
        if args.resume:
            raise InputError("--freeze-trunk writes no checkpoint to resume from")
        refuse_random(args.model, args.pretrained)
        train = _training_images(args)
        net, log = fit_rotation_head(
            args.model,
            train.images,
            recipe,
            config=config,
            device=device,
            model_dir=args.model_dir,
            pretrained=args.pretrained,
        )
        training = _training_record(args, recipe, device) | {"images": len(train), **log}
        net.save_pretrained(args.out, training=training)
        print(f"the rotation head is in {args.out}")
        return
    if args.model:
        raise InputError("--model belongs to --freeze-trunk; joint training takes --arch or --init")
    work = _work_folder(args)
    recipe = dataclass_from_args(args, JointRecipe)
    config = dataclasses.replace(config, split=recipe.split)
    train, test = _training_images(args), _test_images(args)
    model, head, log = train_joint(
        recipe, train, test, work, config=config, device=device, resume=args.resume
    )
    training = _training_record(args, recipe, device) | {"images": len(train), **log}
    save_with_model(
        model,
        recipe.arch,
        recipe.model_args,
        args.out,
        config=config,
        tensors=head,
        training=training,
    )
    print(f"model and rotation head are in {args.out}, the checkpoint of their training in {work}")


def _train_mt3(args: argparse.Namespace) -> None:
    from ..artifacts.saving import save_with_model
    from ..methods import MT3
    from ..train.mt3 import MT3Recipe, train_mt3

    work = _work_folder(args)
    recipe = dataclass_from_args(args, MT3Recipe)
    device = args.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = _device(device)
    if recipe.init and (hasattr(args, "arch") or hasattr(args, "model_args")):
        raise InputError("--init brings its own architecture; leave --arch and --model-args out")
    # Set by torchrun when it starts the processes again.
    resume = args.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    config = configure(MT3(lr=recipe.inner_lr), fields_from_pairs(args.set, MT3))
    train = _training_images(args)
    model, head, log = train_mt3(recipe, train, work, config=config, device=device, resume=resume)
    if os.environ.get("RANK", "0") != "0":
        return
    # With --init the recipe's own architecture is not the one that was trained.
    recipe = dataclasses.replace(recipe, arch=log["architecture"], model_args=log["model_args"])
    training = _training_record(args, recipe, device) | {"images": len(train), **log}
    save_with_model(
        model,
        log["architecture"],
        log["model_args"],
        args.out,
        config=config,
        tensors=head,
        training=training,
    )
    print(f"the meta-model is in {args.out}, the checkpoint of its training in {work}")


def _recipe_of(args: argparse.Namespace, cls: type, other: type, flag: str) -> object:
    """The recipe ``flag`` asks for; typed flags that only the other recipe has are mistakes."""
    known = {f.name for f in dataclasses.fields(cls)}
    for name in sorted({f.name for f in dataclasses.fields(other)} - known):
        if hasattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} has no meaning with {flag}")
    return dataclass_from_args(args, cls)


def _training_record(args: argparse.Namespace, recipe: object, device: str) -> dict:
    """What every trained artifact's config.json says of its making."""
    return {
        "command": args.command_line,
        "note": args.note,
        "recipe": dataclasses.asdict(recipe),
        "device": torch.cuda.get_device_name(device) if "cuda" in device else "cpu",
    }


def _train_mgg(args: argparse.Namespace) -> None:
    from ..artifacts.saving import save_learned
    from ..benchmark import EXTRA_CORRUPTIONS, load_stream
    from ..data.cifar10 import EXTRA_ROWS
    from ..data.images import to_float
    from ..data.parquet import read_parquet
    from ..methods import MGG
    from ..train.mgg import MGGRecipe, train_mgg, untrained

    work = _work_folder(args)
    recipe = dataclass_from_args(args, MGGRecipe)
    fields = fields_from_pairs(args.set, MGG)
    if "lr" in fields:
        raise InputError(
            f"--set lr: the step size is chosen among those of --grid; for this one only, give "
            f"--grid {fields['lr']}"
        )
    configure(MGG(), fields)  # a bad value is found before anything is read
    if args.statistics_images < 1:
        raise InputError(f"--statistics-images must be at least 1, got {args.statistics_images}")
    device = _device(args.device)
    data = {name: load_stream(args.data_dir, name) for name in EXTRA_CORRUPTIONS}
    nets, fitted = [], 0
    for model in args.model:
        net = untrained(model, device=device, model_dir=args.model_dir, **fields)
        if not net.backbone.has_batch_norm:
            # BatchNorm models carry their source statistics; for others clean images are measured.
            if args.entropy_alone:
                nets.append(net.with_tensors(net.config))
            folder = args.data_dir if (args.data_dir / "train.parquet").is_file() else None
            clean = read_parquet((folder or args.data_dir / "cifar10") / "train.parquet")
            images = clean.images[:-EXTRA_ROWS][: args.statistics_images]
            fitted = len(images)
            net.fit_source_statistics(to_float(part) for part in images.split(500))
        nets.append(net)
    trained, log = train_mgg(recipe, nets, data, work, resume=args.resume)
    training = _training_record(args, recipe, device) | {
        "corruptions": list(data),
        "images": min(len(part) for part in data.values()),
        "labels": "used by the outer loss and to choose checkpoint and step size"
        if recipe.labelled
        else "used to choose checkpoint and step size only",
        "statistics_images": fitted,
        **log,
    }
    if len(args.model) == 1:
        trained.save_pretrained(args.out, training=training)
    else:
        # It belongs to none of them: the optimizer alone, which fits any classifier.
        slow = {n: t for n, t in trained.learned_tensors().items() if n.startswith("memory.")}
        training["classifiers"] = [str(model) for model in args.model]
        save_learned(trained.config, slow, {"source": "module"}, args.out, training=training)
    print(f"the optimizer is in {args.out}, the checkpoint of its training in {work}")


def _info(args: argparse.Namespace) -> None:
    from ..artifacts import info

    print(info.describe(args.name, hub.Access(args.revision)))


def _publish(args: argparse.Namespace) -> None:
    from ..artifacts.publish import publish

    commit, new = publish(
        args.folder, args.repository, private=args.private or None, measured=args.results
    )
    done = "published" if new else "unchanged, no commit made"
    print(f"{args.repository}@{commit}: {done}")
    print(f'load it with tp.from_pretrained("{args.repository}")')


def _card(args: argparse.Namespace) -> None:

    facts = {"license": args.license, "datasets": args.datasets, "note": args.note}
    for folder in args.folder:
        print(refresh(folder, measured=args.results, facts=facts) / "README.md")


def _convert(args: argparse.Namespace) -> None:
    from ..train.released import convert_mgg, convert_mt3

    if args.kind == "mt3":
        if args.statistics:
            raise InputError("--statistics belongs to convert mgg")
        folder = convert_mt3(args.checkpoint, args.out)
    else:
        folder = convert_mgg(args.checkpoint, args.out, args.statistics)
    print(f"the artifact is in {folder}")


def _list(args: argparse.Namespace) -> None:
    from .. import list_bundled, list_methods

    print("methods:", *list_methods(), sep="\n  ")
    print("bundled:", *(f"bundled:{name}" for name in list_bundled()), sep="\n  ")


# -- parser ------------------------------------------------------------------------------


def _add_benchmark(commands) -> None:
    from ..benchmark import DATASETS, PROTOCOLS
    from ..benchmark.protocols import CONCENTRATION

    add = commands.add_parser("benchmark", help="measure an adapter on corrupted images")
    add.set_defaults(run=_benchmark)
    add.add_argument("model", metavar="MODEL", help="what wrap or from_pretrained takes")
    add.add_argument("--method", help="name of a method (default: the artifact's own)")
    add.add_argument("--dataset", choices=DATASETS, default="cifar10")
    add.add_argument("--data-dir", type=Path, required=True, help="folder with the images")
    add.add_argument("--out", type=Path, required=True, help="folder for the results")
    levels = range(1, 6)
    add.add_argument("--severity", type=int, nargs="+", choices=levels, help="(default: all)")
    add.add_argument("--corruption", nargs="+", help="(default: the benchmark's)")
    add.add_argument("--n-examples", type=int, metavar="N", help="images a cell (default: all)")
    add.add_argument("--batch-size", type=int, default=64, metavar="B")
    add.add_argument("--protocol", choices=PROTOCOLS, default="reset-per-cell")
    add.add_argument(
        "--concentration",
        type=float,
        default=CONCENTRATION,
        metavar="DELTA",
        help="of the Dirichlet distribution of --protocol correlated (default: %(default)s)",
    )
    add.add_argument("--device", help="such as cuda (default: cpu)")
    add.add_argument(
        "--seed",
        type=int,
        nargs="+",
        help="of the images' order in a cell and of the adapter's draws (default: as stored, and "
        "0); several give means and standard errors",
    )
    add.add_argument("--lr", type=float, help="short for --set lr=LR")
    _add_fields(add)
    add.add_argument("--labels", type=Path, help="parquet file of the clean test images")
    add.add_argument("--model-dir", type=Path, default=Path("models"), help="RobustBench's models")
    add.add_argument("--pretrained", action="store_true", help="download timm's weights")
    add.add_argument("--overwrite", action="store_true", help="replace other results in OUT")
    add.add_argument("--resume", action="store_true", help="go on with the unfinished run in OUT")
    add.add_argument("--no-download", action="store_true", help="missing data is an error")
    add.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    add.add_argument("--autocast", choices=("bfloat16", "float16"), help="reduced precision")
    add.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model with torch.compile (BACKEND: inductor)",
    )
    add.add_argument(
        "--threads", type=int, help="of the processor (default: torch's own; 1 under torchrun)"
    )
    add.add_argument(
        "--lease",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="under torchrun: a process silent for so long counts as dead (default: %(default)s)",
    )


def _add_compare(commands) -> None:
    add = commands.add_parser("compare", help="put the results of several benchmarks side by side")
    add.set_defaults(run=_compare)
    add.add_argument("folders", nargs="+", type=Path, metavar="OUT", help="of a benchmark")
    add.add_argument(
        "--html",
        type=Path,
        default=Path("comparison.html"),
        metavar="FILE",
        help="the report, a page with its pictures inside (default: %(default)s)",
    )


def _add_fields(add) -> None:
    add.add_argument(
        "--set",
        type=key_value,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="fields of the method's config",
    )


def _add_train(commands) -> None:
    from ..train.joint import JointRecipe
    from ..train.mgg import MGGRecipe
    from ..train.mt3 import MT3Recipe
    from ..train.source import SourceRecipe

    kinds = commands.add_parser("train", help="train what adapters are made of")
    kinds = kinds.add_subparsers(required=True, metavar="source|ttt|mt3|mgg")
    add = kinds.add_parser("source", help="a classifier to adapt")
    add.set_defaults(run=_train_source)
    _add_training(add, "folder with train.parquet and test.parquet", SourceRecipe)
    add = kinds.add_parser("ttt", help="a classifier with a rotation head, or the head alone")
    add.set_defaults(run=_train_ttt)
    add.add_argument(
        "--freeze-trunk",
        action="store_true",
        help="train only a rotation head, on the classifier that --model names (by default "
        "10 epochs of Adam at 1e-3)",
    )
    add.add_argument("--pretrained", action="store_true", help="with --model: timm's weights")
    add.add_argument("--model", help="with --freeze-trunk: the classifier; what wrap takes")
    add.add_argument("--model-dir", type=Path, default=Path("models"), help="RobustBench's models")
    _add_fields(add)
    _add_training(add, "folder with train.parquet and test.parquet", JointRecipe)
    add = kinds.add_parser("mt3", help="a meta-model that one self-supervised step improves")
    add.set_defaults(run=_train_mt3)
    _add_fields(add)
    _add_training(add, "folder with train.parquet", MT3Recipe)
    add = kinds.add_parser("mgg", help="MGG's optimizer, on corrupted images")
    add.set_defaults(run=_train_mgg)
    add.add_argument(
        "--model",
        required=True,
        nargs="+",
        help="the classifier, what wrap takes; several make one optimizer that fits any",
    )
    add.add_argument("--model-dir", type=Path, default=Path("models"), help="RobustBench's models")
    add.add_argument(
        "--entropy-alone",
        action="store_true",
        help="train on every classifier without source statistics too",
    )
    add.add_argument(
        "--statistics-images",
        type=int,
        default=4096,
        metavar="N",
        help="clean training images that source statistics are measured on (default: %(default)s)",
    )
    _add_fields(add)
    _add_training(add, "folder that holds cifar10 and cifar10c", MGGRecipe)


def _add_training(add, folder: str, recipe: type) -> None:
    """The flags that all trainings share, and those of the recipe."""
    add.add_argument("--data-dir", type=Path, required=True, help=folder)
    add.add_argument("--out", type=Path, required=True, help="folder for the artifact")
    add.add_argument("--device", default="cpu")
    add.add_argument("--resume", action="store_true", help="go on from its checkpoint")
    add.add_argument("--note", default="", help="a sentence for the card")
    add_dataclass_flags(add, recipe)


def _add_artifacts(commands) -> None:
    add = commands.add_parser("publish", help="put an artifact on the Hugging Face Hub")
    add.set_defaults(run=_publish)
    add.add_argument("folder", type=Path, metavar="FOLDER")
    add.add_argument("repository", metavar="ORG/NAME", help="created if there is none")
    add.add_argument("--private", action="store_true", help="the new repository is private")
    add.add_argument("--results", type=Path, metavar="FILE", help="a benchmark's results.json")
    add.epilog = "Log in with `hf auth login` first, or set HF_TOKEN."
    add = commands.add_parser("info", help="what an artifact is, without loading its classifier")
    add.set_defaults(run=_info)
    add.add_argument("name", metavar="NAME_OR_FOLDER", help="what from_pretrained takes")
    add.add_argument("--revision", help="branch, tag or commit on the Hub")
    add = commands.add_parser("card", help="write an artifact's card (README.md) anew")
    add.set_defaults(run=_card)
    add.add_argument("folder", type=Path, nargs="+", metavar="FOLDER")
    add.add_argument("--results", type=Path, metavar="FILE", help="a benchmark's results.json")
    add.add_argument("--license", help="the Hub's identifier, such as apache-2.0")
    add.add_argument("--datasets", nargs="+", metavar="NAME", help="the Hub's identifiers")
    add.add_argument("--note", help="a sentence for the section on limits")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Test-time training for image classifiers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    add = commands.add_parser("demo", help="see it work: real images, a table and a picture")
    add.set_defaults(run=_demo)
    add.add_argument("--out", type=Path, default=Path("ttt-plugins-demo"), help="folder")
    add.add_argument("--images", type=int, metavar="N", help="images a corruption (default: all)")
    _add_benchmark(commands)
    _add_compare(commands)
    _add_train(commands)
    _add_artifacts(commands)
    add = commands.add_parser("convert", help="turn the papers' released weights into artifacts")
    add.set_defaults(run=_convert)
    add.add_argument("kind", choices=("mgg", "mt3"))
    add.add_argument("checkpoint", help="MGG's file, or the prefix of MT3's TensorFlow checkpoint")
    add.add_argument("--statistics", type=Path, help="MGG: the file of ViT-B/16's statistics")
    add.add_argument("--out", type=Path, required=True, help="folder for the artifact")
    add = commands.add_parser("list", help="name the methods and what is bundled")
    add.set_defaults(run=_list)
    return parser


def _show_warning(message, *_, **__) -> None:
    print(f"{PROGRAM}: warning: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code (0, 2 for a user's mistake, 130 for Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.command_line = shlex.join([PROGRAM, *argv])
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            args.run(args)
        except TTTError as error:
            print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except OSError as error:  # a file or the network, in a way that nobody foresaw
            said = " ".join(str(error).split()) or type(error).__name__
            print(f"{PROGRAM}: error: {said}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0
