"""The command ``predict``: pictures to a CSV file, resumed after a kill as if it was unbroken."""

import csv
import os
import signal

import forked
import pytest
import torch
from PIL import Image

import ttt_plugins as tp
from ttt_plugins.cli import predict
from ttt_plugins.cli.main import main
from ttt_plugins.data.cifar10 import CIFAR10_CLASSES
from ttt_plugins.demo import load_sample

MODEL = "bundled:source-resnet26bn-cifar10"


@pytest.fixture(scope="module")
def sample():
    return load_sample(n=24)


@pytest.fixture
def folder(tmp_path, sample):
    """Class folders of CIFAR-10's names with the demo's foggy pictures."""
    for name in CIFAR10_CLASSES:
        (tmp_path / "pictures" / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(sample.images["fog"], sample.labels, strict=True)):
        place = tmp_path / "pictures" / CIFAR10_CLASSES[label]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:02d}.png")
    for name in CIFAR10_CLASSES:
        if not any((tmp_path / "pictures" / name).iterdir()):
            Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / name / "black.png")
    return tmp_path / "pictures"


def arguments(folder, out, *more):
    words = ["predict", MODEL, folder, "--method", "tent", "--lr", "0.05", "--batch-size", "4"]
    return [str(word) for word in (*words, "--workers", "0", "--out", out, *more)]


def rows(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_predictions_are_the_adapters(folder, tmp_path, capsys):
    out = tmp_path / "predictions.csv"
    assert main(arguments(folder, out)) == 0
    found = rows(out)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert [row["file"] for row in found] == files
    net = tp.wrap(MODEL, "tent", lr=0.05)
    right = 0
    for start in range(0, len(files), 4):
        pictures = [Image.open(folder / file) for file in files[start : start + 4]]
        pixels = [torch.tensor(list(p.tobytes())).view(32, 32, 3) for p in pictures]
        scores = net(torch.stack(pixels).permute(0, 3, 1, 2) / 255).softmax(1)
        for row, score in zip(found[start : start + 4], scores, strict=True):
            # Folders are sorted by name, which is CIFAR-10's own order.
            assert int(row["class"]) == score.argmax()
            assert row["name"] == CIFAR10_CLASSES[score.argmax()]
            assert float(row["score"]) == pytest.approx(score.max().item(), abs=1e-5)
            right += row["file"].startswith(f"{row['name']}/")
    assert f"{len(files)} pictures of this run: {100 * right / len(files):.2f} %" in (
        capsys.readouterr().out
    )
    assert [p.name for p in tmp_path.iterdir() if "predictions" in p.name] == ["predictions.csv"]


def test_a_killed_run_resumes_as_if_it_was_unbroken(folder, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    assert main(arguments(folder, whole)) == 0
    write, written = predict._write_rows, []

    def dies(*args):
        write(*args)
        written.append(1)
        predict._CHECKPOINT_SECONDS = 0 if len(written) == 3 else 1e9
        if len(written) == 5:
            args[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "_write_rows", dies)
        process = forked.start(main, arguments(folder, broken))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not broken.exists()
    part = broken.with_name("broken.csv.part")
    assert len(part.read_text().splitlines()) == 1 + 5 * 4  # two batches beyond the checkpoint
    assert main(arguments(folder, broken, "--resume")) == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert main(arguments(folder, broken, "--resume")) == 0  # nothing left to do
    assert broken.read_bytes() == whole.read_bytes()


def test_another_run_is_not_resumed(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.csv"
    monkeypatch.setattr(predict, "_CHECKPOINT_SECONDS", 0)
    (folder / "truck" / "zz.png").write_bytes(b"damaged")
    assert main(arguments(folder, out)) == 2
    assert "zz.png" in capsys.readouterr().err
    assert main(arguments(folder, out, "--resume", "--seed", "3")) == 2
    assert "other settings" in capsys.readouterr().err
    assert not out.exists()
    (folder / "truck" / "zz.png").unlink()
    assert main(arguments(folder, out, "--resume")) == 0
    assert len(rows(out)) == len(list(folder.rglob("*.png")))


def test_damaged_pictures_are_skipped_and_counted(folder, tmp_path, capsys):
    (folder / "cat" / "zz.png").write_bytes(b"damaged")
    assert main(arguments(folder, tmp_path / "a.csv", "--skip-damaged")) == 0
    assert "skipped 1 damaged pictures" in capsys.readouterr().out
    assert not any("zz.png" in row["file"] for row in rows(tmp_path / "a.csv"))


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "there.csv").write_text("")
    for out, said in (
        (tmp_path / "there.csv", "--overwrite"),
        (tmp_path / "no" / "a.csv", "no such"),
    ):
        assert main(arguments(folder, out)) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert main(arguments(tmp_path / "nowhere", tmp_path / "b.csv")) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_pictures_of_any_size_are_resized_as_the_model_wants_them(tmp_path):
    Image.new("RGB", (200, 90), (9, 99, 199)).save(tmp_path / "a.jpg")
    Image.new("L", (50, 60), 9).save(tmp_path / "b.png")
    assert main(arguments(tmp_path, tmp_path / "c.csv")) == 0
    found = rows(tmp_path / "c.csv")
    assert [row["file"] for row in found] == ["a.jpg", "b.png"]
    assert found[0]["name"] == ""  # the model's ten classes have no names here


def test_source_statistics_come_from_any_source(folder, sample):
    model = "bundled:source-resnet26-cifar10"
    net = tp.wrap(model, "mgg", source_images=folder)
    by_hand = tp.wrap(model, "mgg")
    files = sorted(folder.rglob("*.png"))
    pixels = [torch.tensor(list(Image.open(f).tobytes())).view(32, 32, 3) for f in files]
    by_hand.fit_source_statistics([torch.stack(pixels).permute(0, 3, 1, 2) / 255])
    for name, tensor in net.learned_tensors().items():
        torch.testing.assert_close(tensor, by_hand.learned_tensors()[name])
