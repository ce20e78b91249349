"""The demo: classifiers predict corrupted images, with and without adaptation.

The package contains everything that it needs: small networks, their trained heads and optimizers,
and real images. Methods that adapt along a stream share one network. TTT and MT3, which adapt to
each image separately, use the networks that they were trained with, and see fewer images because
they are slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter
from ..benchmark.evaluate import classify
from ..benchmark.plots import figure
from ..benchmark.resume import check_out, write_files
from ..data.images import LabelledImages
from ..errors import DataError
from ..utils.progress import progress_bar
from ..wrapping import from_pretrained, wrap
from .picture import draw
from .result import DemoResult, Frames
from .sample import Sample, load_sample

__all__ = [
    "RATES",
    "build_adapters",
    "build_per_image_adapters",
    "predict_frames",
    "predict_sample",
    "run_demo",
    "run_per_image",
]

MODEL = "bundled:source-resnet26-cifar10"
MGG = "bundled:mgg-resnet26-cifar10"
TTT = "bundled:ttt-resnet26-cifar10"
MT3 = "bundled:mt3-resnet26-cifar10"
#: Batch size of the grids that `RATES` come from.
BATCH_SIZE = 64
#: The learning rates that were best on four other corruptions, see "How the learning rates were
#: chosen" in RESULTS.md; MGG's step size in its artifact was chosen there too.
RATES = {"tent": 0.003, "sar": 0.2}
#: Number of images of each kind in the stream of single frames, and for TTT and MT3.
FRAMES = 160
PER_IMAGE = 32


def build_adapters(model: str = MODEL, mgg: str = MGG) -> dict[str, Adapter]:
    """The unadapted model, Tent, SAR and MGG, each at the best rate of its grid."""
    adapters = {name: wrap(model, name, lr=rate) for name, rate in RATES.items()}
    return {"source": wrap(model, "source"), **adapters, "mgg": from_pretrained(mgg)}


def build_per_image_adapters(ttt: str = TTT, mt3: str = MT3) -> dict[str, Adapter]:
    """TTT (one step per image) and MT3, each preceded by its own model without adaptation."""
    return {
        "ttt's model": wrap(ttt, "source"),
        "ttt": from_pretrained(ttt, steps=1, lr=0.01),
        "mt3's model": wrap(mt3, "source"),
        "mt3": from_pretrained(mt3),
    }


def _rows(parts: int, count: int) -> Tensor:
    """Pairs of a part's number and a row in it: ``count`` rows of each part in turn."""
    return torch.cartesian_prod(torch.arange(parts), torch.arange(count))


def predict_sample(
    nets: Mapping[str, Adapter],
    sample: Sample,
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> DemoResult:
    """Predict every kind of images with every adapter; it is reset before each kind."""
    count = len(sample.labels)
    predictions: dict[str, dict[str, Tensor]] = {name: {} for name in nets}
    seconds = dict.fromkeys(nets, 0.0)
    total = len(nets) * len(sample.images) * -(-count // batch_size)
    with progress_bar(total=total, unit="batch", show=progress) as bar:
        for kind, images in sample.images.items():
            parts = {0: LabelledImages(images, sample.labels)}
            for name, net in nets.items():
                bar.set_description(f"{kind}, {name}")
                net.reset()
                evaluation = classify(net, parts, _rows(1, count), batch_size, bar.update)
                predictions[name][kind] = evaluation.answers.predictions
                seconds[name] += evaluation.seconds
    return DemoResult(predictions, seconds, sample)


def predict_frames(nets: Mapping[str, Adapter], sample: Sample, *, progress: bool = True) -> Frames:
    """Predict image by image, one kind after the other, with a reset only at the beginning."""
    count = len(sample.labels)
    parts = {
        number: LabelledImages(images, sample.labels)
        for number, images in enumerate(sample.images.values())
    }
    rows = _rows(len(parts), count)
    right = {}
    with progress_bar(total=len(nets) * len(rows), unit="image", show=progress) as bar:
        for name, net in nets.items():
            bar.set_description(f"single frames, {name}")
            net.reset()
            right[name] = classify(net, parts, rows, 1, bar.update).answers.right
    windows = {
        name: net.config.window for name, net in nets.items() if hasattr(net.config, "window")
    }
    return Frames(right, tuple((name, count) for name in sample.images), windows)


def run_demo(
    out: str | Path, *, n: int | None = None, progress: bool = True
) -> tuple[DemoResult, Frames]:
    """Run the package's own models on its own images and write ``demo.png``.

    Args:
        out: folder for the picture.
        n: number of images of each kind (default: all); in the stream of single frames at most
            160.
        progress: whether to show a progress bar.

    Returns:
        results on batches, and on the stream of single frames.
    """
    # The folder and the presence of matplotlib are checked before the work begins.
    out = check_out(out)
    figure(1, 1)
    sample = load_sample(n=n)
    nets = build_adapters()
    result = predict_sample(nets, sample, progress=progress)
    few = load_sample(n=min(FRAMES, len(sample.labels)))
    frames = predict_frames(nets, few, progress=progress)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot create this folder ({error.strerror})") from error
    write_files(out, {"demo.png": draw(result, frames)})
    return result, frames


def run_per_image(*, n: int | None = None, progress: bool = True) -> DemoResult:
    """Run TTT and MT3 on the first 32 images of each kind, or on ``n`` if that is less."""
    sample = load_sample(n=n)
    few = load_sample(n=min(PER_IMAGE, len(sample.labels)))
    return predict_sample(build_per_image_adapters(), few, progress=progress)
