"""What TTT and MT3 reach: each against its own model without adaptation, on the same images.

    python examples/per_image_results.py ttt-standard --data DIR --n-examples 150
    python examples/per_image_results.py ttt-standard ttt-one-step ttt-online mt3 --report

Severity 5, the fifteen corruptions, the first N images of each in a shuffled order that the seed
draws, one image at a time for TTT online. The standard error is that of the paired difference over
all images. Results are written after every corruption; a run goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

import ttt_plugins as tp
from ttt_plugins.artifacts.card import refresh
from ttt_plugins.artifacts.folder import bundled_folder
from ttt_plugins.benchmark import CORRUPTIONS, EXTRA_CORRUPTIONS, load_stream
from ttt_plugins.data.images import to_float

TTT, MT3 = "bundled:ttt-resnet26-cifar10", "bundled:mt3-resnet26-cifar10"

#: Name of a measurement -> artifact and the fields it changes.
MEASUREMENTS = {
    "ttt-standard": (TTT, {}),
    "ttt-standard-0.003": (TTT, {"lr": 0.003}),
    "ttt-standard-0.01": (TTT, {"lr": 0.01}),
    "ttt-one-step": (TTT, {"steps": 1, "lr": 0.01}),
    "ttt-online": (TTT, {"mode": "online"}),
    # The rate was chosen among 1e-3, 3e-3 and this on the four extra corruptions (--corruption).
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
    """Predicted classes, and the seconds they took, from a reset."""
    net.reset()
    found, start = [], time.perf_counter()
    for part in images.split(batch_size):
        found += net(part).argmax(1).tolist()
    return found, time.perf_counter() - start


def measure(
    name: str, data: Path, n: int, seed: int, path: Path, corruptions=CORRUPTIONS, device="cpu"
) -> dict:
    """One measurement over the corruptions; ``path`` is written after each of them."""
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
        path.write_text(json.dumps(result) + "\n")
        bar.set_postfix_str(line(result))
    return result


def paired(these: list[int], those: list[int]) -> tuple[float, float]:
    """Mean difference of right answers to the same images, and its standard error, in points."""
    gaps = [a - b for a, b in zip(these, those, strict=True)]
    n, mean = len(gaps), sum(gaps) / len(gaps)
    error = math.sqrt(sum((g - mean) ** 2 for g in gaps) / max(1, n - 1) / n)
    return 100 * mean, 100 * error


def figures(result: dict) -> dict[str, float]:
    """Accuracies in %, their paired difference with its standard error, and images a second."""
    cells = result["cells"].values()
    adapted = [r for c in cells for r in c["adapted_right"]]
    source = [r for c in cells for r in c["source_right"]]
    n = len(adapted)
    gain, error = paired(adapted, source)
    return {
        "source": 100 * sum(source) / n,
        "adapted": 100 * sum(adapted) / n,
        "gain": gain,
        "error": error,
        "images_per_second": n / sum(c["seconds"] for c in cells),
        "passes": sum(c["forwards"] + c["backwards"] for c in cells) / n,
    }


def line(result: dict) -> str:
    f = figures(result)
    return f"{f['source']:.1f} -> {f['adapted']:.1f} ({f['gain']:+.1f} ± {f['error']:.1f})"


def comparison(result: dict, first: dict) -> list[str]:
    """A line on two measurements of the same images; none if they are of different ones."""
    same = all(result["settings"][k] == first["settings"][k] for k in ("n_examples", "seed"))
    if not same or result["cells"].keys() != first["cells"].keys():
        return []
    both = [
        [a for c in first["cells"] for a in r["cells"][c]["adapted_right"]] for r in (result, first)
    ]
    mean, error = paired(*both)
    names = (result["settings"]["measurement"], first["settings"]["measurement"])
    return ["", f"{names[0]} against {names[1]} on the same images: {mean:+.2f} ± {error:.2f}"]


def report(results: list[dict]) -> str:
    """Markdown: one row a measurement, each against the first, accuracies by corruption."""
    lines = [
        "| | images a corruption | without adaptation | adapted | gain ± s.e. | passes an image "
        "| images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        f, name = figures(result), result["settings"]["measurement"]
        done = len(result["cells"])
        n = f"{result['settings']['n_examples']}" + ("" if done == 15 else f" ({done} of 15)")
        lines.append(
            f"| {name} | {n} | {f['source']:.2f} | {f['adapted']:.2f} | {f['gain']:+.2f} ± "
            f"{f['error']:.2f} | {f['passes']:.0f} | {f['images_per_second']:.2f} |"
        )
    for other in results[1:]:
        lines += comparison(other, results[0])
    lines += ["", "| | " + " | ".join(r["settings"]["measurement"] for r in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for corruption in CORRUPTIONS:
        cells = []
        for result in results:
            cell = result["cells"].get(corruption)
            if cell is None:
                cells.append("–")
                continue
            both = (cell["source_right"], cell["adapted_right"])
            cells.append(" → ".join(f"{100 * sum(r) / len(r):.1f}" for r in both))
        lines.append(f"| {corruption} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def artifact_results(results: list[dict]) -> dict:
    """Finished measurements of one artifact as its ``results.json``."""
    runs = []
    for result in results:
        settings, f, by_corruption = result["settings"], figures(result), {}
        method = settings["measurement"].split("-")[0]
        for corruption, cell in result["cells"].items():
            both = {method: cell["adapted_right"], "source": cell["source_right"]}
            by_corruption[corruption] = {m: round(sum(r) / len(r), 6) for m, r in both.items()}
        runs.append(
            {
                "dataset": "CIFAR-10-C made from JPEG images",  # so these are no official figures
                "severities": [5],
                "corruptions": list(result["cells"]),
                "images": settings["n_examples"],
                "protocol": "reset-per-corruption",
                "batch_size": 1,
                "seeds": [settings["seed"]],
                "accuracy": {method: f["adapted"] / 100, "source": f["source"] / 100},
                "standard_error": {method: f["error"] / 100},
                "by_corruption": by_corruption,
                "note": f"{settings['measurement']}, fields {json.dumps(settings['fields'])}; "
                "source is the same model without adaptation on the same images; the standard "
                "error is that of the paired difference over images.",
                "command": f"python examples/per_image_results.py {settings['measurement']} "
                f"--data DIR --n-examples {settings['n_examples']}",
                "versions": result["versions"],
            }
        )
    return {"format_version": 1, "runs": runs}


def into_cards(results: list[dict]) -> None:
    """Put finished measurements into the bundled artifacts they were made with."""
    for artifact in (TTT, MT3):
        own = [
            r for r in results if r["settings"]["artifact"] == artifact and len(r["cells"]) == 15
        ]
        if own:
            folder = bundled_folder(artifact.removeprefix("bundled:"))
            refresh(folder, measured=artifact_results(own))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measurements", nargs="+", choices=MEASUREMENTS)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10 and cifar10c")
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
    parser.add_argument("--report", action="store_true", help="print tables of earlier runs")
    parser.add_argument(
        "--into-cards", action="store_true", help="put the figures of earlier runs into hub_cards/"
    )
    args = parser.parse_args(argv)
    results = []
    for name in args.measurements:
        path = args.out / f"per-image-{name}.json"
        if not args.report and not args.into_cards:
            if args.data is None:
                parser.error("--data is needed to measure")
            measure(name, args.data, args.n_examples, args.seed, path, args.corruption, args.device)
        if path.is_file():
            results.append(json.loads(path.read_text()))
    if args.into_cards:
        into_cards(results)
    print(report(results))


if __name__ == "__main__":
    main()
