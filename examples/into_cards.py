"""Put the measurements of ``examples/results`` into the artifacts that they were made with.

    python examples/into_cards.py

Each artifact's ``results.json`` and card are rewritten. For online methods they have the rows that
were run on whole streams in three orders, for methods that adapt to every image all finished
measurements.
"""

from __future__ import annotations

import json
import statistics

import report

from ttt_plugins.artifacts.card import refresh
from ttt_plugins.artifacts.folder import bundled_folder, list_bundled
from ttt_plugins.benchmark import CORRUPTIONS

COMMON = {
    "dataset": "CIFAR-10-C made from JPEG images",  # so these are not official figures
    "severities": [5],
    "protocol": "reset-per-corruption",
}
#: Rows of the cards, at the rate that was measured in three orders.
ROWS = (
    "source",
    "batch statistics",
    "tent",
    "sar",
    "tent, mix",
    "mgg",
    "mgg, batch",
    "mgg, entropy alone",
)


def online_run(result: dict) -> dict:
    """The measurements of one classifier as a run of an artifact's ``results.json``."""
    accuracy, errors, by_corruption, rates = {}, {}, {}, []
    for row in ROWS:
        for label, rate in report.labels(result, row).items():
            measured = report.over_seeds(result, label)
            if measured is None:
                continue
            name = row if row not in accuracy else label
            accuracy[name] = round(measured[0] / 100, 8)
            if measured[1]:
                errors[name] = round(measured[1] / 100, 8)
            if rate is not None:
                rates.append(f"{name} {rate:g}")
            seeds = [0] if row == "source" else [0, 1, 2]
            for corruption in CORRUPTIONS:
                means = [report.accuracy(result, label, s, corruptions=[corruption]) for s in seeds]
                shares = by_corruption.setdefault(corruption, {})
                shares[name] = round(statistics.mean(m for m in means if m is not None) / 100, 6)
    universal = result["optimizer"] == "mgg-universal"
    held_out = ", held out" if universal else ""
    folder = "runs/held-out/" if universal else ""
    return COMMON | {
        "network": f"{result['backbone']}{held_out}",
        "corruptions": list(CORRUPTIONS),
        "images": result["n_examples"],
        "batch_size": result["batch_size"],
        "seeds": [0, 1, 2],
        "accuracy": accuracy,
        "standard_error": errors,
        "by_corruption": by_corruption,
        "note": f"Learning rates: {', '.join(rates)}. The seeds change the order of "
        "the images only, and the standard error is over them. RESULTS.md says how the rates were "
        "chosen and what Adam reaches on MGG's loss.",
        "command": f"python examples/results.py --data DIR --backbone {folder}{result['backbone']}",
        "versions": result["versions"],
    }


def per_image_run(result: dict) -> dict:
    """One finished per-image measurement as a run."""
    settings, f, by_corruption = result["settings"], report.per_image_figures(result), {}
    method = settings["measurement"].split("-")[0]
    for corruption, cell in result["cells"].items():
        both = {method: cell["adapted_right"], "source": cell["source_right"]}
        by_corruption[corruption] = {m: round(sum(r) / len(r), 6) for m, r in both.items()}
    return COMMON | {
        "network": f"resnet26, {settings['measurement']}",
        "corruptions": list(result["cells"]),
        "images": settings["n_examples"],
        "batch_size": 1,
        "seeds": [settings["seed"]],
        "accuracy": {method: f["adapted"] / 100, "source": f["source"] / 100},
        "standard_error": {method: f["error"] / 100},
        "by_corruption": by_corruption,
        "note": f"{settings['measurement']}, fields {json.dumps(settings['fields'])}; source is "
        "the same model without adaptation on the same images; the standard error is that of the "
        "paired difference, clustered by image.",
        "command": f"python examples/per_image_results.py {settings['measurement']} --data DIR "
        f"--n-examples {settings['n_examples']}",
        "versions": result["versions"],
    }


def main() -> None:
    runs: dict[str, list] = {}
    for backbone in (*report.BUNDLED, *report.HELD_OUT):
        result = report.load(f"online-{backbone}")
        run = online_run(result)
        for name in {f"source-{backbone}-cifar10", result["optimizer"]} & set(list_bundled()):
            runs.setdefault(name, []).append(run)
    for measurement in report.PER_IMAGE:
        result = report.load(f"per-image-{measurement}")
        name = result["settings"]["artifact"].removeprefix("bundled:")
        runs.setdefault(name, []).append(per_image_run(result))
    for name, measured in runs.items():
        refresh(bundled_folder(name), measured={"format_version": 1, "runs": measured})


if __name__ == "__main__":
    main()
