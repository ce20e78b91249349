"""Test-time training for image classifiers: wrap a model, and it adapts itself at inference.

    >>> import ttt_plugins as tp
    >>> net = tp.wrap("resnet50", "mgg", pretrained=True)
    >>> logits = net(images)          # float images in [0, 1], (B, C, H, W)

See ``wrap``, ``from_pretrained``, and the command line ``ttt-plugins``.
"""

import warnings as _warnings

from .utils.signals import exit_on_interrupt as _exit_on_interrupt

_exit_on_interrupt()  # first, because what follows takes seconds

with _warnings.catch_warnings():
    # Importing timm raises deprecation warnings of torch that our users can do nothing about.
    _warnings.simplefilter("ignore", FutureWarning)
    from .backbones import networks  # noqa: F401  (registers our networks with timm)

from .adapter import Adapter
from .artifacts.folder import list_bundled
from .backbones.kinds.open_clip_models import zero_shot
from .core.registry import list_methods
from .errors import (
    ArtifactError,
    DataError,
    DistributedError,
    HubError,
    InputError,
    MissingDependencyError,
    TTTError,
)
from .methods import MGG, MT3, SAR, TTT, Source, Tent
from .version import __version__
from .wrapping import from_pretrained, wrap

__all__ = [
    "MGG",
    "MT3",
    "SAR",
    "TTT",
    "Adapter",
    "ArtifactError",
    "DataError",
    "DistributedError",
    "HubError",
    "InputError",
    "MissingDependencyError",
    "Source",
    "TTTError",
    "Tent",
    "__version__",
    "from_pretrained",
    "list_bundled",
    "list_methods",
    "wrap",
    "zero_shot",
]
