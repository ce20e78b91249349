"""Tent and SAR against plain loops on a copy of the model, written with torch.optim.

The loops follow arXiv 2006.10726 and 2302.12400, and share nothing with the library: the
parameters are found by their modules' classes, BatchNorm loses its running statistics, gradients
come from ``backward``.
"""

import copy
import math
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

import ttt_plugins as tp
from ttt_plugins.backbones.backbone import Backbone
from ttt_plugins.cli.flags import fields_from_pairs
from ttt_plugins.core.registry import get_method

F64 = torch.float64
TOLERANCE = 1e-10
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


def configured(model, adapted=lambda name: True):
    """Frozen but for the norms' affine parameters; BatchNorm on batch statistics."""
    model = copy.deepcopy(model).train()
    model.requires_grad_(False)
    chosen = []
    for name, module in model.named_modules():
        if isinstance(module, NORMS) and adapted(name):
            module.requires_grad_(True)
            chosen += [module.weight, module.bias]
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return model, chosen


def normalised(model, images):
    mean = torch.tensor(model.pretrained_cfg["mean"]).view(-1, 1, 1).to(images)
    std = torch.tensor(model.pretrained_cfg["std"]).view(-1, 1, 1).to(images)
    return (images - mean) / std


def entropies(logits):
    p = logits.softmax(1)
    return -(p * p.log()).sum(1)


def distance(net, plain):
    """Largest difference of any parameter; the ones that do not adapt count too."""
    adapted = {n.removeprefix("params.model."): t for n, t in net.adaptation_state().items()}
    source = dict(net.backbone.model.named_parameters())
    return max(
        (adapted.get(n, source[n]) - p).abs().max().item() for n, p in plain.named_parameters()
    )


# -- Tent --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=5e-3)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=5e-3, momentum=0.9)),
    ],
)
def test_tent_equals_a_plain_loop(kind, optimizer, make, make_model, images):
    model = make_model(kind, F64)
    net = tp.wrap(model, "tent", window=1, statistics="batch", lr=5e-3, optimizer=optimizer)
    plain, chosen = configured(model)
    rule = make(chosen)
    for seed in range(5):
        batch = images(7, seed, F64)
        logits = plain(normalised(model, batch))
        entropies(logits).mean().backward()
        rule.step()
        rule.zero_grad()
        assert (net(batch) - logits.detach()).abs().max() < TOLERANCE
        assert distance(net, plain) < TOLERANCE
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    moved = max((p - q).abs().max() for p, q in pairs)
    assert moved > 1e-3


def test_tent_momentum_is_used(make_model, images):
    model = make_model("groupnorm", F64)
    net = tp.wrap(
        model, "tent", window=1, statistics="batch", lr=1e-2, optimizer="sgd", momentum=0.5
    )
    plain, chosen = configured(model)
    rule = torch.optim.SGD(chosen, lr=1e-2, momentum=0.5)
    for seed in range(3):
        batch = images(5, seed, F64)
        entropies(plain(normalised(model, batch))).mean().backward()
        rule.step()
        rule.zero_grad()
        net(batch)
    assert distance(net, plain) < TOLERANCE


def test_tent_lowers_the_entropy(kind, make_model, images):
    net = tp.wrap(make_model(kind), "tent", window=1, statistics="batch", lr=1e-2)
    batch = images(16)
    values = [entropies(net(batch)).mean().item() for _ in range(8)]
    assert values[-1] < 0.9 * values[0]


# -- SAR ---------------------------------------------------------------------------------------


class PlainSAR:
    """Two passes, filter and re-filter, momentum SGD, recovery (arXiv 2302.12400, algorithm 1).

    The moving average is of the filtered loss, the one the step is taken on: the released code
    feeds it ``loss_second``, the mean over what both filters kept. Unlike there, a batch without
    any reliable sample moves nothing (stated in `updates.SharpnessAware`).
    """

    def __init__(self, model, lr, margin=0.4, radius=0.05, recovery=0.2, adapted=lambda n: True):
        self.source = model
        self.model, self.chosen = configured(model, adapted)
        self.start = [p.detach().clone() for p in self.chosen]
        self.lr, self.radius, self.recovery = lr, radius, recovery
        self.margin = margin * math.log(10)
        self.kept, self.resets = [], 0
        self.begin()

    def begin(self):
        with torch.no_grad():
            for p, start in zip(self.chosen, self.start, strict=True):
                p.copy_(start)
        self.velocity = [torch.zeros_like(p) for p in self.chosen]
        self.average = None

    def gradients(self, batch, reliable=None):
        logits = self.model(normalised(self.source, batch))
        each = entropies(logits)
        counted = each.detach() < self.margin
        if reliable is not None:
            counted = counted & reliable
        loss = each[counted].mean()
        grads = torch.autograd.grad(loss, self.chosen)
        return logits.detach(), counted, loss.item(), grads

    @torch.enable_grad()
    def __call__(self, batch):
        logits, first, _, grads = self.gradients(batch)
        length = math.sqrt(sum(g.square().sum().item() for g in grads))
        before = [p.detach().clone() for p in self.chosen]
        with torch.no_grad():
            for p, g in zip(self.chosen, grads, strict=True):
                p += self.radius * g / length
        _, second, loss, grads = self.gradients(batch, first)
        with torch.no_grad():
            for p, old, v, g in zip(self.chosen, before, self.velocity, grads, strict=True):
                v.mul_(0.9).add_(g)
                p.copy_(old - self.lr * v)
        self.average = loss if self.average is None else 0.9 * self.average + 0.1 * loss
        self.kept.append((len(batch), int(first.sum()), int(second.sum())))
        if self.average < self.recovery:
            self.begin()
            self.resets += 1
        return logits


def follow(net, plain, batches):
    for batch in batches:
        expected = plain(batch)
        assert (net(batch) - expected).abs().max() < TOLERANCE
        assert distance(net, plain.model) < TOLERANCE


def test_sar_equals_a_plain_loop(kind, make_model, images):
    model = make_model(kind, F64)
    # Without recovery, so that the loop is followed for long.
    net = tp.wrap(
        model, "sar", window=1, statistics="batch", lr=1e-2, recovery=0.0, skip_late=False
    )
    plain = PlainSAR(model, lr=1e-2, recovery=0.0)
    follow(net, plain, [images(24, seed, F64) for seed in range(5)])
    assert plain.resets == 0
    assert all(total > first >= second > 0 for total, first, second in plain.kept)


def test_sar_averages_the_loss_that_passed_both_filters(kind, make_model, images):
    # As the released code has it: the moving average is of the loss of the samples that pass both
    # filters.
    model = make_model(kind, F64)
    net = tp.wrap(
        model, "sar", window=1, statistics="batch", lr=1e-2, recovery=0.0, skip_late=False
    )
    plain = PlainSAR(model, lr=1e-2, recovery=0.0)
    assert math.isnan(net.adaptation_state()["rule.level"].item())  # no average yet
    for seed in range(5):
        follow(net, plain, [images(24, seed, F64)])
        level = net.adaptation_state()["rule.level"].item()
        assert abs(level - plain.average) < TOLERANCE
    assert any(first > second for _, first, second in plain.kept)


def test_sar_recovers(kind, make_model, images):
    """At a threshold that the average falls under after some batches, everything starts over."""
    model = make_model(kind, F64)
    batches = [images(24, 0, F64)] * 10  # entropy falls on a batch seen again and again
    # At margin 1 both filters keep every sample: this is about the recovery alone.
    scout = PlainSAR(model, lr=3e-2, margin=1.0, recovery=0.0)
    averages = []
    for batch in batches:
        scout(batch)
        averages.append(scout.average)
    assert averages == sorted(averages, reverse=True)
    threshold = (averages[3] + averages[4]) / 2
    net = tp.wrap(
        model,
        "sar",
        window=1,
        statistics="batch",
        lr=3e-2,
        margin=1.0,
        recovery=threshold,
        skip_late=False,
    )
    plain = PlainSAR(model, lr=3e-2, margin=1.0, recovery=threshold)
    source = net.adaptation_state()
    follow(net, plain, batches[:4])
    assert plain.resets == 0
    follow(net, plain, batches[4:5])
    state = net.adaptation_state()
    assert plain.resets == 1
    assert all(torch.equal(t, source[n]) for n, t in state.items() if n.startswith("params."))
    follow(net, plain, batches[5:])  # velocity and average begin anew as well
    assert plain.resets == 2


def test_sar_without_reliable_samples_moves_nothing(make_model, images, same_tensors):
    net = tp.wrap(
        make_model("groupnorm", confidence=0.05),
        "sar",
        window=1,
        statistics="batch",
        lr=1e-2,
        guard=False,
    )
    before = net.adaptation_state()
    logits = net(images(8))
    assert (entropies(logits) > 0.4 * math.log(10)).all()
    after = net.adaptation_state()
    assert before.pop("batches") == 0
    assert after.pop("batches") == 1
    assert same_tensors(after, before)
    assert net.skipped_updates == 0  # everything was finite


def test_sar_filters_with_the_models_number_of_classes(make_model, images):
    # margin * ln(classes): at margin 1 every sample counts, at 0 none.
    for margin, moves in ((1.0, True), (0.0, False)):
        net = tp.wrap(
            make_model("groupnorm", confidence=0.2),
            "sar",
            window=1,
            statistics="batch",
            lr=1e-1,
            margin=margin,
        )
        net(images(8))
        velocity = net.adaptation_state()["rule.velocity"]
        assert bool(velocity.any()) is moves


def affine(model, keep):
    """Names of affine parameters by the modules' classes, whatever the library thinks."""
    return {
        f"{name}.{p}"
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and keep(name)
        for p in ("weight", "bias")
    }


def test_sar_leaves_layer4_out():
    model = timm.create_model("resnet18", num_classes=10)
    net = tp.wrap(model, "sar")
    assert set(net.names) == affine(model, lambda name: not name.startswith("layer4"))
    assert len(net.names) == 30  # stem, 2 x 2 in layer1, 2 x 2 + 1 in layer2 and layer3


def test_sar_leaves_the_last_blocks_and_the_final_norm_out():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    late = ("blocks.9.", "blocks.10.", "blocks.11.", "norm")
    net = tp.wrap(model, "sar")
    assert set(net.names) == affine(model, lambda name: not name.startswith(late))
    assert len(net.names) == 9 * 2 * 2


VIT = {"image_size": 32, "patch_size": 16, "num_layers": 12, "num_heads": 1}
VIT |= {"hidden_dim": 4, "mlp_dim": 4}


@pytest.mark.parametrize(
    ("make", "by_stages", "by_names"),
    [
        (partial(timm.create_model, "resnet18"), 30, 30),
        (torchvision.models.resnet18, 30, 30),
        (partial(timm.create_model, "ttt_resnet26"), 32, 48),
        (partial(torchvision.models.VisionTransformer, **VIT), 38, 50),
        (partial(timm.create_model, "vit_tiny_patch16_224"), 36, 36),
    ],
)
def test_sar_leaves_out_by_structure_or_by_the_released_codes_names(make, by_stages, by_names):
    model = make()
    given = fields_from_pairs([("exclude", "names")], tp.SAR)  # as of --set exclude=names
    for fields, count in (({}, by_stages), (given, by_names)):
        config = tp.SAR(**fields)
        names = get_method("sar").select(config, Backbone(model, mean=0.5, std=0.25))
        assert len(names) == count
        # The released code looks at every norm, and at its name.
        if fields:
            skipped = ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm.")
            assert set(names) == {
                f"{n}.{p}"
                for n, m in model.named_modules()
                if isinstance(m, NORMS) and n != "norm" and not any(s in n for s in skipped)
                for p in ("weight", "bias")
            }


def test_sar_with_everything_or_a_choice_of_ones_own(make_model):
    model = make_model("layernorm")
    assert set(tp.wrap(model, "sar", skip_late=False).names) == affine(model, lambda name: True)
    assert len(tp.wrap(model, "sar").names) < len(tp.wrap(model, "sar", skip_late=False).names)
    chosen = ["norm.weight", "norm.bias"]  # late, but asked for
    assert tp.wrap(model, "sar", params=chosen).names == chosen


def test_sar_with_late_norms_left_out_equals_the_plain_loop(make_model, images):
    model = make_model("groupnorm", F64)
    net = tp.wrap(model, "sar", window=1, lr=1e-2, recovery=0.0)
    early = {n.rpartition(".")[0] for n in net.names}
    plain = PlainSAR(model, lr=1e-2, recovery=0.0, adapted=lambda name: name in early)
    follow(net, plain, [images(24, seed, F64) for seed in range(3)])
    assert not any(n.startswith(("stages.2", "norm")) for n in early)
