"""Data files that are damaged or hostile: one clear line each, without taking memory for them."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from benchmark_fakes import random_cell, write_parquet

from ttt_plugins.benchmark import open_dataset
from ttt_plugins.cli import main
from ttt_plugins.data.npy_files import NpzImages, map_array
from ttt_plugins.data.parquet import read_labels, read_parquet
from ttt_plugins.errors import DataError, MissingDependencyError
from ttt_plugins.utils import robustbench as bridge

MEMBER = "severity_5.npy"


@pytest.fixture
def folder(tmp_path):
    """The compact layout, 20 images of fog at severity 5."""
    write_parquet(tmp_path / "test.parquet", 20, 3)
    np.savez_compressed(tmp_path / "fog.npz", severity_5=_images())
    return tmp_path


def _images(count: int = 20) -> np.ndarray:
    return random_cell(np.random.default_rng(0), count)[0]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _header(shape, dtype="|u1") -> bytes:
    buffer = io.BytesIO()
    description = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _archive(path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(MEMBER, content)


def _patched(path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def _bomb(path) -> None:
    """Forty megabytes of zeros in forty kilobytes, after a header of one image."""
    _archive(path, _header((1, 32, 32, 3)) + bytes(40_000_000))


def _encrypted(path) -> None:
    _archive(path, _npy(_images()))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content = bytearray(path.read_bytes())
        content[content.index(mark) + offset] |= 1
        path.write_bytes(content)


def _damaged(path) -> None:
    _archive(path, _npy(_images()), zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_compression(path) -> None:
    _archive(path, _npy(_images()), zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        struct.pack_into("<H", content, content.index(mark) + offset, 97)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: _archive(p, _header((10**15, 32, 32, 3))), "announces 1,000,000,000,000,000"),
        (lambda p: _archive(p, _header((10_001, 32, 32, 3))), "the data set has 10,000"),
        (lambda p: _archive(p, _header((2**62, 2**62, 2**62, 3))), "must be uint8"),
        (lambda p: _archive(p, _header((20, 32, 32, 3), "|V9999999")), "must be uint8"),
        (lambda p: _archive(p, _header((20, 32, 32, 3))), "size that its header announces"),
        (lambda p: _archive(p, _npy(_images()) + b"more"), "size that its header announces"),
        (lambda p: _archive(p, b""), "not a readable npz"),
        (lambda p: _archive(p, b"\x93NUMPY\x07\x00" + bytes(99)), "not a readable npz"),
        (lambda p: _archive(p, _npy(np.array([{}]))), "not a readable npz.*Python objects"),
        (lambda p: _archive(p, b"\x93NUMPY\x01\x00\x20\x00" + b"(" * 32), "not a readable npz"),
        (_bomb, "size that its header announces"),
        (_encrypted, "not a readable npz.*encrypted"),
        (_damaged, "not a readable npz"),
        (_other_compression, "not a readable npz"),
    ],
)
def test_npz_files_that_cannot_be_read(spoil, message, folder, tmp_path, capsys):
    spoil(folder / "fog.npz")
    with pytest.raises(DataError, match=message) as raised:
        open_dataset("cifar10", folder, corruptions=["fog"])
    assert "\n" not in str(raised.value)
    argv = ["benchmark", "ttt_resnet26", "--method", "source", "--data-dir", str(folder)]
    assert main([*argv, "--corruption", "fog", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ttt-plugins: error: {folder / 'fog.npz'}")
    assert not (tmp_path / "out").exists()


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    _bomb(tmp_path / "fog.npz")
    unpacked = []
    original = zlib.decompressobj

    class Counting:
        def __init__(self, *args):
            self.inner = original(*args)

        def decompress(self, *args):
            content = self.inner.decompress(*args)
            unpacked.append(len(content))
            return content

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    with pytest.raises(DataError, match="size that its header announces"):
        NpzImages(tmp_path / "fog.npz", 32, 10_000).read("severity_5")
    assert 0 < sum(unpacked) < 1_000_000


def test_fortran_order_is_read_as_it_is_meant(tmp_path):
    images = _images()
    np.savez(tmp_path / "fog.npz", severity_5=np.asfortranarray(images))
    found = NpzImages(tmp_path / "fog.npz", 32, 10_000).read("severity_5")
    assert np.array_equal(found, images)


@pytest.mark.parametrize(
    "content",
    [
        _header((10**15,)),
        _header((2**62, 2**62)),
        _header((10_000,), "|O"),
        _header((10_000,), "<i8") + bytes(79_999),
        b"\x93NUMPY\x01\x00\x20\x00" + b"{" * 32,
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{}",
        b"\x93NUMPY",
        b"",
    ],
)
def test_npy_files_that_cannot_be_read(content, tmp_path):
    (tmp_path / "labels.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.npy: not a readable npy file") as raised:
        map_array(tmp_path / "labels.npy")
    assert "\n" not in str(raised.value)


@pytest.fixture
def robustbench():
    try:
        return bridge.import_robustbench()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("labels", [np.full(10_000, 3.7), np.full(10_000, np.nan)])
def test_labels_that_are_no_integers(labels, robustbench, tmp_path):
    (tmp_path / "CIFAR-10-C").mkdir()
    np.save(tmp_path / "CIFAR-10-C" / "labels.npy", labels)
    with pytest.raises(DataError, match="labels must be integers from 0 to 9"):
        open_dataset("cifar10", tmp_path, corruptions=["fog"])


def _parquet_columns():
    return {
        "fractions": [3.7] * 20,
        "nan": [float("nan")] * 20,
        "lists": [[1]] * 20,
        "words": ["cat"] * 20,
        "nothing": [None, *[1] * 19],
        "truths": [True] * 20,
    }


@pytest.mark.parametrize("kind", _parquet_columns())
def test_parquet_labels_that_are_no_integers(kind, folder, tmp_path, capsys):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(folder / "test.parquet")
    table = table.set_column(1, "label", pa.array(_parquet_columns()[kind]))
    parquet.write_table(table, folder / "test.parquet")
    for read in (read_labels, read_parquet):
        with pytest.raises(DataError) as raised:
            read(folder / "test.parquet")
        assert str(raised.value).startswith(str(folder / "test.parquet"))
    argv = ["benchmark", "ttt_resnet26", "--method", "source", "--data-dir", str(folder)]
    assert main([*argv, "--corruption", "fog", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ttt-plugins: error: {folder / 'test.parquet'}")


def test_what_is_good_is_still_read(folder):
    data = open_dataset("cifar10", folder, corruptions=["fog"])
    expected = torch.from_numpy(_images()).permute(0, 3, 1, 2)
    assert torch.equal(data.load(("fog", 5)).images, expected)
