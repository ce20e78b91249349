"""A stand-in for mariodoebler/test-time-adaptation: its documented contract, in our own words.

Its modules ``conf`` (on the real yacs), ``methods.base``, ``utils.registry`` and
``datasets.data_loading``, as far as a method meets them: the order in which the base class sets
itself up, and how its ``forward`` deals with batches, single samples, several steps and resets.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import torch
from torch import nn
from yacs.config import CfgNode


def configuration() -> CfgNode:
    """The keys that our methods read, with that repository's defaults."""
    return CfgNode(
        {
            "SETTING": "continual",
            "DATA_DIR": "./data",
            "RNG_SEED": 1,
            "MIXED_PRECISION": False,
            "MODEL": {
                "ADAPTATION": "source",
                "ARCH": "Standard",
                "USE_CLIP": False,
                "CKPT_PATH": "",
                "EPISODIC": False,
                "RESET_AFTER_NUM_UPDATES": 0,
            },
            "CORRUPTION": {"DATASET": "cifar10_c", "SEVERITY": [5, 4, 3, 2, 1]},
            "OPTIM": {"STEPS": 1, "LR": 0.001, "METHOD": "Adam"},
            "SOURCE": {"NUM_WORKERS": 0},
            "TEST": {"BATCH_SIZE": 128, "WINDOW_LENGTH": 1},
        }
    )


def get_source_loader(
    dataset_name,
    adaptation,
    preprocess,
    data_root_dir,
    batch_size,
    use_clip,
    n_views=64,
    train_split=True,
    ckpt_path=None,
    num_samples=-1,
    percentage=1.0,
    workers=4,
):
    """Made images in place of the source dataset's, with that loader's signature."""
    pixels = torch.rand(num_samples, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dataset = torch.utils.data.TensorDataset(pixels, torch.zeros(num_samples))
    return dataset, torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers)


class Registry:
    """Classes by their names, and by their names in lower case."""

    def __init__(self):
        self.classes = {}

    def register(self):
        def decorate(cls):
            for name in {cls.__name__, cls.__name__.lower()}:
                assert name not in self.classes, name
                self.classes[name] = cls
            return cls

        return decorate

    def get(self, name):
        return self.classes[name]


class TTAMethod(nn.Module):
    def __init__(self, cfg, model, num_classes):
        super().__init__()
        self.cfg, self.model, self.num_classes = cfg, model, num_classes
        self.episodic, self.steps = cfg.MODEL.EPISODIC, cfg.OPTIM.STEPS
        self.updates, self.limit = 0, cfg.MODEL.RESET_AFTER_NUM_UPDATES
        self.configure_model()  # before anything that a subclass sets
        self.params, _ = self.collect_params()
        self.optimizer = self.setup_optimizer() if self.params else None
        self.trainable = sum(p.numel() for p in self.params)
        self.total = sum(p.numel() for p in self.model.parameters())
        self.window, self.window_length, self.place = None, cfg.TEST.WINDOW_LENGTH, 0
        self.has_bn = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        self.models = [self.model]
        self.model_states, self.optimizer_state = self.copy_model_and_optimizer()
        self.mixed_precision = cfg.MIXED_PRECISION

    def _adapt(self, x):
        for _ in range(self.steps):
            outputs = self.forward_and_adapt(x)
            self.updates += 1
            if self.limit and self.updates % self.limit == 0:
                self.reset()
        return outputs

    def forward(self, x):
        if self.episodic:
            self.reset()
        x = x if isinstance(x, list) else [x]
        if len(x[0]) > 1:
            return self._adapt(x)
        place = self.place
        if self.window is None:
            self.window = [part.clone() for part in x]
            self.change_mode_of_batchnorm1d(self.models, to_train_mode=False)
        elif len(self.window[0]) < self.window_length:
            self.window = [torch.cat(pair) for pair in zip(self.window, x, strict=True)]
            self.change_mode_of_batchnorm1d(self.models, to_train_mode=True)
        else:
            for part, new in zip(self.window, x, strict=True):
                part[place] = new[0]
        self.place = (place + 1) % self.window_length
        if place == self.window_length - 1:
            return self._adapt(self.window)[[place]]
        if self.has_bn:
            return self.forward_sliding_window(self.window)[[place]]
        return self.forward_sliding_window(x)

    def forward_sliding_window(self, x):
        with torch.no_grad():
            return self.model(x[0])

    def setup_optimizer(self):
        return torch.optim.Adam(self.params)

    def copy_model_and_optimizer(self):
        return copy.deepcopy(self.model.state_dict()), self.optimizer.state_dict()

    def reset(self):
        raise RuntimeError("cannot reset without saved states")

    @staticmethod
    def change_mode_of_batchnorm1d(models, to_train_mode=True):
        raise AssertionError("the mode of an adapter's layers is its own")


def install(monkeypatch) -> ModuleType:
    """Put the modules where an import finds them; returns ``utils.registry``."""
    parts = {
        "conf": {"cfg": configuration()},
        "methods": {},
        "methods.base": {"TTAMethod": TTAMethod},
        "utils": {},
        "utils.registry": {"ADAPTATION_REGISTRY": Registry()},
        "datasets": {},
        "datasets.data_loading": {"get_source_loader": get_source_loader},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["utils.registry"]
