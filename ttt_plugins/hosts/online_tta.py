"""MGG, MT3 and TTT in mariodoebler/test-time-adaptation: importing this registers them there.

Put ``import ttt_plugins.hosts.online_tta`` at the end of that repository's
``classification/methods/__init__.py`` (or copy this file there and import the copy), then run
``python test_time.py --cfg CFG`` with one of the files in ``ttt_plugins/hosts/cfgs``.

Its OPTIM.LR and OPTIM.STEPS are ``lr`` and steps; the update rules are the methods' own, so
OPTIM.METHOD and what belongs to it have no effect. A section TTT_PLUGINS is added to its
configuration: ARTIFACT (what `ttt_plugins.from_pretrained` takes), ITS_MODEL (run the classifier
that the artifact names or carries instead of MODEL.ARCH), FIELDS (other fields of the method).
MIXED_PRECISION means bfloat16, which needs no gradient scaler.
"""

from __future__ import annotations

import logging
import warnings

import torch

import ttt_plugins as tp

from ..core.scope import call

try:
    from conf import cfg as defaults
    from methods.base import TTAMethod
    from utils.registry import ADAPTATION_REGISTRY
except ImportError as error:
    raise tp.MissingDependencyError(
        "this runs inside mariodoebler/test-time-adaptation: import it from its folder "
        f"classification ({' '.join(str(error).split())})"
    ) from error

__all__ = ["MGG", "MT3", "TTT"]

if "TTT_PLUGINS" not in defaults:
    node = type(defaults)
    section = {"ARTIFACT": "", "ITS_MODEL": False, "FIELDS": node({}, new_allowed=True)}
    defaults.TTT_PLUGINS = node(section)


class _Hosted(TTAMethod):
    """An adapter in that repository's contract; its models normalise by themselves."""

    per_image = True  # each image adapts on its own: no window of past ones is needed

    def __init__(self, cfg, model, num_classes):
        super().__init__(cfg, model, num_classes)  # calls configure_model and collect_params
        if self.per_image:
            self.steps = self.window_length = 1  # one call takes all steps

    def configure_model(self):
        chosen, method = self.cfg.TTT_PLUGINS, type(self).__name__.lower()
        options = {"lr": float(self.cfg.OPTIM.LR), **dict(chosen.FIELDS)}
        options |= {"steps": self.cfg.OPTIM.STEPS} if self.per_image else {}
        options |= {"device": next(self.model.parameters()).device, "seed": self.cfg.RNG_SEED}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* does not say how its input is normalised")
            if not chosen.ARTIFACT:
                net = tp.wrap(self.model, method, normalize=False, **options)
            else:
                model = None if chosen.ITS_MODEL else self.model
                net = tp.from_pretrained(chosen.ARTIFACT, backbone=model, **options)
        if net.method != method or net.num_classes not in (None, self.num_classes):
            raise tp.InputError(
                f"{chosen.ARTIFACT} is a {net.method} adapter with {net.num_classes} classes, "
                f"asked for is {method} with {self.num_classes}"
            )
        logging.getLogger(__name__).info(net.describe())
        self.model = net

    def collect_params(self):
        source = self.model.algorithm().source
        return list(source.values()), list(source)

    def setup_optimizer(self):
        return None  # the update rule is the adapter's

    def copy_model_and_optimizer(self):
        return None, None  # the source is never written

    def load_model_and_optimizer(self):
        self.model.reset()

    reset = load_model_and_optimizer

    @staticmethod
    def change_mode_of_batchnorm1d(model_list, to_train_mode=True):
        pass  # an adapter chooses its statistics by the batch

    def loss_calculation(self, x):
        outputs = self.model(x[0])
        return outputs, self.model.loss

    def forward_and_adapt(self, x):
        with self._precision():
            return self.loss_calculation(x)[0]

    @torch.no_grad()
    def forward_sliding_window(self, x):
        """Predict with what was learned so far, without learning."""
        state = self.model.adaptation_state()
        params = {n[7:]: t for n, t in state.items() if n.startswith("params.")}
        with self._precision():
            return call(self.model.backbone, params, x[0])

    def _precision(self):
        kind = next(self.model.parameters()).device.type
        return torch.autocast(kind, torch.bfloat16, enabled=getattr(self, "mixed_precision", False))


@ADAPTATION_REGISTRY.register()
class MGG(_Hosted):
    """Online, over batches; single samples adapt a window at a time."""

    per_image = False


@ADAPTATION_REGISTRY.register()
class MT3(_Hosted):
    """Each image from the meta-learned start."""


@ADAPTATION_REGISTRY.register()
class TTT(_Hosted):
    """Each image from the start, or along the stream with FIELDS.mode online."""
