"""Compare a step of MGG with a step of Tent: time, size of the state, and reset.

    python examples/step_cost.py [--device cuda]

The networks are ResNet-26 at batch size 64 and ViT-B/16 at batch size 8 (64 on a GPU), with random
weights, because the time does not depend on them. The two methods run in turns; the figure is the
median of the pairwise ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch

import ttt_plugins as tp


def seconds(net, images) -> float:
    start = time.perf_counter()
    net(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, batch_size: int, rounds: int, device: str = "cpu", **kwargs) -> dict:
    """Median seconds of a Tent and an MGG step, their ratio, MB of state, and reset's seconds."""
    model = timm.create_model(name, **kwargs)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.rand(batch_size, *size, generator=torch.Generator().manual_seed(0))
    images = images.to(device)
    # Every batch is one update, whatever its size, and there is no guard.
    fields = {"window": 1, "statistics": "batch", "guard": False}
    tent, mgg = (tp.wrap(model, method, device=device, **fields) for method in ("tent", "mgg"))
    if not mgg.backbone.has_batch_norm:
        mgg.fit_source_statistics([images], progress=False)
    for net in (tent, mgg):
        net(images)
    times = []
    for i in range(rounds):
        order = (tent, mgg) if i % 2 else (mgg, tent)
        taken = {net.method: seconds(net, images) for net in order}
        times.append((taken["tent"], taken["mgg"]))
    state = sum(t.numel() * t.element_size() for t in mgg.adaptation_state().values())
    adapted = sum(
        t.numel() * t.element_size()
        for n, t in mgg.adaptation_state().items()
        if n.startswith("params.")
    )
    start = time.perf_counter()
    mgg.reset()
    reset = time.perf_counter() - start
    return {
        "tent_s": statistics.median(t for t, _ in times),
        "mgg_s": statistics.median(m for _, m in times),
        "ratio": statistics.median(m / t for t, m in times),
        "state_mb": (state - adapted) / 1e6,
        "reset_s": reset,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args(argv)
    batch = 8 if args.device == "cpu" else 64
    for name, size, rounds in (
        ("ttt_resnet26", 64, args.rounds),
        ("ttt_resnet26_bn", 64, args.rounds),
        ("ttt_vit_tiny_patch4_32", 64, args.rounds),
        ("vit_base_patch16_224", batch, max(3, args.rounds // 4)),
    ):
        found = compare(name, size, rounds, args.device)
        print(
            f"{name:24s} batch {size:3d}: tent {1e3 * found['tent_s']:8.1f} ms, mgg "
            f"{1e3 * found['mgg_s']:8.1f} ms, ratio {found['ratio']:.3f}, state "
            f"{found['state_mb']:.2f} MB, reset {1e6 * found['reset_s']:.0f} us",
            flush=True,
        )


if __name__ == "__main__":
    main()
