"""Every table of RESULTS.md, from the files in ``examples/results``.

    python examples/report.py          # print them
    python examples/report.py --write  # renew them in RESULTS.md

`results.py`, `imagenet.py`, `per_image_results.py`, `field.py` and `entropy_alone.py` write those
files, and `into_cards.py` puts them into the bundled artifacts' cards. Nothing is measured
here.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ttt_plugins.artifacts.folder import bundled_folder, read_config
from ttt_plugins.benchmark import CORRUPTIONS, FIELD
from ttt_plugins.utils.files import write_text

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parent.parent / "RESULTS.md"
BUNDLED = ("resnet26", "resnet26bn", "vit-tiny")
HELD_OUT = ("resnet10t", "resnetv2-gn", "convnext")
#: Batches of seed 0's streams that the table of all rows is over, 64 images each.
BATCHES = 16
#: Row of the tables -> name of the row in the files, in the order of the tables.
ROWS = {
    "source, no adaptation": "source",
    "batch statistics, no adaptation": "batch statistics",
    "mixed statistics, no adaptation": "mixed statistics",
    "Tent": "tent",
    "Tent on mixed statistics": "tent, mix",
    "SAR": "sar",
    "Adam, same loss": "adam, same loss",
    "MGG, the paper's recipe": "mgg, paper's recipe",
    "MGG on batch statistics": "mgg, batch",
    "MGG": "mgg",
}
BATCH_NORM_ONLY = {"batch statistics", "mixed statistics", "tent, mix", "mgg, batch"}
PER_IMAGE = (
    "ttt-standard",
    "ttt-standard-0.003",
    "ttt-one-step",
    "ttt-skip-0.9",
    "ttt-skip-0.8",
    "ttt-skip-0.6",
    "ttt-online-0.01",
    "mt3",
)


#: Rows of the ImageNet network's table, likewise.
IMAGENET_ROWS = {
    "source, no adaptation": "source",
    "batch statistics, no adaptation": "batch statistics",
    "mixed statistics, no adaptation": "mixed statistics",
    "statistics of the stream, no adaptation": "stream statistics",
    "Tent, the laboratory's setting": "tent",
    "Tent, the package's defaults": "tent, defaults",
    "SAR, the laboratory's setting": "sar",
    "SAR, the package's defaults": "sar, defaults",
    "Adam, MGG's loss": "adam, same loss",
    "MGG, the paper's recipe for this network": "mgg, paper's recipe",
    "MGG, another recipe for this network": "mgg, own",
    "`mgg-universal` in the laboratory's setting": "mgg, batch",
    "`mgg-universal`": "mgg",
}
IMAGENET = "imagenet-efficientnet_lite0"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, header first."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  ", "| ")


# Methods that adapt along a stream


def labels(result: dict, row: str) -> dict[str, float | None]:
    """The learning rates of a row's streams, by their keys in the file."""
    rates = {}
    for key in result["streams"]:
        label = key.split("/")[0]
        if label == row:
            rates[label] = None
        elif label.startswith(row + " ") and re.fullmatch(r"[\d.e+-]+", label[len(row) + 1 :]):
            rates[label] = float(label[len(row) + 1 :])
    return rates


def chosen(result: dict, row: str) -> tuple[str, float | None] | None:
    """Label and rate of a row at the chosen rate; None if that was not measured."""
    measured = labels(result, row)
    if row in measured:
        return row, None
    if row == "tent, mix":
        return next(iter(measured.items()), None)
    rate = result["rates"].get(row)
    return next(((label, r) for label, r in measured.items() if r == rate), None)


def seeds_of(result: dict, label: str) -> list[int]:
    found = {int(k.split("/")[2]) for k in result["streams"] if k.split("/")[0] == label}
    return sorted(found)


def accuracy(
    result: dict, label: str, seed: int, batches: int | None = None, corruptions=CORRUPTIONS
) -> float | None:
    """Mean accuracy in % over the corruptions, of the first batches of each stream."""
    shares = []
    for corruption in corruptions:
        stream = result["streams"].get(f"{label}/{corruption}/{seed}")
        seen = min(stream["n"], (batches or 10**9) * result["batch_size"]) if stream else 0
        if stream is None or seen < min(result["n_examples"], (batches or 10**9) * 64):
            return None
        shares.append(sum(stream["right"][:batches]) / seen)
    return 100 * statistics.mean(shares)


def over_seeds(result: dict, label: str) -> tuple[float, float] | None:
    """Mean accuracy in % and its standard error over three orders of whole streams."""
    seeds = [0] if label == "source" else [0, 1, 2]
    found = [accuracy(result, label, seed) for seed in seeds]
    means = [mean for mean in found if mean is not None]
    if len(means) < len(found):
        return None
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return statistics.mean(means), error


def _cells(row: str, results: list[dict], cell: Callable[[dict, str], str | None]) -> list[str]:
    cells = []
    for result in results:
        out = row in BATCH_NORM_ONLY and not labels(result, "batch statistics")
        found = None if out else chosen(result, row)
        text = cell(result, found[0]) if found else None
        rate = f" ({found[1]:g})" if found and found[1] is not None else ""
        cells.append("–" if out else f"{text}{rate}" if text else "not measured")
    return cells


def online() -> str:
    """The table of all rows on the same images in the same order."""
    results = [load(f"online-{name}") for name in BUNDLED]

    def cell(result: dict, label: str) -> str | None:
        found = accuracy(result, label, 0, BATCHES)
        return None if found is None else f"{found:.2f}"

    rows = [[name, *_cells(row, results, cell)] for name, row in ROWS.items()]
    return table(["", *BUNDLED], rows)


def _spread(result: dict, label: str) -> str | None:
    found = over_seeds(result, label)
    if found is None:
        first = accuracy(result, label, 0)
        mgg = accuracy(result, "mgg", 0)
        return None if first is None else f"{first:.2f} in order 0, where MGG has {mgg:.2f}"
    return f"{found[0]:.2f}" + (f" ± {found[1]:.2f}" if label != "source" else "")


def online_orders() -> str:
    """The table of the rows that were run on whole streams in three orders."""
    results = [load(f"online-{name}") for name in BUNDLED]
    rows = []
    for name, row in ROWS.items():
        measured = [over_orders(result, row) for result in results]
        if any(measured):
            cells = [
                "–" if row in BATCH_NORM_ONLY and not labels(r, "batch statistics") else m or "–"
                for r, m in zip(results, measured, strict=True)
            ]
            rows.append([name, *cells])
    return table(["", *BUNDLED], rows)


def over_orders(result: dict, row: str) -> str | None:
    """A row at every rate that was run on whole streams in three orders."""
    parts = []
    for label, rate in labels(result, row).items():
        if text := _spread(result, label):
            parts.append(text + (f" ({rate:g})" if rate is not None else ""))
    return ", ".join(parts) or None


def settings() -> str:
    """The settings of the bundled optimizers, from their config.json, and the paper's."""
    names = [f"mgg-{name}-cifar10" for name in BUNDLED] + ["mgg-universal"]
    configs = [read_config(bundled_folder(name)) for name in names]
    fields = [config["fields"] for config in configs]
    chosen_by = [config["training"]["chosen"]["accuracy"] for config in configs]
    rows = [
        ["lambda", "0.4", *(f"{f['discrepancy']:g}" for f in fields)],
        ["step size", "0.001", *(f"{f['lr']:g}" for f in fields)],
        # Measured before "stream", which two artifacts have now, took the place of "mix".
        ["BatchNorm statistics", "–", *(f["statistics"].replace("stream", "mix") for f in fields)],
        ["outer loss", "unlabelled", *(_outer(c) for c in configs)],
        ["clean images for statistics", "–", *(_clean(c) for c in configs)],
        ["accuracy when chosen", "–", *(f"{100 * share:.2f}" for share in chosen_by)],
    ]
    return table(["", "the paper", *names], rows)


def _outer(config: dict) -> str:
    return "labelled" if config["training"]["recipe"]["labelled"] else "unlabelled"


def _clean(config: dict) -> str:
    return f"{config['training']['statistics_images']:,}"


def held_out() -> str:
    """The table of networks that no optimizer was trained on."""
    rows = []
    for name in HELD_OUT:
        result = load(f"online-{name}")
        cells = [over_orders(result, row) or "–" for row in ("source", "batch statistics")]
        cells += [over_orders(result, row) or "–" for row in ("tent", "sar")]
        cells += ["not measured", over_orders(result, "mgg") or "–"]
        rows.append([name, *cells, over_orders(result, "mgg, entropy alone") or "has them"])
    header = ["", "source", "batch statistics", "Tent", "SAR", "Adam, same loss", "mgg-universal"]
    return table([*header, "without source statistics"], rows)


def logged(config: dict) -> dict[str, float]:
    """Accuracy in [0, 1] by step size as text, in the validation that chose an optimizer."""
    training = config["training"]
    return training["epochs"][training["chosen"]["epoch"] - 1]["accuracy"]


def tuning(name: str) -> dict[str, dict[float, float]]:
    """Accuracy in % on the four extra corruptions, by row and rate."""
    found = _tried(load(f"online-{name}"))
    if name in BUNDLED:
        scores = logged(read_config(bundled_folder(f"mgg-{name}-cifar10")))
        found["mgg, when meta-trained"] = {float(r): 100 * share for r, share in scores.items()}
    return found


def _tried(result: dict) -> dict[str, dict[float, float]]:
    return {
        row: {float(rate): 100 * share for rate, share in sorted(scores.items(), key=_rate)}
        for row, scores in result["tuning"].items()
        if scores
    }


def _rate(item: tuple[str, float]) -> float:
    return float(item[0])


def rates() -> str:
    """Accuracy of every rate on the four extra corruptions, and whether the best is at an edge."""
    shown = {row: name for name, row in ROWS.items()}
    shown["mgg, when meta-trained"] = "MGG, when it was meta-trained"
    rows = []
    for name in (*BUNDLED, *HELD_OUT):
        for row, scores in tuning(name).items():
            best = max(scores, key=scores.__getitem__)
            edge = "yes" if best in (min(scores), max(scores)) else "no"
            listed = ", ".join(f"{rate:g}: {score:.2f}" for rate, score in scores.items())
            rows.append([name, shown[row], listed, f"{best:g}", edge])
    return table(["", "", "rate: accuracy", "best", "at an edge"], rows)


def sar_rates() -> str:
    """SAR's rates on the corruptions they are chosen on, and on the fifteen."""
    rows = []
    for name in BUNDLED:
        result, scores = load(f"online-{name}"), tuning(name)["sar"]
        for rate, label in sorted((r, label) for label, r in labels(result, "sar").items() if r):
            fifteen = accuracy(result, label, 0, BATCHES)
            if fifteen is not None:
                extra = f"{scores[rate]:.2f}" if rate in scores else "not measured"
                rows.append([name, f"{rate:g}", extra, f"{fifteen:.2f}"])
    return table(["", "SAR's rate", "four extra corruptions", "fifteen corruptions"], rows)


def by_corruption() -> str:
    """Accuracies at the chosen rates, of the same images as the table of all rows."""
    parts = []
    for name in BUNDLED:
        result = load(f"online-{name}")
        found = {shown: chosen(result, row) for shown, row in ROWS.items()}
        measured = {
            shown: label[0]
            for shown, label in found.items()
            if label and accuracy(result, label[0], 0, BATCHES) is not None
        }
        rows = [
            [
                corruption,
                *(
                    f"{accuracy(result, label, 0, BATCHES, [corruption]):.1f}"
                    for label in measured.values()
                ),
            ]
            for corruption in CORRUPTIONS
        ]
        parts.append(table([name, *measured], rows))
    return "\n\n".join(parts)


def time_to_accuracy(result: dict, rival: str = "sar 0.1", row: str = "mgg") -> dict | None:
    """How much sooner a row permanently reaches a rival's final accuracy, by median times.

    Accuracies so far are averaged over corruptions and seeds; the seconds of a batch are the
    median over corruptions and seeds, so that a stream that other work stalled does not count.

    Returns:
        Number of the batch, batches of a stream, and the rival's seconds for the whole stream over
        the row's up to that batch; None if the row never gets there.
    """
    curves, clocks = {}, {}
    for label in (rival, row):
        parts = [v for k, v in result["streams"].items() if k.split("/")[0] == label]
        longest = max(len(part["right"]) for part in parts)
        parts = [part for part in parts if len(part["right"]) == longest]
        right = np.array([part["right"] for part in parts], dtype=float).cumsum(1)
        seen = np.arange(1, longest + 1) * result["batch_size"]
        curves[label] = (right / seen.clip(max=parts[0]["n"])).mean(0)
        clocks[label] = np.median([part["seconds"] for part in parts], axis=0).cumsum()
    below = np.flatnonzero(curves[row] < curves[rival][-1])
    # From then on, not for a lucky moment.
    first = int(below[-1]) + 1 if len(below) else 0
    if first == len(curves[row]):
        return None
    ratio = float(clocks[rival][-1] / clocks[row][first])
    return {"batch": first + 1, "of": len(curves[row]), "ratio": ratio}


def speed() -> str:
    rows = []
    for name, row, shown in (
        ("resnet26", "mgg", "MGG"),
        ("resnet26bn", "mgg", "MGG"),
        ("resnet26bn", "mgg, batch", "MGG on batch statistics, as SAR"),
    ):
        found = time_to_accuracy(load(f"online-{name}"), row=row)
        at = "never" if found is None else f"{found['batch']} of {found['of']}"
        rows.append([name, shown, at, "–" if found is None else f"{found['ratio']:.1f}"])
    return table(["", "", "batch", "times faster"], rows)


# Errors


def clustered(gaps: ArrayLike) -> tuple[float, float]:
    """Mean and standard error in points, of gaps by corruption and image.

    The same images stand under every corruption, so an image's mean over them is one observation.
    """
    means = np.mean(np.array(gaps, dtype=float), axis=0)
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return 100 * float(means.mean()), 100 * float(error)


def hits(
    result: dict, label: str, seed: int = 0, corruptions: Sequence[str] = CORRUPTIONS
) -> np.ndarray | None:
    """Which images of a seed's streams were correct, (corruptions, images); None if not recorded.

    A row that was measured before single predictions were recorded may have been measured again.
    """
    rows = []
    for corruption in corruptions:
        keys = (f"{label}/{corruption}/{seed}", f"{label} again/{corruption}/{seed}")
        streams = [result["streams"].get(key, {}) for key in keys]
        stream = next((stream for stream in streams if "hits" in stream), None)
        if stream is None:
            return None
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(stream["hits"]), np.uint8))
        rows.append(bits[: min(stream["n"], BATCHES * result["batch_size"])].astype(float))
    return np.array(rows)


def paired() -> str:
    """Differences of recorded rows from MGG on the same images."""
    rows = []
    for name in BUNDLED:
        result = load(f"online-{name}")
        mgg = hits(result, "mgg")
        if mgg is None:
            continue
        level, error = clustered(mgg)
        rows.append([name, "MGG", f"{level:.2f} ± {error:.2f}", ""])
        for shown, row in ROWS.items():
            for label, rate in labels(result, row).items():
                other = None if row == "mgg" else hits(result, label)
                if other is not None:
                    gap, error = clustered(mgg - other)
                    at = f" ({rate:g})" if rate is not None else ""
                    gap_text = f"{gap:+.2f} ± {error:.2f}"
                    rows.append([name, f"MGG over {shown}{at}", gap_text, f"{gap / error:.1f}"])
    return table(["", "", "± clustered by image", "in standard errors"], rows)


# An ImageNet network


def _imagenet_labels(result: dict) -> dict[str, tuple[str, float | None]]:
    """Label and rate by displayed name, of the rows that have a stream of the fifteen."""
    found = {shown: chosen(result, row) for shown, row in IMAGENET_ROWS.items()}
    return {shown: at for shown, at in found.items() if at and _streams_of(result, at[0])}


def _streams_of(result: dict, label: str) -> list[str]:
    """The corruptions, of the fifteen, that a row's first order was measured on."""
    return [c for c in CORRUPTIONS if f"{label}/{c}/0" in result["streams"]]


def _over(result: dict, label: str, other: str) -> str:
    """Difference of one row from another, on the corruptions that both were measured on."""
    both = [c for c in _streams_of(result, label) if c in _streams_of(result, other)]
    if not both or label == other:
        return "–"
    parts = [hits(result, name, 0, both) for name in (label, other)]
    gap, error = clustered(np.subtract(*parts))
    return f"{gap:+.2f} ± {error:.2f}" + ("" if len(both) == 15 else f" ({len(both)})")


def imagenet() -> str:
    """All rows on the ImageNet network, in order 0."""
    command = "python examples/imagenet.py --data DIR --work WORK"
    if not (RESULTS / f"{IMAGENET}.json").is_file():
        return f"Not measured: `{command}`."
    result = load(IMAGENET)
    found, rows = _imagenet_labels(result), []
    for shown, row in IMAGENET_ROWS.items():
        if shown not in found:
            rows.append([shown, "", "", "not measured", "", ""])
            continue
        label, rate = found[shown]
        settings = result["rows"][row]
        rate = settings.get("lr") if rate is None else rate
        guard = {None: "", True: ", guard", False: ", no guard"}[settings.get("guard")]
        measured = _streams_of(result, label)
        level, error = clustered(hits(result, label, 0, measured))
        cells = [settings["statistics"] + guard, "" if rate is None else f"{rate:g}"]
        cells.append(f"{level:.2f} ± {error:.2f}")
        cells[-1] += "" if len(measured) == len(CORRUPTIONS) else f" ({len(measured)})"
        rows.append([shown, *cells, _over(result, label, "source"), _over(result, "mgg", label)])
    header = ["", "statistics, guard", "rate", "accuracy", "over source", "`mgg-universal` over it"]
    return table(header, rows)


def imagenet_rates() -> str:
    """Accuracy of every rate on the four extra corruptions of the training photographs."""
    if not (RESULTS / f"{IMAGENET}.json").is_file():
        return "Not measured."
    shown = {row: name for name, row in IMAGENET_ROWS.items()}
    rows = []
    result = load(IMAGENET)
    for row, scores in _tried(result).items():
        best = result["rates"].get(row)
        if best is None:
            continue  # its grid is not complete
        edge = "yes" if best in (min(scores), max(scores)) else "no"
        listed = ", ".join(f"{rate:g}: {score:.2f}" for rate, score in scores.items())
        rows.append([shown[row], listed, f"{best:g}", edge])
    return table(["", "rate: accuracy", "best", "at an edge"], rows)


# Photographs


def photographs() -> str:
    """The five commands of `photographs.py`, with their figures."""
    path = RESULTS / "photographs.json"
    steps = json.loads(path.read_text())["steps"] if path.is_file() else {}
    rows = []
    for name, told in (
        ("statistics", _fitted),
        ("mgg", _meta_trained),
        ("benchmark", _benchmarked),
        ("head", _head),
        ("predictions.csv", _predicted),
        ("source.csv", _predicted),
    ):
        step = steps.get(name)
        if step is None:
            rows.append([name, "not measured", ""])
        else:
            seconds = step.get("processor_seconds")
            rows.append([name, told(step), "" if seconds is None else f"{seconds:.0f}"])
    return table(["output", "figures", "processor seconds"], rows)


def _fitted(step: dict) -> str:
    return f"statistics of {step['images']} photographs"


def _meta_trained(step: dict) -> str:
    share = 100 * step["chosen"]["accuracy"]
    return f"{step['images']} photographs, {share:.2f} % as the unadapted model on clean ones"


def _benchmarked(step: dict) -> str:
    shown = {"source": "source", "mgg": "MGG"}
    parts = []
    for method, name in shown.items():
        cells = {c: 100 * share for c, share in step["accuracy"][method].items()}
        listed = ", ".join(f"{c} {share:.1f}" for c, share in cells.items())
        parts.append(f"{name} {statistics.mean(cells.values()):.2f} ({listed})")
    return "; ".join(parts)


def _head(step: dict) -> str:
    share = 100 * step["epochs"][-1]["rotation_accuracy"]
    return f"{step['images']} photographs, {share:.2f} % of the rotations right in the last epoch"


def _predicted(step: dict) -> str:
    return f"{step['images']} photographs, {100 * step['right'] / step['images']:.2f} % right"


# Methods that adapt to every image


def per_image_figures(result: dict) -> dict[str, float]:
    """Accuracies in %, their paired difference with its standard error, and passes per image."""
    cells = list(result["cells"].values())
    adapted = [cell["adapted_right"] for cell in cells]
    source = [cell["source_right"] for cell in cells]
    gain, error = clustered(np.array(adapted) - np.array(source))
    passes = sum(c["forwards"] + c["backwards"] for c in cells)
    return {
        "source": 100 * float(np.mean(source)),
        "adapted": 100 * float(np.mean(adapted)),
        "gain": gain,
        "error": error,
        "passes": passes / sum(map(len, adapted)),
    }


def per_image() -> str:
    shown = {
        "ttt-standard": "TTT, 10 steps at 0.001 (the paper's)",
        "ttt-standard-0.003": "TTT, 10 steps at 0.003",
        "ttt-one-step": "TTT, 1 step at 0.01",
        "ttt-skip-0.9": "the same, skipping images above 0.9",
        "ttt-skip-0.8": "the same, above 0.8",
        "ttt-skip-0.6": "the same, above 0.6",
        "ttt-online-0.01": "TTT online at 0.01",
        "mt3": "MT3",
    }
    rows = []
    for name in PER_IMAGE:
        result = load(f"per-image-{name}")
        f = per_image_figures(result)
        gain = f"{f['gain']:+.2f} ± {f['error']:.2f}"
        n = f"{result['settings']['n_examples']:,}"
        levels = [f"{f['source']:.2f}", f"{f['adapted']:.2f}"]
        rows.append([shown[name], n, *levels, gain, f"{f['passes']:.0f}"])
    header = ["", "images a corruption", "without adaptation", "adapted", "gain", "passes an image"]
    return table(header, rows)


def published() -> str:
    """Averages of the papers' own tables on the official CIFAR-10-C, severity 5."""
    rows = [
        ["TTT, 10 steps", "66.7", "69.0", "+2.3"],
        ["TTT online", "66.7", "79.6", "+12.9"],
        ["MT3", "71.4", "75.6", "+4.2"],
    ]
    return table(["published", "without adaptation", "adapted", "gain"], rows)


def per_image_pairs() -> str:
    """MT3 compared with TTT on the same images."""
    rows = []
    mt3 = load("per-image-mt3")["cells"]
    for name, shown in (("ttt-standard", "TTT, 10 steps"), ("ttt-one-step", "TTT, 1 step at 0.01")):
        other = load(f"per-image-{name}")["cells"]
        gaps = [np.subtract(mt3[c]["adapted_right"], other[c]["adapted_right"]) for c in mt3]
        gap, error = clustered(gaps)
        ratio = f"{abs(gap) / error:.1f}"
        rows.append([f"MT3 over {shown}", f"{gap:+.2f} ± {error:.2f}", ratio])
    return table(["", "difference", "in standard errors"], rows)


# The field


def field_gap(found: dict, method: str) -> tuple[float, float] | None:
    """Points above the source with the error clustered by image; None if not fully measured."""
    own, source = found.get(method), found.get("source")
    if not own or not source or not own.get("done"):
        return None
    shown = np.array(source["shown"], dtype=float)
    gaps = (np.array(own["right"], dtype=float) - np.array(source["right"])) / shown
    return clustered([gaps])


def field() -> str:
    """Methods at their defaults on every stream, as differences from the source."""
    parts = []
    for name in BUNDLED:
        path = RESULTS / f"field-{name}.json"
        streams = json.loads(path.read_text())["streams"] if path.is_file() else {}
        rows = []
        for stream in (stream for stream in FIELD if stream != "long"):
            found = streams.get(stream, {})
            source, cells = "not measured", []
            if counts := found.get("source"):
                source = f"{100 * sum(counts['right']) / sum(counts['shown']):.2f}"
            for method in ("tent", "sar", "mgg"):
                gap = field_gap(found, method)
                cells.append("not measured" if gap is None else f"{gap[0]:+.2f} ± {gap[1]:.2f}")
            rows.append([stream, source, *cells])
        parts.append(table([name, "source", "Tent", "SAR", "MGG"], rows))
    return "\n\n".join(parts)


def field_long() -> str:
    """Accuracy and peak memory along the long stream, by tenths."""
    path = RESULTS / "field-long-resnet26.json"
    if not path.is_file():
        return "Not measured."
    found = json.loads(path.read_text())["streams"]["long"]
    methods = {"source": "source", "mgg": "MGG"}
    parts = {method: list(found[method]["parts"].values()) for method in methods}
    rows = [
        [
            str(tenth + 1),
            *(f"{100 * shares[tenth]:.1f}" for shares in parts.values()),
            f"{found['mgg']['memory'][tenth] / 1e6:.0f}",
        ]
        for tenth in range(10)
    ]
    return table(["tenth", *methods.values(), "peak memory, MB"], rows)


def entropy_alone() -> str:
    """`entropy_alone.py`'s table."""
    path = RESULTS / "entropy-alone.json"
    if not path.is_file():
        return "Not measured: `python examples/entropy_alone.py --data DIR`."
    found = json.loads(path.read_text())["accuracy"]
    columns = list(dict.fromkeys(c for scores in found.values() for c in scores))
    rows = [[name, *(f"{100 * s[c]:.2f}" for c in columns)] for name, s in found.items()]
    return table(["", *columns], rows)


SECTIONS: dict[str, Callable[[], str]] = {
    "online": online,
    "online-orders": online_orders,
    "paired": paired,
    "settings": settings,
    "rates": rates,
    "sar-rates": sar_rates,
    "speed": speed,
    "held-out": held_out,
    "imagenet": imagenet,
    "imagenet-rates": imagenet_rates,
    "photographs": photographs,
    "per-image": per_image,
    "per-image-pairs": per_image_pairs,
    "published": published,
    "field": field,
    "field-long": field_long,
    "entropy-alone": entropy_alone,
    "by-corruption": by_corruption,
}


def report() -> str:
    """All sections, each under its name."""
    return "\n\n".join(f"## {name}\n\n{section()}" for name, section in SECTIONS.items()) + "\n"


def renewed(text: str) -> str:
    """A document with new contents of its blocks ``<!-- report: NAME -->`` .. ``<!-- end -->``."""

    def block(match: re.Match) -> str:
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- report: (\S+) -->)\n.*?\n?(<!-- end -->)", block, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the tables of RESULTS.md")
    args = parser.parse_args(argv)
    if args.write:
        write_text(DOCUMENT, renewed(DOCUMENT.read_text()))
    else:
        print(report(), end="")


if __name__ == "__main__":
    main()
