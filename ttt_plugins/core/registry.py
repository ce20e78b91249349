"""The registry of methods, which wrapping, artifacts and the command line look up by name.

Other packages add methods through entry points of the group ``ttt_plugins.methods``::

    [project.entry-points."ttt_plugins.methods"]
    signsgd = "my_package.my_module"

Loading the entry point registers the methods: its module calls `register` (or
`ttt_plugins.methods.register_update_rule`), or the entry point names a `Method`. Entry points are
loaded when the names are first listed, or when an unknown name is requested.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol

from ..backbones.backbone import Backbone
from ..errors import InputError
from ..utils.plugins import use_plugins
from . import scope
from .algorithm import Algorithm, Tensors

__all__ = [
    "GROUP",
    "HEAD",
    "SOURCE_STATISTICS",
    "Method",
    "configure",
    "get_method",
    "list_methods",
    "register",
    "stored_config",
]


#: Group of the entry points through which other packages register methods.
GROUP = "ttt_plugins.methods"

#: What `Method.fit` learns.
HEAD, SOURCE_STATISTICS = "head", "source statistics"


class Build(Protocol):
    """Creates a method's `Algorithm`."""

    def __call__(
        self, config: Any, backbone: Backbone, source: Tensors, tensors: Tensors, seed: int, /
    ) -> Algorithm:
        """Create the algorithm.

        Args:
            config: the method's config.
            backbone: the classifier; `ttt_plugins.core.scope.call` runs it with adapted tensors.
            source: initial values of the tensors that adapt, by the names that ``call`` uses.
            tensors: tensors that were learned beforehand, by name.
            seed: seed for everything random.
        """
        ...


class Check(Protocol):
    """Checks the names, shapes and values of learned tensors."""

    def __call__(self, config: Any, backbone: Backbone, tensors: Tensors, where: str, /) -> Tensors:
        """Return ``tensors`` in canonical order; ``where`` names their artifact in errors."""
        ...


class Eligible(Protocol):
    """Limits which parameters may adapt."""

    def __call__(self, config: Any, backbone: Backbone, /) -> Collection[str]:
        """Names of the parameters that may adapt, relative to the user's model."""
        ...


class FitsAny(Protocol):
    """Tells whether learned tensors can be used with any classifier."""

    def __call__(self, config: Any, tensors: Tensors, /) -> bool:
        """Whether they can."""
        ...


class Fit(Protocol):
    """Learns tensors from clean images, with an unchanged classifier."""

    def __call__(
        self,
        config: Any,
        backbone: Backbone,
        images: Any,
        seed: int,
        /,
        progress: bool = True,
    ) -> Tensors:
        """Return the learned tensors by name.

        Args:
            config: the method's config.
            backbone: the classifier, on the device where it is used.
            images: images (N, C, H, W), or a loader of such batches or of tuples that begin with
                one; if the method reads them batch by batch, also any source of images
                (`ttt_plugins.data.opening.open_images`).
            seed: seed for everything random.
            progress: whether to show a progress bar.
        """
        ...


@dataclass(frozen=True)
class Method:
    """The record of a method.

    Attributes:
        name: name of the method: letters, digits and underscores.
        config: frozen dataclass of the method's settings. The library reads some of its fields if
            they exist: ``params``, the parameters that adapt (by default all eligible ones),
            ``statistics`` with ``prior``, what BatchNorm normalises with (by default the source's
            statistics), ``window``, the number of images in an update (by default those of each
            batch), and ``guard`` and ``pull`` (by default neither).
        build: creates the algorithm; None for a method that does not adapt.
        citation: reference of the method's paper.
        default_artifact: name of the bundled artifact whose learned tensors `wrap` uses if none are
            given and no bundled artifact was made for the model; None if the method has none.
        check: checks learned tensors; None for a method that learns nothing.
        eligible: limits the parameters that may adapt; None for no limits.
        fits_any: tells whether learned tensors fit any classifier; None if they always belong to
            the weights that they were made for.
        fit: learns tensors from clean images; None if nothing can be learned from them.
        fits: kind of tensors that ``fit`` learns, `HEAD` or `SOURCE_STATISTICS`.
        rank: ``config -> rank`` of low-rank changes; None for the library's default.
        describe: ``(config, backbone) -> lines`` that only this method adds to a description; None
            for no lines.
        retired: fields that the config no longer has but artifacts may contain, each with a check
            for the values under which the method behaves as it does now.
    """

    name: str
    config: type
    build: Build | None
    citation: str = ""
    default_artifact: str | None = None
    check: Check | None = None
    eligible: Eligible | None = None
    fits_any: FitsAny | None = None
    fit: Fit | None = None
    fits: str = ""
    rank: Callable[[Any], int] | None = None
    describe: Callable[[Any, Backbone], list[str]] | None = None
    retired: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)

    def select(self, config: Any, backbone: Backbone) -> list[str]:
        """Names of the parameters that adapt, relative to the user's model.

        Raises:
            InputError: as for `ttt_plugins.core.scope.select`.
        """
        if self.build is None:
            return []
        eligible = self.eligible(config, backbone) if self.eligible is not None else None
        return scope.select(backbone, getattr(config, "params", "all"), eligible)

    def source(self, config: Any, backbone: Backbone, names: Collection[str], seed: int) -> Tensors:
        """Initial values of the tensors that adapt, for parameters of these names."""
        rank = 0
        if getattr(config, "params", None) == "lora":
            rank = scope.LORA_RANK if self.rank is None else self.rank(config)
        return scope.parameters(backbone, names, rank, seed)


_METHODS: dict[str, Method] = {}
_discovered = False


def register(method: Method) -> Method:
    """Add a method; it replaces an earlier one of the same name.

    Returns:
        the method.

    Raises:
        InputError: this is no `Method`, its name contains anything but letters, digits and
            underscores, or its config is not a frozen dataclass.
    """
    if not isinstance(method, Method):
        raise InputError(f"register takes a Method, got {type(method).__name__}")
    if not re.fullmatch(r"\w{1,64}", method.name):
        raise InputError(
            f"the name of a method must consist of letters, digits and _, got {method.name!r}"
        )
    settings = getattr(method.config, "__dataclass_params__", None)
    if settings is None or not settings.frozen:
        raise InputError(
            f"the config {method.config.__name__} of {method.name!r} must be a frozen dataclass"
        )
    _METHODS[method.name] = method
    return method


def _discover() -> None:
    """Load the entry points of other packages once, with a warning for each that fails."""
    global _discovered
    if _discovered:
        return
    _discovered = True  # before loading, because a plugin may list the methods itself
    use_plugins(GROUP, _use)


def _use(point: metadata.EntryPoint) -> None:
    """Load an entry point, and remove the methods that it has registered if it fails."""
    before = dict(_METHODS)
    try:
        loaded = point.load()
        if isinstance(loaded, Method):
            register(loaded)
        replaced = [name for name in before if _METHODS.get(name) is not before[name]]
        if replaced:
            raise InputError(f"it would replace {replaced}; choose another name")
    except (Exception, SystemExit):
        _METHODS.clear()
        _METHODS.update(before)
        raise


def list_methods() -> list[str]:
    """Sorted names of all methods, including those of installed plugins."""
    _discover()
    return sorted(_METHODS)


def get_method(method: str | object) -> Method:
    """The record of a method given by name or by a config object.

    Raises:
        InputError: the method is unknown; the message names the closest one.
    """
    known = method in _METHODS if isinstance(method, str) else _of_config(method)
    if not known:
        _discover()
    if isinstance(method, str):
        if method in _METHODS:
            return _METHODS[method]
        close = difflib.get_close_matches(method, _METHODS, 1)
        hint = f" Did you mean {close[0]!r}?" if close else " Is its package installed?"
        raise InputError(f"unknown method {method!r}; the methods are {list_methods()}.{hint}")
    if record := _of_config(method):
        return record
    raise InputError(
        f"method must be one of {list_methods()} or a config object such as tp.MGG(), "
        f"got {type(method).__name__}"
    )


def _of_config(config: object) -> Method | None:
    return next((r for r in _METHODS.values() if type(config) is r.config), None)


def configure(config: Any, overrides: dict[str, Any]) -> Any:
    """A copy of ``config`` with some fields replaced.

    Raises:
        InputError: a field does not exist, or the config refuses its value.
    """
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name in overrides:
        if name not in fields:
            raise InputError(
                f"{type(config).__name__} has no field {name!r}; its fields are {sorted(fields)}"
            )
    return dataclasses.replace(config, **overrides)


def stored_config(method: Method, fields: Mapping[str, Any]) -> Any:
    """The config for the fields of an artifact, which any version of the package may have written.

    Raises:
        InputError: there has never been such a field, or its value is no longer supported.
    """
    current = {}
    for name, value in fields.items():
        if name not in method.retired:
            current[name] = tuple(value) if isinstance(value, list) else value
        elif not method.retired[name](value):
            raise InputError(f"{method.name} does not support {name}={value!r}")
    return configure(method.config(), current)
