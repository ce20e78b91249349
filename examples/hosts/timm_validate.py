"""An adapter with timm's own loader, created by ``timm.create_model``.

timm's own script, from its repository, runs unchanged:

    python -m ttt_plugins.hosts.timm_models validate.py --data-dir DIR --model ttt_plugins \
        --model-kwargs "adapter='bundled:mgg-resnet26-cifar10'"
"""

import sys

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config

import ttt_plugins.hosts.timm_models  # noqa: F401 (registers the name ttt_plugins)


def main(folder):
    """Evaluate; ``folder`` has a folder ``validation`` with one folder of images for each class."""
    adapter = "bundled:mgg-resnet26-cifar10"
    model = timm.create_model("ttt_plugins", adapter=adapter, warm_up=False)
    config = resolve_model_data_config(model)  # mean 0, deviation 1: images in [0, 1]
    loader = create_loader(
        create_dataset("", root=folder, split="validation"),
        input_size=config["input_size"],
        batch_size=64,
        mean=config["mean"],
        std=config["std"],
        crop_pct=1.0,
        interpolation=config["interpolation"],
        device=torch.device("cpu"),
    )
    right = seen = 0
    for images, labels in loader:
        right += (model(images).argmax(1) == labels).sum().item()
        seen += len(labels)
    print(f"top-1 {100 * right / seen:.1f} % of {seen} images")


if __name__ == "__main__":
    main(sys.argv[1])
