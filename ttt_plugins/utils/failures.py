"""Recognition of torch's errors that are about the machine, not about the model or its images."""

from __future__ import annotations

import torch

__all__ = ["device_failed", "out_of_memory"]

#: Parts of messages when an allocation fails: torch has its own type only for CUDA's allocator.
_MEMORY = (
    "out of memory",  # CUDA, HIP and MPS
    "can't allocate memory",  # the CPU's allocator on Linux
    "not enough memory",  # on Windows
    "_ALLOC_FAILED",  # cuBLAS, cuDNN and their likes, which allocate by themselves
    "OUT_OF_DEVICE_MEMORY",
    "OUT_OF_HOST_MEMORY",
)
#: Parts of messages when an accelerator or one of its libraries fails.
_DEVICE = (
    "CUDA error",
    "HIP error",
    "cuDNN error",
    "MIOpen Error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little memory, of an accelerator or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _MEMORY)


def device_failed(error: BaseException) -> bool:
    """Whether an error means that an accelerator failed, including from too little memory."""
    accelerator = getattr(torch, "AcceleratorError", ())  # since torch 2.8
    if isinstance(error, accelerator) or out_of_memory(error):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _DEVICE)
