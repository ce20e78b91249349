"""Downloading from the Hugging Face Hub: the name of an artifact -> a folder with its files.

A revision is resolved to a commit first, and every file is taken from that commit. Each file is
compared with the hash that the Hub announced.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..backbones.kinds import repository_kind
from ..errors import ArtifactError, HubError, InputError
from ..utils.connection import in_time
from .folder import (
    CARD,
    CONFIG,
    LEARNED,
    MODEL,
    PROCESSOR,
    RESULTS,
    Artifact,
    named_folder,
    read_artifact,
    read_config,
)
from .hub_access import DEFAULT_ACCESS, Access, make_api, offline, readable
from .schema import OWN_WEIGHTS
from .strict_json import MAX_CARD, MAX_JSON, read_json
from .tensor_files import MAX_LEARNED, MAX_WEIGHTS

__all__ = [
    "Place",
    "await_answer",
    "download",
    "download_weights",
    "find",
    "is_repository",
    "read_named",
    "timm_commit",
    "timm_repository",
]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w.\-]+/[\w.\-]+(@[\w./\-]+)?", re.ASCII)
_LIMITS = {
    CONFIG: MAX_JSON,
    RESULTS: MAX_JSON,
    CARD: MAX_CARD,
    MODEL: MAX_WEIGHTS,
    LEARNED: MAX_LEARNED,
    PROCESSOR: MAX_JSON,
}


@dataclass(frozen=True)
class Place:
    """Where an artifact is.

    Attributes:
        folder: folder with its files.
        name: name that will find the same files again: a path, ``bundled:<name>``, or
            ``org/name@commit``.
        repository: ``org/name`` on the Hub; None for a local folder.
        commit: commit that the files belong to; None for a local folder.
    """

    folder: Path
    name: str
    repository: str | None = None
    commit: str | None = None


def is_repository(name: str) -> bool:
    """Whether ``name`` looks like ``org/name`` or ``org/name@revision``."""
    if not _REPOSITORY.fullmatch(name):
        return False
    try:
        validate_repo_id(name.partition("@")[0])
    except HFValidationError:
        return False
    return ".." not in name


def _resolve(repository: str, access: Access) -> str:
    """The commit of a revision now or, without a connection, when it was last resolved."""
    with readable(repository, access, "downloading"):
        commit = in_time(
            lambda: make_api(access).resolve_revision(
                repository,
                revision=access.revision,
                cache_dir=access.cache_dir,
                local_files_only=access.local_files_only,
            )
        ).resolved
    if not _COMMIT.fullmatch(commit):
        raise HubError(f"{repository}: the Hub returned {commit[:60]!r}, which is not a commit")
    return commit


def _download(repository: str, commit: str, file: str, access: Access) -> Path:
    """Download a file of a commit, and check its size and its hash."""
    arguments: dict[str, Any] = {
        "revision": commit,
        "cache_dir": access.cache_dir,
        "local_files_only": access.local_files_only,
    }
    api, new = make_api(access), False
    if not offline(access):
        announced = in_time(
            lambda: api.hf_hub_download(repository, file, dry_run=True, **arguments)
        )
        new = announced.will_download
        if (announced.file_size or 0) > _LIMITS[file]:
            raise HubError(
                f"{repository}: {file} has {announced.file_size:,} bytes; more than "
                f"{_LIMITS[file]:,} are not accepted"
            )
    path = Path(api.hf_hub_download(repository, file, **arguments))
    blob = path.resolve()
    if (expected := blob.name) != file and not _same_hash(blob, expected):
        if new:
            blob.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise HubError(
            f"{repository}: {file} is not what the Hub announced (hash {expected}): it was damaged "
            f"{'in transit' if new else f'in the cache, delete {blob}'}; download it again"
        )
    return path


def _same_hash(blob: Path, expected: str) -> bool:
    """Whether a blob has the hash in its name: SHA-256, or git's SHA-1 for small files."""
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", expected):
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode())
    else:
        return True  # an ETag of another kind, or a cache without links
    with open(blob, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == expected


def _needed(repository: str, commit: str, file: str, access: Access) -> Path:
    try:
        return _download(repository, commit, file, access)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise HubError(f"{repository}@{commit} cannot be loaded: it contains no {file}") from error


def _optional(repository: str, commit: str, file: str, access: Access) -> Path | None:
    """Download a file that may be missing; return None only if it is known to be missing."""
    try:
        return _download(repository, commit, file, access)
    except LocalEntryNotFoundError:
        known = try_to_load_from_cache(repository, file, access.cache_dir, commit)
        if known is None and file == LEARNED:
            raise  # neither in the cache nor known to be missing
        return None
    except EntryNotFoundError:
        # Only a real attempt records in the cache that the file is missing, for use offline.
        with suppress(EntryNotFoundError):
            in_time(
                lambda: make_api(access).hf_hub_download(
                    repository, file, revision=commit, cache_dir=access.cache_dir
                )
            )
        return None


def _snapshot(repository: str, access: Access) -> tuple[Path, str]:
    commit = _resolve(repository, access)
    with readable(repository, access, "downloading"):
        folder = _needed(repository, commit, CONFIG, access).parent
        config = read_json(folder / CONFIG)
        ours = isinstance(config, dict) and "format_version" in config
        kind = None if ours or not isinstance(config, dict) else repository_kind(config)
        if ours or not (isinstance(config, dict) and ("architecture" in config or kind)):
            _check_ours(folder, repository, commit)
        if kind is not None:
            _optional(repository, commit, PROCESSOR, access)
        _needed(repository, commit, MODEL, access)
        if ours:
            if config["backbone"]["source"] == OWN_WEIGHTS:
                needed = "learned" in config
                (_needed if needed else _optional)(repository, commit, LEARNED, access)
            for file in (CARD, RESULTS):
                _optional(repository, commit, file, access)
    return folder, commit


def _check_ours(folder: Path, repository: str, commit: str) -> None:
    """Refuse a config that is not an artifact's or names a folder, before further downloads."""
    backbone = read_config(folder, f"{repository}@{commit}")["backbone"]
    if backbone["source"] == "folder":
        raise ArtifactError(
            f"{repository} names a folder on another machine as its classifier "
            f"({backbone.get('name')!r}): pass your own classifier as backbone="
        )


def find(name: str | Path, access: Access = DEFAULT_ACCESS) -> Place | None:
    """Find the folder that a name stands for; a Hub repository is downloaded, with progress bars.

    Args:
        name: ``"bundled:<name>"``, a local folder, ``"org/name"`` or ``"org/name@revision"``.
        access: how to reach the Hub.

    Returns:
        the folder's place, None if the name is none of these.

    Raises:
        ArtifactError: no bundled artifact has this name.
        HubError: the Hub does not have the repository, refuses, or cannot be reached.
        InputError: a revision is given for something that is not on the Hub, or two revisions are
            given.
    """
    text = str(name)
    folder = named_folder(text)
    if folder is None and not text.startswith(("bundled:", ".", "/", "~")):
        if not is_repository(text) or Path(text).exists():
            return None
        repository, _, inside = text.partition("@")
        if inside and access.revision not in (None, inside):
            raise InputError(
                f"{text!r} and revision={access.revision!r} are two different revisions"
            )
        return download(repository, replace(access, revision=inside or access.revision))
    if folder is not None and access.revision is not None:
        raise InputError(f"{text!r} is not on the Hub, so it has no revision {access.revision!r}")
    return None if folder is None else Place(folder, text)


def download(repository: str, access: Access) -> Place:
    """Download one commit of the repository of an artifact or a model.

    Args:
        repository: ``org/name``; never the name of a local folder.
        access: how to reach the Hub, and the revision.

    Raises:
        HubError: the Hub does not have the repository, refuses, or cannot be reached.
    """
    if not is_repository(repository) or "@" in repository:
        raise HubError(
            f"{repository[:200]!r} cannot be the name of a repository: it must be ORG/NAME"
        )
    folder, commit = _snapshot(repository, access)
    return Place(folder, f"{repository}@{commit}", repository, commit)


def download_weights(repository: str, access: Access) -> tuple[Path, str]:
    """Download ``model.safetensors`` of a repository.

    Args:
        repository: ``org/name``.
        access: how to reach the Hub, and the revision.

    Returns:
        the file, and its commit.

    Raises:
        HubError: the Hub does not have the file, refuses, or cannot be reached.
    """
    commit = _resolve(repository, access)
    with readable(repository, access, "downloading"):
        return _needed(repository, commit, MODEL, access), commit


def read_named(name: str, access: Access = DEFAULT_ACCESS) -> Artifact:
    """Read an artifact by name.

    Args:
        name: name as for `find`.
        access: how to reach the Hub.

    Raises:
        ArtifactError: there is no such artifact, or it cannot be loaded.
    """
    place = find(name, access)
    return read_artifact(place.folder if place else name, place.name if place else None)


def await_answer(repository: str | None) -> None:
    """Ask the Hub for the weights in a repository, without downloading them.

    Args:
        repository: ``org/name``; None to ask nothing.

    Raises:
        HubError: the Hub does not answer at all; all other errors are left to the download.
    """
    if repository is None or offline(DEFAULT_ACCESS):
        return
    api = make_api(DEFAULT_ACCESS)
    try:
        in_time(lambda: api.hf_hub_download(repository, MODEL, dry_run=True))
    except HubError:
        raise
    except Exception:
        return


def timm_repository(name: str) -> str | None:
    """The repository with timm's weights for a name; None if timm knows none on the Hub."""
    try:
        settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # a tag that this version of timm does not know
        return None
    repository = settings.hf_hub_id if settings is not None else None
    if settings is not None and repository and repository.endswith("/"):
        # The name is completed by the architecture and the tag.
        repository += str(settings.architecture) + (f".{settings.tag}" if settings.tag else "")
    return repository or None


def timm_commit(repository: str, files: Iterable[str], revision: str | None = None) -> str | None:
    """The commit of the weights that timm has just loaded from the cache, None if unknown."""
    for file in files:
        path = try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(path, str) and _COMMIT.fullmatch(commit := Path(path).parent.name):
            return commit
    return None
