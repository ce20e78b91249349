"""How far ``mgg-universal`` may go where there is nothing but entropy to go by.

    python examples/entropy_alone.py --data DIR

Accuracy on the four extra corruptions, without source statistics, for several step sizes; on the
bundled classifiers that have no statistics of their own. ``lr_alone`` of the artifact was chosen
with it: the largest step size that costs no classifier more than half a point.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ttt_plugins as tp
from ttt_plugins.benchmark import EXTRA_CORRUPTIONS, load_stream
from ttt_plugins.train.mgg import stream_accuracy


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10 and cifar10c")
    parser.add_argument("--n-examples", type=int, default=768, help="images of each corruption")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    args = parser.parse_args(argv)
    streams = [load_stream(args.data, name)[: args.n_examples] for name in EXTRA_CORRUPTIONS]
    print("| classifier | source | " + " | ".join(f"{lr:g}" for lr in args.rates) + " |")
    print("|---" * (2 + len(args.rates)) + "|")
    for name in ("resnet26", "vit-tiny"):
        model = f"bundled:source-{name}-cifar10"
        nets = [tp.wrap(model, "source")]
        nets += [
            tp.from_pretrained("bundled:mgg-universal", backbone=model, lr=lr, lr_alone=lr)
            for lr in args.rates
        ]
        scores = [sum(stream_accuracy(net, s) for s in streams) / len(streams) for net in nets]
        print(f"| {name} | " + " | ".join(f"{100 * s:.2f}" for s in scores) + " |", flush=True)


if __name__ == "__main__":
    main()
