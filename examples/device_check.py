"""Compare what a device and the CPU compute: the same streams with every method.

    python examples/device_check.py [--device cuda]

Logits of the first batch must agree up to rounding (`CLOSE`, relative to the largest logit). After
that the streams diverge, because optimizers divide by gradients that are close to zero; predictions
must agree on a share `AGREEING` of all images. TF32 is disabled. The exit status is 1 if anything
differs more.
"""

from __future__ import annotations

import argparse
import sys

import torch

import ttt_plugins as tp
from ttt_plugins.data.images import to_float
from ttt_plugins.demo import load_sample

#: Largest difference of a first batch's logits, by whether they are computed after gradient steps.
CLOSE = {False: 1e-4, True: 1e-2}
AGREEING = 0.97
NETWORKS = ("resnet26-cifar10", "resnet26bn-cifar10", "vit-tiny-cifar10")
PER_IMAGE = {
    "ttt": ("bundled:ttt-resnet26-cifar10", {"steps": 2}),
    "ttt online": ("bundled:ttt-resnet26-cifar10", {"mode": "online"}),
    "ttt batch": ("bundled:ttt-resnet26-cifar10", {"mode": "batch", "steps": 2}),
    "mt3": ("bundled:mt3-resnet26-cifar10", {}),
}


def adapter(name: str, device: str) -> tp.Adapter:
    """An adapter by its method's name and, for online methods, the network's name after a slash."""
    if name in PER_IMAGE:
        model, fields = PER_IMAGE[name]
        return tp.from_pretrained(model, device=device, copies=8, **fields)
    method, network = name.split("/")
    if method == "mgg":
        return tp.from_pretrained(f"bundled:mgg-{network}", device=device, window=1)
    fields = {} if method == "source" else {"window": 1}
    return tp.wrap(f"bundled:source-{network}", method, device=device, **fields)


def names() -> list[str]:
    """Names of everything that is compared."""
    online = [f"{m}/{n}" for m in ("source", "tent", "sar", "mgg") for n in NETWORKS]
    return [*online, *PER_IMAGE]


def compare(name: str, device: str, batches: int, size: int) -> tuple[bool, str]:
    """Whether an adapter agrees with the same one on the CPU, and a line that says how closely."""
    sample = load_sample().images["gaussian_noise"][: batches * size]
    here, there = adapter(name, "cpu"), adapter(name, device)
    logits = [
        torch.stack([net(to_float(part).to(net.device)).cpu() for part in sample.split(size)])
        for net in (here, there)
    ]
    largest = logits[0][0].abs().max()
    apart = ((logits[0][0] - logits[1][0]).abs().max() / largest).item()
    agreeing = (logits[0].argmax(2) == logits[1].argmax(2)).double().mean().item()
    fine = apart <= CLOSE[name in PER_IMAGE] and agreeing >= AGREEING
    return fine, f"{name:24s} first batch {apart:.1e} apart, {agreeing:.1%} of predictions agree"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=names(), default=names())
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    right = True
    for name in args.only:
        fine, line = compare(name, args.device, args.batches, args.batch_size)
        print(line if fine else f"{line}: TOO FAR APART", flush=True)
        right &= fine
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
