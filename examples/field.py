"""Measure Tent, SAR and MGG at their defaults on the field's streams, for `report.py`.

    python examples/field.py --data DIR                           # the fifteen corruptions
    python examples/field.py --data DIR --extra --out DIR         # the four extra ones

Each stream of ``benchmark --field`` (at severity 5; ``gradual`` at all severities) is measured on
the first images of every corruption: ``gradual`` uses a quarter of them, ``clean`` four times as
many. The ``long`` stream is measured by ``benchmark --field long``. The source's predictions do not
depend on the order of the images, so it predicts each image once.

Settings may be chosen only on the extra corruptions. For every image of the data set the file
``OUT/field-BACKBONE.json`` records how often it was predicted correctly in a stream, so that errors
can be clustered by image. It is written whenever a part of a stream between two resets is finished,
and the same command resumes there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import ttt_plugins as tp
from ttt_plugins.benchmark import CORRUPTIONS, EXTRA_CORRUPTIONS, FIELD, open_dataset
from ttt_plugins.benchmark.cells import Cell, CorruptionData
from ttt_plugins.benchmark.evaluate import classify
from ttt_plugins.benchmark.field import field_views
from ttt_plugins.benchmark.protocols import Stretch, plan, streams
from ttt_plugins.utils.files import write_text

BACKBONES = ("resnet26", "resnet26bn", "vit-tiny")
METHODS = ("tent", "sar", "mgg")
#: Streams in the order in which they are measured; if time runs out, the last are missing.
STREAMS = (
    "batch-1",
    "batch-64",
    "sorted",
    "continual",
    "mixed",
    "dirichlet-0.1",
    "clean",
    "clean-corrupt-clean",
    "batch-4",
    "gradual",
    "batch-200",
    "dirichlet-0.01",
    "batch-16",
)
BATCH = 64

#: Numbers of correct predictions and of all predictions, by image.
Counts = dict[str, list[int]]


def adapter(backbone: str, method: str, **fields) -> tp.Adapter:
    """A method at its defaults around a bundled classifier; MGG has the optimizer trained on it."""
    if method == "mgg":
        return tp.from_pretrained(f"bundled:mgg-{backbone}-cifar10", **fields)
    return tp.wrap(f"bundled:source-{backbone}-cifar10", method, **fields)


def cells_of(data_dir: Path, extra: bool, n: int, stream: str) -> CorruptionData:
    """The cells of a stream."""
    every = FIELD[stream].cells == "all"
    count = {"clean": 4 * n, "gradual": max(1, n // 4)}.get(stream, n)
    data = open_dataset(
        "cifar10",
        data_dir,
        corruptions=EXTRA_CORRUPTIONS if extra else CORRUPTIONS,
        severities=None if every else [5],
        n_examples=count,
    )
    views, missing = field_views({stream: FIELD[stream]}, data, 1)
    if stream not in views:
        raise SystemExit(f"{missing[0]}")
    return views[stream]


class Source:
    """Which images the unadapted model predicts correctly, determined once for every cell."""

    def __init__(self, net: tp.Adapter):
        self._net = net
        self._right: dict[Cell, torch.Tensor] = {}

    def right(self, data: CorruptionData, cell: Cell) -> torch.Tensor:
        """Whether each image of a cell is predicted correctly, bool (N,)."""
        known = self._right.get(cell)
        if known is None or len(known) < data.counts[cell]:
            rows = torch.arange(data.counts[cell])
            pairs = torch.stack([torch.zeros_like(rows), rows], 1)
            answers = classify(self._net, {0: data.read(cell)}, pairs, BATCH).answers
            self._right[cell] = answers.right
        return self._right[cell]


def empty(images: int) -> Counts:
    """Counts before anything was predicted."""
    return {"right": [0] * images, "shown": [0] * images}


def add(counts: Counts, rows: torch.Tensor, right: torch.Tensor) -> None:
    """Add the predictions of the images ``rows``; ``right`` says which are correct."""
    for row, correct in zip(rows.tolist(), right.tolist(), strict=True):
        counts["right"][row] += int(correct)
        counts["shown"][row] += 1


def stretches_of(stream: str, data: CorruptionData, seed: int) -> list[list[Stretch]]:
    """The parts of a stream between two resets."""
    protocol = FIELD[stream]
    return streams(plan(protocol.protocol, data, seed, protocol.concentration))


def run_part(net: tp.Adapter, data: CorruptionData, part: list[Stretch], batch: int) -> Iterator:
    """Yield each stretch and which of its images were predicted correctly, after a reset."""
    net.reset()
    for stretch in part:
        images = {number: data.read(cell) for number, cell in enumerate(stretch.cells)}
        yield stretch, classify(net, images, stretch.rows, batch).answers.right


def source_counts(source: Source, data: CorruptionData, parts: list[list[Stretch]]) -> Counts:
    """The source's counts over a whole stream."""
    counts = empty(max(data.counts.values()))
    for stretch in (stretch for part in parts for stretch in part):
        right = [source.right(data, cell) for cell in stretch.cells]
        numbers, rows = stretch.rows.unbind(1)
        hits = [right[i][row] for i, row in zip(numbers.tolist(), rows.tolist(), strict=True)]
        add(counts, rows, torch.stack(hits))
    return counts


def measure(
    backbone: str,
    data_dir: Path,
    path: Path,
    *,
    extra: bool,
    n: int,
    chosen: Sequence[str] = STREAMS,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    wrap: Callable[..., tp.Adapter] = adapter,
) -> dict:
    """Measure a network; ``path`` is written after every part of a stream between two resets.

    Args:
        backbone: name of a bundled classifier.
        data_dir: folder that holds cifar10 and cifar10c.
        path: JSON file with the results; what it already holds is not measured again.
        extra: whether to use the four extra corruptions, on which settings may be chosen.
        n: number of images of each corruption.
        chosen: names of streams.
        methods: names of methods.
        seed: seed for the order of the images.
        wrap: function that creates the adapter of a backbone and a method.
    """
    settings = {"backbone": backbone, "extra": extra, "n_examples": n, "seed": seed}
    result = {**settings, "streams": {}, "versions": {}}
    if path.is_file():
        result = json.loads(path.read_text())
        if any(result[name] != value for name, value in settings.items()):
            raise SystemExit(f"{path} was measured with other corruptions, another number or order")
    result["versions"] = {"torch": torch.__version__, "ttt_plugins": tp.__version__}
    source = Source(wrap(backbone, "source"))
    nets: dict[str, tp.Adapter] = {}
    for stream in chosen:
        data = cells_of(data_dir, extra, n, stream)
        parts = stretches_of(stream, data, seed)
        found = result["streams"].setdefault(stream, {})
        if "source" not in found:
            found["source"] = source_counts(source, data, parts)
        for method in methods:
            new = empty(max(data.counts.values())) | {"parts": 0, "seconds": 0.0, "events": {}}
            own = found.setdefault(method, new)
            for part in parts[own["parts"] :]:
                net = nets.setdefault(method, wrap(backbone, method))
                start = time.process_time()
                for stretch, right in run_part(net, data, part, FIELD[stream].batch_size or BATCH):
                    add(own, stretch.rows[:, 1], right)
                events = Counter(f"{event.reason}, {event.action}" for event in net.guard_events)
                own["events"] = dict(Counter(own["events"]) + events)
                own["seconds"] = round(own["seconds"] + time.process_time() - start, 1)
                own["parts"] += 1
                own["done"] = own["parts"] == len(parts)
                write_text(path, json.dumps(result) + "\n")
        print(line(backbone, stream, found), flush=True)
    return result


def line(backbone: str, stream: str, found: dict[str, dict]) -> str:
    """Accuracies of a stream in %, and points above the source."""
    share = {m: 100 * sum(c["right"]) / max(sum(c["shown"]), 1) for m, c in found.items()}
    shown = [f"source {share['source']:.1f}"]
    shown += [
        f"{m} {share[m] - share['source']:+.1f} ({c['seconds']:.0f} s{_events(c)})"
        for m, c in found.items()
        if m != "source"
    ]
    return f"{backbone} {stream}: {', '.join(shown)}"


def _events(counts: dict) -> str:
    return "".join(f"; {times} {what}" for what, times in counts["events"].items())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds cifar10 and cifar10c"
    )
    parser.add_argument("--backbone", nargs="+", choices=BACKBONES, default=BACKBONES)
    parser.add_argument("--extra", action="store_true", help="use the four extra corruptions")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=STREAMS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument(
        "--n-examples", type=int, default=192, help="number of images of each corruption"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of the images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for backbone in args.backbone:
        measure(
            backbone,
            args.data,
            args.out / f"field-{backbone}.json",
            extra=args.extra,
            n=args.n_examples,
            chosen=args.streams,
            methods=args.methods,
            seed=args.seed,
        )


if __name__ == "__main__":
    main()
