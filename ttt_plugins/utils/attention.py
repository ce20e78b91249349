"""Attention without fused kernels, whose switches in PyTorch hold for the whole process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cuda

__all__ = ["plain_attention"]

#: Question and answer for each kernel (on every device), and whether a block uses it.
_KERNELS = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, False),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, False),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
)
_lock = threading.Lock()
#: One entry for every block that is being executed, in any thread.
_inside: set[object] = set()
#: What was switched on before the first of them was entered; empty where there is none.
_before: list[bool] = []


@contextmanager
def plain_attention() -> Iterator[None]:
    """Have attention computed by plain matrix products, without PyTorch's fused kernels.

    Those have no rule for a batch of weights and no second derivative. They are switched off when
    the first block is entered and on again when the last one is left, so that blocks may overlap
    in several threads.
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
        except BaseException:  # an interrupt, which comes once
            _inside.discard(block)
            _switch()
            raise


def _switch() -> None:
    """Switch as `_inside` says; repeated, it changes nothing."""
    with _lock:
        if _inside and not _before:
            _before[:] = [enabled() for enabled, _, _ in _KERNELS]  # all of them, or none
        if _before:
            for (_, enable, wanted), before in zip(_KERNELS, _before, strict=True):
                enable(wanted if _inside else before)
        if not _inside:
            _before.clear()


def _forget_threads() -> None:
    """In a forked child, of which the threads inside a block are no part."""
    global _lock
    _lock = threading.Lock()
    _inside.clear()
    _switch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
