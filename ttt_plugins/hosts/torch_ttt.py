"""Engines for torch-ttt (0.0.2 or later): importing this registers ``mt3``, ``mgg``, our ``ttt``.

torch-ttt has a ``ttt`` of its own, which is left alone: ours are always ``ttt_plugins_<name>``,
and the short name as well where it is free. It looks for no entry points, so a script imports this.
"""

from __future__ import annotations

import torch
from torch import nn

from ..core.heads import init_byol, init_rotation
from .steps import joint_step, memory_step, meta_step
from .torch_ttt_engine import Engine
from .torch_ttt_import import register

__all__ = ["MGGEngine", "MT3Engine", "TTTEngine"]


class TTTEngine(Engine):
    """TTT, trained jointly; ``features_layer_name`` is where the trunk ends (`TTT.split`)."""

    method = "ttt"

    def __init__(
        self, model: nn.Module, features_layer_name="", optimization_parameters=None, **options
    ):
        if features_layer_name:
            options["split"] = features_layer_name
        super().__init__(model, optimization_parameters, **options)

    def fresh_heads(self, model, split=-1, seed=0, **options):
        """An untrained rotation head."""
        return init_rotation(model, split, torch.Generator().manual_seed(seed))

    def step(self, net, images):
        """Joint training."""
        return joint_step(net, self.model, self.learned(), images, self.number)


class MT3Engine(Engine):
    """MT3, meta-trained: the logits are those after the inner step."""

    method = "mt3"

    def fresh_heads(self, model, seed=0, **options):
        """An untrained projector and predictor."""
        return init_byol(model, torch.Generator().manual_seed(seed))

    def step(self, net, images):
        """Meta-training; a batch is a task."""
        return meta_step(net, self.model, self.learned(), images, self.number)


class MGGEngine(Engine):
    """MGG: the optimizer learns and the model stays; a sequence lasts until `reset`."""

    method = "mgg"

    def step(self, net, images):
        """Meta-training of the optimizer."""
        logits, loss, self.sequence = memory_step(net, self.learned(), images, self.sequence)
        return logits, loss


for _engine in (MGGEngine, MT3Engine, TTTEngine):
    register(_engine.method, _engine)
