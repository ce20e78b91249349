"""A change of the shift is seen in the images alone (`ttt_plugins.backbones.look`)."""

import pytest
import torch
from fixed_stream import sample
from torch._subclasses.fake_tensor import FakeTensorMode

from ttt_plugins.backbones.look import CHANGED, HORIZON, NUMBERS, Watch, look


@pytest.fixture(scope="module")
def tiles():
    """96 photographs under each of four shifts."""
    kinds = ("clean", "gaussian_noise", "defocus_blur", "contrast")
    return {kind: sample(kind, 96) for kind in kinds}


def changes(batches, watch=None):
    """Positions of the batches that changed the shift."""
    watch, found = watch or Watch.start(torch.device("cpu")), []
    for place, batch in enumerate(batches):
        changed, watch = watch.after(batch)
        if changed:
            found.append(place)
    return found


@pytest.mark.parametrize("first", ["clean", "gaussian_noise", "defocus_blur", "contrast"])
def test_another_corruption_is_noticed_at_once(tiles, first):
    for second in tiles:
        batches = [*tiles[first].split(32), *tiles[second].split(32)]
        assert changes(batches) == ([3] if second != first else []), second


def test_single_images_need_a_few(tiles):
    stream = torch.cat([tiles["clean"], tiles["gaussian_noise"]]).split(1)
    found = changes(stream)
    assert found
    assert 96 < found[0] < 96 + 32
    assert changes(tiles["clean"].split(1)) == []


def test_a_mixture_is_one_shift(tiles):
    order = torch.randperm(4 * 96, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat(list(tiles.values()))[order]
    assert changes(mixed.split(64)) == []
    assert changes(mixed.split(1)) == []


def test_a_single_picture_never_changes(tiles):
    picture = tiles["clean"][:1].repeat(64, 1, 1, 1)
    assert changes([picture, picture, *picture.split(1)]) == []


def test_it_equals_a_plain_restatement(tiles):
    """The score of two batches: the difference of means in units of the spread, less chance."""
    a, b = tiles["clean"][:48], tiles["clean"][48:88] * 0.93
    watch = Watch.start(torch.device("cpu")).after(a)[1]
    before = look(a).double()
    late = (16 * before.mean(0) + 40 * look(b).double().mean(0)) / 56
    spread = before.var(0, correction=0).clamp_min(0.01)
    score = ((late - before.mean(0)) ** 2 / spread).mean() - 1 / 56 - 1 / 48
    for threshold, expected in ((score - 1e-3, True), (score + 1e-3, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ttt_plugins.backbones.look.CHANGED", threshold)
            changed, after = watch.after(b)
            assert bool(changed) == expected
            assert after.counts.tolist() == ([56.0, 56.0] if expected else [88.0, 56.0])
    assert score < CHANGED
    assert HORIZON > 88


def test_what_is_no_image_counts_for_nothing(tiles):
    batch = tiles["clean"][:32]
    broken = torch.cat([batch, batch[:1] * torch.nan])
    start = Watch.start(torch.device("cpu"))
    ours, theirs = start.after(broken)[1], start.after(batch)[1]
    assert torch.allclose(ours.looks, theirs.looks)
    assert torch.equal(ours.counts, theirs.counts)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 1, 1, 9), (3, 4, 8, 8), (2, 3, 5, 1)])
def test_images_of_any_shape_have_a_look(shape):
    found = look(torch.rand(shape))
    assert found.shape == (shape[0], NUMBERS)
    assert torch.isfinite(found).all()


def test_an_accelerator_is_not_waited_for():
    with FakeTensorMode():
        watch = Watch.start(torch.device("cuda"))
        changed, _ = watch.after(torch.empty(4, 3, 8, 8, device="cuda"))
        assert changed.device.type == "cuda"
