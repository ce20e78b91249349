"""Classifiers that a ``config.json`` describes: timm's, and other kinds of models.

The file may come from anybody, so a model is built within limits and its weights are safetensors.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..backbones.kinds import ModelKind, attach, read_preprocess, repository_kind, settings_of
from ..errors import ArtifactError, InputError
from .build_budget import TOO_LARGE, BuildBudget, rehearse
from .folder import CONFIG, MODEL, PROCESSOR
from .schema import check_timm_part, pretrained_settings
from .strict_json import read_json
from .tensor_files import TensorInfo, described, read_tensors, tensor_header

__all__ = ["described_by_config", "repository_model"]


def _constructor_keywords(architecture: str) -> set[str]:
    """Keyword arguments of the model classes in the module that registers an architecture."""
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    keywords = {name for c in classes for name in inspect.signature(c.__init__).parameters}
    # These are arguments of timm's loader, which could download and unpickle files.
    loader = set(inspect.signature(timm.create_model).parameters) | {"self", "args", "kwargs"}
    return {n for n in keywords - loader if not n.startswith("pretrained")}


def described_by_config(
    config: Mapping[str, Any], header: Mapping[str, TensorInfo], where: str
) -> nn.Module:
    """Create the model that a timm ``config.json`` describes, before its weights are loaded.

    Args:
        config: the parsed ``config.json``.
        header: types and shapes of the weights beside it, which limit the size of the model.
        where: name of the artifact in error messages.

    Raises:
        ArtifactError: this does not describe a timm model, or the model is far larger than the
            weights, or they do not fit it.
    """
    check_timm_part(config, where)
    architecture, arguments = config["architecture"], config.get("model_args", {})
    plain = architecture.split(".")[0]
    if not timm.is_model(plain):
        raise ArtifactError(f"{where}: timm {timm.__version__} knows no {architecture!r}")
    if extra := sorted(arguments.keys() - _constructor_keywords(plain)):
        raise ArtifactError(f"{where}: {architecture} takes no argument {extra[0]!r}")
    elements = sum(math.prod(t.shape) for t in header.values())
    create = partial(_create, config, elements, len(header), where)
    known = timm.get_pretrained_cfg(plain)
    size = pretrained_settings(config).get("input_size")
    if arguments or (size is not None and (known is None or size != tuple(known.input_size))):
        rehearse(create, elements, where)
    model = create()
    floating = {t.dtype for t in header.values() if t.dtype.is_floating_point}
    if len(floating) == 1:
        model = model.to(floating.pop())
    wanted = described(model.state_dict())
    for name in sorted(wanted.keys() | header.keys()):
        if (has := header.get(name)) != (needs := wanted.get(name)):
            raise ArtifactError(
                f"{where}: {MODEL} does not fit {architecture}: {name[:80]!r} is {_said(has)}, "
                f"expected {_said(needs)}"
            )
    return model


def _create(config: Mapping[str, Any], elements: int, tensors: int, where: str) -> nn.Module:
    architecture, arguments = config["architecture"], config.get("model_args", {})
    try:
        with torch.random.fork_rng(devices=[]), BuildBudget(elements, tensors):
            # Given here, so that no artifact can set them: they could download or unpickle files.
            return timm.create_model(
                architecture,
                pretrained=False,
                pretrained_cfg=None,
                pretrained_cfg_overlay=pretrained_settings(config),
                checkpoint_path="",
                num_classes=config["num_classes"],
                **arguments,
            )
    except (ArtifactError, MemoryError) as error:
        raise ArtifactError(f"{where}: {str(error) or TOO_LARGE}") from error
    except Exception as error:  # a constructor may raise anything for unsuitable arguments
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise ArtifactError(
            f"{where}: {architecture} cannot be built with {arguments} ({reason})"
        ) from error


def _said(tensor: TensorInfo | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tensor.shape}"


def repository_model(folder: Path, where: str) -> nn.Module:
    """A classifier from the files of a repository of any author; only safetensors are read.

    Args:
        folder: folder with ``config.json`` in timm's form or in that of another kind of model,
            ``model.safetensors``, and a processor's settings if there are any.
        where: name of the repository in error messages.

    Raises:
        ArtifactError: the files do not describe a model that is built, or they do not fit together.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ArtifactError(f"{where}: config.json is not a JSON object")
    if not (folder / MODEL).is_file():
        raise ArtifactError(
            f"{where}: {MODEL} is missing, and pickled weights are not read: save the model as "
            "safetensors"
        )
    header = tensor_header(folder / MODEL)
    kind = repository_kind(config)
    if kind is not None:
        return _model_of_kind(kind, config, folder, where)
    if "model_type" in config and "architecture" not in config:
        raise ArtifactError(
            f"{where}: models of type {str(config['model_type'])[:40]!r} are not built"
        )
    inside = "timm_model."  # as transformers saves a model of timm
    prefix = inside if all(name.startswith(inside) for name in header) else ""
    header = {name.removeprefix(prefix): info for name, info in header.items()}
    model = described_by_config(config, header, where)
    tensors = read_tensors(folder / MODEL)
    model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items()}, strict=True)
    return model.eval()


def _model_of_kind(
    kind: ModelKind, config: Mapping[str, Any], folder: Path, where: str
) -> nn.Module:
    kind.ready()
    header = tensor_header(folder / MODEL)
    elements = sum(math.prod(t.shape) for t in header.values())

    def empty() -> None:
        with BuildBudget(elements, len(header)):
            model = kind.build(config, None)
        if sum(t.numel() for t in model.state_dict().values()) > 2 * elements + (1 << 20):
            raise ArtifactError(TOO_LARGE)

    try:
        with torch.random.fork_rng(devices=[]):
            rehearse(partial(_told, empty, where), elements, where)
            model = kind.build(config, read_tensors(folder / MODEL))
    except ArtifactError:
        raise
    except Exception as error:  # a constructor may raise anything for unsuitable arguments
        raise ArtifactError(f"{where}: {_reason(error)}") from error
    settings = settings_of(model)
    if (folder / PROCESSOR).is_file():
        try:
            settings = settings.with_preprocessing(read_preprocess(read_json(folder / PROCESSOR)))
        except (InputError, TypeError, ValueError) as error:
            raise ArtifactError(f"{where}: {PROCESSOR}: {_reason(error)}") from error
    attach(model, settings)
    return model


def _told(build: Callable[[], None], where: str) -> None:
    """Run ``build``, whatever it raises as an `ArtifactError`."""
    try:
        build()
    except Exception as error:
        raise ArtifactError(f"{where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return (
        said[:300]
        if isinstance(error, (ValueError, ArtifactError, InputError)) and said
        else (f"{type(error).__name__}: {said}"[:300])
    )
