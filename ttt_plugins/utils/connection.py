"""A time limit for short requests to the Hugging Face Hub."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants

from ..errors import HubError

__all__ = ["in_time"]

Result = TypeVar("Result")


def in_time(ask: Callable[[], Result]) -> Result:
    """Call ``ask``, which sends a short request to the Hub, and return what it returns.

    The client waits HF_HUB_ETAG_TIMEOUT seconds (10 by default) for a response, but repeats a
    request without a response many times. This function waits three times that long in all.

    Raises:
        HubError: there was no response in time.
        Exception: any exception of ``ask``.
    """
    seconds = 3 * constants.HF_HUB_ETAG_TIMEOUT
    answers: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:  # is raised in the calling thread
            answers.put((None, error))

    # A daemon thread, because nothing can interrupt the client while it waits.
    threading.Thread(target=run, daemon=True, name="ttt_plugins-hub").start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise HubError(
            f"{constants.ENDPOINT} has not answered within {seconds} seconds: try again later, "
            "use only the cache (local_files_only=True, HF_HUB_OFFLINE=1), or set "
            "HF_HUB_ETAG_TIMEOUT to wait longer"
        ) from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # without an error there is a result
