"""The Hugging Face Hub: an artifact's name -> a folder of its files, and a folder -> the Hub.

A revision is resolved first and every file is taken from that one commit. What arrives is compared
with the hash the Hub announced. Every failure becomes one `HubError` with cause and remedy.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import ArtifactError, HubError, InputError, TTTError
from ..version import __version__
from .folder import (
    CARD,
    CONFIG,
    FILES,
    LEARNED,
    MODEL,
    OWN_WEIGHTS,
    RESULTS,
    Artifact,
    check_plain,
    named_folder,
    read_artifact,
    read_config,
)
from .strict_json import MAX_CARD, MAX_JSON, read_json
from .tensor_files import MAX_LEARNED, MAX_WEIGHTS

__all__ = [
    "Access",
    "Found",
    "download",
    "download_weights",
    "find",
    "is_repository",
    "read_named",
    "timm_commit",
    "upload",
]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w.\-]+/[\w.\-]+(@[\w./\-]+)?", re.ASCII)
_LIMITS = {
    CONFIG: MAX_JSON,
    RESULTS: MAX_JSON,
    CARD: MAX_CARD,
    MODEL: MAX_WEIGHTS,
    LEARNED: MAX_LEARNED,
}


@dataclass(frozen=True)
class Access:
    """How to reach the Hub.

    Attributes:
        revision: branch, tag or commit; the default branch unless given.
        cache_dir: where files are kept, huggingface_hub's own cache unless given.
        local_files_only: use the cache alone.
        token: access token; the one of ``hf auth login`` or HF_TOKEN unless given, none if False.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Found:
    """Where an artifact is.

    Attributes:
        folder: its files.
        name: how to name it again and mean the same: a path, ``bundled:<name>``, or
            ``org/name@commit``.
        repository, commit: on the Hub; None for a folder.
    """

    folder: Path
    name: str
    repository: str | None = None
    commit: str | None = None


def _api(access: Access) -> HfApi:
    return HfApi(library_name="ttt_plugins", library_version=__version__, token=access.token)


def is_repository(name: str) -> bool:
    """Whether ``name`` looks like ``org/name`` or ``org/name@revision``."""
    if not _REPOSITORY.fullmatch(name):
        return False
    try:
        validate_repo_id(name.partition("@")[0])
    except HFValidationError:
        return False
    return ".." not in name


# -- failures --------------------------------------------------------------------------------


def _status(error: HfHubHTTPError) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _offline(access: Access) -> str | None:
    if access.local_files_only:
        return "local_files_only=True"
    return "offline mode (HF_HUB_OFFLINE=1)" if constants.HF_HUB_OFFLINE else None


@contextmanager
def _readable(repository: str, access: Access, doing: str) -> Iterator[None]:
    """Turn whatever goes wrong on the way to the Hub into one `HubError`."""
    what = f"{repository}@{access.revision}" if access.revision else repository
    try:
        yield
    except TTTError:
        raise
    except GatedRepoError as error:
        raise HubError(
            f"{repository} is gated: ask for access on {constants.ENDPOINT}/{repository}, then log "
            "in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{repository} has no revision {access.revision!r}: see its branches and tags on "
            f"{constants.ENDPOINT}/{repository}/tree/main"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"there is no repository {repository!r} on {constants.ENDPOINT}, and no folder of that "
            "name here; if it is private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except (RevisionResolutionError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if reason := _offline(access):
            raise HubError(
                f"{what} is not in the cache, and {reason} forbids {doing} it: do so once with a "
                "connection, or name another cache_dir"
            ) from error
        raise HubError(
            f"{constants.ENDPOINT} cannot be reached ({_first_line(error.__cause__ or error)}), "
            f"and {what} is not in the cache: try again with a connection"
        ) from error
    except HFValidationError as error:
        raise HubError(f"{repository!r} cannot be a repository's name: {error}") from error
    except HfHubHTTPError as error:
        status = _status(error)
        remedy = {
            401: "log in with `hf auth login` or set HF_TOKEN",
            403: "the token has no right to do this: use one that may write there",
            413: "the files are too large for the Hub",
            429: "too many requests: wait a few minutes and try again",
        }.get(status, "nothing was changed here: try again later")
        raise HubError(
            f"{constants.ENDPOINT} refuses {doing} {what} ({status}: {_first_line(error)}); "
            f"{remedy}"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "check the disk and the connection"
        raise HubError(
            f"{doing} {what} failed ({_first_line(error)}): {remedy} and try again; nothing "
            "half-done is used"
        ) from error
    except Exception as error:  # transport classes differ between huggingface_hub 1.x and 2.x
        raise HubError(
            f"{doing} {what} from {constants.ENDPOINT} was interrupted "
            f"({type(error).__name__}: {_first_line(error)}): check the connection and try again"
        ) from error


# -- from the Hub ----------------------------------------------------------------------------


def _resolve(repository: str, access: Access) -> str:
    """The commit that a revision means now, or meant when it was last seen."""
    with _readable(repository, access, "downloading"):
        found = _api(access).resolve_revision(
            repository,
            revision=access.revision,
            cache_dir=access.cache_dir,
            local_files_only=access.local_files_only,
        )
    commit = found.resolved
    if not _COMMIT.fullmatch(commit):
        raise HubError(f"{repository}: the Hub names {commit[:60]!r} as a commit, which it is not")
    return commit


def _download(repository: str, commit: str, file: str, access: Access) -> Path:
    """One file of one commit, of an acceptable size and with the hash that was announced."""
    arguments = {
        "revision": commit,
        "cache_dir": access.cache_dir,
        "local_files_only": access.local_files_only,
    }
    api, offline = _api(access), _offline(access)
    new = False
    if not offline:
        announced = api.hf_hub_download(repository, file, dry_run=True, **arguments)
        new = announced.will_download
        if (announced.file_size or 0) > _LIMITS[file]:
            raise HubError(
                f"{repository}: {file} would have {announced.file_size:,} bytes; more than "
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
            f"{'on the way' if new else f'in the cache, delete {blob}'}; download it again"
        )
    return path


def _same_hash(blob: Path, expected: str) -> bool:
    """Blobs are called by their SHA-256, or by git's SHA-1 for small files."""
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", expected):
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode())
    else:
        return True  # an ETag of another kind, or a cache without links
    with open(blob, "rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest() == expected


def _needed(repository: str, commit: str, file: str, access: Access) -> Path:
    try:
        return _download(repository, commit, file, access)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise HubError(
            f"{repository}@{commit} cannot be loaded: there is no {file} in it"
        ) from error


def _optional(repository: str, commit: str, file: str, access: Access) -> Path | None:
    """A file that may be missing; None only where that is known."""
    try:
        return _download(repository, commit, file, access)
    except LocalEntryNotFoundError:
        known = try_to_load_from_cache(repository, file, access.cache_dir, commit)
        if known is None and file == LEARNED:
            raise  # neither there nor known to be missing
        return None
    except EntryNotFoundError:
        # Only a real attempt notes in the cache that it is missing, for times without connection.
        with suppress(EntryNotFoundError):
            _api(access).hf_hub_download(
                repository, file, revision=commit, cache_dir=access.cache_dir
            )
        return None


def _snapshot(repository: str, access: Access) -> tuple[Path, str]:
    commit = _resolve(repository, access)
    with _readable(repository, access, "downloading"):
        config = _needed(repository, commit, CONFIG, access)
        folder = config.parent
        described = read_json(config)
        ours = isinstance(described, dict) and "format_version" in described
        if ours:
            described = read_config(folder, f"{repository}@{commit}")
            if described["backbone"]["source"] == "folder":
                raise ArtifactError(
                    f"{repository} names a folder of another machine as its classifier "
                    f"({described['backbone'].get('name')!r}): pass your own as backbone="
                )
        elif not (isinstance(described, dict) and "architecture" in described):
            read_config(folder, repository)  # says what it is instead
        _needed(repository, commit, MODEL, access)
        if ours:
            if described["backbone"]["source"] == OWN_WEIGHTS:
                needed = "learned" in described
                (_needed if needed else _optional)(repository, commit, LEARNED, access)
            for file in (CARD, RESULTS):
                _optional(repository, commit, file, access)
    return folder, commit


def find(name: str | Path, access: Access = Access()) -> Found | None:
    """The folder that a name means; what is on the Hub is downloaded first, with progress bars.

    Args:
        name: ``"bundled:<name>"``, a local folder, ``"org/name"`` or ``"org/name@revision"``.

    Returns:
        None when the name is none of these.

    Raises:
        ArtifactError: nothing bundled of that name.
        HubError: the Hub does not have it, refuses, or cannot be reached.
        InputError: a revision of something that is not on the Hub, or two different ones.
    """
    text = str(name)
    folder = named_folder(text)
    if folder is None and not text.startswith(("bundled:", ".", "/", "~")):
        if not is_repository(text) or Path(text).exists():
            return None
        repository, _, inside = text.partition("@")
        if inside and access.revision not in (None, inside):
            raise InputError(f"{text!r} and revision={access.revision!r} name two revisions")
        return download(repository, replace(access, revision=inside or access.revision))
    if folder is not None and access.revision is not None:
        raise InputError(f"{text!r} is not on the Hub, so it has no revision {access.revision!r}")
    return None if folder is None else Found(folder, text)


def download(repository: str, access: Access) -> Found:
    """One commit of an artifact's or a timm model's repository; no local folder stands for it.

    Raises:
        HubError: the Hub does not have it, refuses, or cannot be reached.
    """
    if not is_repository(repository) or "@" in repository:
        raise HubError(f"{repository[:200]!r} cannot be a repository's name: it must be ORG/NAME")
    folder, commit = _snapshot(repository, access)
    return Found(folder, f"{repository}@{commit}", repository, commit)


def download_weights(repository: str, access: Access) -> tuple[Path, str]:
    """``model.safetensors`` of a repository, and its commit.

    Raises:
        HubError: the Hub does not have it, refuses, or cannot be reached.
    """
    commit = _resolve(repository, access)
    with _readable(repository, access, "downloading"):
        return _needed(repository, commit, MODEL, access), commit


def read_named(name: str, access: Access = Access()) -> Artifact:
    """Read the artifact that ``"bundled:<name>"``, a folder or a Hub repository names.

    Raises:
        ArtifactError: there is none, or it does not load.
    """
    found = find(name, access)
    return read_artifact(found.folder if found else name, found.name if found else None)


def timm_commit(repository: str, files: Iterable[str], revision: str | None = None) -> str | None:
    """The commit whose weights timm has just taken from the cache; None if they came otherwise."""
    for file in files:
        path = try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(path, str) and _COMMIT.fullmatch(commit := Path(path).parent.name):
            return commit
    return None


# -- to the Hub ------------------------------------------------------------------------------


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str | None = None,
) -> tuple[str, bool]:
    """Make a repository hold what an artifact folder holds, in one commit.

    The repository is created if there is none. Files of ours that the folder no longer has are
    deleted; others stay.

    Args:
        private: whether a new repository is private (its owner's default unless given).
        message: of the commit.

    Returns:
        the commit, and whether it is new: unchanged files make none.

    Raises:
        HubError: the Hub refuses or cannot be reached; nothing is published then.
    """
    access = Access(token=token)
    api = _api(access)
    if "@" in repository or not is_repository(repository):
        raise HubError(f"{repository!r} cannot be a repository's name: it must be ORG/NAME")
    check_plain(folder)
    with _readable(repository, access, "publishing"):
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"offline mode (HF_HUB_OFFLINE=1) forbids publishing {repository}")
        before = None
        try:
            there = api.model_info(repository)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            api.create_repo(repository, private=private, exist_ok=True)
        else:
            before = there.sha
            if private and there.private is False:
                raise HubError(
                    f"{repository} exists and is public: make it private in its settings first, "
                    "or publish under another name; nothing was published"
                )
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(FILES),
            delete_patterns=list(FILES),
            commit_message=message or f"Publish with ttt_plugins {__version__}",
        )
    return commit.oid, commit.oid != before
