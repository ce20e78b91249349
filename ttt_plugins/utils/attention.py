"""Attention without fused kernels, which PyTorch enables or disables for the whole process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cuda

__all__ = ["plain_attention"]

#: For each kernel: whether it is enabled, how to enable it, and whether `plain_attention` uses it.
_KERNELS = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, False),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, False),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
)
_lock = threading.Lock()
#: One entry for every block that is currently running, in any thread.
_inside: set[object] = set()
#: Whether each kernel was enabled before the first of these blocks; empty if no block is running.
_before: list[bool] = []


@contextmanager
def plain_attention() -> Iterator[None]:
    """Have attention computed by plain matrix products, without PyTorch's fused kernels.

    The fused kernels support neither a batch of weights nor second derivatives. They are disabled
    when the first block is entered and restored when the last one is left, so that blocks may
    overlap in several threads.
    """
    block = object()
    try:
        _inside.add(block)
        _switch()
        yield
    finally:
        try:
            _inside.discard(block)
            _switch()
        except BaseException:  # an interrupt during the lines above; they must still be completed
            _inside.discard(block)
            _switch()
            raise


def _switch() -> None:
    """Disable or restore the kernels, as `_inside` requires; calling it again changes nothing."""
    with _lock:
        if _inside and not _before:
            # In one assignment, so that an interrupt leaves either all of the values or none.
            _before[:] = [enabled() for enabled, _, _ in _KERNELS]
        if _before:
            for (_, enable, wanted), before in zip(_KERNELS, _before, strict=True):
                enable(wanted if _inside else before)
        if not _inside:
            _before.clear()


def _forget_threads() -> None:
    """Reset the state in a forked child, which has only the thread that forked it."""
    global _lock
    _lock = threading.Lock()
    _inside.clear()
    _switch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
