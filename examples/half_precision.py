"""Compare the accuracy of Tent and MGG in half precision and in single precision.

    python examples/half_precision.py --data DIR

Both adapt the bundled GroupNorm and BatchNorm ResNet-26 to the same images of one extra corruption,
once in each precision. The difference is given with its standard error over the images, which are
the same in both. The adapted tensors have single precision whatever the model's precision is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ttt_plugins as tp
from ttt_plugins.benchmark import load_stream

METHODS = ("source", "tent", "mgg")


def right(net: tp.Adapter, images: torch.Tensor, labels: torch.Tensor, batch: int) -> torch.Tensor:
    """Which images (N,) are classified correctly, in the order of the stream."""
    logits = [net(part.to(net.dtype)) for part in images.split(batch)]
    return torch.cat(logits).argmax(1) == labels


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds cifar10 and cifar10c"
    )
    parser.add_argument(
        "--corruption", default="gaussian_blur", help="one of the four extra corruptions"
    )
    parser.add_argument("--n-examples", type=int, default=1024, help="number of its images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    args = parser.parse_args(argv)
    half = getattr(torch, args.dtype)
    stream = load_stream(args.data, args.corruption)[: args.n_examples]
    images, labels = stream.images.float() / 255, stream.labels
    for name in ("resnet26", "resnet26bn"):
        for method in METHODS:
            answers = []
            for dtype in (torch.float32, half):
                net = tp.wrap(f"bundled:source-{name}-cifar10", method).to(dtype)
                answers.append(right(net, images, labels, args.batch_size).double())
            single, other = (100 * answer.mean().item() for answer in answers)
            difference = 100 * (answers[1] - answers[0])
            error = difference.std().item() / len(difference) ** 0.5
            print(
                f"{name:10} {method:6} float32 {single:.2f}, {args.dtype} {other:.2f}, difference "
                f"{other - single:+.2f} ± {error:.2f} points ({len(labels)} images)",
                flush=True,
            )


if __name__ == "__main__":
    main()
