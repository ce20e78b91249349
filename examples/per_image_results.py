"""Measure TTT and MT3, each against its own model without adaptation on the same images.

    python examples/per_image_results.py ttt-standard mt3 --data DIR --n-examples 150

The images are the first N of each of the fifteen corruptions at severity 5, in a shuffled order
that the seed draws; TTT online gets one image at a time. ``--corruption`` may name the four extra
ones instead, to choose settings on; results on them belong in a separate folder (``--out``). The
standard error is that of the paired difference, clustered by image. Results are written after every
corruption, and the same command resumes there. `report.py` prints the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from report import per_image_figures
from tqdm.auto import tqdm

import ttt_plugins as tp
from ttt_plugins.benchmark import CORRUPTIONS, EXTRA_CORRUPTIONS, load_stream
from ttt_plugins.data.images import to_float
from ttt_plugins.utils.files import write_text

TTT, MT3 = "bundled:ttt-resnet26-cifar10", "bundled:mt3-resnet26-cifar10"

#: The artifact, and the fields that are changed, by the name of the measurement.
MEASUREMENTS = {
    "ttt-standard": (TTT, {}),
    "ttt-standard-0.003": (TTT, {"lr": 0.003}),
    "ttt-standard-0.01": (TTT, {"lr": 0.01}),
    "ttt-one-step": (TTT, {"steps": 1, "lr": 0.01}),
    # The rate of 0.01 was chosen among these three on the four extra corruptions.
    "ttt-online": (TTT, {"mode": "online"}),
    "ttt-online-0.003": (TTT, {"mode": "online", "lr": 0.003}),
    "ttt-online-0.01": (TTT, {"mode": "online", "lr": 0.01}),
    "ttt-skip-0.9": (TTT, {"steps": 1, "lr": 0.01, "threshold": 0.9}),
    "ttt-skip-0.8": (TTT, {"steps": 1, "lr": 0.01, "threshold": 0.8}),
    "ttt-skip-0.6": (TTT, {"steps": 1, "lr": 0.01, "threshold": 0.6}),
    "mt3": (MT3, {}),
    "mt3-0.05": (MT3, {"lr": 0.05}),
    "mt3-0.2": (MT3, {"lr": 0.2}),
    "mt3-two-steps": (MT3, {"steps": 2}),
    "mt3-vote": (MT3, {"vote": True}),
}


def predict(net, images: torch.Tensor, batch_size: int) -> tuple[list[int], float]:
    """Predicted classes and the seconds for predicting them, from a reset."""
    net.reset()
    classes, start = [], time.perf_counter()
    for batch in images.split(batch_size):
        classes += net(batch).argmax(1).tolist()
    return classes, time.perf_counter() - start


def measure(
    name: str, data: Path, n: int, seed: int, path: Path, corruptions=CORRUPTIONS, device="cpu"
) -> dict:
    """Make one measurement over the corruptions; ``path`` is written after each of them."""
    artifact, fields = MEASUREMENTS[name]
    settings = {
        "measurement": name,
        "artifact": artifact,
        "fields": fields,
        "n_examples": n,
        "seed": seed,
    }
    result = {"settings": settings, "cells": {}}
    if path.is_file() and (stored := json.loads(path.read_text()))["settings"] == settings:
        result = stored
    result |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "device": device}
    result |= {"versions": {"torch": torch.__version__, "ttt_plugins": tp.__version__}}
    net = tp.from_pretrained(artifact, seed=seed, device=device, **fields)
    plain = tp.wrap(artifact, "source", device=device)
    bar = tqdm([c for c in corruptions if c not in result["cells"]], name)
    for corruption in bar:
        stream = load_stream(data, corruption, n_examples=n)
        order = torch.randperm(len(stream), generator=torch.Generator().manual_seed(seed))
        images = to_float(stream.images[order]).to(device)
        labels = stream.labels[order].tolist()
        before = (net.forwards, net.backwards)
        adapted, seconds = predict(net, images, 50)
        source, _ = predict(plain, images, 50)
        result["cells"][corruption] = {
            "adapted_right": [int(a == b) for a, b in zip(adapted, labels, strict=True)],
            "source_right": [int(a == b) for a, b in zip(source, labels, strict=True)],
            "seconds": seconds,
            "forwards": net.forwards - before[0],
            "backwards": net.backwards - before[1],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result) + "\n")
        bar.set_postfix_str(line(result))
    return result


def line(result: dict) -> str:
    f = per_image_figures(result)
    return f"{f['source']:.1f} -> {f['adapted']:.1f} ({f['gain']:+.1f} ± {f['error']:.1f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("measurements", nargs="+", choices=MEASUREMENTS)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds cifar10 and cifar10c"
    )
    parser.add_argument("--n-examples", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--corruption",
        nargs="+",
        choices=(*CORRUPTIONS, *EXTRA_CORRUPTIONS),
        default=CORRUPTIONS,
        help="(default: the fifteen; the extra ones are for choices)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    for name in args.measurements:
        path = args.out / f"per-image-{name}.json"
        measure(name, args.data, args.n_examples, args.seed, path, args.corruption, args.device)


if __name__ == "__main__":
    main()
