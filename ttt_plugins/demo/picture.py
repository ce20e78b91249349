"""The demo's picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..benchmark.plots import COLOURS, figure, to_png
from ..data.cifar10 import CIFAR10_CLASSES
from .result import DemoResult, Frames

__all__ = ["draw"]

#: Number of images that a point of the curves is the accuracy of.
_SPAN = 80


def draw(
    result: DemoResult,
    frames: Frames | None = None,
    *,
    classes: Sequence[str] = CIFAR10_CLASSES,
    before: str = "source",
    after: str = "mgg",
    examples: int = 8,
) -> bytes:
    """Draw accuracy on batches, along the single frames, and example images, as a PNG file."""
    names = list(result.sample.images)
    heights = [3.0, 2.7, 2.2] if frames else [3.0, 2.2]
    drawn = figure(max(9.0, 1.25 * len(names) + 3), sum(heights))
    parts = drawn.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_bars(parts[0].add_subplot(), result)
    if frames:
        _draw_frames(parts[1].add_subplot(), frames)
    _draw_examples(parts[-1], result, classes, before, after, examples)
    # Noisy examples compress badly; with a palette the file is less than half as large.
    with Image.open(io.BytesIO(to_png(drawn, dpi=100))) as picture:
        small = io.BytesIO()
        picture.convert("RGB").quantize(256).save(small, "png", optimize=True)
    return small.getvalue()


def _colours(methods: Sequence[str]) -> list[tuple[str, str]]:
    return [(method, COLOURS[i % len(COLOURS)]) for i, method in enumerate(methods)]


def _draw_bars(axes: Any, result: DemoResult) -> None:
    names, methods = list(result.sample.images), list(result.predictions)
    width = 0.8 / len(methods)
    for position, (method, colour) in enumerate(_colours(methods)):
        heights = [*(result.accuracy(method, name) for name in names), result.mean(method)]
        lefts = [i + position * width for i in range(len(heights))]
        axes.bar(lefts, heights, width, label=method, color=colour)
    ticks = [i + (len(methods) - 1) * width / 2 for i in range(len(names) + 1)]
    labels = [name.replace("_", "\n") for name in names] + ["mean of\ncorruptions"]
    axes.set_xticks(ticks, labels)
    axes.set_ylim(0, 115)  # space for the legend above bars of any height
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy in %")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=len(methods), loc="upper right")
    axes.set_title("Batches: the same network on corrupted images, without and with adaptation")


def _draw_frames(axes: Any, frames: Frames) -> None:
    lines = {method: frames.lately(method, _SPAN) for method in frames.right}
    for method, colour in _colours(list(lines)):
        line = lines[method]
        # From the first whole span on; before it a few images make the curve jump.
        first = min(_SPAN, len(line)) - 1
        axes.plot(range(first + 1, len(line) + 1), line[first:], color=colour, label=method)
    start = 0
    for name, count in frames.kinds:
        axes.axvline(start, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.annotate(
            name.replace("_", " "),
            (start + count / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -12),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
        start += count
    values = torch.cat([line[min(_SPAN, len(line)) - 1 :] for line in lines.values()])
    axes.set_xlim(0, start)
    axes.set_ylim(max(0.0, values.min().item() - 5), min(105.0, values.max().item() + 10))
    axes.set_xlabel("frames, one at a time, without a reset")
    axes.set_ylabel(f"% of the last {_SPAN}")
    axes.grid(axis="y", alpha=0.3)
    shares = ", ".join(f"{method} {frames.mean(method):.1f} %" for method in frames.right)
    axes.set_title(f"Single frames in one stream: {shares}")


def _draw_examples(
    part: Any, result: DemoResult, classes: Sequence[str], before: str, after: str, count: int
) -> None:
    chosen = _examples(result, before, after, count)
    gained, lost = result.changed(before, after)
    part.suptitle(
        f"{after} corrects {gained} predictions of {before} on the corrupted images, "
        f"and breaks {lost}" + ("; some that it corrects:" if chosen else ""),
        fontsize=11,
    )
    for column, (name, row) in enumerate(chosen):
        small = part.add_subplot(1, count, column + 1)
        small.imshow(result.sample.images[name][row].permute(1, 2, 0).numpy())
        small.set_axis_off()
        small.set_title(name.replace("_", " "), fontsize=9)
        marks = ((before, "\N{BALLOT X}", "#c0392b"), (after, "\N{CHECK MARK}", "#1e8449"))
        for line, (method, mark, colour) in enumerate(marks):
            text = f"{method}: {classes[int(result.predictions[method][name][row])]} {mark}"
            position = {"x": 0.5, "y": -0.13 - 0.17 * line, "transform": small.transAxes}
            small.text(s=text, color=colour, ha="center", fontsize=9, **position)


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
