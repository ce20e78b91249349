"""Data sets on the Hugging Face Hub: downloaded parquet shards, or streamed rows."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ..errors import DataError, HubError, InputError, MissingDependencyError, TTTError
from ..utils.connection import in_time
from ..version import __version__
from .arrays import LoaderStream
from .parquet import ParquetSource
from .source import LABEL_COLUMNS, Columns, ImageSource, ImageStream

__all__ = ["open_hub_dataset"]

_ADDRESS = re.compile(
    r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)"
    r"(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<part>.+?))?/?"
)
#: Revision with the shards into which the Hub converts data sets of other formats.
_CONVERTED = "refs/convert/parquet"
_SPLIT = re.compile(r"(?:^|[/_.-])(train|training|validation|valid|val|dev|test|testing)(?=[/_.-])")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")


class _Address(NamedTuple):
    repository: str
    revision: str | None
    part: str | None


def open_hub_dataset(address: str, columns: Columns, stream: bool) -> ImageSource | ImageStream:
    """Open a data set on the Hub by its address.

    Its shards, all of one commit, are downloaded once into huggingface_hub's cache and read from
    there, also without a connection.

    Args:
        address: ``hf://datasets/ORG/NAME[@REVISION][/PART]``; the part is a split, a folder, or a
            pattern such as ``data/train-*.parquet``.
        columns: names of the columns of images and labels; None to find them by name.
        stream: whether to stream rows instead of downloading shards.

    Raises:
        InputError: the address is malformed.
        HubError: the Hub does not have the data set, refuses access, or cannot be reached.
        DataError: it has no parquet files, or files of more than one split.
    """
    matched = _ADDRESS.fullmatch(address)
    if matched is None:
        raise InputError(f"{address!r} is not of the form hf://datasets/ORG/NAME[@REVISION][/PART]")
    parts = matched.groupdict()
    where = _Address(
        parts["repository"], parts["revision"] and unquote(parts["revision"]), parts["part"]
    )
    if stream:
        return _streamed(where, columns)
    with _translated(where):
        files = _download(where)
    source = ParquetSource(files, *columns)
    source.location = address
    return source


def _download(where: _Address) -> list[Path]:
    """Download the wanted shards, all of one commit, and return their paths in order."""
    api = HfApi(library_name="ttt-plugins", library_version=__version__)
    for revision in [where.revision] if where.revision else [None, _CONVERTED]:
        try:
            resolved = in_time(
                partial(
                    api.resolve_revision,
                    where.repository,
                    repo_type="dataset",
                    revision=revision,
                )
            ).resolved
        except (RevisionNotFoundError, RevisionResolutionError):
            if revision is None or where.revision:
                raise
            break  # the Hub has not converted it
        shards = sorted(f for f in _files(api, where, resolved) if f.endswith(".parquet"))
        if shards:
            return [_shard(api, where, resolved, file) for file in _wanted(shards, where)]
    raise DataError(
        f"{where.repository}: no parquet files at revision {where.revision or 'main'}, and none "
        f"converted by the Hub at {_CONVERTED}"
    )


def _shard(api: HfApi, where: _Address, commit: str, file: str) -> Path:
    """Download a file, unless the cache has it."""
    fetch = partial(
        api.hf_hub_download, where.repository, file, repo_type="dataset", revision=commit
    )
    if not constants.HF_HUB_OFFLINE:
        in_time(partial(fetch, dry_run=True))  # the download itself may take as long as it needs
    return Path(fetch())


def _files(api: HfApi, where: _Address, commit: str) -> list[str]:
    """The files of a commit; without a connection, those that are in the cache."""
    try:
        return in_time(
            lambda: api.list_repo_files(where.repository, repo_type="dataset", revision=commit)
        )
    except (HfHubHTTPError, HubError):
        raise
    except Exception:  # no connection: transport classes differ between huggingface_hub 1.x and 2.x
        try:
            folder = Path(
                api.snapshot_download(
                    where.repository, repo_type="dataset", revision=commit, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            folder = None
        files = [] if folder is None else [p.relative_to(folder) for p in folder.rglob("*.parquet")]
        if not files:
            raise
        return [file.as_posix() for file in files]


def _wanted(shards: list[str], where: _Address) -> list[str]:
    """The shards that an address selects, which must be complete and of one split."""
    part = where.part
    if part is not None:
        matching = [
            shard
            for shard in shards
            if fnmatch.fnmatch(shard, part) or shard.startswith(f"{part}/") or _split(shard) == part
        ]
        if not matching:
            raise DataError(
                f"{where.repository}: no parquet files match {part!r}; there are {shards[:20]}"
            )
        shards = matching
    groups = {(str(Path(shard).parent), _split(shard)) for shard in shards}
    if len(groups) > 1:
        splits = sorted({split for _, split in groups if split} or {folder for folder, _ in groups})
        raise DataError(
            f"{where.repository} has more than one split or configuration, {splits}: name one, "
            f"as in hf://datasets/{where.repository}/{splits[0]}, or a pattern of {shards[:8]}"
        )
    for shard in shards:
        counted = _SHARD.fullmatch(shard)
        if counted is not None:
            before, _, of, after = counted.groups()
            missing = {f"{before}-{i:05d}-of-{of}{after}" for i in range(int(of))} - {*shards}
            if missing and part not in shards and not any(c in (part or "") for c in "*?["):
                raise DataError(
                    f"{where.repository}: {len(missing)} of {int(of)} shards are missing from the "
                    f"cache, such as {min(missing)}; download them once with a connection"
                )
    return shards


def _split(shard: str) -> str | None:
    """The split in the name of a shard; None if it names none."""
    words = _SPLIT.findall(f"/{shard}")
    return words[-1] if words else None


class _Rows:
    """The rows of a streamed data set; a failure while they are read is a `HubError`."""

    def __init__(self, where: _Address, rows: Any):
        self._where, self._rows = where, rows

    def __iter__(self) -> Iterator[Any]:
        with _translated(self._where):
            yield from self._rows


def _streamed(where: _Address, columns: Columns) -> ImageStream:
    """Stream a split, ``train`` unless named, or the files that match a pattern."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingDependencyError(
            'streaming needs the datasets package: pip install "ttt-plugins[datasets]"; without it '
            "shards are downloaded"
        ) from error
    part = where.part or "train"
    chosen = {"split": part}
    if any(c in part for c in "*?[/") or part.endswith(".parquet"):
        chosen = {"split": "train", "data_files": part}
    with _translated(where):
        try:
            rows = datasets.load_dataset(
                where.repository, revision=where.revision, streaming=True, **chosen
            )
        except datasets.exceptions.DatasetNotFoundError as error:
            if isinstance(error.__cause__, HfHubHTTPError):
                raise error.__cause__ from error  # says whether it is private, gated or absent
            raise HubError(f"there is no data set {_place(where)}") from error
        except (ValueError, FileNotFoundError) as error:
            # An unknown split, a pattern without files, or a data set without images.
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{_place(where)}: {part!r} cannot be streamed ({reason})") from error
        features = rows.features or {}
        for name, feature in features.items():
            if isinstance(feature, datasets.Image):
                # Left encoded, so that pictures from all sources are decoded in the same way.
                rows = rows.cast_column(name, datasets.Image(decode=False))
    stream = LoaderStream(_Rows(where, rows), columns)
    stream.location = f"hf://datasets/{where.repository}"
    label = columns[1] or next((name for name in LABEL_COLUMNS if name in features), None)
    names = getattr(features.get(label), "names", None)
    stream.classes = tuple(names) if names else None
    return stream


def _place(where: _Address) -> str:
    """The address of a data set's page."""
    return f"{constants.ENDPOINT}/datasets/{where.repository}"


@contextlib.contextmanager
def _translated(where: _Address) -> Iterator[None]:
    """Convert failures of requests to the Hub into `HubError`."""
    place = _place(where)
    try:
        yield
    except TTTError:
        raise
    except GatedRepoError as error:
        raise HubError(
            f"{place} is gated: request access there, then log in with `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{place} has no revision {where.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"there is no data set {place}; if it is private, log in with `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise HubError(f"{where.repository!r} cannot be a data set's name: {error}") from error
    except Exception as error:  # transport classes differ between huggingface_hub 1.x and 2.x
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise HubError(
            f"{place} cannot be read ({type(error).__name__}: {reason}), and the cache does not "
            "contain everything that is needed: try again with a connection"
        ) from error
