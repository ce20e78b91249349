"""Adapters as timm models, which timm's own scripts can run unchanged.

timm's ``validate.py`` creates its model by name, normalises the images in its loader, and passes
one batch of random numbers through the model before the first batch of images. `TimmModel` handles
this: its data configuration has mean 0 and standard deviation 1, so that the loader yields images
in [0, 1], and the source model predicts the warm-up batch without adapting. Importing this module
registers the name ``ttt_plugins``; run as a module, it starts one of timm's scripts with that name
registered::

    python -m ttt_plugins.hosts.timm_models validate.py --data-dir DIR --model ttt_plugins \
        --model-kwargs "adapter='bundled:mgg-resnet26-cifar10'"
    python -m ttt_plugins.hosts.timm_models validate.py --data-dir DIR --model ttt_plugins \
        --model-kwargs classifier=resnet50 method=tent lr=0.001

The inner quotes are for timm, which reads the values as Python literals.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import InputError
from ..wrapping import from_pretrained, wrap

__all__ = ["TimmModel", "ttt_plugins"]

#: Arguments of every timm model that do not apply to a finished classifier.
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "global_pool", "cache_dir")


class TimmModel(nn.Module):
    """An adapter with the attributes that timm's scripts read from a model.

    Args:
        net: the adapter.
        warm_up: whether the first batch is a script's warm-up, which the source model predicts
            without adapting.

    Attributes:
        net: the adapter.
        num_classes: number of classes; None if unknown.
        pretrained_cfg: the classifier's data configuration, with mean 0 and standard deviation 1.
    """

    def __init__(self, net: Adapter, warm_up: bool = True):
        super().__init__()
        self.net, self.num_classes = net, net.num_classes
        channels, height, width = net.input_size
        own = getattr(net.backbone.model, "pretrained_cfg", {})
        self.pretrained_cfg = dict(own) | {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        if height is not None and width is not None:
            self.pretrained_cfg["input_size"] = (channels, height, width)
        self._warming_up = warm_up

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to logits (B, classes)."""
        if self._warming_up:
            self._warming_up = False
            with torch.no_grad():
                return self.net.backbone(images, tensors={})
        return self.net(images)


@register_model
def ttt_plugins(
    pretrained: bool = False,
    adapter: str = "",
    classifier: str = "",
    method: str = "",
    warm_up: bool = True,
    **fields: Any,
) -> TimmModel:
    """Load or wrap an adapter, for ``timm.create_model("ttt_plugins", …)``.

    Args:
        pretrained: whether to download timm's weights of ``classifier``.
        adapter: name of an artifact, as for `ttt_plugins.from_pretrained`.
        classifier: name of a model, as for `ttt_plugins.wrap`, instead of ``adapter``; needs
            ``method``.
        method: name of the method that adapts ``classifier``.
        warm_up: see `TimmModel`; False for scripts without a warm-up, such as ``inference.py``.
        **fields: fields of the method's config.

    Returns:
        the adapter as a timm model.

    Raises:
        InputError: neither or both of ``adapter`` and ``classifier`` are given, or the classifier
            does not have the number of classes or channels that the script requests.
    """
    if bool(adapter) == bool(classifier and method) or bool(classifier) != bool(method):
        raise InputError("give adapter=NAME, or else classifier=NAME together with method=NAME")
    requested = {name: fields.pop(name, None) for name in ("num_classes", "in_chans")}
    fields = {name: value for name, value in fields.items() if name not in _TIMM_ONLY}
    if adapter:
        net = from_pretrained(adapter, **fields)
    else:
        net = wrap(classifier, method, pretrained=pretrained, **fields)
    has = {"num_classes": net.num_classes, "in_chans": net.input_size[0]}
    for name, value in requested.items():
        if value is not None and has[name] not in (None, value):
            raise InputError(f"{adapter or classifier} has {name}={has[name]}, not {value}")
    return TimmModel(net, warm_up)


def run_script(arguments: list[str]) -> None:
    """Run one of timm's scripts, given its path and then its own arguments.

    Raises:
        InputError: no script is named, or it does not exist.
    """
    if not arguments or not Path(arguments[0]).is_file():
        raise InputError(
            f"no script {arguments[0] if arguments else ''!r}: the first argument must be the path "
            "of a script such as validate.py, which is in timm's repository but not in its package"
        )
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    run_script(sys.argv[1:])
