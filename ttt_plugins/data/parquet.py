"""Parquet files in the layout of the Hugging Face Hub: one file, or shards in order."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, MissingDependencyError
from .decode import decode
from .images import LabelledImages
from .loading import ImageLoader
from .source import IMAGE_COLUMNS, LABEL_COLUMNS, OPEN_BLOCKS, ImageSource, Sample

__all__ = ["ParquetSource", "read_labels", "read_parquet"]

#: Bytes of encoded pictures in a block, which is read at once and cached.
_BLOCK_BYTES = 32 << 20


class _Block(NamedTuple):
    """Rows of a row group that are read together: the ``place``-th slice of ``step`` rows."""

    file: str
    group: int
    place: int
    step: int
    rows: range


class ParquetSource(ImageSource):
    """Rows of parquet files: a column of encoded pictures, and optionally one of labels.

    A picture is a struct ``{bytes, path}``, as the Hub's viewer and `datasets` write it, or bytes.
    Only a few blocks of rows are in memory at a time, for files of any size.

    Args:
        files: the shards, in order, all with the same columns.
        image_column: name of the column of pictures; found by name and type unless given.
        label_column: name of the column of integer labels; found by name and type unless given.

    Raises:
        DataError: a file is missing, damaged, or lacks a column.
        MissingDependencyError: pyarrow is not installed.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        self._files = [str(file) for file in files]
        self.location = self._files[0] if len(files) == 1 else str(Path(files[0]).parent)
        self._blocks: list[_Block] = []
        for file in self._files:
            with _reading(file) as parquet, parquet.ParquetFile(file) as opened:
                schema = opened.schema_arrow
                if file is self._files[0]:
                    self._image = _image_column(schema, file, image_column)
                    self._label = _label_column(schema, file, label_column)
                    self.labelled = self._label is not None
                    self.classes = _class_names(schema, self._label)
                missing = {self._image, self._label} - {None, *schema.names}
                if missing:
                    raise DataError(f"{file}: no column {missing.pop()!r}, which other shards have")
                sizes = [opened.metadata.row_group(g) for g in range(opened.num_row_groups)]
            for group, facts in enumerate(sizes):
                self._add_blocks(file, group, facts.num_rows, facts.total_byte_size)
        if not self._blocks:
            raise DataError(f"{self.location}: no rows")
        self._starts = np.array([block.rows.start for block in self._blocks])
        self._loaded: OrderedDict[int, Any] = OrderedDict()
        self._rest: tuple[int, Iterator[Any]] | None = None  # of the row group read last

    def _add_blocks(self, file: str, group: int, rows: int, size: int) -> None:
        step = max(1, rows // max(1, round(size / _BLOCK_BYTES)))
        first = self._blocks[-1].rows.stop if self._blocks else 0
        for place, offset in enumerate(range(0, rows, step)):
            part = range(first + offset, first + min(offset + step, rows))
            self._blocks.append(_Block(file, group, place, step, part))

    def __len__(self) -> int:
        return self._blocks[-1].rows.stop

    def blocks(self) -> Sequence[range]:
        """Ranges of rows within row groups."""
        return [block.rows for block in self._blocks]

    def __getstate__(self) -> dict[str, Any]:
        # Loaded blocks and open files are not shared between processes.
        return self.__dict__ | {"_loaded": OrderedDict(), "_rest": None}

    def read(self, row: int) -> Sample:
        """Read and decode one row; its name is the picture's path, or file and row."""
        index = int(np.searchsorted(self._starts, row, "right")) - 1
        block = self._load(index)
        place = row - self._blocks[index].rows.start
        cell = block.column(self._image)[place].as_py()
        encoded = cell.get("bytes") if isinstance(cell, dict) else cell
        path = cell.get("path") if isinstance(cell, dict) else None
        where = f"{self._blocks[index].file}, row {row}{f' ({path})' if path else ''}"
        label = None
        if self._label is not None:
            label = block.column(self._label)[place].as_py()
            if label is None:
                raise DataError(f"{where}: no label")
        return Sample(decode(encoded or b"", where), label, path or f"row {row}")

    def read_labels(self) -> Tensor:
        """The column of labels."""
        return torch.cat([_column(file, self._label or "") for file in self._files])

    def _load(self, index: int) -> Any:
        """A block's rows, from the cache if it is loaded."""
        if index in self._loaded:
            self._loaded.move_to_end(index)
            return self._loaded[index]
        block = self._blocks[index]
        with _reading(block.file) as parquet:
            if self._rest is not None and self._rest[0] == index:
                batches = self._rest[1]
            else:
                # A row group can only be read from its beginning: earlier blocks are skipped.
                slices = parquet.ParquetFile(block.file).iter_batches(
                    batch_size=block.step,
                    row_groups=[block.group],
                    columns=[self._image, *([self._label] if self._label else [])],
                    use_threads=False,
                )
                batches = itertools.islice(slices, block.place, None)
            rows = next(batches)
        self._rest = (index + 1, batches)
        if index + 1 == len(self._blocks) or self._blocks[index + 1].place == 0:
            self._rest = None
        self._loaded[index] = rows
        if len(self._loaded) > OPEN_BLOCKS:
            self._loaded.popitem(last=False)
        return rows


def _image_column(schema: Any, file: str, given: str | None) -> str:
    """The column of pictures: the given one, or one with a common name, or the only one."""
    names = [field.name for field in schema if _holds_pictures(field.type)]
    if given is not None:
        if given not in names:
            raise DataError(f"{file}: no column {given!r} of pictures; there are {names}")
        return given
    usual = [name for name in IMAGE_COLUMNS if name in names]
    if not usual and len(names) != 1:
        raise DataError(
            f"{file}: cannot tell which column holds the pictures; name one of {names} (all "
            f"columns: {schema.names}; a picture is a struct of bytes and path, or bytes)"
        )
    return usual[0] if usual else names[0]


def _holds_pictures(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _label_column(schema: Any, file: str, given: str | None) -> str | None:
    """The column of labels: the given one, or the first of integers with a common name, if any."""
    import pyarrow

    names = [field.name for field in schema if pyarrow.types.is_integer(field.type)]
    if given is not None and given not in names:
        raise DataError(f"{file}: no column {given!r} of integers; there are {names}")
    return given or next((name for name in LABEL_COLUMNS if name in names), None)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """The names that `datasets` writes beside a column of labels."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None or label is None:
        return None
    try:
        names = json.loads(written)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, names))


def read_parquet(path: str | Path, start: int = 0, stop: int | None = None) -> LabelledImages:
    """Read small, labelled pictures of one size from a parquet file into memory.

    Args:
        path: the file.
        start: first row to read, from 0.
        stop: row to stop before; None for the last.

    Raises:
        DataError: the file is missing, lacks a column, or has pictures of different sizes.
        MissingDependencyError: pyarrow is not installed.
    """
    source = ParquetSource([path])
    if not source.labelled:
        raise DataError(f"{path}: no column of integer labels; looked for {LABEL_COLUMNS}")
    batches = list(ImageLoader(source, workers=0, start=start, limit=stop))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return LabelledImages(torch.cat([batch.images for batch in batches]), torch.cat(labels))


def read_labels(path: str | Path) -> Tensor:
    """Read only the labels (N,) of such a file, which is much faster than also decoding its images.

    Raises:
        DataError, MissingDependencyError: as for `read_parquet`, except for errors in images.
    """
    with _reading(path) as parquet:
        schema = parquet.ParquetFile(path).schema_arrow
        column = _label_column(schema, str(path), None)
        if column is None:
            raise DataError(f"{path}: no column of integer labels; looked for {LABEL_COLUMNS}")
    return _column(path, column)


def _column(path: str | Path, name: str) -> Tensor:
    """A column of integers, int64 (N,)."""
    with _reading(path) as parquet:
        labels = parquet.read_table(path, columns=[name])[name].to_pylist()
        if None in labels:
            raise DataError(f"{path}, row {labels.index(None)}: no label")
        return torch.tensor(labels, dtype=torch.int64)


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[ModuleType]:
    """Yield pyarrow's parquet module for an existing file; failures become `DataError`."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; expected pictures in the Hub's parquet layout")
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError(
            'reading parquet files needs pyarrow: pip install "ttt-plugins[train]"'
        ) from error
    try:
        yield parquet
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise DataError(
            f"{path}: not a parquet file with columns image{{bytes, path}} and label ({error})"
        ) from error
