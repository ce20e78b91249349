"""Reading safetensors files: headers alone, or all tensors; fingerprints of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import ArtifactError
from .strict_json import parse_json

__all__ = [
    "MAX_LEARNED",
    "MAX_WEIGHTS",
    "TensorInfo",
    "described",
    "fingerprint",
    "read_tensors",
    "tensor_header",
]


MAX_WEIGHTS = 16 << 30  # bytes of a classifier's weights
MAX_LEARNED = 1 << 30  # bytes of a method's learned tensors
_MAX_HEADER = 16 << 20
_MAX_DIMENSIONS = 16

#: Names of types in safetensors -> types of torch.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def described(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Types and shapes of tensors by name; what else a ``state_dict()`` may hold is left out."""
    return {
        name: TensorInfo(t.dtype, tuple(t.shape))
        for name, t in tensors.items()
        if isinstance(t, Tensor)
    }


def _check_size(file: Path, limit: int) -> None:
    """Check what safetensors does not: the size of the file, and that no name occurs twice."""
    if not file.is_file():
        raise ArtifactError(f"{file} is missing")
    total = file.stat().st_size
    if total > limit:
        raise ArtifactError(f"{file} has {total:,} bytes; more than {limit:,} are not read")
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER, total - 8):
            raise ArtifactError(
                f"{file} is not a safetensors file, or it is truncated: its header would have "
                f"{length:,} bytes, and the file has {total:,}"
            )
        parse_json(stream.read(length), f"the header of {file}")


def _open(file: Path, limit: int):
    """Open a safetensors file; the library checks that its header accounts for every byte."""
    try:
        _check_size(file, limit)
        return safe_open(file, framework="pt")
    except ArtifactError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{file} is truncated or damaged ({error})") from error


def tensor_header(file: Path, limit: int = MAX_WEIGHTS) -> dict[str, TensorInfo]:
    """Types and shapes of the tensors in a safetensors file, without reading the tensors.

    Args:
        file: the file.
        limit: largest size in bytes.

    Raises:
        ArtifactError: the file is missing, truncated, padded, too large, or not a safetensors file.
    """
    header = {}
    with _open(file, limit) as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            tensor = opened.get_slice(name)
            kind, shape = tensor.get_dtype(), tuple(tensor.get_shape())
            if kind not in _DTYPES or len(shape) > _MAX_DIMENSIONS:
                raise ArtifactError(
                    f"{file}: tensor {name[:80]!r} is of type {kind!r} with {len(shape)} "
                    "dimensions, which no tensor of a model has"
                )
            header[name] = TensorInfo(_DTYPES[kind], shape)
    return header


def read_tensors(file: Path, limit: int = MAX_WEIGHTS) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name.

    Args:
        file: the file.
        limit: largest size in bytes.

    Raises:
        ArtifactError: the file is missing, damaged or too large, or a value is not finite.
    """
    tensor_header(file, limit)
    with _open(file, limit) as opened:
        try:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(f"{file} cannot be read ({error})") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{file}: {name[:80]!r} holds non-finite values")
    return tensors


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of a model's ``state_dict()``.

    Quantized layers have tuples of tensors in it, and other modules extra state of any type.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        for value in tree_leaves(state[name]):
            if not isinstance(value, Tensor):
                digest.update(f"{name} {value!r}\n".encode())
                continue
            tensor = value.detach().cpu()
            tensor = (tensor.dequantize() if tensor.is_quantized else tensor).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
