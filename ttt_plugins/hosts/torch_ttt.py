"""Engines for torch-ttt 0.0.2 or later; importing this module registers them.

Their names are ``ttt_plugins_mgg``, ``ttt_plugins_mt3`` and ``ttt_plugins_ttt``. The names ``mgg``
and ``mt3`` work as well, while ``ttt`` remains torch-ttt's own engine. torch-ttt does not read
entry points, so a script has to import this module.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import nn

from ..core.heads import init_byol, init_rotation
from .steps import joint_step, memory_step, meta_step
from .torch_ttt_engine import Engine
from .torch_ttt_import import register

__all__ = ["MGGEngine", "MT3Engine", "TTTEngine"]


class TTTEngine(Engine):
    """TTT, trained jointly; ``features_layer_name`` says where the trunk ends (`TTT.split`)."""

    method = "ttt"
    kept = MappingProxyType({"mode": "online"})

    def __init__(
        self, model: nn.Module, features_layer_name="", optimization_parameters=None, **options
    ):
        if features_layer_name:
            options["split"] = features_layer_name
        super().__init__(model, optimization_parameters, **options)

    def fresh_heads(self, model, options):
        """An untrained rotation head."""
        draw = torch.Generator().manual_seed(options.get("seed", 0))
        return init_rotation(model, options.get("split", -1), draw)

    def step(self, net, images):
        """Joint training."""
        return joint_step(net, self.model, self.learned(), images, self.number)


class MT3Engine(Engine):
    """MT3, meta-trained: the logits are those after the inner step."""

    method = "mt3"

    def fresh_heads(self, model, options):
        """An untrained projector and predictor."""
        return init_byol(model, torch.Generator().manual_seed(options.get("seed", 0)))

    def step(self, net, images):
        """Meta-training; a batch is a task."""
        return meta_step(net, self.model, self.learned(), images, self.number)


class MGGEngine(Engine):
    """MGG: only the optimizer learns, not the model; a sequence lasts until `reset`."""

    method = "mgg"
    kept = MappingProxyType({})

    def __init__(self, model: nn.Module, optimization_parameters=None, **options):
        # By default every call is an update, as with torch-ttt's own engines.
        super().__init__(model, optimization_parameters, **({"window": 1} | options))

    def step(self, net, images):
        """Meta-training of the optimizer."""
        logits, loss, self.sequence = memory_step(net, self.learned(), images, self.sequence)
        return logits, loss


for _engine in (MGGEngine, MT3Engine, TTTEngine):
    register(_engine.method, _engine)
