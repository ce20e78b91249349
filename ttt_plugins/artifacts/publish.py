"""From an artifact folder to a Hub repository: nothing of this machine goes along.

The folder is copied aside first. There a classifier in a local folder is put into the artifact,
paths of this machine are shortened, and the card gets the repository's name.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from . import hub
from .card import render_card
from .folder import (
    OWN_WEIGHTS,
    Artifact,
    check_plain,
    is_bundled,
    read_artifact,
    timm_part,
    write_artifact,
)
from .measured import load_measured
from .tensor_files import fingerprint

__all__ = ["publish"]

#: An absolute path: not after a letter, a colon or a slash, as in an address.
_PATH = re.compile(r"(?<![\w:/.~\-])(?:~|[A-Za-z]:[\\/]|/)(?:[^\s'\"]*[\\/])?([^\s'\"\\/]+)")


def _shorten(value: Any) -> Any:
    """``/home/me/data`` -> ``.../data`` in all strings of a JSON value."""
    if isinstance(value, str):
        return _PATH.sub(r".../\1", value)
    if isinstance(value, Mapping):
        return {key: _shorten(v) for key, v in value.items()}
    return [_shorten(v) for v in value] if isinstance(value, list) else value


def _embed(artifact: Artifact, where: Path) -> Artifact:
    """Put the classifier of a local folder into the artifact: its path means nothing elsewhere."""
    backbone = artifact.config["backbone"]
    remedy = "publish that folder first and wrap it by its repository's name, then save again"
    try:
        model = read_artifact(Path(backbone["name"]))
    except ArtifactError as error:
        raise ArtifactError(
            f"{where} adapts a classifier in the folder {backbone['name']}, whose weights have to "
            f"go along, but it cannot be read ({error}): put it back, or {remedy}"
        ) from error
    fits = fingerprint(model.weights or {}) == backbone.get("fingerprint")
    if model.weights is None or not fits:
        raise ArtifactError(
            f"{where} was made for other weights than those now in {backbone['name']}: {remedy}"
        )
    part = timm_part(model.config)
    backbone = backbone | {"source": OWN_WEIGHTS, "name": part["architecture"]}
    return replace(
        artifact, config=artifact.config | part | {"backbone": backbone}, weights=model.weights
    )


def portable(folder: Path, repository: str, measured: Any = None) -> Artifact:
    """What is published of an artifact folder.

    Raises:
        ArtifactError: it does not load, or its classifier is in a folder that is gone.
    """
    artifact = read_artifact(folder)
    own_words = artifact.card != render_card(folder.resolve().name, artifact)
    if measured is not None:
        artifact = replace(artifact, results=load_measured(measured))
    if artifact.config["backbone"]["source"] == "folder":
        artifact = _embed(artifact, folder)
    records = {
        k: _shorten(artifact.config[k]) for k in ("training", "card") if k in artifact.config
    }
    config, found = artifact.config | records, _shorten(artifact.results)
    if config != artifact.config or found != artifact.results:
        warnings.warn("paths of this machine in the records are shortened", stacklevel=4)
    artifact = replace(artifact, config=config, results=found)
    if own_words and measured is None:
        return artifact  # somebody has written a card of their own
    return replace(artifact, card=render_card(repository, artifact))


def publish(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    measured: str | Path | Mapping[str, Any] | None = None,
) -> tuple[str, bool]:
    """Make a Hub repository hold an artifact folder; see `hub.upload`.

    Args:
        measured: results to publish with it, as for `results.load`.

    Returns:
        the commit, and whether it is new.

    Raises:
        ArtifactError: the folder is no artifact, or depends on a folder that is gone.
        HubError: the Hub refuses or cannot be reached.
    """
    check_plain(Path(folder))
    if is_bundled(folder) and measured is None:
        # What ships and what is published are the same files.
        read_artifact(folder)
        return hub.upload(Path(folder), repository, private=private, token=token)
    artifact = portable(Path(folder), repository, measured)
    with tempfile.TemporaryDirectory(prefix="ttt-plugins-") as work:
        staged = write_artifact(Path(work) / "artifact", artifact)
        return hub.upload(staged, repository, private=private, token=token)
