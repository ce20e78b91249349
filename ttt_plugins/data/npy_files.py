"""Arrays in npy and npz files, whose headers are checked before any memory is allocated."""

from __future__ import annotations

import contextlib
import lzma
import math
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from ..errors import DataError

__all__ = ["ArrayHeader", "NpzImages", "extract_array", "map_array", "read_labels"]

#: Largest number of characters in a header; that of an image array has about 80.
_MAX_HEADER = 10_000
#: Exceptions that numpy, zipfile and the decompressors raise for damaged or malicious files.
_DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,
    NotImplementedError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class ArrayHeader(NamedTuple):
    """The contents of an npy file's header."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def _read_header(stream: IO[bytes]) -> ArrayHeader:
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"npy format {version} is not supported")
    # numpy would allocate as many bytes as are announced, in format 2 up to 4 GB.
    start = stream.tell()
    length = int.from_bytes(stream.read(2 * version[0]), "little")
    stream.seek(start)
    if length > _MAX_HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than {_MAX_HEADER:,}")
    header = ArrayHeader(*read(stream, max_header_size=_MAX_HEADER))
    if header.dtype.hasobject:
        raise ValueError("it holds Python objects")
    return header


@contextlib.contextmanager
def _reading(path: Path | str, kind: str) -> Iterator[None]:
    """Convert all failures into `DataError` with a message of one line."""
    try:
        yield
    except DataError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: not a readable {kind} file ({reason})") from error


def map_array(path: Path, name: str | None = None) -> np.ndarray:
    """Memory-map the array of an npy file: only the parts that are accessed are read.

    Args:
        path: the file.
        name: what error messages call it; its path by default.

    Raises:
        DataError: the file is missing, damaged, truncated, or holds Python objects.
    """
    if not path.is_file():
        raise DataError(f"{name or path}: no such file")
    with _reading(name or path, "npy"):
        with path.open("rb") as stream:
            shape, _, dtype = _read_header(stream)
            size = math.prod(shape) * dtype.itemsize
            if stream.tell() + size > path.stat().st_size:
                raise ValueError(f"cut short: its header announces {size:,} bytes of numbers")
        return np.load(path, mmap_mode="r", allow_pickle=False)


def extract_array(archive: zipfile.ZipFile, key: str, target: Path, name: str) -> None:
    """Write one array of an npz file to an npy file, in pieces.

    Args:
        archive: the npz file.
        key: name of the array.
        target: the npy file.
        name: what error messages call the array.

    Raises:
        DataError: it is damaged or encrypted, holds Python objects, or does not fit on the disk.
    """
    with _reading(name, "npz"):
        total = archive.getinfo(f"{key}.npy").file_size
        with archive.open(f"{key}.npy") as packed:
            shape, _, dtype = _read_header(packed)
            if packed.tell() + math.prod(shape) * dtype.itemsize != total:
                raise ValueError(f"{key} does not have the size that its header announces")
        if total > (free := shutil.disk_usage(target.parent).free):
            raise DataError(
                f"{name}: {total:,} bytes have to be extracted to {target.parent}, whose disk has "
                f"{free:,} left; set TMPDIR to a folder on a larger disk"
            )
        with archive.open(f"{key}.npy") as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)


def read_labels(archive: zipfile.ZipFile, key: str, images: int, name: str) -> np.ndarray:
    """Read one array of an npz file as the labels (N,) of its images.

    Args:
        archive: the npz file.
        key: name of the array.
        images: number of images, and so of labels.
        name: what error messages call the file.

    Raises:
        DataError: it is damaged or encrypted, or does not hold one integer for each image.
    """
    with _reading(name, "npz"), archive.open(f"{key}.npy") as stream:
        shape, _, dtype = _read_header(stream)
        if shape != (images,) or dtype.kind not in "iu":
            raise DataError(
                f"{name}: {images} images need as many integer labels, got {dtype} {shape}"
            )
        content = stream.read(images * dtype.itemsize)
        if len(content) < images * dtype.itemsize or stream.read(1):
            raise ValueError(f"{key} does not have the size that its header announces")
    return np.frombuffer(content, dtype)


class NpzImages:
    """The images in one npz file, uint8 (N, H, W, 3).

    Args:
        path: the file.
        side: height and width of the images in pixels.
        limit: largest number of images in an array.

    Raises:
        DataError: the file is missing, truncated, or not a zip archive.
    """

    def __init__(self, path: Path, side: int, limit: int):
        self.path, self.side, self.limit = path, side, limit
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: not an npz file, or cut short")
        with _reading(path, "npz"), zipfile.ZipFile(path) as archive:
            members = [info.filename for info in archive.infolist()]
        self.names = {name.removesuffix(".npy") for name in members if name.endswith(".npy")}

    def read(self, name: str) -> np.ndarray:
        """Read one array.

        Raises:
            DataError: it is damaged or encrypted, is not an array of images, or has too many.
        """
        with (
            _reading(self.path, "npz"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{name}.npy") as stream,
        ):
            shape, fortran_order, dtype = _read_header(stream)
            if dtype != np.uint8 or len(shape) != 4 or shape[1:] != (self.side, self.side, 3):
                raise DataError(
                    f"{self.path}: {name} must be uint8 (N, {self.side}, {self.side}, 3), "
                    f"got {dtype} {shape}"
                )
            if shape[0] > self.limit:
                raise DataError(
                    f"{self.path}: {name} announces {shape[0]:,} images, the data set has "
                    f"{self.limit:,}"
                )
            size = math.prod(shape)
            content = stream.read(size)
            # Reading to the end also makes zipfile verify the checksum.
            if len(content) < size or stream.read(1):
                raise ValueError(f"{name} does not have the size that its header announces")
        array = np.frombuffer(bytearray(content), np.uint8)
        return array.reshape(shape, order="F" if fortran_order else "C")
