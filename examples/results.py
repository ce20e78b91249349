"""Measure the online methods on the fifteen corruptions; `report.py` prints the tables.

    python examples/results.py --data DIR --backbone resnet26 --seeds 0
    python examples/results.py --data DIR --backbone resnet26bn --rows sar --rate 0.3 --seeds 0
    python examples/results.py --data DIR --backbone runs/held-out/convnext

A name means a bundled classifier and the optimizer trained on it. A folder means a classifier that
no optimizer was trained on (`held_out.py`); it gets ``mgg-universal``, both with source statistics
of 4,096 clean training images and without.

The severity is 5, with a reset per corruption and one shuffled stream for each corruption and seed:
a seed changes the order of the images and nothing else. Learning rates are the best of a grid on
the four extra corruptions; while the best is at an edge of the grid, the grid is widened (three
times at most). The chosen rates and every stream are written to ``OUT/online-BACKBONE.json`` as
soon as they are known; the same command resumes there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from report import logged

import ttt_plugins as tp
from ttt_plugins.artifacts.folder import read_config
from ttt_plugins.benchmark import CORRUPTIONS, EXTRA_CORRUPTIONS, load_stream
from ttt_plugins.data.cifar10 import EXTRA_ROWS
from ttt_plugins.data.images import LabelledImages, to_float
from ttt_plugins.data.parquet import read_parquet
from ttt_plugins.train.mgg import stream_accuracy
from ttt_plugins.utils.files import write_text

PAPER = "mgg, paper's recipe"
ADAM = "adam, same loss"

#: Learning rates that are tried first.
GRIDS = {
    "tent": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "sar": (1e-3, 1e-2, 3e-2, 1e-1),
    ADAM: (3e-3, 1e-2, 3e-2),
    "mgg": (3e-3, 1e-2, 3e-2),
}
#: Rows that run at the learning rate that their artifact brings, unless asked to choose anew.
SETTLED = ("mgg",)


@dataclass(frozen=True)
class Subject:
    """A classifier, and the source of what was learned for it.

    Attributes:
        backbone: name of a bundled classifier, or a folder that `held_out.py` wrote.
        data: folder that holds cifar10 and cifar10c.
        paper: artifact that was meta-trained with the paper's recipe, for its row.
    """

    backbone: str
    data: Path
    paper: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether no optimizer was trained on it."""
        return Path(self.backbone).is_dir()

    @property
    def model(self) -> str:
        """What `wrap` takes."""
        return self.backbone if self.held_out else f"bundled:source-{self.backbone}-cifar10"

    @property
    def optimizer(self) -> str:
        """Name of the bundled optimizer that belongs to it."""
        return "mgg-universal" if self.held_out else f"mgg-{self.backbone}-cifar10"

    def wrap(self, method: str, **fields):
        """A method around the classifier, by default on batch statistics and without a guard."""
        common = {} if method == "source" else {"statistics": "batch", "guard": False}
        return tp.wrap(self.model, method, **common | fields)

    def mgg(self, statistics_of_features: bool = True, **fields):
        """MGG with the optimizer that belongs to the classifier, by default on mixed statistics."""
        fields = {"statistics": "mix", "guard": False} | fields
        if not self.held_out:
            return tp.from_pretrained(f"bundled:{self.optimizer}", **fields)
        net = tp.wrap(self.model, "mgg", **fields)
        if statistics_of_features and not net.backbone.has_batch_norm:
            rows = read_parquet(self.data / "cifar10" / "train.parquet").images[:-EXTRA_ROWS]
            clean = [to_float(part) for part in rows[:4096].split(512)]
            net.fit_source_statistics(clean, progress=False)
        return net


#: Name of a row -> adapter of a subject with some fields (its learning rate, where it is tuned).
ROWS: dict[str, Callable] = {
    "source": lambda subject: subject.wrap("source"),
    "batch statistics": lambda subject: subject.wrap("source", statistics="batch"),
    "mixed statistics": lambda subject: subject.wrap("source", statistics="mix"),
    "tent": lambda subject, **fields: subject.wrap("tent", **fields),
    "sar": lambda subject, **fields: subject.wrap("sar", **fields),
    "tent, mix": lambda subject, **fields: subject.wrap("tent", statistics="mix", **fields),
    ADAM: lambda subject, **fields: subject.mgg(rule="adam", **fields),
    PAPER: lambda subject, **fields: tp.from_pretrained(subject.paper, guard=False, **fields),
    "mgg": lambda subject, **fields: subject.mgg(**fields),
    "mgg, batch": lambda subject, **fields: subject.mgg(statistics="batch", **fields),
    "mgg, entropy alone": lambda subject, **fields: subject.mgg(False, **fields),
}


def rows_for(subject: Subject) -> list[str]:
    """The rows that apply to a subject."""
    batch_norm = subject.wrap("source").backbone.has_batch_norm
    out = set()
    if not batch_norm:
        out |= {"batch statistics", "mixed statistics", "tent, mix", "mgg, batch"}
    if batch_norm or not subject.held_out:
        out.add("mgg, entropy alone")
    if subject.paper is None:
        out.add(PAPER)
    return [name for name in ROWS if name not in out]


def next_rate(rates, best: float) -> float | None:
    """The next rate, in steps of 1, 3, 10, if a grid's best is at its edge; otherwise None."""
    if best == max(rates):
        digits = f"{best:.0e}"
        return best * 10 / 3 if digits[0] == "3" else best * 3
    if best == min(rates):
        digits = f"{best:.0e}"
        return best / 3 if digits[0] == "3" else best * 3 / 10
    return None


def best_rate(grid, scores: dict, score: Callable[[float], float], note: Callable) -> float:
    """The best rate of a grid, which is widened while it is at the edge, three times at most.

    Args:
        grid: rates that are tried first.
        scores: scores by rate as text; missing ones are added.
        score: measures a rate.
        note: function called after each measured rate.
    """

    def tried(rate: float) -> None:
        if (key := f"{rate:.2g}") not in scores:
            scores[key] = score(float(key))
            note()

    for rate in grid:
        tried(rate)
    for _ in range(3):
        best = max(scores, key=scores.__getitem__)
        rate = next_rate([float(key) for key in scores], float(best))
        if rate is None:
            break
        tried(rate)
    return float(max(scores, key=scores.__getitem__))


def choose_rate(row: str, subject: Subject, scores: dict, batch_size: int, n, note) -> float:
    """The rate with the best mean accuracy on the four extra corruptions.

    Args:
        row: name of the row.
        subject: the classifier that adapts.
        scores: rate as text -> accuracy in [0, 1]; those that are missing are added.
        batch_size: images a batch.
        n: images of each extra corruption, None for all.
        note: called after each rate.
    """
    streams = [load_stream(subject.data, name) for name in EXTRA_CORRUPTIONS]
    streams = [stream[:n] for stream in streams]

    def score(rate: float) -> float:
        net = ROWS[row](subject, lr=rate)
        accuracies = [stream_accuracy(net, stream, batch_size) for stream in streams]
        mean = sum(accuracies) / len(accuracies)
        print(f"  {row} at {rate:.2g}: {100 * mean:.2f} on the extra corruptions", flush=True)
        return mean

    return best_rate(GRIDS[row], scores, score, note)


def run_stream(net, stream: LabelledImages, batch_size: int, seed: int, batches=None) -> dict:
    """Correct predictions and seconds of every batch of one shuffled stream, after a reset.

    The stream may end early, after ``batches``: an online method does not know what follows, so
    these batches are the same as in the whole stream. ``hits`` has one bit for every image, in the
    order of the stream, starting with the highest bit of the first byte.
    """
    net.reset()
    order = torch.randperm(len(stream), generator=torch.Generator().manual_seed(seed))
    seconds, hits = [], []
    for rows in order.split(batch_size)[:batches]:
        images = to_float(stream.images[rows])
        start = time.perf_counter()
        logits = net(images)
        seconds.append(round(time.perf_counter() - start, 6))
        hits.append(logits.argmax(1) == stream.labels[rows])
    packed = np.packbits(torch.cat(hits).numpy()).tobytes().hex()
    right = [int(part.sum()) for part in hits]
    return {
        "n": sum(map(len, hits)),
        "right": right,
        "seconds": seconds,
        "hits": packed,
        "torch": torch.__version__,
    }


def label_of(row: str, rate: float | None) -> str:
    """The key of a row's streams: its name, and its rate if it is tuned."""
    return row if rate is None else f"{row} {rate:.2g}"


def load(path: Path, about: dict, n: int, batch_size: int, tune_n) -> dict:
    """The results so far, or empty results that say what they are about."""
    if path.is_file():
        result = json.loads(path.read_text())
        if (result["n_examples"], result["batch_size"]) != (n, batch_size):
            raise SystemExit(f"{path} holds streams of another length or batch size")
        return result
    return {
        **about,
        "batch_size": batch_size,
        "n_examples": n,
        "tune_examples": tune_n,
        "tuning": {},
        "rates": {},
        "streams": {},
        "versions": {"torch": torch.__version__, "ttt_plugins": tp.__version__},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def measure(
    subject: Subject,
    rows,
    seeds,
    path: Path,
    n=2000,
    batch_size=64,
    tune_n=None,
    rate=None,
    batches=None,
    again=False,
    choose=False,
) -> dict:
    """Measure rows of one subject; ``path`` is written after every stream and every rate.

    Args:
        subject: the classifier that adapts.
        rows: names of rows.
        seeds: of the order of the images.
        path: JSON file with the results; streams that are there are not run again.
        n: images a corruption.
        batch_size: images a batch.
        tune_n: images of each extra corruption that rates are chosen on, None for all; a file
            that exists keeps its own.
        rate: measure the rows at this learning rate, beside the one that is chosen.
        batches: end every stream after so many, None for whole streams.
        again: measure rows a second time, under another label: streams of earlier versions do not
            say which images were right.
        choose: try MGG's step sizes as well; the row keeps its artifact's all the same.
    """
    about = {"backbone": Path(subject.backbone).name, "optimizer": subject.optimizer}
    result = load(path, about, n, batch_size, tune_n)

    def note() -> None:
        write_text(path, json.dumps(result) + "\n")

    nets = {}
    for row in rows:
        used = rate
        if row in GRIDS and (choose or row not in SETTLED):
            scores = result["tuning"].setdefault(row, {})
            chosen = choose_rate(row, subject, scores, batch_size, result["tune_examples"], note)
            if row not in SETTLED:
                result["rates"][row] = chosen
                used = rate or chosen
        elif row == "tent, mix":
            used = rate or result["rates"]["tent"]
        elif row == PAPER:
            result["tuning"][row] = logged(read_config(Path(str(subject.paper))))
            note()
        label = label_of(row, used) + (" again" if again else "")
        nets[label] = ROWS[row](subject, **({} if used is None else {"lr": used}))
    for seed in seeds:
        for corruption in CORRUPTIONS:
            stream = load_stream(subject.data, corruption, n_examples=n)
            for label, net in nets.items():
                if label == "source" and seed != seeds[0]:
                    continue  # order means nothing to it
                key = f"{label}/{corruption}/{seed}"
                wanted = min(len(stream), (batches or len(stream)) * batch_size)
                if result["streams"].get(key, {"n": 0})["n"] < wanted:
                    result["streams"][key] = run_stream(net, stream, batch_size, seed, batches)
                    note()
        print(f"  {', '.join(nets)}: seed {seed}", flush=True)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds cifar10 and cifar10c"
    )
    parser.add_argument(
        "--backbone",
        nargs="+",
        default=["resnet26", "resnet26bn", "vit-tiny"],
        help="of the bundled ones, or folders of classifiers",
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="(default: all that apply)")
    parser.add_argument("--rate", type=float, help="learning rate, instead of the chosen one")
    parser.add_argument("--again", action="store_true", help="measure rows a second time")
    parser.add_argument("--choose", action="store_true", help="try MGG's step sizes as well")
    parser.add_argument("--paper", help="artifact that was meta-trained with the paper's recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-examples", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, help="end every stream after so many")
    parser.add_argument(
        "--tune-examples", type=int, help="images of each extra corruption (default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for backbone in args.backbone:
        print(backbone, flush=True)
        subject = Subject(backbone, args.data, args.paper)
        measure(
            subject,
            args.rows or rows_for(subject),
            args.seeds,
            args.out / f"online-{Path(backbone).name}.json",
            args.n_examples,
            args.batch_size,
            args.tune_examples,
            args.rate,
            args.batches,
            args.again,
            args.choose,
        )


if __name__ == "__main__":
    main()
