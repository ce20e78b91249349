"""The artifacts that ship inside the package (issue 2, part 4)."""

import pytest
import torch
from conftest import PER_IMAGE

import ttt_plugins as tp

SOURCES = ["source-resnet26-cifar10", "source-resnet26bn-cifar10", "source-vit-tiny-cifar10"]
OPTIMIZERS = ["mgg-resnet26-cifar10", "mgg-resnet26bn-cifar10", "mgg-vit-tiny-cifar10"]


def test_all_six_ship():
    assert set(SOURCES + OPTIMIZERS) <= set(tp.list_bundled())


@pytest.mark.parametrize("name", sorted({*SOURCES, *OPTIMIZERS, *tp.list_bundled()}))
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
    net = tp.wrap(f"bundled:{name}", method)
    assert torch.isfinite(net(images(4))).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bundled_optimizer_adapts(name, images, moved):
    net = tp.from_pretrained(f"bundled:{name}")
    net(images(8))
    assert moved(net)
    assert net.skipped_updates == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_source_statistics_are_at_hand(name):
    # Discrepancy 0 would be the optimizer's own choice; otherwise the term must be in force.
    net = tp.from_pretrained(f"bundled:{name}")
    assert net.config.discrepancy == 0 or "no source statistics" not in net.describe()


def test_a_bare_mgg_takes_a_bundled_optimizer(kind, make_model, images, moved):
    net = tp.wrap(make_model(kind), "mgg")
    assert torch.isfinite(net(images(8))).all()
    assert moved(net)


def test_a_field_of_a_bundled_artifact_can_be_changed(images):
    net = tp.from_pretrained("bundled:mgg-resnet26bn-cifar10", lr=0.0)
    plain = tp.wrap("bundled:source-resnet26bn-cifar10", "source", statistics=net.config.statistics)
    for seed in range(2):
        assert torch.equal(net(images(8, seed)), plain(images(8, seed)))


def test_an_unknown_bundled_name_lists_the_real_ones():
    with pytest.raises(tp.ArtifactError, match="source-resnet26-cifar10"):
        tp.from_pretrained("bundled:nothing")
