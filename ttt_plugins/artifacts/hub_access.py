"""How the Hub is reached: access, the client, patience, and one readable error per failure."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

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

__all__ = ["DEFAULT_ACCESS", "Access", "in_time", "make_api", "offline", "readable"]

Result = TypeVar("Result")

_REMEDIES = {
    401: "log in with `hf auth login` or set HF_TOKEN",
    403: "the token has no right to do this: use one that has",
    404: "it is not there, or hidden from this token",
    413: "the files are too large for the Hub",
    429: "too many requests: wait a few minutes and try again",
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


DEFAULT_ACCESS = Access()


def make_api(access: Access) -> HfApi:
    """The Hub's client, which says who asks."""
    return HfApi(library_name="ttt_plugins", library_version=__version__, token=access.token)


def offline(access: Access) -> str | None:
    """What forbids a connection, if anything does."""
    if access.local_files_only:
        return "local_files_only=True"
    return "offline mode (HF_HUB_OFFLINE=1)" if constants.HF_HUB_OFFLINE else None


def in_time(ask: Callable[[], Result]) -> Result:
    """What a question to the Hub returns, if it does so in time; for answers that are short.

    The client waits HF_HUB_ETAG_TIMEOUT seconds (10 unless set) for an answer, but asks a Hub that
    gives none again and again. Three times that is enough.

    Raises:
        HubError: no answer in time.
        Exception: whatever the question raises.
    """
    seconds = 3 * constants.HF_HUB_ETAG_TIMEOUT
    answers: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:  # for the thread that asked
            answers.put((None, error))

    # A daemon, since nothing can stop the client in the middle of its wait.
    threading.Thread(target=run, daemon=True, name="ttt_plugins-hub").start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise HubError(
            f"{constants.ENDPOINT} has not answered within {seconds} seconds: try again later, "
            "use the cache alone (local_files_only=True, HF_HUB_OFFLINE=1), or set "
            "HF_HUB_ETAG_TIMEOUT to wait longer"
        ) from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # without an error there is a result


@contextmanager
def readable(repository: str, access: Access, doing: str) -> Iterator[None]:
    """Turn whatever goes wrong on the way to the Hub into one `HubError`.

    Args:
        repository: ``org/name``.
        access: how it is reached.
        doing: ``"downloading"`` or ``"publishing"``.
    """
    try:
        yield
    except TTTError:
        raise
    except Exception as error:  # transport classes differ between huggingface_hub 1.x and 2.x
        raise HubError(_explain(error, repository, access, doing)) from error


def _explain(error: Exception, repository: str, access: Access, doing: str) -> str:
    """Cause and remedy of a failure, on one line."""
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
            f"{doing} {what} failed ({_first_line(error)}): {remedy} and try again; nothing "
            "half-done is used"
        )
    return (
        f"{doing} {what} from {constants.ENDPOINT} was interrupted "
        f"({type(error).__name__}: {_first_line(error)}): check the connection and try again"
    )


def _refused(error: HfHubHTTPError, repository: str, access: Access, doing: str) -> str:
    """The Hub has answered, with an error."""
    endpoint = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return (
            f"{repository} is gated: ask for access on {endpoint}/{repository}, then log in with "
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
    """The cache does not hold it, and the Hub could not be asked, or its answer is of no use."""
    if reason := offline(access):
        return (
            f"{what} is not in the cache, and {reason} forbids {doing} it: do so once with a "
            "connection, or name another cache_dir"
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
