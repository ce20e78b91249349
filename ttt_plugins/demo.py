"""The demo: classifiers predict corrupted images, with and without adaptation.

The package contains everything that it needs: small networks, their trained heads and optimizers,
and real images. Methods that adapt batch by batch share one network. TTT and MT3, which adapt to
each image separately, use the networks that they were trained with, and see fewer images because
they are slower.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .adapter import Adapter
from .benchmark.evaluate import classify
from .benchmark.plots import COLOURS, figure, to_png
from .benchmark.resume import check_out, write_files
from .data.cifar10 import CIFAR10_CLASSES
from .data.images import LabelledImages
from .errors import DataError, InputError
from .utils.text import align
from .wrapping import from_pretrained, wrap

__all__ = [
    "DemoResult",
    "Sample",
    "build_adapters",
    "build_per_image_adapters",
    "draw",
    "load_sample",
    "predict_sample",
    "run_demo",
]

MODEL = "bundled:source-resnet26-cifar10"
MGG = "bundled:mgg-resnet26-cifar10"
TTT = "bundled:ttt-resnet26-cifar10"
MT3 = "bundled:mt3-resnet26-cifar10"
SAMPLE = Path(__file__).parent / "assets" / "demo"
BATCH_SIZE = 32
CLEAN = "clean"
#: Number of images of each kind for TTT and MT3.
PER_IMAGE = 32


@dataclass(frozen=True)
class Sample:
    """Labels (N,) and, for ``clean`` and each corruption, uint8 images (N, 3, H, W)."""

    labels: Tensor
    images: dict[str, Tensor]

    @property
    def corruptions(self) -> list[str]:
        """Names of all kinds of images except the clean ones."""
        return [name for name in self.images if name != CLEAN]


@dataclass(frozen=True)
class DemoResult:
    """Predicted classes (N,) by method and corruption, and each method's time in seconds."""

    predictions: dict[str, dict[str, Tensor]]
    seconds: dict[str, float]
    sample: Sample

    def accuracy(self, method: str, name: str) -> float:
        """Accuracy of a method on one kind of images, in percent."""
        correct = self.predictions[method][name] == self.sample.labels
        return 100 * correct.double().mean().item()

    def mean(self, method: str) -> float:
        """Mean accuracy of a method over the corruptions, in percent."""
        names = self.sample.corruptions
        return sum(self.accuracy(method, name) for name in names) / len(names)

    def table(self) -> str:
        """Table of accuracies in percent, with one row per corruption and one column per method."""
        methods = list(self.predictions)
        rows = [["accuracy in %", *methods]]
        rows += [
            [name, *(f"{self.accuracy(m, name):.1f}" for m in methods)]
            for name in self.sample.images
        ]
        rows.append(["mean of corruptions", *(f"{self.mean(m):.1f}" for m in methods)])
        count = len(self.sample.labels) * len(self.sample.images)
        rows.append(["ms per image", *(f"{1e3 * self.seconds[m] / count:.1f}" for m in methods)])
        return align(rows)

    def changed(self, before: str, after: str) -> tuple[int, int]:
        """Numbers of corrupted images that only ``after``, and only ``before``, predicts right."""
        gained = lost = 0
        for name in self.sample.corruptions:
            was = self.predictions[before][name] == self.sample.labels
            now = self.predictions[after][name] == self.sample.labels
            gained += int((now & ~was).sum())
            lost += int((was & ~now).sum())
        return gained, lost


def _tiles(path: Path, side: int = 32) -> Tensor:
    """uint8 images (N, 3, side, side) from one lossless picture that holds them row by row."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    grid = pixels.view(rows, side, columns, side, 3).permute(0, 2, 4, 1, 3)
    return grid.reshape(rows * columns, 3, side, side)


def load_sample(folder: str | Path = SAMPLE, n: int | None = None) -> Sample:
    """Load the first ``n`` images of each kind, from ``labels.json`` and ``<kind>.webp`` files.

    Raises:
        InputError: ``n`` is below 1 or larger than the number of images.
        DataError: a file is missing or has another layout.
    """
    folder = Path(folder)
    try:
        labels = torch.tensor(json.loads((folder / "labels.json").read_text()))
        images = {path.stem: _tiles(path) for path in sorted(folder.glob("*.webp"))}
        if not images or any(len(kind) != len(labels) for kind in images.values()):
            raise ValueError("pictures and labels do not match")
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{folder}: not the demo's images ({reason}); reinstall ttt-plugins"
        ) from error
    if n is not None and not 1 <= n <= len(labels):
        raise InputError(f"the demo can use 1 to {len(labels)} images of each kind, got {n}")
    order = sorted(images, key=lambda name: (name != CLEAN, name))
    return Sample(labels[:n], {name: images[name][:n].contiguous() for name in order})


def build_adapters(model: str = MODEL, mgg: str = MGG) -> dict[str, Adapter]:
    """The unadapted model, Tent, SAR and MGG, each with its own defaults."""
    adapters = {name: wrap(model, name, window=BATCH_SIZE) for name in ("tent", "sar")}
    mgg_adapter = from_pretrained(mgg, window=BATCH_SIZE)
    return {"source": wrap(model, "source"), **adapters, "mgg": mgg_adapter}


def build_per_image_adapters(ttt: str = TTT, mt3: str = MT3) -> dict[str, Adapter]:
    """TTT (one step per image) and MT3, each preceded by its own model without adaptation."""
    return {
        "ttt's model": wrap(ttt, "source"),
        "ttt": from_pretrained(ttt, steps=1, lr=0.01),
        "mt3's model": wrap(mt3, "source"),
        "mt3": from_pretrained(mt3),
    }


def predict_sample(
    nets: Mapping[str, Adapter],
    sample: Sample,
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> DemoResult:
    """Predict every kind of images with every adapter; it is reset before each kind."""
    count = len(sample.labels)
    rows = torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count)], 1)
    predictions: dict[str, dict[str, Tensor]] = {name: {} for name in nets}
    seconds = dict.fromkeys(nets, 0.0)
    total = len(nets) * len(sample.images) * -(-count // batch_size)
    with tqdm(total=total, unit="batch", disable=not progress, leave=False) as bar:
        for kind, images in sample.images.items():
            parts = {0: LabelledImages(images, sample.labels)}
            for name, net in nets.items():
                bar.set_description(f"{kind}, {name}")
                net.reset()
                evaluation = classify(net, parts, rows, batch_size, bar.update)
                predictions[name][kind] = evaluation.answers.predictions
                seconds[name] += evaluation.seconds
    return DemoResult(predictions, seconds, sample)


def _examples(result: DemoResult, before: str, after: str, count: int) -> list[tuple[str, int]]:
    """Corruption and row of images that only ``after`` predicts correctly.

    They are taken from the corruptions in turn, and no image is chosen twice.
    """
    labels = result.sample.labels
    queues = {}
    for name in result.sample.corruptions:
        now, was = result.predictions[after][name], result.predictions[before][name]
        queues[name] = torch.nonzero((now == labels) & (was != labels)).flatten().tolist()
    chosen: dict[int, str] = {}
    while any(queues.values()):
        for name, queue in queues.items():
            while queue and queue[0] in chosen:
                queue.pop(0)
            if queue:
                chosen[queue.pop(0)] = name
    return [(name, row) for row, name in chosen.items()][:count]


def draw(
    result: DemoResult,
    *,
    classes: Sequence[str] = CIFAR10_CLASSES,
    before: str = "source",
    after: str = "mgg",
    examples: int = 8,
) -> bytes:
    """Draw the accuracy by corruption and method, and example images below it, as a PNG file."""
    names, methods = list(result.sample.images), list(result.predictions)
    drawn = figure(max(9.0, 1.25 * len(names) + 3), 6.2)
    top, bottom = drawn.subfigures(2, 1, height_ratios=[3, 2], squeeze=False)[:, 0]
    axes = top.add_subplot()
    width = 0.8 / len(methods)
    for position, method in enumerate(methods):
        heights = [*(result.accuracy(method, name) for name in names), result.mean(method)]
        lefts = [i + position * width for i in range(len(heights))]
        axes.bar(lefts, heights, width, label=method, color=COLOURS[position % len(COLOURS)])
    ticks = [i + (len(methods) - 1) * width / 2 for i in range(len(names) + 1)]
    labels = [name.replace("_", "\n") for name in names] + ["mean of\ncorruptions"]
    axes.set_xticks(ticks, labels)
    axes.set_ylim(0, 115)  # space for the legend above bars of any height
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy in %")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=len(methods), loc="upper right")
    axes.set_title("The same network on corrupted images, without and with adaptation")
    chosen = _examples(result, before, after, examples)
    gained, lost = result.changed(before, after)
    bottom.suptitle(
        f"{after} corrects {gained} predictions of {before} on the corrupted images, "
        f"and breaks {lost}" + ("; some that it corrects:" if chosen else ""),
        fontsize=11,
    )
    for column, (name, row) in enumerate(chosen):
        small = bottom.add_subplot(1, examples, column + 1)
        small.imshow(result.sample.images[name][row].permute(1, 2, 0).numpy())
        small.set_axis_off()
        small.set_title(name.replace("_", " "), fontsize=9)
        marks = ((before, "\N{BALLOT X}", "#c0392b"), (after, "\N{CHECK MARK}", "#1e8449"))
        for line, (method, mark, colour) in enumerate(marks):
            text = f"{method}: {classes[int(result.predictions[method][name][row])]} {mark}"
            position = {"x": 0.5, "y": -0.13 - 0.17 * line, "transform": small.transAxes}
            small.text(s=text, color=colour, ha="center", fontsize=9, **position)
    return to_png(drawn)


def run_demo(
    out: str | Path, *, n: int | None = None, progress: bool = True
) -> tuple[DemoResult, DemoResult]:
    """Run both comparisons on the package's own models and images and write ``demo.png``.

    Returns:
        results of the methods that adapt batch by batch, and of those that adapt to each image
        separately.
    """
    # The folder and the presence of matplotlib are checked before the work begins.
    out = check_out(out)
    figure(1, 1)
    sample = load_sample(n=n)
    smaller = load_sample(n=min(PER_IMAGE, len(sample.labels)))
    result = predict_sample(build_adapters(), sample, progress=progress)
    per_image = predict_sample(build_per_image_adapters(), smaller, progress=progress)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot create this folder ({error.strerror})") from error
    write_files(out, {"demo.png": draw(result)})
    return result, per_image
