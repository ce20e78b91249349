"""The README's main table: MGG against the unadapted model, Tent and SAR.

    python examples/results.py --data DIR --backbone resnet26 --out results/
    python examples/results.py --data DIR --backbone runs/held-out/convnext

A name stands for a bundled classifier and the optimizer trained on it. A folder is a classifier
that no optimizer was trained on (`held_out.py`): it gets ``mgg-universal``, with source statistics
of clean training images and without.

Severity 5, the fifteen corruptions, reset per corruption, one shuffled stream a corruption and
seed, the same streams for all methods, which take turns on each stream so that their times are
comparable. Tent's and SAR's learning rates are the best of a grid on the four extra corruptions;
MGG's step size was chosen there by its meta-training. ``--report`` prints tables from the JSON
files of earlier runs instead, ``--into-cards`` puts them into the bundled artifacts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

import ttt_plugins as tp
from ttt_plugins.artifacts.card import refresh
from ttt_plugins.artifacts.folder import bundled_folder, list_bundled
from ttt_plugins.benchmark import CORRUPTIONS, EXTRA_CORRUPTIONS, load_stream
from ttt_plugins.data.cifar10 import EXTRA_ROWS
from ttt_plugins.data.images import LabelledImages, to_float
from ttt_plugins.data.parquet import read_parquet
from ttt_plugins.train.mgg import stream_accuracy

GRIDS = {
    "tent": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "sar": (1e-3, 1e-2, 3e-2, 1e-1),
}


def choose_rate(model: str, method: str, grid, data: Path, batch_size: int, n=None) -> dict:
    """Mean accuracy of each learning rate on the four extra corruptions."""
    streams = [load_stream(data, name) for name in EXTRA_CORRUPTIONS]
    streams = [stream[:n] for stream in streams]
    scores = {}
    for lr in grid:
        net = tp.wrap(model, method, lr=lr)
        accuracies = [stream_accuracy(net, stream, batch_size) for stream in streams]
        scores[lr] = sum(accuracies) / len(accuracies)
        print(f"  {method} lr {lr:g}: {100 * scores[lr]:.2f} on the extra corruptions", flush=True)
    return scores


def run_stream(net, stream: LabelledImages, batch_size: int, seed: int) -> dict:
    """Right answers and seconds of every batch of one shuffled stream, from a reset."""
    net.reset()
    order = torch.randperm(len(stream), generator=torch.Generator().manual_seed(seed))
    right, seconds = [], []
    for rows in order.split(batch_size):
        images = to_float(stream.images[rows])
        start = time.perf_counter()
        logits = net(images)
        seconds.append(time.perf_counter() - start)
        right.append(int((logits.argmax(1) == stream.labels[rows]).sum()))
    return {"n": len(stream), "right": right, "seconds": seconds}


def adapters(backbone: str, data: Path, rates: dict) -> dict:
    """Name of a row -> adapter of that backbone, rivals at their best rates."""
    universal = Path(backbone).is_dir()
    model = backbone if universal else f"bundled:source-{backbone}-cifar10"
    nets = {"source": tp.wrap(model, "source")}
    has_batch_norm = nets["source"].backbone.has_batch_norm
    if has_batch_norm:
        nets["batch statistics"] = tp.wrap(model, "source", statistics="batch")
    nets |= {method: tp.wrap(model, method, lr=lr) for method, lr in rates.items()}

    def mgg(**fields):
        if universal:
            return tp.wrap(model, "mgg", **fields)
        return tp.from_pretrained(f"bundled:mgg-{backbone}-cifar10", **fields)

    nets["mgg"] = mgg()
    if universal and not has_batch_norm:
        nets["mgg, entropy alone"] = mgg()
        clean = read_parquet(data / "cifar10" / "train.parquet").images[:-EXTRA_ROWS][:4096]
        nets["mgg"].fit_source_statistics([to_float(p) for p in clean.split(512)], progress=False)
    if has_batch_norm:
        # Part of MGG's advantage is its statistics; this says how much,
        # on both sides.
        used = nets["mgg"].config.statistics
        nets[f"tent, {used}"] = tp.wrap(model, "tent", lr=rates["tent"], statistics=used)
        nets["mgg, batch"] = mgg(statistics="batch")
    return nets


def measure(
    backbone: str,
    data: Path,
    seeds,
    n: int,
    batch_size: int,
    path: Path,
    tune_n=None,
    resume=False,
) -> dict:
    """Everything the table needs for one backbone; ``path`` is written after every seed.

    With ``resume`` the learning rates are those an earlier run wrote there, and so are the seeds
    it finished, if its streams were as long.
    """
    model = backbone if Path(backbone).is_dir() else f"bundled:source-{backbone}-cifar10"
    stored = json.loads(path.read_text()) if resume and path.is_file() else None
    if stored is not None:
        tune_n = stored["tune_examples"]
        tuning = {
            m: {float(lr): score for lr, score in scores.items()}
            for m, scores in stored["tuning"].items()
        }
    else:
        tuning = {m: choose_rate(model, m, g, data, batch_size, tune_n) for m, g in GRIDS.items()}
    rates = {method: max(scores, key=scores.get) for method, scores in tuning.items()}
    nets = adapters(backbone, data, rates)
    result = {
        "backbone": Path(backbone).name,
        "optimizer": "mgg-universal" if Path(backbone).is_dir() else f"mgg-{backbone}-cifar10",
        "batch_size": batch_size,
        "seeds": [],
        "n_examples": n,
        "tune_examples": tune_n,
        "tuning": {m: {f"{lr:g}": s for lr, s in v.items()} for m, v in tuning.items()},
        "rates": rates | {"mgg": nets["mgg"].config.lr},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "ttt_plugins": tp.__version__},
        "streams": {},
    }
    if stored is not None and (stored["n_examples"], stored["batch_size"]) == (n, batch_size):
        result["streams"], result["seeds"] = stored["streams"], stored["seeds"]
    streams = result["streams"]
    for seed in seeds:
        if seed in result["seeds"]:
            continue
        for corruption in CORRUPTIONS:
            stream = load_stream(data, corruption, n_examples=n)
            for method, net in nets.items():
                if method == "source" and seed != seeds[0]:
                    continue  # order means nothing to it
                key = f"{method}/{corruption}/{seed}"
                if key in streams:
                    continue
                streams[key] = run_stream(net, stream, batch_size, seed)
        result["seeds"].append(seed)
        path.write_text(json.dumps(result) + "\n")
        shown = {m: round(mean, 2) for m, (mean, _) in averages(result).items()}
        print(f"  seeds {result['seeds']}: {shown}", flush=True)
    return result


def _accuracies(result: dict, method: str, seed: int) -> dict[str, float]:
    found = {}
    for corruption in CORRUPTIONS:
        stream = result["streams"][f"{method}/{corruption}/{seed}"]
        found[corruption] = 100 * sum(stream["right"]) / stream["n"]
    return found


def _methods(result: dict) -> list[str]:
    return list(dict.fromkeys(key.split("/")[0] for key in result["streams"]))


def averages(result: dict) -> dict[str, tuple[float, float]]:
    """Method -> mean accuracy over the corruptions in %, standard error over the seeds."""
    table = {}
    for method in _methods(result):
        seeds = result["seeds"][:1] if method == "source" else result["seeds"]
        means = [statistics.mean(_accuracies(result, method, s).values()) for s in seeds]
        error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
        table[method] = (statistics.mean(means), error)
    return table


def time_to_accuracy(result: dict) -> tuple[float, float, float] | None:
    """Seconds a stream SAR takes, MGG takes to SAR's final accuracy, and their ratio.

    Curves are accuracies so far, averaged over corruptions and seeds. None if MGG never gets
    there.
    """
    curves, clocks = {}, {}
    for method in ("sar", "mgg"):
        parts = [v for k, v in result["streams"].items() if k.split("/")[0] == method]
        right = torch.tensor([p["right"] for p in parts], dtype=torch.float64).cumsum(1)
        seen = torch.arange(1, right.shape[1] + 1) * result["batch_size"]
        curves[method] = (right / seen.clamp(max=parts[0]["n"])).mean(0)
        clocks[method] = torch.tensor([p["seconds"] for p in parts]).cumsum(1).mean(0)
    target = curves["sar"][-1]
    # From then on, not for a lucky moment.
    below = (curves["mgg"] < target).nonzero()
    first = int(below[-1]) + 1 if len(below) else 0
    if first == len(curves["mgg"]):
        return None
    sar, mgg = clocks["sar"][-1].item(), clocks["mgg"][first].item()
    return sar, mgg, sar / mgg


def summary(results: list[dict]) -> str:
    """Markdown: one row a backbone."""
    lines = [
        "| backbone | images, seeds | source | batch statistics | Tent (lr) | SAR (lr) "
        "| MGG (alpha) | MGG, entropy alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        table, rates = averages(result), result["rates"]
        cells = [result["backbone"], f"{result['n_examples']}, {len(result['seeds'])}"]
        for method in (
            "source",
            "batch statistics",
            "tent",
            "sar",
            "mgg",
            "mgg, entropy alone",
        ):
            if method not in table:
                cells.append("–")
                continue
            mean, error = table[method]
            spread = method != "source" and len(result["seeds"]) > 1
            text = f"{mean:.2f} ± {error:.2f}" if spread else f"{mean:.2f}"
            cells.append(text + (f" ({rates[method]:g})" if method in rates else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(results: list[dict]) -> str:
    """Markdown: averages, time to accuracy, and accuracies by corruption."""
    lines = []
    for result in results:
        lines.append(
            f"\n**{result['backbone']}**: {result['n_examples']} images a corruption, batch "
            f"{result['batch_size']}, seeds {result['seeds']}, learning rates {result['rates']}\n"
        )
        methods = _methods(result)
        table = averages(result)
        lines.append("| | " + " | ".join(methods) + " |")
        lines.append("|---" * (len(methods) + 1) + "|")
        for corruption in CORRUPTIONS:
            cells = []
            for method in methods:
                seeds = result["seeds"][:1] if method == "source" else result["seeds"]
                found = [_accuracies(result, method, s)[corruption] for s in seeds]
                cells.append(f"{statistics.mean(found):.1f}")
            lines.append(f"| {corruption} | " + " | ".join(cells) + " |")
        cells = [f"**{m:.2f}** ± {e:.2f}" for m, e in table.values()]
        lines.append("| average | " + " | ".join(cells) + " |")
        spent = {
            m: statistics.mean(
                sum(v["seconds"]) for k, v in result["streams"].items() if k.split("/")[0] == m
            )
            for m in methods
        }
        cells = [f"{seconds:.1f}" for seconds in spent.values()]
        lines.append("| seconds a stream | " + " | ".join(cells) + " |")
        if (found := time_to_accuracy(result)) is None:
            lines.append("\nMGG does not reach SAR's final accuracy.")
        else:
            lines.append(
                f"\nMGG is at SAR's final accuracy after {found[1]:.2f} s of a stream, SAR after "
                f"{found[0]:.2f} s: {found[2]:.1f} times faster."
            )
    return "\n".join(lines)


def artifact_run(result: dict) -> dict:
    """The measurement as a run in an artifact's ``results.json``."""
    table, by_corruption = averages(result), {}
    for method in table:
        seeds = result["seeds"][:1] if method == "source" else result["seeds"]
        found = [_accuracies(result, method, seed) for seed in seeds]
        for corruption in CORRUPTIONS:
            share = statistics.mean(f[corruption] for f in found) / 100
            by_corruption.setdefault(corruption, {})[method] = round(share, 6)
    rates = ", ".join(f"{method} {rate:g}" for method, rate in result["rates"].items())
    universal = result.get("optimizer") == "mgg-universal"
    classifier = f"Classifier: held-out {result['backbone']}. " if universal else ""
    folder = "runs/held-out/" if universal else ""
    return {
        "dataset": "CIFAR-10-C made from JPEG images",  # so these are no official figures
        "severities": [5],
        "corruptions": list(CORRUPTIONS),
        "images": result["n_examples"],
        "protocol": "reset-per-corruption",
        "batch_size": result["batch_size"],
        "seeds": result["seeds"],
        "accuracy": {m: round(mean / 100, 8) for m, (mean, _) in table.items()},
        "standard_error": {m: round(error / 100, 8) for m, (_, error) in table.items() if error},
        "by_corruption": by_corruption,
        "note": f"{classifier}Learning rates, chosen on four other corruptions: {rates}.",
        "command": f"python examples/results.py --data DIR --backbone {folder}{result['backbone']}",
        "versions": result["versions"],
    }


def into_cards(results: list[dict]) -> None:
    """Put measurements into the bundled artifacts they were made with."""
    runs: dict[str, list] = {}
    for result in results:
        own = f"source-{result['backbone']}-cifar10"
        used = result.get("optimizer", f"mgg-{result['backbone']}-cifar10")
        for name in {own, used} & set(list_bundled()):
            runs.setdefault(name, []).append(artifact_run(result))
    for name, made in runs.items():
        measured = {"format_version": 1, "runs": made}
        refresh(bundled_folder(name), measured=measured)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds cifar10 and cifar10c")
    parser.add_argument(
        "--backbone",
        nargs="+",
        default=["resnet26", "resnet26bn", "vit-tiny"],
        help="of the bundled ones, or folders of classifiers",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-examples", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--tune-examples", type=int, help="images of each extra corruption (default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--resume", action="store_true", help="learning rates and seeds of the run already in OUT"
    )
    parser.add_argument("--report", action="store_true")
    parser.add_argument(
        "--into-cards", action="store_true", help="put the figures of earlier runs into hub_cards/"
    )
    args = parser.parse_args(argv)
    paths = [args.out / f"online-{Path(backbone).name}.json" for backbone in args.backbone]
    if not args.report and not args.into_cards:
        if args.data is None:
            parser.error("--data is needed to measure")
        args.out.mkdir(parents=True, exist_ok=True)
        for backbone, path in zip(args.backbone, paths, strict=True):
            print(backbone, flush=True)
            measure(
                backbone,
                args.data,
                args.seeds,
                args.n_examples,
                args.batch_size,
                path,
                args.tune_examples,
                args.resume,
            )
    results = [json.loads(path.read_text()) for path in paths if path.is_file()]
    if args.into_cards:
        into_cards(results)
    print(summary(results))
    print(report(results))


if __name__ == "__main__":
    main()
