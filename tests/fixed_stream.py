"""Logits of every method on one fixed stream, to hold a change to "no figure changes".

    python tests/fixed_stream.py OUT.safetensors [BEFORE.safetensors]

writes the logits, and with a second file compares them bit for bit with those of another commit
on the same machine. `test_fixed_stream.py` compares them with the stored file, within rounding.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ttt_plugins as tp

SAMPLE = Path(tp.__file__).parent / "assets" / "demo"
SOURCES = ("source-resnet26-cifar10", "source-resnet26bn-cifar10", "source-vit-tiny-cifar10")
RATES = {"tent": 1e-3, "sar": 1e-2}
WINDOW = 32


def sample(name: str, count: int) -> torch.Tensor:
    """The first images (count, 3, 32, 32) of a tile of the demo's, in [0, 1]."""
    tile = torch.from_numpy(np.asarray(Image.open(SAMPLE / f"{name}.webp").convert("RGB")))
    rows, columns = tile.shape[0] // 32, tile.shape[1] // 32
    images = tile.view(rows, 32, columns, 32, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    return images[:count].float() / 255


def adapters() -> dict[str, tp.Adapter]:
    """By name: all six methods, on networks of three norm kinds."""
    nets = {}
    for source in SOURCES:
        model = f"bundled:{source}"
        nets[f"source/{source}"] = tp.wrap(model, "source")
        for method, lr in RATES.items():
            fields = {"lr": lr, "window": WINDOW, "statistics": "batch", "guard": False}
            nets[f"{method}/{source}"] = tp.wrap(model, method, **fields)
        nets[f"mgg/{source}"] = tp.from_pretrained(
            model.replace("source", "mgg"), window=WINDOW, statistics="mix", guard=False
        )
    ttt = "bundled:ttt-resnet26-cifar10"
    nets["ttt"] = tp.from_pretrained(ttt, steps=2, copies=8, lr=0.01)
    nets["ttt/online"] = tp.from_pretrained(ttt, mode="online", copies=8)
    nets["mt3"] = tp.from_pretrained("bundled:mt3-resnet26-cifar10", copies=8)
    return nets


def logits() -> dict[str, torch.Tensor]:
    """Logits (N, 10) of each adapter over two corruptions, in batches of 32 (4 per image)."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # their number is in the last bits of some sums
    found = {}
    for name, net in adapters().items():
        size, count = (4, 4) if name[:3] in ("ttt", "mt3") else (WINDOW, 96)
        parts = [sample(kind, count).split(size) for kind in ("gaussian_noise", "fog")]
        found[name] = torch.cat([net(images) for part in parts for images in part])
    torch.set_num_threads(threads)
    return found


def main(out: str, before: str | None = None) -> int:
    """Write the logits; 1 if they differ from those of ``before`` in a single bit."""
    found = logits()
    save_file(found, out)
    if before is None:
        return 0
    wanted = load_file(before)
    different = [n for n in wanted if not torch.equal(found[n], wanted[n])]
    print("different: " + ", ".join(different) if different else f"{len(wanted)} equal")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
