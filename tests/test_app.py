"""The page's work without the page: pictures, two predictions of a stream, a Space's files."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from torchvision.transforms.functional import to_pil_image

import ttt_plugins as tp
from ttt_plugins.app.pictures import Pictures, dropped_pictures, sample_pictures, source_pictures
from ttt_plugins.app.session import Session, offered_methods
from ttt_plugins.cli import main
from ttt_plugins.cli.main import _parser
from ttt_plugins.data.cifar10 import CIFAR10_CLASSES
from ttt_plugins.data.corruptions import corrupt
from ttt_plugins.demo import load_sample
from ttt_plugins.errors import DataError, InputError

MODEL = "bundled:source-resnet26-cifar10"


def build(method):
    return tp.wrap(MODEL, method, **({} if method == "source" else {"window": 8}))


@pytest.fixture
def session():
    return Session(build, "tent")


def test_a_stream_is_what_two_adapters_predict(session):
    pictures = sample_pictures(session.net, "clean", 24)
    options = {"batch_size": 8, "corruption": "speckle_noise", "severity": 5, "seed": 3}
    steps = list(session.stream(pictures, **options))
    generator = torch.Generator().manual_seed(3)
    source, net = build("source"), build("tent")
    right = torch.zeros(2)
    for number, step in enumerate(steps):
        rows = slice(8 * number, 8 * number + 8)
        images = corrupt(pictures.images[rows], "speckle_noise", 5, generator=generator)
        assert torch.equal(step.images, images)
        for place, (adapter, found) in enumerate(((source, step.source), (net, step.adapter))):
            expected = adapter(images.float() / 255).argmax(1)
            assert torch.equal(found, expected)
            right[place] += (expected == pictures.labels[rows]).sum()
    last = session.points[-1]
    assert [point.images for point in session.points] == [8, 16, 24]
    assert (last.source, last.adapter) == pytest.approx(tuple((100 * right / 24).tolist()))
    assert session.health["seen"] == 24


def test_the_stream_goes_on_until_a_reset_or_another_method(session):
    pictures = sample_pictures(session.net, "fog", 16)
    for _ in range(2):
        list(session.stream(pictures, batch_size=8))
    assert session.points[-1].images == 32
    moved = session.net.adaptation_state()
    session.reset()
    assert session.points == []
    fresh = build("tent").adaptation_state()
    now = session.net.adaptation_state()
    assert all(torch.equal(now[name], fresh[name]) for name in fresh)
    assert any(not torch.equal(moved[name], fresh[name]) for name in fresh)
    session.choose("sar")
    assert session.net.method == "sar"


def test_a_batch_of_no_images_is_refused(session):
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        next(session.stream(sample_pictures(session.net, "fog", 2), batch_size=0))


def test_without_labels_there_is_confidence_alone(session):
    pictures = Pictures(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), None, None)
    list(session.stream(pictures))
    point = session.points[-1]
    assert point.source is None
    assert 10 <= point.source_confidence <= 100


@pytest.fixture
def folder(tmp_path):
    """Foggy pictures in folders of the classes' names, and a damaged one."""
    sample = load_sample(n=40)
    for name in CIFAR10_CLASSES:
        (tmp_path / name).mkdir()
    for row, label in enumerate(sample.labels.tolist()):
        place = tmp_path / CIFAR10_CLASSES[label] / f"{row}.png"
        to_pil_image(sample.images["fog"][row]).save(place)
    (tmp_path / "cat" / "damaged.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_pictures_of_a_folder_have_labels(session, folder):
    pictures = source_pictures(session.net, folder, 100)
    sample = load_sample(n=40)
    assert len(pictures) == 40
    assert len(pictures.skipped) == 1
    assert list(pictures.names) == list(CIFAR10_CLASSES)
    assert sorted(pictures.labels.tolist()) == sorted(sample.labels.tolist())
    for image, label in zip(pictures.images, pictures.labels, strict=True):
        (row,) = (r for r in range(40) if torch.equal(sample.images["fog"][r], image))
        assert label == sample.labels[row]


def test_dropped_pictures_have_none(session, folder):
    files = sorted(folder.rglob("*.png"))
    pictures = dropped_pictures(session.net, files, 3)
    assert len(pictures) + len(pictures.skipped) == 3
    assert pictures.labels is None
    with pytest.raises(DataError, match="drop some"):
        dropped_pictures(session.net, [], 3)


def test_the_sample_in_a_models_own_size():
    net = tp.wrap("resnet10t", "source")
    pictures = sample_pictures(net, "fog", 2)
    assert pictures.images.shape[1:] == net.input_size
    assert pictures.labels is None  # another model's classes
    with pytest.raises(InputError, match="'rain'"):
        sample_pictures(net, "rain")


def test_offered_methods_begin_with_the_artifacts_own():
    assert offered_methods("ttt")[0] == "ttt"
    assert {"tent", "sar", "mgg"} <= set(offered_methods(None))
    assert "source" not in offered_methods("source")


def test_a_space_has_what_it_needs(tmp_path, capsys):
    out = tmp_path / "space"
    words = ["bundled:mgg-universal", "--method", "mgg"]
    assert main(["app", *words, "--export-space", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"app.py", "requirements.txt", "README.md"}
    text = (out / "app.py").read_text()
    arguments = json.loads(text[text.index("main(") + 5 : text.rindex(")")])
    assert arguments == ["app", *words]
    assert callable(_parser().parse_args(arguments).run)
    assert (out / "requirements.txt").read_text() == f"ttt-plugins[app]=={tp.__version__}\n"
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert main(["app", "--export-space", str(out)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_a_space_of_a_local_artifact_carries_it(tmp_path):
    build("tent").save_pretrained(tmp_path / "mine")
    out = tmp_path / "space"
    assert main(["app", str(tmp_path / "mine"), "--export-space", str(out)]) == 0
    assert '["app", "./artifact"]' in (out / "app.py").read_text()
    assert tp.from_pretrained(out / "artifact").method == "tent"
    assert str(tmp_path) not in "".join(file.read_text() for file in out.glob("*.*"))


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", MODEL]) == 2
    assert 'pip install "ttt-plugins[app]"' in capsys.readouterr().err
