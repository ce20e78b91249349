"""Names of the methods; tests, the command line and the Hub code enumerate this registry.

It is open: other packages add methods through entry points of the group
``ttt_plugins.methods``::

    [project.entry-points."ttt_plugins.methods"]
    signsgd = "my_package.my_module"

Loading the entry point registers them: its module calls `register` (or
`ttt_plugins.methods.register_update_rule`), or it names a `Method`. That happens when the names
are first listed, or one is asked for that this package does not have.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol

from ..backbones.backbone import Backbone
from ..errors import InputError
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


#: Entry points that other packages register methods through.
GROUP = "ttt_plugins.methods"

#: What `Method.fit` learns.
HEAD, SOURCE_STATISTICS = "head", "source statistics"


class Build(Protocol):
    """Makes a method's `Algorithm`."""

    def __call__(
        self, config: Any, backbone: Backbone, source: Tensors, tensors: Tensors, seed: int, /
    ) -> Algorithm:
        """The pure functions.

        Args:
            config: the method's fields.
            backbone: the classifier; `ttt_plugins.core.scope.call` runs it on adapted tensors.
            source: the tensors that adapt, at their start, by the names that ``call`` knows.
            tensors: what was learned beforehand, by name.
            seed: of everything random.
        """
        ...


class Check(Protocol):
    """Validates learned tensors by name, shape and value."""

    def __call__(self, config: Any, backbone: Backbone, tensors: Tensors, where: str, /) -> Tensors:
        """``tensors`` in their canonical order; ``where`` names their origin in messages."""
        ...


class Eligible(Protocol):
    """Limits what may adapt."""

    def __call__(self, config: Any, backbone: Backbone, /) -> Collection[str]:
        """Names of parameters, relative to the user's model."""
        ...


class FitsAny(Protocol):
    """Tells whether what was learned serves any classifier."""

    def __call__(self, config: Any, tensors: Tensors, /) -> bool:
        """Whether it does."""
        ...


class Fit(Protocol):
    """Learns what can be learned from clean images while the classifier stays as it is."""

    def __call__(
        self,
        config: Any,
        backbone: Backbone,
        images: Any,
        seed: int,
        /,
        progress: bool = True,
    ) -> Tensors:
        """Learned tensors by name.

        Args:
            config: the method's fields.
            backbone: the classifier, where it is to be used.
            images: (N, C, H, W), or a loader of such batches or of tuples that begin with one;
                or, where the method takes them one batch after the other, any source of images
                (`ttt_plugins.data.opening.open_images`).
            seed: of everything random.
            progress: whether to show a progress bar.
        """
        ...


@dataclass(frozen=True)
class Method:
    """What the library knows of a method.

    Attributes:
        name: as users type it.
        config: frozen dataclass of the method's fields. Some of its fields are the library's where
            it has them: ``params``, what adapts (all that is eligible unless it has one),
            ``statistics`` with ``prior``, what BatchNorm normalises with (the source's unless it
            has one), ``window``, images per update (each batch unless it has one), and ``guard``
            and ``pull`` (neither unless it has them).
        build: makes the algorithm; None for a method that does not adapt.
        citation: reference of the method's paper.
        default_artifact: bundled artifact whose learned tensors `wrap` takes when it is given none
            and there is none for the very model; None where there is no such thing.
        check: for what was learned beforehand; None for methods that learn nothing.
        eligible: which parameters may adapt at all; None for no limits.
        fits_any: None for methods whose artifacts belong to the weights they were made for.
        fit: what learns from clean images; None where nothing can.
        fits: what ``fit`` learns, `HEAD` or `SOURCE_STATISTICS`.
        rank: ``config -> rank`` of low-rank changes; None for the library's own.
        describe: ``(config, backbone) -> lines`` on what only this method has; None for none.
        retired: fields that the config no longer has and that artifacts may still hold, each with
            a check of the values that mean what the method does today.
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
        """The tensors that adapt, at their start, for the parameters of these names."""
        rank = 0
        if getattr(config, "params", None) == "lora":
            rank = scope.LORA_RANK if self.rank is None else self.rank(config)
        return scope.parameters(backbone, names, rank, seed)


_METHODS: dict[str, Method] = {}
_discovered = False


def register(method: Method) -> Method:
    """Add a method; a second registration of the same name replaces the first.

    Raises:
        InputError: what is given is no `Method`, its name is not of letters, digits and
            underscores (artifacts and the command line carry it), or its config is no frozen
            dataclass.
    """
    if not isinstance(method, Method):
        raise InputError(f"register takes a Method, got {type(method).__name__}")
    if not re.fullmatch(r"\w{1,64}", method.name):
        raise InputError(f"a method's name is of letters, digits and _, got {method.name!r}")
    settings = getattr(method.config, "__dataclass_params__", None)
    if settings is None or not settings.frozen:
        raise InputError(
            f"the config {method.config.__name__} of {method.name!r} must be a frozen dataclass"
        )
    _METHODS[method.name] = method
    return method


def _discover() -> None:
    """Load the entry points of other packages, once; a broken one is a warning that names it."""
    global _discovered
    if _discovered:
        return
    _discovered = True  # at once, since a plugin may ask for the names itself
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        before = dict(_METHODS)
        try:
            found = point.load()
            if isinstance(found, Method):
                register(found)
            taken = [name for name in before if _METHODS.get(name) is not before[name]]
            if taken:
                raise InputError(f"it would replace {taken}")
        except (Exception, SystemExit) as error:
            # All or nothing: what it had registered so far goes again.
            _METHODS.clear()
            _METHODS.update(before)
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"the plugin {point.name!r} ({point.value}, of the package {package}) is left "
                f"out: {reason}",
                RuntimeWarning,
                stacklevel=3,
            )


def list_methods() -> list[str]:
    """Names of all methods, sorted, those of installed plugins among them."""
    _discover()
    return sorted(_METHODS)


def get_method(method: str | object) -> Method:
    """The record of a method given by name or by a config object.

    Raises:
        InputError: unknown; the message names the closest ones.
    """
    known = method in _METHODS if isinstance(method, str) else _of_config(method)
    if not known:
        _discover()
    if isinstance(method, str):
        if method in _METHODS:
            return _METHODS[method]
        close = difflib.get_close_matches(method, _METHODS, 1)
        hint = f" Did you mean {close[0]!r}?" if close else " Is a package missing that has it?"
        raise InputError(f"unknown method {method!r}; there are {list_methods()}.{hint}")
    if record := _of_config(method):
        return record
    raise InputError(
        f"method must be one of {list_methods()} or a config object such as tp.MGG(), "
        f"got {type(method).__name__}"
    )


def _of_config(config: object) -> Method | None:
    return next((r for r in _METHODS.values() if type(config) is r.config), None)


def configure(config: Any, overrides: dict[str, Any]) -> Any:
    """``config`` with fields replaced.

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
    """The config of an artifact's fields, which may be of any version of the package.

    Raises:
        InputError: a field never existed, or it holds what the method does not do.
    """
    current = {}
    for name, value in fields.items():
        if name not in method.retired:
            current[name] = tuple(value) if isinstance(value, list) else value
        elif not method.retired[name](value):
            raise InputError(f"{method.name} does not run with {name}={value!r}")
    return configure(method.config(), current)
