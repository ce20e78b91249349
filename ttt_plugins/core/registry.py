"""Names of the methods; tests, the command line and the Hub code enumerate this registry.

It is open: a package of anybody's adds methods through entry points of the group
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from torch import Tensor

from ..errors import InputError

__all__ = [
    "GROUP",
    "Method",
    "configure",
    "get_method",
    "list_methods",
    "register",
    "stored_config",
]


#: Entry points that other packages register methods through.
GROUP = "ttt_plugins.methods"


@dataclass(frozen=True)
class Method:
    """What the library knows of a method.

    Attributes:
        name: as users type it.
        config: frozen dataclass of the method's fields.
        build: ``(config, backbone, source, tensors, seed) -> algorithm`` with ``init()``,
            ``adapt(params, state, images)`` and ``describe()``, where ``source`` are the
            parameters that adapt; None for a method that does not adapt.
        citation: reference of the method's paper.
        default_artifact: bundled artifact whose learned tensors `wrap` takes when it is given none
            and there is none for the very model; None where there is no such thing.
        check: ``(config, backbone, tensors, where) -> tensors`` validates learned tensors by name,
            shape and value; None for methods that learn nothing beforehand.
        eligible: ``(config, backbone) -> names`` of the parameters that may adapt at all; None
            for no limits.
        fits_any: ``(config, tensors) -> bool``, whether what was learned serves any classifier;
            None for methods whose artifacts belong to the weights they were made for.
        fit: ``(model, images, config, **options) -> adapter`` with what can be learned on clean
            images while the model stays as it is, ``options`` as for `wrap`; None where nothing
            can.
        retired: fields that the config no longer has and that artifacts may still hold, each with
            a check of the values that mean what the method does today.
    """

    name: str
    config: type
    build: Callable[..., Any] | None
    citation: str = ""
    default_artifact: str | None = None
    check: Callable[..., dict[str, Tensor]] | None = None
    eligible: Callable[..., list[str]] | None = None
    fits_any: Callable[..., bool] | None = None
    fit: Callable[..., Any] | None = None
    retired: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)


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
