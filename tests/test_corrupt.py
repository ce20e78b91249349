"""Corruptions as published, and the command ``corrupt``, which writes them for the benchmark.

``data/corruptions_published.npz`` holds what the authors' own functions (repository
hendrycks/robustness, with ImageMagick) make of pictures of the demo's sheet with the same random
numbers: of a tile, and of its corner enlarged to 224 pixels, every seventh pixel.
"""

import io
import os
import signal
from pathlib import Path

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ttt_plugins as tp
from ttt_plugins.benchmark import open_dataset
from ttt_plugins.cli.main import main
from ttt_plugins.data import corrupted_copies, published_corruptions
from ttt_plugins.data.datasets import CORRUPTIONS
from ttt_plugins.data.published_corruptions import corrupt_as_published
from ttt_plugins.errors import InputError

DATA = Path(__file__).parent / "data"
LEVELS = {"cifar": (1, 3, 5), "imagenet": (2, 4)}


def sheet():
    with Image.open(Path(tp.__file__).parent / "assets" / "demo" / "clean.webp") as opened:
        return opened.convert("RGB")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_results_agree_with_the_published_functions(name):
    clean = {
        "cifar": sheet().crop((96, 32, 128, 64)),
        "imagenet": sheet().crop((0, 0, 96, 96)).resize((224, 224), Image.Resampling.BICUBIC),
    }
    # The layer of snow is blurred before it is rounded, and JPEG's decoders differ in rounding.
    most = {"snow": 3, "jpeg_compression": 8}.get(name, 1)
    with np.load(DATA / "corruptions_published.npz") as stored:
        for variant, levels in LEVELS.items():
            pixels, state = np.array(clean[variant]), np.random.get_state()[1].copy()
            for level in levels:
                found = corrupt_as_published(pixels, name, level, variant=variant, seed=[3, level])
                step = slice(None) if variant == "cifar" else slice(3, None, 7)
                difference = found[step, step].astype(int) - stored[f"{variant}_{name}_{level}"]
                assert found.dtype == np.uint8
                assert np.abs(difference).max() <= most
                assert np.abs(difference).mean() < 1
            assert np.array_equal(state, np.random.get_state()[1])


def test_unsuitable_pictures_and_unknown_names_are_refused():
    pixels = np.zeros((32, 32, 3), np.uint8)
    good = {"name": "snow", "severity": 1, "variant": "cifar", "seed": [0]}
    wrong = [{"name": "rain"}, {"severity": 6}, {"severity": True}, {"variant": "mnist"}]
    for changes in wrong:
        with pytest.raises(InputError, match=str(next(iter(changes.values())))):
            corrupt_as_published(pixels, **(good | changes))
    for other in (pixels[:31], pixels[..., :1], pixels.astype(float)):
        with pytest.raises(InputError, match="pixels"):
            corrupt_as_published(other, **good)


def write_folder(root):
    for i in range(4):
        folder = root / ("n01440764", "n01443537")[i // 2]
        folder.mkdir(parents=True, exist_ok=True)
        sheet().crop((40 * i, 0, 40 * i + 60, 50)).save(folder / f"{i}.{('jpg', 'png')[i % 2]}")
    return root


def files(folder):
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def corrupt(source, out, *more):
    return main(["corrupt", str(source), "--out", str(out), *map(str, more)])


def test_photographs_become_imagenet_c(tmp_path, capsys):
    source = write_folder(tmp_path / "pictures")
    some = ("--corruption", "fog", "impulse_noise", "spatter", "--severity", 2, 5)
    some += ("--image-size", 40)
    assert corrupt(source, tmp_path / "one", *some, "--workers", 0) == 0
    found = files(tmp_path / "one" / "ImageNet-C")
    names = ("n01440764/0.jpg", "n01440764/1.png.jpeg", "n01443537/2.jpg", "n01443537/3.png.jpeg")
    cells = [f"{c}/{s}" for c in ("fog", "impulse_noise", "spatter") for s in (2, 5)]
    assert sorted(found) == sorted(f"{cell}/{name}" for cell in cells for name in names)
    content = {name: file.read_bytes() for name, file in found.items()}
    assert len(set(content.values())) == len(content)
    with Image.open(found["fog/5/n01443537/2.jpg"]) as picture:
        assert (picture.format, picture.size) == ("JPEG", (40, 40))

    # What is there is kept; the rest is the same, also from several processes.
    lost = [name for name in found if name.endswith("jpeg")]
    kept = {name: file.stat().st_mtime_ns for name, file in found.items() if name not in lost}
    for name in lost:
        found[name].unlink()
    capsys.readouterr()
    assert corrupt(source, tmp_path / "one", *some, "--workers", 2) == 0
    assert "12 files were written and 12 kept, of 4 pictures" in capsys.readouterr().out
    assert {name: file.read_bytes() for name, file in found.items()} == content
    assert {name: found[name].stat().st_mtime_ns for name in kept} == kept
    # A subset of the corruptions, too; another seed is other noise.
    one = (*some[:2], "impulse_noise", "--severity", 5, "--image-size", 40, "--workers", 0)
    for seed, same in ((0, True), (1, False)):
        out = tmp_path / f"seed{seed}"
        assert corrupt(source, out, "--corruption", *one[1:], "--seed", seed) == 0
        name = f"impulse_noise/5/{names[0]}"
        assert (files(out / "ImageNet-C")[name].read_bytes() == content[name]) == same


def test_a_file_is_whole_or_absent(tmp_path, capsys, monkeypatch):
    source = write_folder(tmp_path / "pictures")
    (source / "n01443537" / "4.jpg").write_bytes(b"no picture")
    some = ("--corruption", "contrast", "--severity", 3, "--image-size", 32, "--workers", 0)
    assert corrupt(source, tmp_path / "out", *some) == 2
    assert "4.jpg" in capsys.readouterr().err
    assert corrupt(source, tmp_path / "out", *some, "--skip-damaged") == 0
    assert "0 files were written and 4 kept, of 4 pictures" in capsys.readouterr().out

    save = Image.Image.save

    def interrupted(image, file, *rest, **options):
        save(image, file, *rest, **options)
        Path(file).write_bytes(Path(file).read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert corrupt(source, tmp_path / "full", *some, "--skip-damaged") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not files(tmp_path / "full")


def write_parquet(file, pictures, paths, labels):
    cells = []
    for picture, path in zip(pictures, paths, strict=True):
        encoded = io.BytesIO()
        picture.save(encoded, "PNG")
        cells.append({"bytes": encoded.getvalue(), "path": path})
    pq.write_table(pa.table({"image": cells, "label": labels}), file)
    return file


def test_small_images_become_cifar_10_c(tmp_path, capsys):
    tiles = [sheet().crop((32 * i, 0, 32 * i + 32, 32)) for i in range(3)]
    source = write_parquet(tmp_path / "small.parquet", tiles, [None] * 3, [7, 1, 4])
    some = ("--corruption", "fog", "saturate", "--workers")
    assert corrupt(source, tmp_path, *some, 2) == 0
    assert "benchmark with --n-examples 3" in capsys.readouterr().out
    data = open_dataset("cifar10", tmp_path, corruptions=["fog", "saturate"], n_examples=3)
    assert data.labels(("fog", 5)).tolist() == [7, 1, 4]
    images = data.load(("fog", 4)).images
    for row, tile in enumerate(tiles):
        seed = (0, corrupted_copies.zlib.crc32(b"fog"), 4, row)
        made = corrupt_as_published(np.array(tile), "fog", 4, variant="cifar", seed=seed)
        assert np.array_equal(images[row].permute(1, 2, 0).numpy(), made)
    fog = tmp_path / "CIFAR-10-C" / "fog.npy"
    before, content = fog.stat(), fog.read_bytes()
    assert before.st_blocks * 512 < 10**6  # the rows of which there is nothing take no space
    (tmp_path / "CIFAR-10-C" / "saturate.npy").unlink()
    assert corrupt(source, tmp_path, *some, 0) == 0
    assert "1 files were written and 1 kept" in capsys.readouterr().out
    assert fog.stat().st_mtime_ns == before.st_mtime_ns
    fog.unlink()
    assert corrupt(source, tmp_path, *some, 0) == 0
    assert fog.read_bytes() == content
    for flags, said in (
        (("--severity", 1, 2), "needs all severities"),
        (("--limit", 0), "--limit must be at least 1"),
    ):
        assert corrupt(source, tmp_path, *flags) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("side", [32, 40])
def test_a_killed_run_is_finished_by_the_same_command(tmp_path, monkeypatch, side):
    """Arrays (32 pixels) and picture files, killed while a file is half written."""
    tiles = [sheet().crop((32 * i, 0, 32 * i + side, side)) for i in range(3)]
    paths = [f"n01440764/{i}.jpg" for i in range(3)]
    source = write_parquet(tmp_path / "p.parquet", tiles, paths, [0, 3, 1])
    some = ("--corruption", "contrast", "brightness", "--workers", 0, "--image-size", side)
    some += () if side == 32 else ("--severity", 1, 5)
    assert corrupt(source, tmp_path / "whole", *some) == 0

    save, write, done = Image.Image.save, np.save, []

    def kill(file):
        done.append(file)
        if len(done) == (2 if side == 32 else 6):
            os.truncate(file, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    def saves(image, file, *rest, **options):
        save(image, file, *rest, **options)
        kill(file)

    def writes(stream, labels):
        write(stream, labels)
        stream.flush()
        kill(stream.name)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", saves)
        patch.setattr(np, "save", writes)
        process = forked.start(corrupt, source, tmp_path / "broken", *some)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    whole = {name: file.read_bytes() for name, file in files(tmp_path / "whole").items()}
    broken = files(tmp_path / "broken")
    finished = {name: file for name, file in broken.items() if name in whole}
    assert 0 < len(finished) < len(whole)
    assert all(file.read_bytes() == whole[name] for name, file in finished.items())
    before = {name: file.stat().st_mtime_ns for name, file in finished.items()}
    assert corrupt(source, tmp_path / "broken", *some) == 0
    broken = files(tmp_path / "broken")
    assert {name: file.read_bytes() for name, file in broken.items()} == whole
    before.pop("CIFAR-10-C/labels.npy", None)  # written with each array
    assert {name: broken[name].stat().st_mtime_ns for name in before} == before


def test_rows_of_parquet_files_get_names(tmp_path, capsys):
    pictures = [sheet().crop((9 * i, 0, 9 * i + 40, 40)) for i in range(3)]
    some = ("--corruption", "contrast", "--severity", 1, "--image-size", 32, "--workers", 0)
    paths = ["n01440764/a.jpg", "../../b.png", None]
    source = write_parquet(tmp_path / "p.parquet", pictures, paths, [0, 3, 1])
    assert corrupt(source, tmp_path / "named", *some) == 0
    assert sorted(files(tmp_path / "named" / "ImageNet-C" / "contrast" / "1")) == [
        "0001/00000002.jpeg",
        "0003/b.png.jpeg",
        "n01440764/a.jpg",
    ]
    source = write_parquet(tmp_path / "p.parquet", pictures, ["a.jpg"] * 3, [0, 0, 0])
    assert corrupt(source, tmp_path / "twice", *some) == 2
    assert "two pictures would be written to 0000/a.jpg" in capsys.readouterr().err


def test_a_missing_library_is_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    source = write_folder(tmp_path / "pictures")
    published_corruptions._library.cache_clear()
    monkeypatch.setattr(published_corruptions.importlib.util, "find_spec", lambda _: None)
    assert corrupt(source, tmp_path / "out", "--corruption", "fog") == 2
    assert "ttt-plugins[corruptions]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # The four extra ones are this package's own.
    own = ("--corruption", "saturate", "--severity", 1, "--workers", 0)
    assert corrupt(source, tmp_path / "out", *own) == 0
