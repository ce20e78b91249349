"""Every method, the benchmark and every training on simulated devices; `test_cuda.py` runs this.

What a GPU computes cannot be tested here. That nothing mixes devices can, and that Python waits
for the device nowhere but where this file says so.
"""

import pytest
import torch

import ttt_plugins as tp
from ttt_plugins.benchmark import CorruptionData, run_benchmark
from ttt_plugins.core.notices import LOOK_EVERY
from ttt_plugins.data.images import LabelledImages
from ttt_plugins.train.byol import ByolRecipe, train_byol
from ttt_plugins.train.joint import HeadRecipe, JointRecipe, fit_rotation_head, train_joint
from ttt_plugins.train.mgg import MGGRecipe, train_mgg, untrained
from ttt_plugins.train.mt3 import MT3Recipe, train_mt3
from ttt_plugins.train.source import SourceRecipe, train_source

SMALL = {"mt3": {"copies": 1, "chunk_size": 2}}
SMALL["ttt"] = SMALL["mt3"] | {"steps": 1}
#: Reads of a batch of two images: where the program waits for the device. It may only shrink.
READS = {
    "ttt threshold": {"core/per_image.py:adapt index": 1},
    "ttt online threshold": {"core/per_image.py:_stream _local_scalar_dense": 2},
}
#: Reads of one epoch of two steps (``mt3``: one). None grows with the steps but the first one of
#: ``source`` (is the batch mixed?) and those of ``mgg`` (is a gradient finite?).
TRAINING_READS = {
    "source": {
        "train/source.py:_augment _local_scalar_dense": 2,
        "train/network.py:run _local_scalar_dense": 1,
    },
    "joint": {"train/network.py:run _local_scalar_dense": 2},
    "byol": {"train/network.py:run _local_scalar_dense": 3},
    "mt3": {"train/mt3.py:_means _local_scalar_dense": 5},
    "head": {"methods/ttt_head.py:_descend _local_scalar_dense": 3},
    "mgg": {
        "train/mgg.py:run_sequence _local_scalar_dense": 3,
        "train/mgg.py:_descend _local_scalar_dense": 2,
        "train/mgg.py:run _local_scalar_dense": 1,
    },
}
#: Reads before and after an epoch that are not counted.
AROUND = (
    "artifacts/tensor_files.py:fingerprint",
    "backbones/outputs.py:",  # of a model's first logits
    "backbones/runner.py:",  # what its first pass writes
    "benchmark/evaluate.py:",
    "core/inputs.py:check_pixels",
    "core/notices.py:look_at_pixels",
    "train/epochs.py:",
)


def reads_of(simulation, net, batch):
    """What a batch waits for, after the first one, whose pixels are looked at."""
    with torch.autocast("cuda", torch.bfloat16):
        net(batch)
    with simulation.watching():
        logits = net(batch)
    assert logits.shape == (len(batch), 10)
    assert logits.device == batch.device
    assert not simulation.uploads
    return dict(simulation.reads)


def test_adapter(simulation, method, kind, make_net, make_model, images):
    """To a device, autocast, state out and in, export, another device in mid-stream, and back."""
    options = SMALL.get(method, {})
    if kind == "groupnorm" and options:
        options = options | {"chunk_size": "auto"}
    net = make_net(method, make_model(kind), **options)
    if method in ("tent", "sar", "mgg"):
        net(images(2))
    batch = images(2).to("cuda:0")
    net.to("cuda")
    assert reads_of(simulation, net, batch) == {}
    state = net.adaptation_state()
    net.load_adaptation_state({n: t.cpu() for n, t in state.items()})  # as from a file
    assert net.export()(batch).device == batch.device
    net.to("cuda:1")
    with pytest.raises(tp.InputError, match="images are on cuda:0"):
        net(batch)
    assert net.adaptation_state().keys() == state.keys()
    net(batch.to("cuda:1"))
    net.reset()
    net.to("cpu")
    assert net.skipped_updates == 1  # what a look at a number found
    assert net(images(2)).device.type == "cpu"


VARIANTS = {
    "tent window": ("tent", {"window": 3}),
    "tent half": ("tent", {"dtype": torch.float16}),
    "tent stream": ("tent", {"statistics": "stream"}),
    "source stream": ("source", {"statistics": "stream"}),
    "source classes": ("source", {"classes": [9, *range(9)]}),
    "mgg mix": ("mgg", {"statistics": "mix"}),
    "ttt threshold": ("ttt", {"threshold": 0.5}),
    "ttt online": ("ttt", {"mode": "online"}),
    "ttt online threshold": ("ttt", {"mode": "online", "threshold": 0.5}),
    "ttt batch": ("ttt", {"mode": "batch"}),
    "ttt norm": ("ttt", {"params": "norm", "steps": 2}),
    "mt3 vote": ("mt3", {"vote": True, "params": "norm"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(simulation, variant, make_net, make_model, images):
    method, options = VARIANTS[variant]
    options = SMALL.get(method, {}) | options
    dtype = options.pop("dtype", torch.float32)
    simulation.truth = False  # no image is sure
    net = make_net(method, make_model("batchnorm", dtype), **options).to("cuda")
    assert reads_of(simulation, net, images(2, dtype=dtype).to("cuda")) == READS.get(variant, {})


def test_images_wait_on_the_device_as_they_are(simulation, make_net, make_model, images):
    net = make_net("tent", make_model("groupnorm"), window=3)
    net(images(1))
    net.to("cuda")
    for _ in range(3):
        net(images(1).to("cuda"))
    assert net.batches == 4
    assert net.backwards == 3


def test_bad_pixels_are_told_of_later(simulation, make_net, make_model, images):
    net, batch = make_net("source", make_model("groupnorm")).to("cuda"), images(1).to("cuda")
    net(batch)
    simulation.number = 255
    for _ in range(LOOK_EVERY - 1):
        net(batch)
    with pytest.raises(tp.InputError, match="from 255 to 255, in one of the batches 2 to 65"):
        net(batch)
    net(batch)
    for look in (net.adaptation_state, net.export):
        with pytest.raises(tp.InputError, match="one of the batches"):
            look()
        net(batch)
    with pytest.raises(tp.InputError, match="from 255 to 255; the adapter"):
        make_net("source", make_model("groupnorm")).to("cuda")(batch)


def some_data(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count) % 10)


def test_benchmark(simulation, make_net, make_model, images, tmp_path, monkeypatch):
    """Reads and uploads are for the cell, whatever the number of its batches."""
    net = make_net("tent", make_model("groupnorm")).to("cuda")
    net(images(2).to("cuda"))
    seen, options = [], {"batch_size": 2, "progress": False, "out": tmp_path / "out"}
    for batches in (2, 3):
        data = CorruptionData.from_arrays({("fog", 3): some_data(2 * batches)})
        with simulation.watching():
            results = run_benchmark(net, data, overwrite=True, **options)
        seen.append((simulation.reads, simulation.uploads))
        assert results.methods[0].cells[0].n == 2 * batches
    assert seen[0] == seen[1]
    card = results.settings["accelerator"]
    assert (card["name"], card["capability"]) == ("a simulated device", "9.0")
    assert card["cudnn_tf32"] is torch.backends.cudnn.allow_tf32
    run_benchmark(net, data, resume=True, **options)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "another device")
    with pytest.raises(tp.InputError, match="accelerator differs"):
        run_benchmark(net, data, resume=True, **options)


GROUPNORM = {"width": 8, "depth": 8, "groups": 4}


def train(name, steps, out, model):
    """One epoch of as many steps."""
    data, quiet = some_data(4 * steps), {"progress": False}
    there, common = {"device": "cuda"} | quiet, {"model_args": GROUPNORM, "epochs": 1}
    if name == "source":
        recipe = SourceRecipe(batch_size=4, cutmix=1.0, autocast=True, **common)
        train_source(recipe, data, some_data(4), out, **there)
    elif name == "joint":
        train_joint(JointRecipe(batch_size=4, **common), data, some_data(4), out, **there)
    elif name == "byol":
        recipe = ByolRecipe(batch_size=4, task_images=2, **common)
        train_byol(recipe, data, some_data(4), out, **there)
    elif name == "mt3":
        train_mt3(MT3Recipe(tasks=2, task_images=2, **common), data, out, **there)
    elif name == "head":
        fit_rotation_head(model, data.images, HeadRecipe(epochs=1, batch_size=4), **there)
    else:
        recipe = MGGRecipe(epochs=1, length=steps, batch_size=2, grid=(1e-3,))
        train_mgg(recipe, untrained(model, device="cuda"), {"fog": some_data(8)}, out, **quiet)


@pytest.mark.parametrize("name", ["source", "joint", "byol", "mt3", "head", "mgg"])
def test_training(simulation, name, make_model, tmp_path):
    train(name, 1 if name == "mt3" else 2, tmp_path, make_model("groupnorm"))
    counted = {p: n for p, n in simulation.reads.items() if not p.startswith(AROUND)}
    assert counted == TRAINING_READS[name]
