"""Adapters on the Hub (issue 5): the genuine client against a Hub on the loopback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

import ttt_plugins as tp
from ttt_plugins.artifacts.publish import publish
from ttt_plugins.artifacts.saving import save_with_model

ROOT = Path(__file__).parent.parent
TINY = ("ttt_resnet26", {"width": 8, "depth": 8, "groups": 4})  # the suite's GroupNorm network


class Client:
    """A process with the Hub's environment variables, which answers one job after another."""

    def __init__(self, home: Path, endpoint: str, images: Path, **environment: str):
        self.images, self._numbers = images, count()
        self.folder = home.parent
        self.log = home.parent / f"{home.name}-{id(self)}.log"
        variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        variables |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_TOKEN": LoopbackHub.TOKEN,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).parent / "hub_client.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=variables | environment,
            text=True,
        )

    def __call__(self, do: str, **job) -> dict:
        if do in ("load", "wrap", "plain_timm"):
            out = self.folder / f"{self.log.stem}-{next(self._numbers)}.safetensors"
            job = {"images": str(self.images), "out": str(out), **job}
        self._process.stdin.write(json.dumps({"do": do, **job}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        answer = json.loads(line)
        if "out" in job and "error" not in answer:
            answer["logits"] = load_file(job["out"])["logits"]
        return answer

    def close(self):
        self._process.stdin.close()
        assert self._process.wait(60) == 0


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def work(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("hub")
    save_file({"images": images(4, 3)}, folder / "images.safetensors")
    return folder


@pytest.fixture(scope="module")
def start(hub, work):
    """``start(home="home", endpoint=the loopback's, **environment)`` -> a `Client`."""
    with contextlib.ExitStack() as stack:

        def make(home="home", endpoint=None, **environment):
            images = work / "images.safetensors"
            client = Client(work / home, endpoint or hub.url, images, **environment)
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture(scope="module")
def client(start):
    """Online, with a token."""
    return start()


@pytest.fixture(scope="module")
def offline(start, client):
    """The same cache, with HF_HUB_OFFLINE."""
    return start(HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def unreachable(start, client):
    """The same cache, and nobody who answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return start(endpoint=f"http://127.0.0.1:{port}")


@pytest.fixture
def artifact(make_model, make_net, tmp_path):
    """``artifact(method, **options)`` -> a folder with its own weights, and its adapter."""

    def make(method, name="artifact", model=None, **options):
        model = make_model("groupnorm") if model is None else model
        net = make_net(method, model)
        folder = save_with_model(
            model, *TINY, tmp_path / name, config=net.config, tensors=net.learned_tensors(),
            **options,
        )  # fmt: skip
        return folder, net

    return make


@pytest.fixture
def expected(images):
    def run(net):
        return torch.cat([net(images(4, 3)), net(images(4, 3))])

    return run


def files_of(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def logits_of(answer):
    assert "logits" in answer, answer
    return answer["logits"]


def error_of(answer, *words):
    """The message of an answer that is a readable error of ours."""
    assert "error" in answer, answer
    assert "TTTError" in answer["kinds"], answer
    assert "ValueError" in answer["kinds"] or "FileNotFoundError" in answer["kinds"]
    for word in words:
        assert word in answer["error"], answer["error"]
    assert "\n" not in answer["error"]
    assert len(answer["error"]) < 700
    return answer["error"]


# -- there and back ----------------------------------------------------------------------------


def test_round_trip_bit_for_bit(
    method, artifact, expected, client, offline, unreachable, hub, tmp_path
):
    folder, net = artifact(method)
    wanted, repository = expected(net), f"tests/{method}-tiny"
    pushed = client("push", name=str(folder), repository=repository)
    assert pushed.get("commit") == hub.repositories[repository].refs["main"], pushed
    mine, published = files_of(folder), hub.repositories[repository].files
    for name in ("model.safetensors", "adapter.safetensors"):
        assert mine.get(name) == published.get(name)
    for who in (client, offline, unreachable):
        found = who("load", name=repository)
        assert torch.equal(logits_of(found), wanted)
        assert found["method"] == method
    assert pushed["commit"] in client("load", name=repository)["origin"]
    only = client("load", name=repository, options={"local_files_only": True})
    assert torch.equal(only["logits"], wanted)
    # What was loaded can be saved, and is the same artifact again.
    copy = client("save", name=repository, folder=str(tmp_path / "copy"))["folder"]
    assert torch.equal(logits_of(client("load", name=copy)), wanted)


def test_publishing_again_makes_no_commit(artifact, client, hub, tmp_path):
    folder, _ = artifact("mgg")
    first = client("command_line", arguments=["publish", str(folder), "tests/again"])
    assert first["code"] == 0, first
    assert "published" in first["out"], first
    commits = len(hub.repositories["tests/again"].commits)
    second = client("command_line", arguments=["publish", str(folder), "tests/again"])
    assert "unchanged" in second["out"], second
    assert len(hub.repositories["tests/again"].commits) == commits
    # A change makes one, and what is no longer there goes.
    folder, _ = artifact("tent")
    third = client("command_line", arguments=["publish", str(folder), "tests/again"])
    assert ": published" in third["out"]
    assert "adapter.safetensors" not in hub.repositories["tests/again"].files
    assert ".gitattributes" in hub.repositories["tests/again"].files


def test_the_client_says_who_it_is(artifact, client, hub):
    folder, _ = artifact("tent")
    start = len(hub.requests)
    client("push", name=str(folder), repository="tests/agent")
    client("load", name="tests/agent")
    ours = [r for r in hub.requests[start:] if "agent-harnesses" not in r[1]]
    named = [agent for _, path, agent in ours if f"ttt_plugins/{tp.__version__}" in agent]
    assert len(named) > 5
    downloads = [agent for verb, path, agent in ours if "/resolve/" in path]
    assert downloads
    assert all(f"ttt_plugins/{tp.__version__}" in agent for agent in downloads)


def test_one_commit_for_all_files_of_a_revision(artifact, expected, client, hub, make_model):
    old, net = artifact("tent", "old")
    wanted = expected(net)
    client("push", name=str(old), repository="tests/revisions")
    repository = hub.repositories["tests/revisions"]
    repository.refs["v1"] = repository.refs["main"]
    newer = make_model("groupnorm", seed=5)
    new, net = artifact("tent", "new", model=newer)
    client("push", name=str(new), repository="tests/revisions")
    start = len(hub.requests)
    for options in ({"revision": "v1"}, {"revision": repository.refs["v1"]}):
        found = client("load", name="tests/revisions", options=options)
        assert torch.equal(logits_of(found), wanted)
        assert repository.refs["v1"] in found["origin"]
    assert torch.equal(logits_of(client("load", name="tests/revisions@v1")), wanted)
    assert torch.equal(logits_of(client("load", name="tests/revisions")), expected(net))
    revisions = {path.split("/")[4] for _, path, _ in hub.requests[start:] if "/resolve/" in path}
    assert revisions <= set(repository.commits)  # never a branch or tag, which could move
    both = client("load", name="tests/revisions@v1", options={"revision": "main"})
    error_of(both, "two different revisions")
    error_of(client("load", name=str(old), options={"revision": "v1"}), "not on the Hub")


def test_a_progress_bar_is_shown(artifact, client, start):
    folder, _ = artifact("tent")
    client("push", name=str(folder), repository="tests/progress")
    fresh = start(home="progress", TQDM_POSITION="-1")  # bars without a terminal
    fresh("load", name="tests/progress")
    assert "100%" in fresh.log.read_text()
    assert "model.safetensors" in fresh.log.read_text()


def test_private_repositories_and_tokens(artifact, client, start, hub):
    folder, _ = artifact("tent")
    arguments = ["publish", str(folder), "tests/private", "--private"]
    assert client("command_line", arguments=arguments)["code"] == 0
    assert hub.repositories["tests/private"].private
    assert "logits" in client("load", name="tests/private")
    stranger = start(home="stranger", HF_TOKEN="")
    error_of(stranger("load", name="tests/private"), "tests/private", "HF_TOKEN")
    known = stranger("load", name="tests/private", options={"token": hub.TOKEN})
    assert "logits" in known, known
    refused = stranger("push", name=str(folder), repository="tests/mine")
    error_of(refused, "tests/mine", "HF_TOKEN")
    assert "tests/mine" not in hub.repositories
    # What exists and is public does not become private by itself.
    client("push", name=str(folder), repository="tests/public")
    again = client("push", name=str(folder), repository="tests/public", options={"private": True})
    error_of(again, "is public", "nothing was published")


# -- where the classifier is -------------------------------------------------------------------


def test_a_published_model_is_a_timm_repository(artifact, client, images, make_model, hub):
    folder, _ = artifact("source")
    client("push", name=str(folder), repository="tests/as-timm")
    net = tp.wrap(make_model("groupnorm"), "source")
    wanted = torch.cat([net(images(4, 3))] * 2)
    found = client("plain_timm", name="hf-hub:tests/as-timm")
    assert torch.allclose(logits_of(found), wanted, atol=1e-5), found
    folder, _ = artifact("mgg", "with-optimizer")
    client("push", name=str(folder), repository="tests/as-timm-too")
    assert "adapter.safetensors" in hub.repositories["tests/as-timm-too"].files
    found = client("plain_timm", name="hf-hub:tests/as-timm-too")
    assert torch.allclose(logits_of(found), wanted, atol=1e-5)


def test_a_classifier_in_another_repository(artifact, client, offline, hub, tmp_path, expected):
    model, _ = artifact("source")
    client("push", name=str(model), repository="tests/classifier")
    pinned = hub.repositories["tests/classifier"].refs["main"]
    wrapped = client("wrap", name="tests/classifier", options={"method": "tent"})
    assert pinned in wrapped["origin"]
    net = tp.wrap(str(model), "tent")
    wanted = expected(net)
    assert torch.equal(logits_of(wrapped), wanted)
    # Saved by hand as an adapter that names it, at its commit.
    folder = net.save_pretrained(tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text())
    config["backbone"] |= {"source": "hub", "name": "tests/classifier", "revision": pinned}
    (folder / "config.json").write_text(json.dumps(config))
    client("push", name=str(folder), repository="tests/adapter")
    card = hub.repositories["tests/adapter"].files["README.md"].decode()
    assert "base_model: tests/classifier" in card
    assert "base_model_relation: adapter" in card
    published = json.loads(hub.repositories["tests/adapter"].files["config.json"])
    assert published["backbone"]["name"] == "tests/classifier"
    assert published["backbone"]["revision"] == pinned
    # The classifier moves on; the adapter keeps the one it was made for.
    hub.repositories["tests/classifier"].commit({"README.md": b"moved"})
    for who in (client, offline):
        assert torch.equal(logits_of(who("load", name="tests/adapter")), wanted)


def test_timms_own_weights_are_pinned(client, offline, hub, work, tmp_path, images):
    name = "test_vit.r160_in1k"
    model = timm.create_model(name, num_classes=1000)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = (tmp_path / "model.safetensors").read_bytes()
    repository = hub.add(f"timm/{name}", {"model.safetensors": weights})
    pinned = repository.refs["main"]
    large = work / "large.safetensors"
    save_file({"images": images(2, 3, size=160)}, large)
    folder = tmp_path / "tent"
    options = {"method": "tent", "pretrained": True}
    wrapped = client("wrap", name=name, options=options, folder=str(folder), images=str(large))
    wanted = logits_of(wrapped)
    described = json.loads((folder / "config.json").read_text())["backbone"]
    assert (described["source"], described["name"]) == ("timm", name)
    assert described["revision"] == pinned
    client("push", name=str(folder), repository="tests/on-timm")
    card = hub.repositories["tests/on-timm"].files["README.md"].decode()
    assert f"base_model: timm/{name}" in card
    # timm publishes other weights; the adapter keeps those it was made for.
    repository.commit({"model.safetensors": weights[:-4] + b"\0\0\0\0"})
    for who in (client, offline):
        found = who("load", name="tests/on-timm", images=str(large))
        assert torch.equal(logits_of(found), wanted)
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["revision"] = "0" * 40
    (folder / "config.json").write_text(json.dumps(config))
    error_of(client("load", name=str(folder)), name)
    error_of(client("load", name=str(folder), options={"local_files_only": True}), "cache")


def test_somebodys_timm_repository(client, hub, make_model, expected, tmp_path):
    model = make_model("groupnorm")
    folder = save_with_model(model, *TINY, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    keys = ("architecture", "num_classes", "num_features", "model_args", "pretrained_cfg")
    config = {k: config[k] for k in keys} | {"global_pool": "avg"}
    config["pretrained_cfg"] |= {"url": "http://127.0.0.1:1/evil.pth", "custom_load": True}
    files = {"config.json": json.dumps(config).encode()}
    files["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    hub.add("somebody/model", files)
    found = client("wrap", name="hf-hub:somebody/model", options={"method": "tent"})
    assert torch.equal(logits_of(found), expected(tp.wrap(model, "tent"))), found
    error_of(client("load", name="somebody/model"), "timm model", "hf:")
    # Weights that would have to be unpickled are not read.
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.add("somebody/pickle", files)
    answer = client("wrap", name="hf-hub:somebody/pickle", options={"method": "tent"})
    error_of(answer, "somebody/pickle", "model.safetensors")


def test_the_classifier_of_a_local_folder_goes_along(artifact, client, hub, expected, tmp_path):
    model, _ = artifact("source")
    net = tp.wrap(str(model), "tent")
    folder = net.save_pretrained(tmp_path / "adapter", training={"command": f"train --in {model}"})
    assert str(model) in (folder / "config.json").read_text()
    wanted = expected(net)
    done = client("command_line", arguments=["publish", str(folder), "tests/embedded"])
    assert done["code"] == 0, done
    files = hub.repositories["tests/embedded"].files
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert torch.equal(logits_of(client("load", name="tests/embedded")), wanted)
    shutil.move(model, tmp_path / "elsewhere")
    commits = len(hub.repositories)
    again = client("command_line", arguments=["publish", str(folder), "tests/embedded2"])
    assert again["code"] == 2
    assert "publish that folder first" in again["error_text"]
    assert len(hub.repositories) == commits


def test_a_path_of_another_machine_is_not_followed(artifact, client, hub, tmp_path):
    model, _ = artifact("source")
    folder = tp.wrap(str(model), "tent").save_pretrained(tmp_path / "adapter")
    hub.add("somebody/path", files_of(folder))
    error_of(client("load", name="somebody/path"), "another machine", "backbone=")


def test_an_adapter_of_a_bare_module(make_model, make_net, client, hub, expected, tmp_path):
    folder = make_net("mgg", make_model("groupnorm")).save_pretrained(tmp_path / "adapter")
    hub.add("tests/bare", files_of(folder))
    error_of(client("load", name="tests/bare"), "backbone=")


# -- cards and info ----------------------------------------------------------------------------


def test_publish_with_results_and_info(artifact, client, hub, tmp_path):
    folder, _ = artifact("tent")
    results = tmp_path / "results.json"
    results.write_text((ROOT / "tests/frozen/benchmark-results.json").read_text())
    arguments = ["publish", str(folder), "tests/results", "--results", str(results)]
    assert client("command_line", arguments=arguments)["code"] == 0
    files = hub.repositories["tests/results"].files
    card = files["README.md"].decode()
    assert "model-index" in card
    assert 'from_pretrained("tests/results")' in card
    assert json.loads(files["results.json"])["runs"][0]["protocol"] == "reset-per-cell"
    info = client("command_line", arguments=["info", "tests/results"])
    assert info["code"] == 0, info
    config = json.loads(files["config.json"])
    for word in ("tent", config["backbone"]["fingerprint"], "CIFAR-10-C", "format", "%"):
        assert word in info["out"]
    assert "Traceback" not in info["error_text"]
    # The command line loads it by its name too.
    missing = client("command_line", arguments=["info", "tests/no-such-thing"])
    assert missing["code"] == 2
    assert "Traceback" not in missing["error_text"]
    assert len(missing["error_text"].strip().splitlines()) == 1


def test_what_is_bundled_is_published_as_it_ships(client, hub):
    folder = ROOT / "hub_cards" / "mgg-resnet26-cifar10"
    done = client("command_line", arguments=["publish", str(folder), "tests/bundled"])
    assert done["code"] == 0, done
    published = hub.repositories["tests/bundled"].files
    assert {n: published[n] for n in files_of(folder)} == files_of(folder)


@pytest.mark.parametrize("name", ["", "org", "org/", "/name", "org/name@main", "a\0b/c", 3])
def test_a_repository_without_a_name(name, artifact):
    folder, net = artifact("tent")
    for publishing in (
        lambda: publish(folder, name),
        lambda: net.push_to_hub(name),
        lambda: publish(ROOT / "hub_cards/mgg-universal", name),
    ):
        with pytest.raises(tp.TTTError, match=r"(?i)org/name"):
            publishing()


@pytest.mark.parametrize("folder", ["", None, 3, "a\0b", "nowhere"])
def test_a_folder_without_a_name_is_not_published(folder):
    with pytest.raises(tp.ArtifactError):
        publish(folder, "org/name")


# -- failures ----------------------------------------------------------------------------------


def test_no_such_repository(client):
    error_of(client("load", name="tests/nothing"), "tests/nothing", "no repository", "private")


def test_no_such_revision(artifact, client, hub):
    hub.add("tests/here", files_of(artifact("tent")[0]))
    answer = client("load", name="tests/here", options={"revision": "v9"})
    error_of(answer, "tests/here", "v9", "branches")


def test_a_gated_repository(artifact, client, hub):
    hub.add("tests/gated", files_of(artifact("tent")[0]), gated=True)
    error_of(client("load", name="tests/gated"), "gated", "request access")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"README.md": b"hello"}, ["config.json"]),
        ({"config.json": b'{"model_type": "bert"}'}, ["another library"]),
        ({"config.json": b"[]"}, ["format_version"]),
        ({"config.json": b"{"}, ["JSON"]),
        ({"config.json": b'{"format_version": 2}'}, ["newer ttt_plugins"]),
    ],
    ids=["no config", "another library's", "a list", "broken", "newer"],
)
def test_not_an_adapter(files, words, client, hub):
    name = f"tests/no-adapter-{len(hub.repositories)}"
    hub.add(name, files)
    error_of(client("load", name=name), *words)


def test_an_impossible_name(client):
    for name in ("a/b/c", "org/na me", "org/..", "https://example.org/x", "x" * 5000, "a\0b/c"):
        error_of(client("load", name=name))


def test_offline_without_a_cache(client, offline, unreachable):
    error_of(offline("load", name="tests/never-seen"), "HF_HUB_OFFLINE", "cache")
    only = client("load", name="tests/never-seen", options={"local_files_only": True})
    error_of(only, "local_files_only", "cache")
    error_of(unreachable("load", name="tests/never-seen"), "cannot be reached", "connection")


def test_publishing_without_a_connection(artifact, offline, unreachable):
    folder, _ = artifact("tent")
    error_of(offline("push", name=str(folder), repository="tests/x"), "offline")
    answer = unreachable("push", name=str(folder), repository="tests/x")
    error_of(answer, "tests/x", "connection")


@pytest.mark.parametrize("fault", ["dies", "short", "long", "other", "huge", "broken"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_faulty_server(fault, file, artifact, expected, client, hub):
    folder, net = artifact("tent")
    name = f"tests/faulty-{fault}-{file.split('.')[0]}"
    repository = hub.add(name, files_of(folder))
    repository.faults[file] = fault
    error_of(client("load", name=name), name)
    # Nothing half-done stays: the next attempt, with a healthy server, succeeds.
    repository.faults.clear()
    found = client("load", name=name)
    assert torch.equal(logits_of(found), expected(net)), found


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("forbidden", ["403", "the token does not allow this"]),
        ("gone", ["404", "it does not exist"]),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_refused_file_is_not_called_unreachable(fault, words, file, artifact, client, hub):
    name = f"tests/{fault}-{file.split('.')[0]}"
    hub.add(name, files_of(artifact("tent")[0])).faults[file] = fault
    message = error_of(client("load", name=name), name, "refuses downloading", *words)
    assert "cannot be reached" not in message


@pytest.fixture(scope="module")
def hurried(start):
    """A client of little patience, which has started."""
    client = start(home="hurried", HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    error_of(client("load", name="tests/nothing"), "no repository")
    return client


@pytest.mark.parametrize(
    ("name", "file", "job"),
    [
        ("tests/drips-model", "model.safetensors", {"do": "load"}),
        ("tests/drips-card", "README.md", {"do": "load"}),
        ("tests/drips-info", "info", {"do": "load"}),
        # timm's own loader and the Hub's client for data sets would wait for minutes.
        ("timm/test_byobnet.r160_in1k", "model.safetensors", {"do": "wrap"}),
        ("datasets/tests/drips", "train.parquet", {"do": "images", "file": "unused"}),
        ("datasets/tests/drips-info", "info", {"do": "images", "file": "unused"}),
    ],
)
def test_a_hub_that_never_finishes_its_answer(name, file, job, artifact, hurried, hub):
    files = files_of(artifact("tent")[0]) if job["do"] == "load" else {file: b"PAR1"}
    hub.add(name, files).faults[file] = "drips"
    if job["do"] == "wrap":
        job = job | {"options": {"method": "tent", "pretrained": True}}
    asked = {"source": f"hf://{name}"} if job["do"] == "images" else {"name": name}
    begin = time.monotonic()
    answer = hurried(**job, **{k: v.removeprefix("timm/") for k, v in asked.items()})
    error_of(answer, "not answered within 3 seconds", "HF_HUB_ETAG_TIMEOUT")
    assert time.monotonic() - begin < 15


def test_a_download_that_stalls(artifact, hurried, hub):
    hub.add("tests/stalls", files_of(artifact("tent")[0])).faults["model.safetensors"] = "stalls"
    begin = time.monotonic()
    error_of(hurried("load", name="tests/stalls"), "tests/stalls", "interrupted", "try again")
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("fault", ["dies", "refused"])
def test_an_upload_that_fails(fault, artifact, client, hub):
    folder, _ = artifact("tent")
    before = files_of(folder)
    repository = hub.add(f"tests/upload-{fault}", {"README.md": b"as it was"})
    repository.faults["upload"] = fault
    answer = client("push", name=str(folder), repository=f"tests/upload-{fault}")
    error_of(answer, f"tests/upload-{fault}")
    assert repository.files == {"README.md": b"as it was"}
    assert files_of(folder) == before
    repository.faults.clear()
    client("push", name=str(folder), repository=f"tests/upload-{fault}")
    assert "config.json" in repository.files


def test_a_damaged_cache_is_noticed(artifact, client, hub, start, work):
    hub.add("tests/cached", files_of(artifact("tent")[0]))
    own = start(home="damaged")
    assert "logits" in own("load", name="tests/cached")
    blobs = (work / "damaged/hub/models--tests--cached/blobs").iterdir()
    blob = max(blobs, key=lambda p: p.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    error_of(own("load", name="tests/cached"), "damaged", "delete", blob.name)


def test_a_full_disk(artifact, hub, start, work, tmp_path):
    folder, _ = artifact("tent")
    hub.add("tests/disk", files_of(folder))
    own = start(home="full")
    own("full_disk")
    error_of(own("load", name="tests/disk"), "space", "tests/disk")
    saved = own("save", name=str(folder), folder=str(tmp_path / "copy"))
    error_of(saved, "cannot write")
    assert not (tmp_path / "copy").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_a_transformers_repository(client, hub, tmp_path):
    """By name and revision, with its processor; an artifact around it names the commit."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vit")
    files = {p.name: p.read_bytes() for p in (tmp_path / "vit").iterdir()}
    repository = hub.add("somebody/vit", files)
    first = repository.refs["main"]
    repository.commit(files | {"model.safetensors": b"broken"})
    folder = str(tmp_path / "tent")
    options = {"method": "tent", "lr": 1e-2, "window": 1}
    found = client("wrap", name=f"hf:somebody/vit@{first}", options=options, folder=folder)
    assert first in found["origin"], found
    images = load_file(client.images)["images"]
    wanted = tp.wrap(model, "tent", preprocess=processor, lr=1e-2, window=1)
    with torch.no_grad():
        wanted = torch.cat([wanted(images), wanted(images)])
    torch.testing.assert_close(logits_of(found), wanted)
    torch.testing.assert_close(logits_of(client("load", name=folder)), wanted)
    broken = client("wrap", name="hf:somebody/vit", options=options)
    error_of(broken, "not a safetensors file")
    error_of(client("load", name=f"somebody/vit@{first}"), "another library's model", "hf:ORG/NAME")
    error_of(client("wrap", name="hf:vit", options=options), "hf:ORG/NAME")


# -- benchmarks, branches, tags, search ------------------------------------------------------------


def test_figures_for_a_benchmark_of_the_hub(artifact, client, hub):
    """As hub-docs' eval-results.md has it; huggingface_hub's own parser reads it."""
    folder, _ = artifact("tent")
    results = ROOT / "tests/frozen/benchmark-results.json"
    common = ["publish", str(folder), "tests/benchmark", "--results", str(results)]
    told = client("command_line", arguments=[*common, "--benchmark", "org/corrupted:fog"])
    assert told["code"] == 0, told
    files = hub.repositories["tests/benchmark"].files
    (entry,) = parse_eval_result_entries(
        yaml.safe_load(files[".eval_results/ttt_plugins-1.yaml"].decode())
    )
    run = json.loads(files["results.json"])["runs"][0]
    assert (entry.dataset_id, entry.task_id) == ("org/corrupted", "fog")
    assert entry.value == pytest.approx(run["accuracy"]["tent"], abs=1e-6)
    assert entry.source_url == f"{hub.url}/tests/benchmark/blob/main/results.json"
    for word in ("tent on", run["network"], run["protocol"]):
        assert word in entry.notes
    assert run["network"] in files["README.md"].decode()
    assert client("load", name="tests/benchmark")["method"] == "tent"
    # Without a benchmark the Hub would refuse the entry: none is written, an old one goes.
    assert client("command_line", arguments=common)["code"] == 0
    assert not [name for name in hub.repositories["tests/benchmark"].files if "eval" in name]
    for wrong, words in (("nothing", "names no benchmark"), ("a/b/c", "names no benchmark")):
        told = client("command_line", arguments=[*common, "--benchmark", wrong])
        assert told["code"] == 2
        assert words in told["error_text"]
    bare = ["publish", str(folder), "tests/benchmark", "--benchmark", "org/corrupted"]
    assert "no results" in client("command_line", arguments=bare)["error_text"]


def test_publishing_on_a_branch_and_with_a_tag(artifact, client, hub):
    folder, _ = artifact("tent")
    client("push", name=str(folder), repository="tests/branches")
    repository = hub.repositories["tests/branches"]
    main = repository.refs["main"]
    other, _ = artifact("mgg")
    options = {"revision": "next", "tag": "v2"}
    pushed = client("push", name=str(other), repository="tests/branches", options=options)
    assert repository.refs == {"main": main, "next": pushed["commit"], "v2": pushed["commit"]}
    for named, method in (("", "tent"), ("@next", "mgg"), ("@v2", "mgg")):
        assert client("load", name=f"tests/branches{named}")["method"] == method
    arguments = ["publish", str(other), "tests/branches", "--revision", "next"]
    assert client("command_line", arguments=arguments)["code"] == 0
    assert repository.refs["v2"] == pushed["commit"]
    again = client("command_line", arguments=arguments)
    assert "unchanged" in again["out"]
    assert "tests/branches@next" in again["out"]
    taken = client("command_line", arguments=[*arguments, "--tag", "v2"])
    assert (taken["code"], "Traceback" in taken["error_text"]) == (2, False)
    wrong = client("command_line", arguments=[*arguments, "--tag", "../x"])
    assert "cannot be the name of a branch or a tag" in wrong["error_text"]


def test_searching_the_hub(artifact, client, offline, hub):
    folder, _ = artifact("tent")
    results = ROOT / "tests/frozen/benchmark-results.json"
    arguments = ["publish", str(folder), "tests/searched", "--results", str(results)]
    assert client("command_line", arguments=arguments)["code"] == 0
    card = "---\ntags: [ttt_plugins, sar]\nbase_model: org/net\ndatasets: [cifar10]\n"
    figures = "model-index:\n- name: x\n  results:\n  - task: {type: t}\n    dataset: {type: d, "
    figures += 'name: "D\\e[31m"}\n    metrics:\n    - {type: accuracy, value: 0.5}\n'
    hub.add("other/sar", {"README.md": (card + figures + "---\n").encode()})
    hub.add("other/foreign", {"README.md": b"---\ntags: [timm]\n---\n"})
    for flags, names in (
        ([], {"tests/searched", "other/sar"}),
        (["--method", "tent"], {"tests/searched"}),
        (["--method", "sar", "--base-model", "org/net", "--dataset", "cifar10"], {"other/sar"}),
        (["--base-model", "org/other"], set()),
    ):
        told = client("command_line", arguments=["search", *flags])
        assert told["code"] == 0, told
        assert "other/foreign" not in told["out"]
        for name in ("tests/searched", "other/sar"):
            assert (name in told["out"]) == (name in names), (flags, told["out"])
        assert bool(names) != ("no adapter on the Hub fits this" in told["out"])
    told = client("command_line", arguments=["search"])["out"]
    assert "other/sar around org/net (sar, 7 downloads)" in told
    assert "50.00 %" in told
    assert "\x1b" not in told  # a stranger's card may hold anything
    mean = json.loads(hub.repositories["tests/searched"].files["results.json"])["runs"][0]
    assert f"{100 * mean['accuracy']['tent']:.2f} %  Mean accuracy of tent on" in told
    listed = client("command_line", arguments=["list", "--hub"])["out"]
    assert "hub:\n" in listed
    assert "tests/searched" in listed
    refused = offline("command_line", arguments=["search"])
    assert (refused["code"], "offline mode" in refused["error_text"]) == (2, True)
