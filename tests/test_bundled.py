"""The artifacts that ship inside the package."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import PER_IMAGE

import ttt_plugins as tp
from ttt_plugins.artifacts.folder import bundled_folder, read_artifact

SOURCES = ["source-resnet26-cifar10", "source-resnet26bn-cifar10", "source-vit-tiny-cifar10"]
OPTIMIZERS = ["mgg-resnet26-cifar10", "mgg-resnet26bn-cifar10", "mgg-vit-tiny-cifar10"]
SELF_SUPERVISED = ["ttt-resnet26-cifar10", "mt3-resnet26-cifar10"]
UNIVERSAL = "mgg-universal"  # of no classifier's


@pytest.mark.parametrize("name", tp.list_bundled())
def test_what_was_learned_carries_its_hash(name, tmp_path):
    artifact = read_artifact(bundled_folder(name))
    assert ("learned" in artifact.config) == bool(artifact.tensors)
    if not artifact.tensors:
        return
    folder = Path(shutil.copytree(bundled_folder(name), tmp_path / name))
    carried = (folder / "adapter.safetensors").exists()
    file = folder / ("adapter.safetensors" if carried else "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(tp.ArtifactError, match="are not those that were saved"):
        read_artifact(folder)


def test_all_ship():
    assert {*SOURCES, *OPTIMIZERS, *SELF_SUPERVISED, UNIVERSAL} <= set(tp.list_bundled())


@pytest.mark.parametrize("name", sorted({*tp.list_bundled()} - {UNIVERSAL}))
def test_loads_and_predicts(name, images):
    net = tp.from_pretrained(f"bundled:{name}")
    logits = net(images(4))
    assert logits.shape == (4, 10)
    assert torch.isfinite(logits).all()
    assert name.startswith(net.method + "-")


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("method", tp.list_methods())
def test_every_method_wraps_a_bundled_source(name, method, images):
    if method in PER_IMAGE:  # they need heads trained for the model, and say so
        with pytest.raises(tp.InputError, match=f"ttt-plugins train {method}"):
            tp.wrap(f"bundled:{name}", method)
        return
    net = tp.wrap(f"bundled:{name}", method, **({} if method == "source" else {"window": 4}))
    assert torch.isfinite(net(images(4))).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bundled_optimizer_adapts(name, images, moved):
    net = tp.from_pretrained(f"bundled:{name}", window=8)
    net(images(8))
    assert moved(net)
    assert net.skipped_updates == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_source_statistics_are_at_hand(name):
    # Discrepancy 0 would be the optimizer's own choice; otherwise the term must be in force.
    net = tp.from_pretrained(f"bundled:{name}")
    assert net.config.discrepancy == 0 or "no source statistics" not in net.describe()


def test_a_bare_mgg_takes_the_universal_optimizer(kind, make_model, images, moved, same_tensors):
    model = make_model(kind)
    net = tp.wrap(model, "mgg", window=8)
    assert torch.isfinite(net(images(8))).all()
    assert moved(net)
    named = tp.from_pretrained(f"bundled:{UNIVERSAL}", backbone=model, window=8)
    assert named.config == net.config
    assert same_tensors(named.learned_tensors(), net.learned_tensors())
    with pytest.raises(tp.ArtifactError, match="backbone="):
        tp.from_pretrained(f"bundled:{UNIVERSAL}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bundled_model_takes_its_own_optimizer(name, same_tensors):
    """By its weights, under whatever name or none."""
    own = tp.from_pretrained(f"bundled:{name}")
    source = name.replace("mgg-", "bundled:source-")
    for model in (source, tp.wrap(source, "source").backbone.model):
        net = tp.wrap(model, "mgg")
        assert net.config == own.config
        assert same_tensors(net.learned_tensors(), own.learned_tensors())


def test_a_field_of_a_bundled_artifact_can_be_changed(images):
    net = tp.from_pretrained("bundled:mgg-resnet26bn-cifar10", lr=0.0)
    plain = tp.wrap("bundled:source-resnet26bn-cifar10", "source", statistics=net.config.statistics)
    for seed in range(2):
        assert torch.equal(net(images(8, seed)), plain(images(8, seed)))


def test_an_unknown_bundled_name_lists_the_real_ones():
    with pytest.raises(tp.ArtifactError, match="source-resnet26-cifar10"):
        tp.from_pretrained("bundled:nothing")


def test_a_bundled_optimizer_keeps_the_statistics_of_its_own_network(make_model):
    own = tp.wrap("bundled:source-resnet26-cifar10", "mgg")
    assert "source.mean" in own.learned_tensors()
    other = tp.wrap(make_model("groupnorm"), "mgg")
    assert "source.mean" not in other.learned_tensors()
    assert "has no effect" in other.describe()
