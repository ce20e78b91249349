"""Finding the tensors that a method learned beforehand for a classifier, and their artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.registry import Method, stored_config
from ..errors import ArtifactError, InputError
from . import hub
from .classifiers import check_fingerprint
from .folder import (
    MODEL,
    Artifact,
    bundled_folder,
    list_bundled,
    named_folder,
    read_artifact,
    read_config,
)
from .tensor_files import described, fingerprint, tensor_header

__all__ = ["Learned", "check_fits_any", "find_learned", "fits_any", "stored_fields"]


@dataclass(frozen=True)
class Learned:
    """Tensors that a method learned beforehand.

    Attributes:
        tensors: the tensors by name.
        where: name of their artifact in error messages.
        config: the parsed ``config.json`` of the artifact; None for tensors that were passed.
    """

    tensors: dict[str, Tensor]
    where: str
    config: dict[str, Any] | None = None


def find_learned(
    record: Method,
    module: nn.Module,
    head: str | Path | None = None,
    carried: Artifact | None = None,
    name: str = "",
) -> Learned | None:
    """Find what a method has learned for a classifier.

    Args:
        record: the method.
        module: the classifier.
        head: the artifact that the user gave.
        carried: the artifact that the classifier itself came from.
        name: name of ``carried`` in error messages.

    Returns:
        the learned tensors: of ``head``, of ``carried``, or of a bundled artifact; None if there
        are none.

    Raises:
        ArtifactError: ``head`` is not an artifact, or was made for other weights.
        InputError: ``head`` was made for another method.
    """
    if head is not None:
        return _named_by_user(record, module, head)
    if carried is not None and carried.config["method"] == record.name:
        return Learned(carried.tensors, name, carried.config)
    if record.default_artifact is None:
        return None
    bundled = _made_for(record, module) or record.default_artifact
    artifact = read_artifact(bundled_folder(bundled))
    return Learned(artifact.tensors, bundled, artifact.config)


def _named_by_user(record: Method, module: nn.Module, head: str | Path) -> Learned:
    place = hub.find(head)
    if place is None:
        raise ArtifactError(f"head={str(head)[:200]!r} is not an artifact")
    artifact = read_artifact(place.folder, place.name)
    if artifact.config["method"] != record.name:
        raise InputError(f"{head} was made for {artifact.config['method']}, not {record.name}")
    remedy = 'train a head for this model with head="train"'
    check_fingerprint(module, artifact.config["backbone"], place.name, True, remedy)
    return Learned(artifact.tensors, place.name, artifact.config)


def _made_for(record: Method, module: nn.Module) -> str | None:
    """Name of the bundled artifact of a method that was made for exactly these weights."""
    state, mark = module.state_dict(), None
    for name in list_bundled():
        config = read_config(bundled_folder(name))
        made_for = config["backbone"]
        if config["method"] != record.name or "fingerprint" not in made_for:
            continue
        # Hashing the weights of a large network takes long, so their shapes are compared first.
        carried = named_folder(str(made_for.get("name")))
        if carried is not None and not _same_shapes(state, carried / MODEL):
            continue
        mark = mark or fingerprint(state)
        if mark == made_for["fingerprint"]:
            return name
    return None


def _same_shapes(state: Mapping[str, Tensor], file: Path) -> bool:
    shapes = {name: tensor.shape for name, tensor in described(state).items()}
    return shapes == {name: tensor.shape for name, tensor in tensor_header(file).items()}


def stored_fields(record: Method, config: Mapping[str, Any], name: str) -> Any:
    """The method's config with the fields that an artifact holds.

    Args:
        record: the method.
        config: the artifact's ``config.json``.
        name: name of the artifact in error messages.

    Raises:
        ArtifactError: the method lacks one of the fields, or refuses a value.
    """
    try:
        return stored_config(record, config["fields"])
    except (InputError, TypeError, OverflowError) as error:
        raise ArtifactError(f"{name}/config.json: {error}") from error


def fits_any(record: Method, config: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the learned tensors of a method can be used with any classifier.

    Args:
        record: the method.
        config: the method's config.
        tensors: learned tensors by name.
    """
    return record.fits_any is not None and record.fits_any(config, dict(tensors))


def check_fits_any(
    record: Method, config: Any, tensors: Mapping[str, Tensor], backbone: Mapping[str, Any], where
) -> bool:
    """Whether an artifact declares that it fits any classifier.

    Args:
        record: the method.
        config: the method's config.
        tensors: learned tensors by name.
        backbone: the part of ``config.json`` that describes the classifier.
        where: name of the artifact in error messages.

    Raises:
        ArtifactError: the artifact declares so, but does not fit any classifier.
    """
    declared = backbone.get("fits") == "any"
    if declared and not fits_any(record, config, tensors):
        raise ArtifactError(f"{where} says that it fits any architecture, but it does not")
    return declared
