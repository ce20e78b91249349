"""docs/export.md: what leaves by torch.export and ONNX is the adapted network, without us."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ttt_plugins as tp

DOCS = Path(__file__).parent.parent / "docs" / "export.md"
ALONE = """
import os, sys
import torch, numpy
os.chdir(sys.argv[1])
images = torch.load("images.pt", weights_only=True)
program = torch.export.load("adapted.pt2").module()
torch.save(program(images), "torch.pt")
try:
    import onnxruntime
except ImportError:
    onnxruntime = None
if onnxruntime is not None:
    session = onnxruntime.InferenceSession("adapted.onnx")
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.save(torch.from_numpy(logits), "onnx.pt")
assert not [name for name in sys.modules if name.startswith(("ttt_plugins", "timm"))]
"""


def documented():
    """The lines of docs/export.md that export a network."""
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[0]
    return code[code.index("example, sizes") :]


@pytest.fixture(params=["batchnorm", "layernorm"])
def adapted(request, make_model, images):
    """A convolutional network and a ViT, and the same unadapted."""
    net = tp.wrap(make_model(request.param), "tent", window=1, lr=0.05)
    for seed in range(3):
        net(images(8, seed))
    return net, tp.wrap(make_model(request.param), "source")


@pytest.mark.filterwarnings("ignore")
def test_the_exported_network_is_the_adapted_one_and_needs_nothing_of_ours(
    adapted, images, tmp_path, monkeypatch
):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    net, source = adapted
    batch = images(5, 7)  # of another size than the example's
    with torch.no_grad():
        plain = net.export()(batch)
    assert (plain - source(batch)).abs().max() > 0.1
    monkeypatch.chdir(tmp_path)
    exec(documented(), {"torch": torch, "net": net, "images": images(4, 9)})  # as a reader would
    torch.save(batch, "images.pt")
    alone = [sys.executable, "-I", "-W", "ignore", "-c", ALONE, str(tmp_path)]
    subprocess.run(alone, check=True, timeout=200)
    for file in ("torch.pt", "onnx.pt"):
        found = torch.load(file, weights_only=True)
        torch.testing.assert_close(found.detach(), plain, rtol=0, atol=1e-4)
