"""Single precision for values that half precision cannot represent."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["single", "single_dtype"]


def single_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half-precision types, otherwise the floating-point type itself."""
    return torch.promote_types(dtype, torch.float32)


def single(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it has half precision, otherwise the tensor itself."""
    return tensor.to(single_dtype(tensor.dtype))
