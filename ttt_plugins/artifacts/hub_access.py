"""Access to the Hub: the client, and one readable error for each kind of failure."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ..errors import HubError, TTTError
from ..version import __version__

__all__ = ["DEFAULT_ACCESS", "Access", "make_api", "offline", "readable"]

_REMEDIES = {
    401: "log in with `hf auth login` or set HF_TOKEN",
    403: "the token does not allow this: use one that does",
    404: "it does not exist, or this token may not see it",
    413: "the files are too large for the Hub",
    429: "too many requests: wait a few minutes and try again",
}


@dataclass(frozen=True)
class Access:
    """How to reach the Hub.

    Attributes:
        revision: branch, tag or commit; None for the default branch.
        cache_dir: folder for downloaded files; None for huggingface_hub's own cache.
        local_files_only: whether to use only files that are in the cache.
        token: access token; None for that of ``hf auth login`` or HF_TOKEN, False for no token.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)


DEFAULT_ACCESS = Access()


def make_api(access: Access) -> HfApi:
    """Client of the Hub, which identifies itself as this package."""
    return HfApi(library_name="ttt_plugins", library_version=__version__, token=access.token)


def offline(access: Access) -> str | None:
    """The setting that forbids a connection, None if there is none."""
    if access.local_files_only:
        return "local_files_only=True"
    return "offline mode (HF_HUB_OFFLINE=1)" if constants.HF_HUB_OFFLINE else None


@contextmanager
def readable(repository: str, access: Access, doing: str) -> Iterator[None]:
    """Turn every exception of the Hub's client and of the connection into a `HubError`.

    Args:
        repository: ``org/name``.
        access: how the Hub is reached.
        doing: ``"downloading"`` or ``"publishing"``, for the message.
    """
    try:
        yield
    except TTTError:
        raise
    except Exception as error:  # huggingface_hub 1.x and 2.x raise different classes
        raise HubError(_explain(error, repository, access, doing)) from error


def _explain(error: Exception, repository: str, access: Access, doing: str) -> str:
    """The cause and the remedy of a failure, in one line."""
    what = f"{repository}@{access.revision}" if access.revision else repository
    if isinstance(error, (RevisionResolutionError, LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return _no_answer(error, what, access, doing)
    if isinstance(error, HFValidationError):
        return f"{repository!r} cannot be the name of a repository: {error}"
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repository, access, doing)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "check the disk and the connection"
        return (
            f"{doing} {what} failed ({_first_line(error)}): {remedy} and try again; no "
            "incomplete file is used"
        )
    return (
        f"{doing} {what} from {constants.ENDPOINT} was interrupted "
        f"({type(error).__name__}: {_first_line(error)}): check the connection and try again"
    )


def _refused(error: HfHubHTTPError, repository: str, access: Access, doing: str) -> str:
    """The message for an error that the Hub has returned."""
    endpoint = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return (
            f"{repository} is gated: request access on {endpoint}/{repository}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repository} has no revision {access.revision!r}: see its branches and tags on "
            f"{endpoint}/{repository}/tree/main"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no repository {repository!r} on {endpoint}, and no folder of that name "
            "here; if it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    status = _status(error)
    remedy = _REMEDIES.get(status or 0, "nothing was changed here: try again later")
    what = f"{repository}@{access.revision}" if access.revision else repository
    return f"{endpoint} refuses {doing} {what} ({status}: {_first_line(error)}); {remedy}"


def _no_answer(error: Exception, what: str, access: Access, doing: str) -> str:
    """The message if the cache lacks something and the Hub gave no usable response."""
    if reason := offline(access):
        return (
            f"{what} is not in the cache, and {reason} forbids {doing} it: do so once with a "
            "connection, or give another cache_dir"
        )
    cause = error.__cause__ or error
    if isinstance(cause, HfHubHTTPError) and _status(cause) is not None:
        return _refused(cause, what, Access(), doing)
    return (
        f"{constants.ENDPOINT} cannot be reached ({_first_line(cause)}), and {what} is not in the "
        "cache: try again with a connection"
    )


def _status(error: HfHubHTTPError) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
