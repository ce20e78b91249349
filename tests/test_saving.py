"""An artifact's folder is replaced as a whole: under kill -9, two savers, readers, and links."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch

import ttt_plugins as tp
from ttt_plugins.artifacts.card import refresh
from ttt_plugins.artifacts.folder import Artifact, read_artifact, write_artifact
from ttt_plugins.core.gradient_memory import init_slow
from ttt_plugins.utils import files

ROOT = Path(__file__).parent.parent
FROZEN = ROOT / "tests/frozen/mgg-v1"


def save_forever(folder, start, step, way):
    """Save one artifact after another, each with its number in every file."""
    if way == "in two renames":
        files._exchange_at_once = lambda one, other: False
    base, number = read_artifact(FROZEN), start
    while True:
        tensors = {n: torch.full_like(t, number / 1024) for n, t in base.tensors.items()}
        config = base.config | {"training": {"number": number}}
        write_artifact(folder, Artifact(config, tensors, None, f"card {number}", None))
        number += step
        time.sleep(0.003)  # as a disk would take, so that a reader on a busy machine has a turn


def start_saver(folder, start, step, way):
    saver = multiprocessing.get_context("fork").Process(
        target=save_forever, args=(folder, start, step, way), daemon=True
    )
    saver.start()
    return saver


def number_of(folder):
    """The number of the save that a folder holds: the same in every one of its files."""
    artifact = read_artifact(folder)
    number = artifact.config["training"]["number"]
    assert artifact.card == f"card {number}"
    assert all((tensor == number / 1024).all() for tensor in artifact.tensors.values())
    return number


def neighbours(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


WAYS = ["at once", "in two renames"]


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_save_leaves_an_artifact_and_the_next_one_tidies(
    way, make_net, make_model, tmp_path
):
    folder = make_net("mgg", make_model("groupnorm")).save_pretrained(tmp_path / "net")
    end, last, kills = time.monotonic() + 60, -1, 0
    while kills < 40 or last < 0:
        assert time.monotonic() < end
        saver = start_saver(folder, last + 1, 1, way)
        time.sleep(0.02 + 0.0017 * (kills % 40))
        saver.kill()
        saver.join()
        kills += 1
        artifact = read_artifact(folder)  # the reader restores what two renames left apart
        if "training" in artifact.config:
            last = number_of(folder)
    make_net("mgg", make_model("groupnorm")).save_pretrained(folder)
    assert neighbours(folder) == []


def test_a_folder_that_cannot_be_listed_can_be_saved_in(
    make_net, make_model, tmp_path, monkeypatch
):
    net, scandir = make_net("mgg", make_model("groupnorm")), os.scandir

    def refuse(path="."):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert (net.save_pretrained(tmp_path / "net") / "config.json").is_file()


@pytest.mark.parametrize("way", WAYS)
def test_a_save_killed_between_its_renames_is_restored(
    way, make_net, make_model, tmp_path, monkeypatch
):
    """The worst moments, one by one: every call that moves something is the last."""
    net = make_net("mgg", make_model("groupnorm"))
    folder = net.save_pretrained(tmp_path / "net", training={"number": 1})
    if way == "in two renames":
        monkeypatch.setattr(files, "_exchange_at_once", lambda one, other: False)
    rename = os.rename

    class Killed(BaseException):
        pass

    for moment in range(4):
        calls = []

        def dying(*paths, moment=moment, calls=calls):
            calls.append(paths)
            if len(calls) > moment:
                raise Killed
            rename(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "rename", dying)
            patch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)
            with contextlib.suppress(Killed):
                net.save_pretrained(folder, training={"number": 2 + moment})
        artifact = read_artifact(folder)
        assert artifact.config["training"]["number"] in range(1, 3 + moment)
        assert tp.from_pretrained(folder, backbone=make_model("groupnorm")).method == "mgg"
    net.save_pretrained(folder)
    assert neighbours(folder) == []


@pytest.mark.parametrize("way", WAYS)
def test_two_savers_and_a_reader(way, make_net, make_model, tmp_path):
    folder = tmp_path / "net"
    savers = [start_saver(folder, start, 2, way) for start in (0, 1)]
    end, seen = time.monotonic() + 1, set()
    try:
        while time.monotonic() < end or len(seen) < 4:
            assert time.monotonic() < end + 60
            assert all(saver.is_alive() for saver in savers), "a saver failed"
            if seen or folder.exists():
                seen.add(number_of(folder))
    finally:
        for saver in savers:
            saver.kill()
            saver.join()
    assert {number % 2 for number in seen} == {0, 1}
    assert isinstance(number_of(folder), int)
    make_net("mgg", make_model("groupnorm")).save_pretrained(folder)
    assert neighbours(folder) == []


def test_threads_that_save_at_once(make_net, make_model, tmp_path):
    net, folder, failures = make_net("mgg", make_model("groupnorm")), tmp_path / "net", []

    def save():
        try:
            for _ in range(5):
                net.save_pretrained(folder)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert read_artifact(folder).config["method"] == "mgg"
    assert neighbours(folder) == []


def test_a_link_is_followed(make_net, make_model, tmp_path):
    net = make_net("mgg", make_model("groupnorm"))
    real = net.save_pretrained(tmp_path / "store" / "real", training={"number": 1})
    link = tmp_path / "latest"
    link.symlink_to(real)
    assert net.save_pretrained(link, training={"number": 2}) == link
    assert link.is_symlink()
    assert read_artifact(real).config["training"]["number"] == 2
    assert neighbours(real) == []
    assert "# real" in (real / "README.md").read_text()


def test_everything_is_flushed_before_it_is_seen(make_net, make_model, tmp_path, monkeypatch):
    net, order = make_net("mgg", make_model("groupnorm")), []
    flush, rename = os.fsync, os.rename

    def note(handle):
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        flush(handle)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", lambda *paths: (order.append("renamed"), rename(*paths)))
    folder = net.save_pretrained(tmp_path / "net")
    before = order[: order.index("renamed")]
    assert {path.name for path in folder.iterdir()} <= set(before)
    assert tmp_path.name in order[order.index("renamed") :]


def test_a_card_is_rewritten_with_its_config_at_once(make_net, make_model, tmp_path, monkeypatch):
    folder = make_net("mgg", make_model("groupnorm")).save_pretrained(tmp_path / "net")
    (folder / "notes").mkdir()  # a checkout of the user's, say
    (folder / "notes" / "mine.txt").write_text("keep me")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ttt_plugins.artifacts.folder.write_text", full)
        with pytest.raises(tp.ArtifactError, match="No space"):
            refresh(folder, facts={"license": "mit"})
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    refresh(folder, facts={"license": "mit"})
    assert json.loads((folder / "config.json").read_text())["card"] == {"license": "mit"}
    assert "license: mit" in (folder / "README.md").read_text()
    assert (folder / "notes" / "mine.txt").read_text() == "keep me"
    assert (folder / "model.safetensors").stat().st_nlink == 1
    assert neighbours(folder) == []


def test_a_card_on_a_read_only_disk(make_net, make_model, tmp_path, monkeypatch):
    folder = make_net("mgg", make_model("groupnorm")).save_pretrained(tmp_path / "net")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    # What such a disk answers to every call that would write, removing what is not there included.
    for name in ("mkdir", "unlink", "rmdir", "rename", "replace", "link"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(tp.ArtifactError, match="Read-only file system"):
        refresh(folder, facts={"license": "mit"})


def test_a_reader_that_never_finds_rest_says_so(make_net, make_model, tmp_path, monkeypatch):
    folder = make_net("mgg", make_model("groupnorm")).save_pretrained(tmp_path / "net")
    monkeypatch.setattr(files, "_is_at", lambda handle, folder: False)
    with pytest.raises(tp.ArtifactError, match="was replaced during every one"):
        read_artifact(folder)


def test_a_foreign_folder_with_a_config_json_is_not_replaced(make_model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "precious.bin").write_text("keep me")
    with pytest.raises(tp.ArtifactError, match="not an artifact"):
        tp.wrap(make_model("groupnorm"), "tent").save_pretrained(tmp_path)
    assert (tmp_path / "precious.bin").read_text() == "keep me"


def test_a_file_in_the_way_of_a_save(make_model, tmp_path):
    (tmp_path / "here").write_text("a file")
    with pytest.raises(tp.ArtifactError, match="not an artifact"):
        tp.wrap(make_model("groupnorm"), "tent").save_pretrained(tmp_path / "here")


def test_what_is_saved_beside_an_adapter(make_model, tmp_path):
    net = tp.wrap(make_model("groupnorm"), "tent")
    for records in ({"training": {"a": torch.ones(1)}}, {"training": 3}, {"card": 3}):
        with pytest.raises(tp.ArtifactError, match="JSON"):
            net.save_pretrained(tmp_path / "net", **records)
    generator = torch.Generator().manual_seed(0)
    broken = tp.wrap(
        make_model("groupnorm"),
        "mgg",
        tensors={f"memory.{n}": t for n, t in init_slow(generator).items()},
    )
    broken._tensors["memory.W1"].fill_(torch.nan)
    with pytest.raises(tp.ArtifactError, match="not finite"):
        broken.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()
    with pytest.raises(tp.InputError, match="org/name"):
        net.push_to_hub(None)
