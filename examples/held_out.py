"""Train classifiers that no optimizer was meta-trained on, to measure ``mgg-universal`` on.

    python examples/held_out.py --data DIR --out runs/held-out
    python examples/results.py --data DIR --backbone runs/held-out/*

These are three small timm networks with three kinds of norm, none of which has the blocks of the
networks in meta-training: a BatchNorm ResNet with a deep stem, a GroupNorm bottleneck ResNet V2 and
a LayerNorm ConvNeXt. They are trained on the CIFAR-10 files like every source. The same command
resumes interrupted training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ttt_plugins.cli.main import main as command_line

EPOCHS = 25
#: Flags of ``ttt-plugins train source`` by name.
HELD_OUT = {
    "resnet10t": [
        "--arch",
        "resnet10t",
        "--model-args",
        json.dumps({"channels": [32, 64, 128, 256]}),
    ],
    "resnetv2-gn": [
        "--arch",
        "resnetv2_50d_gn",
        "--model-args",
        json.dumps({"layers": [1, 1, 1, 1], "channels": [128, 256, 512, 1024], "stem_type": ""}),
        "--lr",
        "0.1",
    ],
    "convnext": [
        "--arch",
        "convnext_atto",
        "--model-args",
        json.dumps({"patch_size": 2, "depths": [1, 1, 3, 1], "dims": [32, 64, 128, 192]}),
        "--optimizer",
        "adamw",
        "--lr",
        "4e-3",
        "--weight-decay",
        "0.05",
    ],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=list(HELD_OUT), help=f"names among {list(HELD_OUT)}"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    for name in args.names:
        out = args.out / name
        where = ["--data-dir", str(args.data / "cifar10"), "--out", str(out), "--resume"]
        flags = [*where, "--epochs", str(args.epochs), "--device", args.device]
        if status := command_line(["train", "source", *HELD_OUT[name], *flags]):
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
