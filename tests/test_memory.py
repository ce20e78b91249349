"""A memory balanced by predicted class (`ttt_plugins.core.memory`)."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import ttt_plugins as tp
from ttt_plugins.core.memory import Balanced, images_of
from ttt_plugins.core.window import Window
from ttt_plugins.testing import all_equal, same_state

SIZE = 12
ONLINE = ["tent", "sar", "mgg"]


class Plain:
    """The rule of RoTTA's section 3.3, restated in lists: one of (number, age, entropy) a class."""

    def __init__(self, size, classes):
        self.size, self.classes = size, classes
        self.held = {label: [] for label in range(classes)}

    def score(self, item):
        return 1 / (1 + math.exp(-item[1] / self.size)) + item[2] / math.log(self.classes)

    def add(self, number, logits):
        p = logits.softmax(0)
        label, new = int(p.argmax()), [number, 0, float(-(p * p.log()).sum())]
        if len(self.held[label]) < self.size / self.classes:
            largest = max(map(len, self.held.values()))
            full = sum(map(len, self.held.values())) == self.size
            rivals = [c for c, items in self.held.items() if len(items) == largest] if full else []
            room = not full
        else:
            rivals, room = [label], False
        if rivals:
            label_of = {id(item): c for c in rivals for item in self.held[c]}
            worst = max((i for c in rivals for i in self.held[c]), key=self.score)
            if room := self.score(worst) > self.score(new):
                self.held[label_of[id(worst)]].remove(worst)
        if room:
            self.held[label].append(new)
        for items in self.held.values():
            for item in items:
                item[1] += 1


@pytest.mark.parametrize("kind", ["fair", "sorted", "one class"])
def test_it_equals_a_plain_restatement(kind):
    """Images numbered by their first pixel, in batches of several sizes."""
    memory, plain, held = Balanced(SIZE), Plain(SIZE, 5), {}
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(5, (120,), generator=generator)
    labels = {"fair": labels, "sorted": labels.sort().values, "one class": labels * 0}[kind]
    logits = 2 * torch.randn(120, 5, generator=generator)
    logits[torch.arange(120), labels] += 30
    images = (torch.arange(120.0) / 255)[:, None, None, None].expand(120, 1, 2, 2)
    for rows in torch.arange(120).split([1, 30, 2, 7, 40, 40]):
        held = memory.offer(held, images[rows], logits[rows])
        for row in rows.tolist():
            plain.add(row, logits[row])
        expected = {item[0]: item[1] for items in plain.held.values() for item in items}
        numbers = held["window.images"][:, 0, 0, 0].tolist()
        assert dict(zip(numbers, held["window.ages"].tolist(), strict=True)) == expected
        assert held["window.images"].dtype == torch.uint8
    sizes = held["window.classes"].bincount(minlength=5)
    assert sizes.max() <= SIZE / 5 + 1
    assert len(held["window.images"]) == {"fair": 12, "sorted": 12, "one class": 3}[kind]


def test_what_is_no_number_is_left_out():
    logits = torch.eye(5)[:4].clone()
    logits[2] = torch.nan
    held = Balanced(SIZE).offer({}, torch.rand(4, 1, 2, 2), logits)
    assert held["window.classes"].tolist() == [0, 1, 3]
    assert held["window.offered"] == 4


@pytest.mark.parametrize("method", ONLINE)
def test_a_stream_stops_and_goes_on(method, make_model, make_net, images, tmp_path):
    """Cut anywhere, through a file, in batches below and above the size."""
    sizes = (3, 16, 1, 5, 6, 20)

    def build(**fields):
        fields = {"window": SIZE, "memory": "balanced", "lr": 0.05, "guard": True} | fields
        return make_net(method, make_model("groupnorm"), **fields)

    unbroken, still = build(), build(lr=0.0)
    expected = [unbroken(images(n, seed)) for seed, n in enumerate(sizes)]
    plain = still.backbone.source_logits
    assert all_equal([still(images(n, 9)) for n in sizes], [plain(images(n, 9)) for n in sizes])
    for stop in range(len(sizes)):
        before, after = build(), build()
        logits = [before(images(n, seed)) for seed, n in enumerate(sizes[:stop])]
        save_file(before.adaptation_state(), tmp_path / "state.safetensors")
        after.load_adaptation_state(load_file(tmp_path / "state.safetensors"))
        logits += [after(images(n, stop + i)) for i, n in enumerate(sizes[stop:])]
        assert all_equal(logits, expected), stop
        assert same_state(after.adaptation_state(), unbroken.adaptation_state()), stop
    assert unbroken.backwards > 0
    assert not all_equal(expected, [plain(images(n, seed)) for seed, n in enumerate(sizes)])
    unbroken.reset()
    assert not any(n.startswith("window.") for n in unbroken.adaptation_state())


def test_states_that_cannot_be(make_model, make_net, images):
    fields = {"window": SIZE, "guard": False}
    net = make_net("tent", make_model("groupnorm"), memory="balanced", **fields)
    other = make_net("tent", make_model("groupnorm"), **fields)
    net(images(5))
    state = net.adaptation_state()
    for name, wrong, said in (
        ("window.ages", -1 - state["window.ages"], "out of range"),
        ("window.classes", state["window.classes"].float(), "unknown here"),
        ("window.entropies", state["window.entropies"] / 0, "out of range"),
        ("window.images", state["window.images"][:, :1], "expected"),
        ("window.more", state["window.ages"], "unknown here"),
    ):
        with pytest.raises(tp.InputError, match=said):
            net.load_adaptation_state(state | {name: wrong})
    with pytest.raises(tp.InputError, match="unknown here"):
        other.load_adaptation_state(state)


def test_it_is_a_choice(make_model, make_net):
    assert images_of(tp.Tent()) == Window(64)
    assert images_of(tp.Tent(memory="balanced", window=9)) == Balanced(9)
    with pytest.raises(tp.InputError, match="memory"):
        tp.Tent(memory="fair")
    text = make_net("tent", make_model("groupnorm"), memory="balanced", window=9).describe()
    assert "memory: up to 9 images, balanced by predicted class" in text
