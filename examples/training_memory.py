"""Measure the memory that training takes, by the number of pictures in its folder.

    python examples/training_memory.py --pictures 2000 20000

For each number it writes a folder of small JPEG files, trains a classifier and then a rotation head
on it for one epoch, in a separate process, and prints the peak memory of this process and of its
largest worker process.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--side", type=int, default=64, help="side of a picture in pixels")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        train(args.run, args.side, args.workers)
        return
    for count in args.pictures:
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(Path(folder) / "pictures", count, args.side)
            words = [sys.executable, __file__, "--run", folder, "--side", str(args.side)]
            found = subprocess.run(
                [*words, "--workers", str(args.workers)], check=True, capture_output=True, text=True
            )
            print(f"{count} pictures of {args.side} pixels: {found.stdout.splitlines()[-1]}")


def write_pictures(root: Path, count: int, side: int) -> None:
    draws = np.random.default_rng(0)
    for i in range(count):
        folder = root / f"class{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=50)


def train(root: Path, side: int, workers: int) -> None:
    from ttt_plugins.cli import main as run

    images, size = str(root / "pictures"), str(side)
    common = ["--images", images, "--image-size", size, "--epochs", "1", "--batch-size", "64"]
    common += ["--workers", str(workers)]
    arch = ["--arch", "ttt_resnet26", "--model-args", '{"width": 8, "depth": 8, "groups": 4}']
    model, head = str(root / "model"), str(root / "head")
    val = ["--val-images", images]
    assert run(["train", "source", *arch, *common, *val, "--out", model]) == 0
    words = ["train", "ttt", "--freeze-trunk", "--model", model, *common, "--out", head]
    assert run(words) == 0
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak {own:.0f} MiB, of a worker {worker:.0f} MiB")


if __name__ == "__main__":
    main()
