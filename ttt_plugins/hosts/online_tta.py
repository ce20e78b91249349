"""MGG, MT3 and TTT in mariodoebler/test-time-adaptation: importing this registers them there.

Put ``import ttt_plugins.hosts.online_tta`` at the end of that repository's
``classification/methods/__init__.py`` (or copy this file there and import the copy), then run
``python test_time.py --cfg CFG`` with one of the files in ``ttt_plugins/hosts/cfgs``.

A section TTT_PLUGINS is added to the repository's configuration. Its keys can be set in a yaml
file and on the command line (``TTT_PLUGINS.FIELDS.mode online``):

- ARTIFACT: name of an artifact, as for `ttt_plugins.from_pretrained`; empty to wrap the
  repository's model. Write a folder as ``./folder``, because ``name/name`` without a dot can also
  be a repository on the Hub.
- ITS_MODEL: True to run the classifier that the artifact names or carries instead of MODEL.ARCH.
- FIELDS: fields of the method's config. Fields that are not set keep the artifact's value.
- CLEAN_IMAGES: number of the source dataset's training images on which MGG's source statistics are
  measured first; 0 measures nothing.

OPTIM.LR sets ``lr``. OPTIM.STEPS sets ``steps`` of the methods that adapt to each image, and the
number of MGG's updates per batch. Both have an effect only if they differ from the repository's
defaults, which stand for the artifact's own values; FIELDS.lr and FIELDS.steps set any value. The
update rules are the methods' own, so OPTIM.METHOD and its options have no effect. MIXED_PRECISION
means bfloat16, which needs no gradient scaler.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from typing import Any

import torch

import ttt_plugins as tp
from ttt_plugins.core.registry import get_method
from ttt_plugins.core.scope import call

try:
    from conf import cfg as defaults  # pyright: ignore[reportMissingImports]
    from methods.base import TTAMethod  # pyright: ignore[reportMissingImports]
    from utils.registry import ADAPTATION_REGISTRY  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise tp.MissingDependencyError(
        "this runs only inside mariodoebler/test-time-adaptation: import it from its folder "
        f"classification ({' '.join(str(error).split())})"
    ) from error

__all__ = ["MGG", "MT3", "TTT"]

#: The repository's defaults; a value that equals its default counts as not set.
_LR, _STEPS = defaults.OPTIM.LR, defaults.OPTIM.STEPS

if "TTT_PLUGINS" not in defaults:
    # yacs merges only declared keys; a key declared as None accepts a value of any type.
    configs = [get_method(name).config for name in ("mgg", "mt3", "ttt")]
    names = {field.name for config in configs for field in dataclasses.fields(config)}
    section = {"ARTIFACT": "", "ITS_MODEL": False, "CLEAN_IMAGES": 0}
    defaults.TTT_PLUGINS = type(defaults)(section | {"FIELDS": dict.fromkeys(sorted(names))})


class _Hosted(TTAMethod):
    """An adapter with the repository's interface, whose models normalise images themselves."""

    per_image = True  # the method adapts to each image separately, without a window of past images

    def __init__(self, cfg, model, num_classes):
        super().__init__(cfg, model, num_classes)  # calls configure_model and collect_params
        if self.per_image:
            self.steps = self.window_length = 1  # one call takes all steps

    def configure_model(self):
        section, method = self.cfg.TTT_PLUGINS, type(self).__name__.lower()
        options = self._fields()
        options |= {"device": next(self.model.parameters()).device, "seed": self.cfg.RNG_SEED}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* does not say how its input is normalised")
            if not section.ARTIFACT:
                net = tp.wrap(self.model, method, normalize=False, **options)
            else:
                model = None if section.ITS_MODEL else self.model
                net = tp.from_pretrained(section.ARTIFACT, backbone=model, **options)
        if net.method != method or net.num_classes not in (None, self.num_classes):
            raise tp.InputError(
                f"{section.ARTIFACT} is a {net.method} adapter with {net.num_classes} classes, "
                f"but the configuration needs {method} with {self.num_classes}"
            )
        if section.CLEAN_IMAGES:
            net.fit_source_statistics(self._clean_images(section.CLEAN_IMAGES))
        logging.getLogger(__name__).info(net.describe())
        self.model = net

    def _fields(self) -> dict[str, Any]:
        """Fields of the method's config that the repository's configuration sets."""
        optim, fields = self.cfg.OPTIM, {}
        if optim.LR != _LR:
            fields["lr"] = float(optim.LR)
        if self.per_image and optim.STEPS != _STEPS:
            fields["steps"] = optim.STEPS
        for name, value in self.cfg.TTT_PLUGINS.FIELDS.items():
            if value is not None:
                fields[name] = tuple(value) if isinstance(value, list) else value
        return fields

    def _clean_images(self, count: int):
        """The repository's own loader of ``count`` training images."""
        # Imported only here, because it imports a reader for every dataset.
        from datasets.data_loading import (  # pyright: ignore[reportMissingImports]
            get_source_loader,
        )

        cfg = self.cfg
        return get_source_loader(
            dataset_name=cfg.CORRUPTION.DATASET,
            adaptation=cfg.MODEL.ADAPTATION,
            preprocess=getattr(self.model, "model_preprocess", None),
            data_root_dir=cfg.DATA_DIR,
            batch_size=cfg.TEST.BATCH_SIZE,
            use_clip=cfg.MODEL.USE_CLIP,
            ckpt_path=cfg.MODEL.CKPT_PATH,
            num_samples=count,
            workers=min(cfg.SOURCE.NUM_WORKERS, os.cpu_count() or 1),
        )[1]

    def collect_params(self):
        source = self.model.algorithm().source
        return list(source.values()), list(source)

    def setup_optimizer(self):
        return None  # the adapter has its own update rule

    def copy_model_and_optimizer(self):
        return None, None  # the source weights are never changed

    def load_model_and_optimizer(self):
        self.model.reset()

    reset = load_model_and_optimizer

    @staticmethod
    def change_mode_of_batchnorm1d(model_list, to_train_mode=True):
        pass  # an adapter handles BatchNorm statistics itself

    def loss_calculation(self, x):
        outputs = self.model(x[0])
        return outputs, self.model.loss

    def forward_and_adapt(self, x):
        with self._precision():
            return self.loss_calculation(x)[0]

    @torch.no_grad()
    def forward_sliding_window(self, x):
        """Predict with the current adapted parameters, without adapting further."""
        state = self.model.adaptation_state()
        params = {n[7:]: t for n, t in state.items() if n.startswith("params.")}
        with self._precision():
            return call(self.model.backbone, params, x[0])

    def _precision(self):
        kind = next(self.model.parameters()).device.type
        return torch.autocast(kind, torch.bfloat16, enabled=getattr(self, "mixed_precision", False))


@ADAPTATION_REGISTRY.register()
class MGG(_Hosted):
    """MGG adapts online, batch by batch; single images are collected into windows."""

    per_image = False


@ADAPTATION_REGISTRY.register()
class MT3(_Hosted):
    """MT3 adapts to each image separately, from the meta-learned parameters."""


@ADAPTATION_REGISTRY.register()
class TTT(_Hosted):
    """TTT adapts to each image from the source, or along the stream with FIELDS.mode online."""
