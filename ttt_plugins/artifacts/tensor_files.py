"""safetensors files: headers that account for every byte, finite tensors, fingerprints."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ArtifactError
from .strict_json import parse_json

__all__ = [
    "MAX_LEARNED",
    "MAX_WEIGHTS",
    "TensorInfo",
    "fingerprint",
    "read_tensors",
    "tensor_header",
]


MAX_WEIGHTS = 16 << 30  # a classifier's
MAX_LEARNED = 1 << 30  # what a method learned beside it
_MAX_HEADER = 16 << 20


#: Type names of safetensors -> (bytes, torch's type).
_DTYPES = {
    "F64": (8, torch.float64),
    "F32": (4, torch.float32),
    "F16": (2, torch.float16),
    "BF16": (2, torch.bfloat16),
    "I64": (8, torch.int64),
    "I32": (4, torch.int32),
    "I16": (2, torch.int16),
    "I8": (1, torch.int8),
    "U8": (1, torch.uint8),
    "BOOL": (1, torch.bool),
}


class TensorInfo(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def tensor_header(file: Path, limit: int = MAX_WEIGHTS) -> dict[str, TensorInfo]:
    """Types and shapes in a safetensors file, none of whose tensors is read.

    The header must account for every byte of the file, and for no byte that is not there.

    Raises:
        ArtifactError: not a safetensors file, truncated, padded, or above ``limit`` bytes.
    """
    try:
        if not file.is_file():
            raise ArtifactError(f"{file} is missing")
        with open(file, "rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_MAX_HEADER, total - 8):
                raise ArtifactError(
                    f"{file} is not a safetensors file, or truncated: its header would have "
                    f"{length:,} bytes, the file has {total:,}"
                )
            content = stream.read(length)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror or error})") from error
    if total > limit:
        raise ArtifactError(f"{file} has {total:,} bytes; more than {limit:,} are not read")
    header = parse_json(content, f"the header of {file}")
    if not isinstance(header, dict):
        raise ArtifactError(f"the header of {file} is not a JSON object")
    header.pop("__metadata__", None)
    spans, found = [], {}
    for name, entry in header.items():
        span, found[name] = _entry(entry, f"{file}: tensor {name[:80]!r}")
        spans.append(span)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ArtifactError(f"{file}: tensors overlap or leave gaps at byte {begin:,}")
        position = end
    if position != total - 8 - length:
        raise ArtifactError(
            f"{file}: the header accounts for {position:,} bytes of tensors, the file holds "
            f"{total - 8 - length:,}: it is truncated or damaged"
        )
    return found


def _entry(entry: Any, where: str) -> tuple[tuple[int, int], TensorInfo]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where} is not described by dtype, shape and data_offsets")
    shape, span = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ArtifactError(f"{where} has the unknown type {str(entry['dtype'])[:40]!r}")
    for numbers in (shape, span):
        good = isinstance(numbers, list) and len(numbers) <= 16
        if not good or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise ArtifactError(f"{where} has a shape or offsets that are no sizes")
    size, dtype = _DTYPES[entry["dtype"]]
    if len(span) != 2 or span[1] - span[0] != size * math.prod(shape):
        raise ArtifactError(f"{where}: its shape {tuple(shape)} and its bytes do not agree")
    return (span[0], span[1]), TensorInfo(dtype, tuple(shape))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a model's ``state_dict()``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def read_tensors(file: Path, limit: int = MAX_WEIGHTS) -> dict[str, Tensor]:
    """Tensors of a safetensors file, all finite.

    Raises:
        ArtifactError: damaged, above ``limit`` bytes, or a value is not finite.
    """
    header = tensor_header(file, limit)
    try:
        tensors = load_file(file)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read ({error})") from error
    found = {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    if found != header:
        raise ArtifactError(f"{file} changed while it was read")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{file}: {name[:80]!r} holds non-finite values")
    return tensors
