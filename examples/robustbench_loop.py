"""An adapter in RobustBench's own evaluation: ``robustbench.utils.clean_accuracy(net, x, y)``.

    python examples/robustbench_loop.py [--data-dir DIR]

RobustBench's functions call a model batch by batch under ``torch.no_grad()``, where an adapter
works unchanged. Only ``net.reset()`` has to be added between streams. RobustBench's own
``benchmark(net, dataset="cifar10", threat_model="corruptions")`` is not an alternative: in release
1.1.1 it raises a TypeError on CIFAR with any model. Without ``--data-dir`` (a folder that holds
``CIFAR-10-C``) the images of the demo are used.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import ttt_plugins as tp
from ttt_plugins.data.images import to_float
from ttt_plugins.demo import load_sample

import ttt_plugins.hosts.robustbench  # isort: skip  # must come before the next import, which needs it
import robustbench  # isort: skip

Stream = tuple[str, Tensor, Tensor]


def from_folder(data_dir: Path, n_examples: int, severity: int) -> Iterable[Stream]:
    """Corruption, images in [0, 1] and labels of each stream, from RobustBench's own loader."""
    for corruption in robustbench.data.CORRUPTIONS:
        x, y = robustbench.data.load_cifar10c(
            n_examples, severity, str(data_dir), corruptions=[corruption]
        )
        yield corruption, x, y


def from_sample(n_examples: int | None = None) -> Iterable[Stream]:
    """The same from the images that the package contains."""
    sample = load_sample()
    for name, images in sample.images.items():
        yield name, to_float(images[:n_examples]), sample.labels[:n_examples]


def evaluate(net: nn.Module, streams: Iterable[Stream], batch_size: int = 64) -> dict[str, float]:
    """Accuracy on each stream, each with the adapter reset."""
    accuracies = {}
    for name, x, y in streams:
        net.reset()
        accuracies[name] = robustbench.utils.clean_accuracy(net, x, y, batch_size=batch_size)
    return accuracies


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder that holds CIFAR-10-C")
    parser.add_argument("--n-examples", type=int, default=256)
    parser.add_argument("--severity", type=int, default=5)
    parser.add_argument("--model", default="bundled:source-resnet26bn-cifar10")
    parser.add_argument("--adapter", default="bundled:mgg-resnet26bn-cifar10")
    args = parser.parse_args(argv)
    nets = {"source": tp.wrap(args.model, "source"), "adapted": tp.from_pretrained(args.adapter)}
    torch.manual_seed(0)
    if args.data_dir is None:
        streams = list(from_sample(args.n_examples))
    else:
        streams = list(from_folder(args.data_dir, args.n_examples, args.severity))
    columns = {name: evaluate(net, streams) for name, net in nets.items()}
    print(f"{'':20s}" + "".join(f"{name:>10s}" for name in columns))
    for corruption in columns["source"]:
        cells = "".join(f"{100 * column[corruption]:10.2f}" for column in columns.values())
        print(f"{corruption:20s}{cells}")


if __name__ == "__main__":
    main()
