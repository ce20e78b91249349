"""Data sets on the Hub as sources of images: the genuine client against a Hub on the loopback."""

import importlib.util
import io
import json
import socket
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import load_file
from test_hub import Client

from ttt_plugins.data.opening import open_images
from ttt_plugins.errors import InputError, MissingDependencyError

PICTURES = [Image.new("RGB", (8, 6), (30 * i, 5, 200 - 20 * i)) for i in range(6)]
EXPECTED = torch.stack(
    [torch.tensor([30 * i, 5, 200 - 20 * i], dtype=torch.uint8) for i in range(6)]
)[:, :, None, None].expand(6, 3, 6, 8)


def encoded(drawn):
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def shard(rows, names=None):
    table = pa.table({"image": [encoded(PICTURES[i]) for i in rows], "label": list(rows)})
    if names:
        label = {"names": names, "_type": "ClassLabel"}
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


SHARDS = {
    "README.md": b"# flowers",
    "data/train-00000-of-00002.parquet": shard((0, 1, 2)),
    "data/train-00001-of-00002.parquet": shard((3, 4, 5)),
}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        server.add("datasets/org/flowers", SHARDS)
        server.add("datasets/org/split", SHARDS | {"data/test-00000-of-00001.parquet": shard((5,))})
        server.add("datasets/org/text", {"README.md": b"# no pictures"})
        named = shard(range(6), list("abcdef"))
        server.add("datasets/org/named", {"data/train-00000-of-00001.parquet": named})
        cut = server.add("datasets/org/cut", SHARDS)
        cut.faults["data/train-00001-of-00002.parquet"] = "broken"
        # What the Hub itself makes of a data set in another format.
        made = server.add("datasets/org/archive", {"default/train/0000.parquet": shard((1, 2))})
        converted = made.refs["main"]
        made.commit({"photographs.zip": b"PK"})
        made.refs["refs/convert/parquet"] = converted
        yield server


@pytest.fixture(scope="module")
def ask(hub, tmp_path_factory):
    """``ask(source, **environment)`` -> answer and images, in a process with that environment."""
    folder, clients = tmp_path_factory.mktemp("datasets"), {}

    def run(source, endpoint=hub.url, stream=False, **environment):
        key = (endpoint, *environment.items())
        if key not in clients:
            clients[key] = Client(folder / "home", endpoint, folder, **environment)
        out = folder / "images.safetensors"
        answer = clients[key]("images", source=source, file=str(out), stream=stream)
        return answer, None if "error" in answer else load_file(out)["images"]

    yield run
    for client in clients.values():
        client.close()


def nobody():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_shards_are_downloaded_once_and_read_from_the_cache(ask, hub):
    # One of the shards alone does not make a complete set.
    _, images = ask("hf://datasets/org/flowers/data/train-00001*")
    assert torch.equal(images, EXPECTED[3:])
    without, _ = ask("hf://datasets/org/flowers", HF_HUB_OFFLINE="1")
    assert "HubError" in without["kinds"] or "DataError" in without["kinds"]
    assert "cache" in without["error"]
    for source in (
        "hf://datasets/org/flowers",
        "hf://datasets/org/flowers@main",
        f"hf://datasets/org/flowers@{hub.repositories['datasets/org/flowers'].refs['main']}",
        "hf://datasets/org/flowers/train",
        "hf://datasets/org/flowers/data",
    ):
        answer, images = ask(source)
        assert torch.equal(images, EXPECTED), source
        assert answer["labels"] == list(range(6))
    for where in ({"HF_HUB_OFFLINE": "1"}, {"endpoint": nobody()}):
        answer, images = ask("hf://datasets/org/flowers", **where)
        assert torch.equal(images, EXPECTED)


def test_one_split_is_read_and_which_has_to_be_said(ask):
    answer, _ = ask("hf://datasets/org/split")
    assert "more than one split" in answer["error"]
    assert "['test', 'train']" in answer["error"]
    assert torch.equal(ask("hf://datasets/org/split/test")[1], EXPECTED[5:])
    assert torch.equal(ask("hf://datasets/org/split/train")[1], EXPECTED)
    answer, _ = ask("hf://datasets/org/split/dev")
    assert "no parquet files match 'dev'" in answer["error"]


def test_what_the_hub_converted_is_found(ask):
    assert torch.equal(ask("hf://datasets/org/archive")[1], EXPECTED[1:3])
    assert torch.equal(ask("hf://datasets/org/archive@refs/convert/parquet")[1], EXPECTED[1:3])


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ("hf://datasets/org/nothing", "HubError", "there is no data set"),
        ("hf://datasets/org/flowers@v9", "HubError", "no revision 'v9'"),
        ("hf://datasets/org/text", "DataError", "no parquet files at revision main"),
        ("hf://datasets/flowers", "InputError", "hf://datasets/ORG/NAME"),
        ("hf://models/org/flowers", "InputError", "hf://datasets/ORG/NAME"),
    ],
)
def test_what_is_not_there_is_one_line(ask, source, kind, said):
    answer, _ = ask(source)
    assert kind in answer["kinds"]
    assert said in answer["error"]


needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None,
    reason='datasets is not installed: pip install "ttt-plugins[datasets]"',
)


@needs_datasets
def test_the_genuine_package_streams_the_same_images(ask, hub):
    before = len(hub.requests)
    for source in ("hf://datasets/org/flowers", "hf://datasets/org/flowers@main/train"):
        answer, images = ask(source, stream=True)
        assert torch.equal(images, EXPECTED), source
        assert answer["labels"] == list(range(6))
    assert torch.equal(ask("hf://datasets/org/split/test", stream=True)[1], EXPECTED[5:])
    pattern = "hf://datasets/org/flowers/data/train-00001*"
    assert torch.equal(ask(pattern, stream=True)[1], EXPECTED[3:])
    read = [path for kind, path, _ in hub.requests[before:] if kind == "GET"]
    assert any(path.endswith("train-00001-of-00002.parquet") for path in read)
    downloaded, streamed = (ask("hf://datasets/org/named", stream=s)[0] for s in (False, True))
    assert downloaded == streamed
    assert streamed["classes"] == list("abcdef")


@needs_datasets
@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ("hf://datasets/org/nothing", "HubError", "there is no data set"),
        ("hf://datasets/org/flowers@v9", "HubError", "no revision 'v9'"),
        ("hf://datasets/org/split/dev", "DataError", "['train', 'test']"),
        ("hf://datasets/org/flowers/no-*.parquet", "DataError", "no-*.parquet"),
        ("hf://datasets/org/cut", "HubError", "cannot be read"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(ask, source, kind, said):
    answer, _ = ask(source, stream=True)
    assert kind in answer["kinds"]
    assert said in answer["error"]
    assert "\n" not in answer["error"]


def test_streaming_needs_its_package_and_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"ttt-plugins\[datasets\]"):
        open_images("hf://datasets/org/flowers", stream=True)
    with pytest.raises(InputError, match="only data sets on the Hub"):
        open_images(EXPECTED, stream=True)
