"""Choose the step size of ``mgg-universal`` without source statistics.

    python examples/entropy_alone.py --data DIR

Accuracy on the four extra corruptions with entropy as the only objective, for several step sizes,
on the bundled classifiers that have no statistics of their own. The artifact's ``lr_alone`` was
chosen in this way: the largest step size that costs no classifier more than half a point. The
result is written to ``OUT/entropy-alone.json``; `report.py` prints the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import ttt_plugins as tp
from ttt_plugins.benchmark import EXTRA_CORRUPTIONS, load_stream
from ttt_plugins.train.mgg import stream_accuracy
from ttt_plugins.utils.files import write_text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds cifar10 and cifar10c"
    )
    parser.add_argument(
        "--n-examples", type=int, default=768, help="number of images of each corruption"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--backbone", nargs="+", default=["resnet26", "vit-tiny"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    streams = [load_stream(args.data, name)[: args.n_examples] for name in EXTRA_CORRUPTIONS]
    accuracy: dict[str, dict[str, float]] = {}
    for name in args.backbone:
        model = f"bundled:source-{name}-cifar10"
        nets = {"source": tp.wrap(model, "source")} | {
            f"{lr:g}": tp.from_pretrained(
                "bundled:mgg-universal", backbone=model, lr=lr, lr_alone=lr, guard=False
            )
            for lr in args.rates
        }
        accuracy[name] = {
            column: sum(stream_accuracy(net, s) for s in streams) / len(streams)
            for column, net in nets.items()
        }
        print(name, {c: round(100 * share, 2) for c, share in accuracy[name].items()}, flush=True)
    result = {
        "n_examples": args.n_examples,
        "corruptions": list(EXTRA_CORRUPTIONS),
        "accuracy": accuracy,
        "versions": {"torch": torch.__version__, "ttt_plugins": tp.__version__},
    }
    write_text(args.out / "entropy-alone.json", json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
