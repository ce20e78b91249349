"""Count a batch's operations: in the forward pass, in the backward pass, and besides them.

    python examples/operations.py [--device cuda] [--networks ttt_resnet26 …]

On a GPU an operation is at least one launch, which costs about the same for all small tensors;
views and allocations launch nothing and are not counted. "added" is what a step takes in addition
to the plain passes that it makes: forward through the unadapted model on its own statistics, and
backward from the mean entropy. Every batch is one update, without a guard.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ttt_plugins as tp

NETWORKS = ("ttt_resnet26", "ttt_resnet26_bn", "ttt_vit_tiny_patch4_32")
PARTS = ("forward", "backward", "rest")
#: Number of forward and backward passes of a step, by method.
METHODS = {"tent": 1, "sar": 2, "mgg": 1}
#: Operations other than views that launch nothing.
FREE = ("empty", "new_empty", "detach", "_unsafe_view", "alias", "lift_fresh")


class Operations(TorchDispatchMode):
    """Counts operations by the part of a step that they belong to, and by name.

    Attributes:
        part: the part, one of `PARTS`, that operations currently belong to.
        counts: how often each operation ran in each part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.counts = "rest", Counter[tuple[str, str]]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, result = func._schema.name.split("::")[-1], func(*args, **(kwargs or {}))
        made = any(isinstance(t, torch.Tensor) for t in tree_leaves(result))
        if made and not func.is_view and not name.startswith(FREE):
            self.counts[self.part, name] += 1
        return result

    def within(self, part: str, function: Callable) -> Callable:
        """Wrap a function so that its operations belong to a part."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.part = part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = "rest"

        return counted

    def total(self, part: str) -> int:
        """The number of operations of a part."""
        return sum(n for (where, _), n in self.counts.items() if where == part)


def count(model: nn.Module, method: str, images: torch.Tensor, **fields: Any) -> Operations:
    """Count the operations of the second batch of a stream."""
    net = tp.wrap(model, method, device=images.device, **fields)
    net.checks_pixels = False
    if method == "mgg" and not net.backbone.has_batch_norm:
        net.fit_source_statistics([images], progress=False)
    net(images)
    counter = Operations()
    forward = counter.within("forward", net.backbone.forward)
    backward = counter.within("backward", torch.autograd.grad)
    parts = patch.object(net.backbone, "forward", forward), patch("torch.autograd.grad", backward)
    with parts[0], parts[1], counter:
        net(images)
    return counter


def measure(name: str, model: nn.Module, images: torch.Tensor) -> list[dict[str, Any]]:
    """One row for each method and each kind of statistics that a network has."""
    fields = {"window": 1, "guard": False}
    plain = count(model, "tent", images, **fields, statistics="source")
    usual = plain.total("forward") + plain.total("backward")
    batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    rows = []
    for method, passes in METHODS.items():
        for statistics in ("batch", "mix", "stream") if batch_norm else ("batch",):
            found = count(model, method, images, **fields, statistics=statistics)
            row = {"network": name, "method": method, "statistics": statistics}
            row |= {part: found.total(part) for part in PARTS}
            rows.append(row | {"added": sum(row[part] for part in PARTS) - passes * usual})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME")
    args = parser.parse_args(argv)
    for name in args.networks:
        model = timm.create_model(name, num_classes=10).eval()
        size = timm.data.resolve_model_data_config(model)["input_size"]
        images = torch.rand(8, *size, generator=torch.Generator().manual_seed(0))
        for row in measure(name, model, images.to(args.device)):
            counts = ", ".join(f"{part} {row[part]:4d}" for part in PARTS)
            print(
                f"{name:24s} {row['method']:5s} {row['statistics']:6s} {counts}; "
                f"added {row['added']:4d}",
                flush=True,
            )


if __name__ == "__main__":
    main()
