"""Compare the speed of adapting to each image with plain loops that call ``loss.backward()``.

    python examples/per_image_speed.py [--device cuda] [--images 64]

For TTT and MT3, our batched adapter is compared with a loop over images that restores the weights,
steps a ``torch.optim.SGD`` and predicts, with the same network, views and steps. For meta-training,
our meta-step is compared with a loop over tasks with ``torch.autograd.grad(create_graph=True)``.
The two run in turns, and figures are medians of the pairwise ratios. On a GPU the images per second
as a share of plain training's (counted by augmented copy) and the peak memory are printed too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ttt_plugins as tp
from ttt_plugins.backbones.backbone import Backbone
from ttt_plugins.core import heads
from ttt_plugins.core.scope import call
from ttt_plugins.core.views import image_keys
from ttt_plugins.methods.mt3 import _views as byol_views
from ttt_plugins.methods.mt3 import byol_loss
from ttt_plugins.methods.ttt import rotation_views
from ttt_plugins.train.joint import JointModel
from ttt_plugins.train.mt3_step import MT3Recipe, clip_each, draw_tasks, meta_gradient


def seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours, plain, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of both, which run in turns, and the median of plain / ours."""
    ours(), plain()
    pairs = []
    for i in range(rounds):
        order = (ours, plain) if i % 2 else (plain, ours)
        taken = {run: seconds(run, device) for run in order}
        pairs.append((taken[ours], taken[plain]))
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "plain_s": statistics.median(b for _, b in pairs),
        "speed-up": statistics.median(b / a for a, b in pairs),
    }


def _model(device: str, **model_args) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("ttt_resnet26", num_classes=10, **model_args).to(device).eval()


def _normalised(model: nn.Module, x: Tensor) -> Tensor:
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[k], device=x.device).view(-1, 1, 1) for k in ("mean", "std"))
    return (x - mean) / std


def ttt(images: int, steps: int, copies: int, rounds: int, device: str, **model_args) -> dict:
    """Compare standard TTT, batched, with the loop."""
    model = _model(device, **model_args)
    joint = JointModel(copy.deepcopy(model), -1).to(device).eval()
    tensors = joint.head_tensors()
    x = torch.rand(images, 3, 32, 32, device=device)
    net = tp.wrap(model, tp.TTT(steps=steps, copies=copies), tensors=tensors, device=device)
    start = copy.deepcopy(joint.state_dict())

    def plain():
        for image in x.split(1):
            joint.load_state_dict(start)
            moved = [*joint.twin.parameters(), *joint.rotation.parameters()]
            optimizer = torch.optim.SGD(moved, lr=1e-3)
            for step in range(steps):
                views, quarters = rotation_views(image, image_keys(image, 0), step, copies)
                loss = F.cross_entropy(
                    joint.rotation_logits(_normalised(model, views[0])), quarters[0]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                joint.model(_normalised(model, image))

    found = compare(lambda: net(x), plain, rounds, device)
    copies_a_second = images * steps * copies / found["ours_s"]
    return found | {"of plain training": copies_a_second / _training(model, device)}


def _training(model: nn.Module, device: str, batch_size: int = 256) -> float:
    """Images per second of plain training steps of the same network."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.rand(batch_size, 3, 32, 32, device=device)
    y = torch.zeros(batch_size, dtype=torch.long, device=device)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    return batch_size / statistics.median(seconds(step, device) for _ in range(3))


def mt3(images: int, copies: int, rounds: int, device: str, **model_args) -> dict:
    """Compare MT3's one step, batched, with a loop over single images."""
    model = _model(device, **model_args)
    head = heads.init_byol(model, torch.Generator().manual_seed(0))
    head = {n: t.to(device) for n, t in head.items()}
    x = torch.rand(images, 3, 32, 32, device=device)
    net = tp.wrap(model, tp.MT3(copies=copies), tensors=head, device=device)
    backbone = Backbone(copy.deepcopy(model))
    own = dict(backbone.model.named_parameters())
    start = {n: p.detach().clone() for n, p in own.items()}
    named = {f"model.{n}": p for n, p in own.items()}

    def plain():
        for image in x.split(1):
            with torch.no_grad():
                for n, p in own.items():
                    p.copy_(start[n]).requires_grad_()
            optimizer = torch.optim.SGD(own.values(), lr=0.1)
            x1, x2 = byol_views(image, image_keys(image, 0), 0, copies)
            optimizer.zero_grad()
            byol_loss(backbone, named, head, x1[0], x2[0]).backward()
            optimizer.step()
            with torch.no_grad():
                backbone(image)

    return compare(lambda: net(x), plain, rounds, device)


def meta_training(rounds: int, device: str, **recipe_fields) -> dict:
    """Compare one meta-step's gradient with a loop over tasks."""
    recipe = MT3Recipe(**({"model_args": {}} | recipe_fields))
    model = _model(device, **recipe.model_args)
    backbone = Backbone(model)
    meta = {f"model.{n}": p.detach().clone() for n, p in backbone.model.named_parameters()}
    meta |= {n: t.to(device) for n, t in heads.init_byol(model, torch.Generator()).items()}
    count = recipe.tasks * recipe.task_images
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.zeros(count, dtype=torch.long, device=device)
    generator = torch.Generator(device).manual_seed(0)
    tasks = draw_tasks(images, labels, recipe.task_images, generator)

    def plain():
        leaves = {n: p.detach().requires_grad_() for n, p in meta.items()}
        for x1, x2, x, y in zip(*tasks, strict=True):
            inner = byol_loss(backbone, leaves, leaves, x1, x2)
            grads = torch.autograd.grad(
                inner,
                list(leaves.values()),
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            grads = clip_each(dict(zip(leaves, grads, strict=True)), recipe.clip)
            moved = {n: p - recipe.inner_lr * grads[n] for n, p in leaves.items()}
            loss = F.cross_entropy(call(backbone, moved, x), y)
            with torch.no_grad():  # the accuracy before the step, which our log has too
                call(backbone, leaves, x)
            loss = loss + recipe.self_supervised * byol_loss(backbone, moved, moved, x1, x2)
            loss.backward()
        return leaves

    def ours():
        return meta_gradient(meta, tasks, backbone, recipe)

    found = compare(ours, plain, rounds, device)
    if device != "cpu":
        for name, run in (("ours", ours), ("plain", plain)):
            torch.cuda.reset_peak_memory_stats()
            run()
            found[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=4, help="number of images in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    for name, found in (
        ("TTT, 10 steps of 32 copies", ttt(args.images, 10, 32, args.rounds, args.device)),
        ("MT3, 32 pairs of views", mt3(args.images, 32, args.rounds, args.device)),
        ("meta-step, 4 tasks of 8", meta_training(args.rounds, args.device)),
    ):
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)


if __name__ == "__main__":
    main()
