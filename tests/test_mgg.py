"""MGG against a plain restatement of arXiv 2412.16901: one scalar at a time, in float64.

Nothing here uses the library's formulas: the inner gradient of the memory layer comes from
autograd on one scalar's fast weights, the network's gradient from autograd on a loss written
with forward hooks on a copy of the plain model.
"""

import copy
import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import ttt_plugins as tp
from ttt_plugins.backbones.backbone import Backbone
from ttt_plugins.backbones.statistics import Feature, feature_statistics
from ttt_plugins.core import gradient_memory, scope
from ttt_plugins.core.online import Loss, Objective, Online, evaluate
from ttt_plugins.core.registry import get_method
from ttt_plugins.core.updates import GradientMemory
from ttt_plugins.train import mgg as meta

F64 = torch.float64
D = 8
STEPS = 4
TOLERANCE = 1e-10

#: The library adds this to a variance before its square root, whose slope is infinite at zero.
#: The paper does not have it; 1e-10 would otherwise be out of reach for channels of small
#: deviation. `test_the_guard_does_not_matter` bounds what it does.
VARIANCE_GUARD = 1e-12


# -- the restatement ---------------------------------------------------------------------------


def layer_norm(z, gain, bias, eps=1e-6):
    mean = sum(z) / len(z)
    var = sum((a - mean) ** 2 for a in z) / len(z)
    return torch.stack(
        [(z[i] - mean) / torch.sqrt(var + eps) * gain[i] + bias[i] for i in range(D)]
    )


class ScalarMemory:
    """The memory layer of ONE adapted scalar."""

    def __init__(self, slow):
        self.slow = slow
        self.m = self.v = 0.0
        self.t = 0
        self.W = slow["W1"][0].clone()
        self.b = slow["b1"][0, 0].clone()

    def update(self, g):
        slow = self.slow
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.99 * self.v + 0.01 * g * g
        # "bias-corrected with exponent t+1 where t counts from 1": the first exponent is 2.
        m_hat = self.m / (1 - 0.9 ** (self.t + 1))
        v_hat = self.v / (1 - 0.99 ** (self.t + 1))
        root = math.sqrt(v_hat) + 1e-8
        x = torch.tensor([m_hat / root, g / root], dtype=F64)
        q = slow["q_proj.weight"] @ x
        k = slow["k_proj.weight"] @ x
        v = slow["v_proj.weight"] @ x
        gain, bias = slow["ttt_norm_weight"][0], slow["ttt_norm_bias"][0]

        W = self.W.clone().requires_grad_()
        b = self.b.clone().requires_grad_()
        reconstruction = layer_norm(k @ W + b, gain, bias)
        inner = 0.5 * ((reconstruction - (v - k)) ** 2).sum()
        slope_W, slope_b = torch.autograd.grad(inner, (W, b))
        gate = slow["learnable_ttt_lr_weight"][0, 0] @ x + slow["learnable_ttt_lr_bias"][0, 0]
        share = max(0.0, 1 + slow["learnable_token_idx"].item())
        eta = torch.sigmoid(gate) * share / D
        self.W = (W - eta * slope_W).detach()
        self.b = (b - eta * slope_b).detach()

        h = q + layer_norm(q @ self.W + self.b, gain, bias)
        out = layer_norm(h, slow["post_norm.weight"], slow["post_norm.bias"])
        return torch.tanh(slow["o_proj.weight"][0] @ out).item()


def plain_loss(model, images, tapped, batch_norm, source, discrepancy, mean, std):
    """Logits and equation 3, from forward hooks on a plain model."""
    seen = {}
    hooks = [
        dict(model.named_modules())[name].register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(
                name, args[0] if batch_norm else output
            )
        )
        for name in tapped
    ]
    logits = model((images - mean) / std)
    for hook in hooks:
        hook.remove()
    p = torch.softmax(logits, 1)
    loss = -(p * torch.log(p)).sum() / len(images)
    if source is None:
        return logits, loss
    distance, start = 0.0, 0
    for name in tapped:
        x = seen[name]
        if x.ndim == 3:  # a ViT's tokens: the class token alone, over the batch
            columns = x[:, 0]
        else:  # a feature map: over batch and positions
            columns = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        centre = columns.sum(0) / len(columns)
        variance = ((columns - centre) ** 2).sum(0) / (len(columns) - 1)
        deviation = torch.sqrt(variance + VARIANCE_GUARD)
        if batch_norm:
            own_mean, own_var, eps = source[name]
            centre = (centre - own_mean) / torch.sqrt(own_var + eps)
            deviation = deviation / torch.sqrt(own_var + eps)
            target_mean, target_std = torch.zeros_like(centre), torch.ones_like(centre)
        else:
            target_mean = source[0][start : start + len(centre)]
            target_std = source[1][start : start + len(centre)]
            start += len(centre)
        distance = distance + ((deviation - target_std) ** 2).sum()
        distance = distance + ((centre - target_mean) ** 2).sum()
    return logits, loss + discrepancy / 64 * distance


def double(slow):
    return {n: t.to(F64) for n, t in slow.items()}


def forget_running_statistics(model):
    """BatchNorm on the batch's own statistics, by PyTorch's rule for missing ones."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return model


# -- the memory layer --------------------------------------------------------------------------


def test_there_are_164_slow_weights():
    slow = gradient_memory.init_slow(torch.Generator().manual_seed(0))
    assert sum(t.numel() for t in slow.values()) == 164


def test_initial_slow_weights_are_as_published():
    # "Initial (W, b) are learned (std 0.02, zeros)"
    slow = gradient_memory.init_slow(torch.Generator().manual_seed(0))
    assert 0.01 < slow["W1"].std() < 0.03
    assert not slow["b1"].any()


def test_memory_layer_equals_the_restatement(slow):
    slow = double(slow)
    generator = torch.Generator().manual_seed(3)
    scales = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1.0, 0.0], dtype=F64)
    count = len(scales)
    state = gradient_memory.init_state(slow, count)
    plain = [ScalarMemory(slow) for _ in range(count)]
    for _ in range(6):
        grads = torch.randn(count, generator=generator, dtype=F64) * scales
        update, state = gradient_memory.step(slow, state, grads)
        for i, one in enumerate(plain):
            assert abs(update[i].item() - one.update(grads[i].item())) < TOLERANCE
            assert abs(state["m"][i].item() - one.m) < TOLERANCE
            assert abs(state["v"][i].item() - one.v) <= TOLERANCE * max(1, one.v)
            assert (state["W"][..., i] - one.W).abs().max() < TOLERANCE
            assert (state["b"][..., i] - one.b).abs().max() < TOLERANCE
        assert int(state["t"]) == plain[0].t


def test_the_learned_rate_is_cut_at_zero(slow):
    # max(0, 1 + s): with s = -2 the fast weights never move.
    slow = double(slow) | {"learnable_token_idx": torch.tensor([-2.0], dtype=F64)}
    state = gradient_memory.init_state(slow, 3)
    update, new = gradient_memory.step(slow, state, torch.tensor([1.0, -2.0, 3.0], dtype=F64))
    assert torch.equal(new["W"], state["W"])
    assert torch.equal(new["b"], state["b"])
    assert abs(update[1].item() - ScalarMemory(slow).update(-2.0)) < TOLERANCE


def test_bias_correction_counts_one_more_than_adam():
    # By hand: g = 1 at the first update, exponent 2: m^ = 0.1/0.19, v^ = 0.01/0.0199.
    zero = torch.zeros(1, dtype=F64)
    x, m, v = gradient_memory.gradient_features(zero + 1, zero, zero, torch.tensor(1))
    assert m.item() == pytest.approx(0.1, abs=1e-15)
    assert v.item() == pytest.approx(0.01, abs=1e-15)
    root = math.sqrt(0.01 / 0.0199)
    assert x[0, 0].item() == pytest.approx(0.1 / 0.19 / root, rel=1e-7)
    assert x[1, 0].item() == pytest.approx(1 / root, rel=1e-7)


def test_scalars_do_not_see_each_other(slow):
    slow = double(slow)
    grads = torch.randn(5, dtype=F64, generator=torch.Generator().manual_seed(1))
    together, _ = gradient_memory.step(slow, gradient_memory.init_state(slow, 5), grads)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled, _ = gradient_memory.step(slow, gradient_memory.init_state(slow, 5), grads[order])
    assert (together[order] - shuffled).abs().max() < 1e-14


def test_the_step_writes_nothing_in_place(slow):
    state = gradient_memory.init_state(slow, 4)
    grads = torch.randn(4, generator=torch.Generator().manual_seed(1))
    _, state = gradient_memory.step(slow, state, grads)
    before = {n: t.clone() for n, t in state.items()}
    gradient_memory.step(slow, state, grads)
    assert all(torch.equal(t, state[n]) for n, t in before.items())


# -- the whole step ----------------------------------------------------------------------------


def adapted_like_the_paper(net, model, kind, slow, source, batches, lr, discrepancy):
    """Compare ``STEPS`` steps of ``net`` with the restatement on a copy of ``model``."""
    batch_norm = kind == "batchnorm"
    plain = copy.deepcopy(model)
    tapped = list(net.backbone.tapped)
    if batch_norm and source is not None:
        modules = dict(plain.named_modules())
        source = {
            n: (modules[n].running_mean.clone(), modules[n].running_var.clone(), modules[n].eps)
            for n in tapped
        }
    forget_running_statistics(plain)
    parameters = dict(plain.named_parameters())
    for name, p in parameters.items():
        p.requires_grad_(name in net.names)
    mean = net.backbone.mean.to(F64)
    std = net.backbone.std.to(F64)
    memories = {
        name: [ScalarMemory(slow) for _ in range(parameters[name].numel())] for name in net.names
    }
    for images in batches:
        logits, loss = plain_loss(plain, images, tapped, batch_norm, source, discrepancy, mean, std)
        wanted = [parameters[n] for n in net.names]
        grads = dict(zip(net.names, torch.autograd.grad(loss, wanted), strict=True))
        assert (net(images) - logits.detach()).abs().max() < TOLERANCE  # before the update
        state = net.adaptation_state()
        offset = 0
        for name in net.names:
            updates = [
                one.update(g.item())
                for one, g in zip(memories[name], grads[name].flatten(), strict=True)
            ]
            with torch.no_grad():
                parameters[name] -= lr * torch.tensor(updates, dtype=F64).view_as(parameters[name])
            ours = state[f"params.model.{name}"]
            # theta moves by lr * update: the update itself agrees to 1e-10 as well.
            assert (ours - parameters[name].detach()).abs().max() < TOLERANCE * lr
            part = slice(offset, offset + len(updates))
            offset += len(updates)
            for key in ("m", "v", "W", "b"):
                theirs = torch.stack(
                    [torch.as_tensor(getattr(one, key), dtype=F64) for one in memories[name]]
                )
                ours = state[f"rule.{key}"][..., part].movedim(-1, 0)  # the scalars come last
                assert (ours - theirs).abs().max() < TOLERANCE, (name, key)
        assert offset == len(state["rule.m"])
    assert int(state["rule.t"]) == len(batches)
    assert net.skipped_updates == 0


def statistics_of(model, net, kind, images):
    """Some clean statistics for models that carry none: of other images, in float64."""
    if kind == "batchnorm":
        return "its own", {}
    measured = copy.deepcopy(net).fit_source_statistics([images], progress=False)
    mean, std = (measured.learned_tensors()[f"source.{s}"] for s in ("mean", "std"))
    return (mean, std), {"source.mean": mean, "source.std": std}


def test_whole_step_with_discrepancy(kind, make_model, make_net, slow, images):
    slow, lr, discrepancy = double(slow), 5e-2, 0.4
    model = make_model(kind, F64)
    fields = {"lr": lr, "discrepancy": discrepancy}
    if kind == "batchnorm":
        fields["statistics"] = "batch"
    source, tensors = statistics_of(
        model, make_net("mgg", model, **fields), kind, images(12, 90, F64)
    )
    net = make_net("mgg", model, tensors=tensors | memory(slow), **fields)
    batches = [images(5, seed, F64) for seed in range(STEPS)]
    adapted_like_the_paper(net, model, kind, slow, source, batches, lr, discrepancy)


def test_whole_step_with_entropy_alone(kind, make_model, make_net, slow, images):
    slow, lr = double(slow), 5e-2
    model = make_model(kind, F64)
    net = make_net("mgg", model, tensors=memory(slow), lr=lr, discrepancy=0.0)
    batches = [images(4, seed, F64) for seed in range(STEPS)]
    adapted_like_the_paper(net, model, kind, slow, None, batches, lr, 0.0)


def memory(slow):
    return {f"memory.{n}": t for n, t in slow.items()}


def test_discrepancy_is_in_the_loss(kind, make_model, make_net, images):
    # Without this the two tests above could agree on a term that is never there.
    model = make_model(kind)
    _, tensors = statistics_of(model, make_net("mgg", model), kind, images(12, 90))
    with_term = make_net("mgg", model, tensors=tensors, lr=1e-2, discrepancy=10.0)
    without = make_net("mgg", model, tensors=tensors, lr=1e-2, discrepancy=0.0)
    for net in (with_term, without):
        net(images(6))
    a, b = (n.adaptation_state()["rule.m"] for n in (with_term, without))
    assert (a - b).abs().max() > 1e-3


def test_without_source_statistics_entropy_alone(make_model, make_net, images):
    model = make_model("layernorm")
    none = make_net("mgg", model, discrepancy=0.4)
    zero = make_net("mgg", model, discrepancy=0.0)
    assert torch.equal(none(images(4)), zero(images(4)))
    a, b = none.adaptation_state(), zero.adaptation_state()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_class_tokens_are_taken_after_the_next_norm(make_model, make_net):
    # "each after the NEXT block's norm1 (the last after the final norm)"
    net = make_net("mgg", make_model("layernorm"))
    assert set(net.backbone.tapped) == {"blocks.1.norm1", "norm"}


def test_vit_b_has_twelve_taps_of_768_and_38400_scalars(make_net, slow):
    model = timm.create_model("vit_base_patch16_224", weight_init="skip")
    backbone = Backbone(model)
    assert set(backbone.tapped) == {f"blocks.{i}.norm1" for i in range(1, 12)} | {"norm"}
    names = scope.select(backbone, "norm")
    parameters = dict(model.named_parameters())
    assert len(names) == 50
    assert sum(parameters[n].numel() for n in names) == 38_400
    # "fast weights of a ViT-B: about 11 MB"; issue 2 allows 15 MB of state in all.
    state = gradient_memory.init_state({n: t.to("meta") for n, t in slow.items()}, 38_400)
    assert 10.5e6 < sum(t.numel() * t.element_size() for t in state.values()) < 15e6


def test_the_guard_does_not_matter(images):
    x = images(16, 4, F64).flatten(1)[:, :50]
    mean, std = feature_statistics([Feature(x, (0,))])
    assert torch.allclose(mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(std, x.std(0), rtol=1e-9)


@pytest.mark.parametrize("kind", ["groupnorm", "layernorm"])
def test_a_batch_of_one_compares_means_only(kind, make_model, make_net, images):
    # Deviation 3 of methods/mgg.py: one image has no deviation, whatever its positions say.
    model = make_model(kind, F64)
    (mean, std), tensors = statistics_of(model, make_net("mgg", model), kind, images(12, 90, F64))
    others = {"std": (mean, 5 * std), "mean": (5 * mean, std)}
    nets = {
        name: make_net("mgg", model, tensors={"source.mean": m, "source.std": s}, lr=1e-2)
        for name, (m, s) in others.items()
    }
    nets["as measured"] = make_net("mgg", model, tensors=tensors, lr=1e-2)
    states = {}
    for name, net in nets.items():
        assert torch.isfinite(net(images(1, 3, F64))).all()
        states[name] = net.adaptation_state()["rule.m"]
    assert torch.equal(states["as measured"], states["std"])
    assert not torch.equal(states["as measured"], states["mean"])


def test_alpha_zero_is_the_plain_model(kind, make_model, make_net, images):
    model = make_model(kind)
    net = make_net("mgg", model, lr=0.0, statistics="batch")
    plain = make_net("source", model, statistics="batch")
    for seed in range(3):
        assert torch.equal(net(images(6, seed)), plain(images(6, seed)))


def test_an_update_is_bounded_by_alpha(kind, make_model, make_net, images):
    model = make_model(kind, F64)
    net = make_net("mgg", model, lr=1e-2)
    net(images(6, dtype=F64))
    parameters = dict(model.named_parameters())
    state = net.adaptation_state()
    moves = [(state[f"params.model.{n}"] - parameters[n]).abs().max() for n in net.names]
    assert 0 < max(moves) <= 1e-2 * (1 + 1e-9)


# -- the released checkpoint -------------------------------------------------------------------

RELEASED = {
    "W1": (1, 8, 8),
    "b1": (1, 1, 8),
    "q_proj.weight": (8, 2),
    "k_proj.weight": (8, 2),
    "v_proj.weight": (8, 2),
    "o_proj.weight": (1, 8),
    "learnable_ttt_lr_weight": (1, 1, 2),
    "learnable_ttt_lr_bias": (1, 1),
    "learnable_token_idx": (1,),
    "ttt_norm_weight": (1, 8),
    "ttt_norm_bias": (1, 8),
    "post_norm.weight": (8,),
    "post_norm.bias": (8,),
}


def test_the_released_checkpoint_loads(tmp_path, make_model, images):
    generator = torch.Generator().manual_seed(5)
    prefix = "seq_modeling_block."
    weights = {
        prefix + n: 0.3 * torch.randn(shape, generator=generator) for n, shape in RELEASED.items()
    }
    torch.save({"model_state_dict": weights}, tmp_path / "mgg.pth")
    loaded = torch.load(tmp_path / "mgg.pth", weights_only=True)["model_state_dict"]
    slow = gradient_memory.check_slow({n.removeprefix(prefix): t for n, t in loaded.items()})
    assert {n: tuple(t.shape) for n, t in slow.items()} == RELEASED
    net = tp.Adapter(
        Backbone(make_model("layernorm")), get_method("mgg"), tp.MGG(lr=1e-3), tensors=memory(slow)
    )
    assert torch.isfinite(net(images(4))).all()
    # and they compute what the restatement computes from them
    update, _ = gradient_memory.step(
        double(slow), gradient_memory.init_state(double(slow), 1), torch.tensor([0.3], dtype=F64)
    )
    assert abs(update.item() - ScalarMemory(double(slow)).update(0.3)) < TOLERANCE


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan"])
def test_other_weights_are_refused(damage, slow):
    if damage == "missing":
        del slow["b1"]
    elif damage == "extra":
        slow["b2"] = torch.zeros(1)
    elif damage == "shape":
        slow["W1"] = slow["W1"][0]
    else:
        slow["W1"][0, 1, 2] = torch.nan
    with pytest.raises(tp.ArtifactError, match="b2" if damage == "extra" else "W1|b1"):
        gradient_memory.check_slow(slow)


# -- the meta-gradient -------------------------------------------------------------------------


def finite_differences(slow, outcome, h=1e-5):
    """Central differences of ``outcome(slow) -> float`` in every one of the 164 weights."""
    slopes = {}
    for name, tensor in slow.items():
        slope = torch.zeros_like(tensor)
        for i in range(tensor.numel()):
            values = []
            for sign in (1, -1):
                shifted = tensor.clone()
                shifted.view(-1)[i] += sign * h
                values.append(outcome(slow | {name: shifted}))
            slope.view(-1)[i] = (values[0] - values[1]) / (2 * h)
        slopes[name] = slope
    return slopes


def agree(slopes, grads):
    largest = max(s.abs().max() for s in slopes.values())
    assert largest > 0
    for name, slope in slopes.items():
        assert slope.abs().max() > 0, f"{name} plays no part in this test"
        assert (slope - grads[name]).abs().max() < 1e-7 * max(1, largest), name


def test_meta_gradient_through_several_steps(slow):
    slow = double(slow)
    generator = torch.Generator().manual_seed(2)
    grads = torch.randn(4, 3, generator=generator, dtype=F64)
    weights = torch.randn(4, 3, generator=generator, dtype=F64)

    def outcome(slow):
        state, total = gradient_memory.init_state(slow, 3), 0.0
        for g, w in zip(grads, weights, strict=True):
            update, state = gradient_memory.step(slow, state, g)
            total = total + (w * update).sum()
        return total

    leaves = {n: t.clone().requires_grad_() for n, t in slow.items()}
    found = torch.autograd.grad(outcome(leaves), list(leaves.values()))
    with torch.no_grad():
        slopes = finite_differences(slow, lambda s: outcome(s).item())
    agree(slopes, dict(zip(leaves, found, strict=True)))


class Recorder:
    """Stands for the meta-optimizer: keeps every gradient, moves nothing."""

    def __init__(self, slow):
        self.slow, self.grads = slow, []

    def zero_grad(self, set_to_none=True):
        for p in self.slow.values():
            p.grad = None

    def step(self):
        # No gradient at all is a gradient of zero: a learned start behind the truncation.
        self.grads.append(
            {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in self.slow.items()
            }
        )


class LinearHead(torch.nn.Module):
    """Logits that are linear in the only norm's affine parameters."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(2, 4)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.norm(x)[:, :, 1, 2])


def linear_setup(slow, images, judged):
    """An algorithm whose loss is linear in theta, so that its gradients are truly constant."""
    torch.manual_seed(0)
    model = LinearHead().double()
    backbone = Backbone(model, normalize=False)
    weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    objective = Objective("linear", lambda logits, f, first: Loss((logits * weights).sum()))
    source = scope.parameters(backbone, scope.select(backbone, "norm"))
    algorithm = Online(backbone, objective, GradientMemory(0.05, slow), source)
    generator = torch.Generator().manual_seed(4)
    batches = [
        (
            torch.randint(0, 256, (6, 4, 4, 4), generator=generator, dtype=torch.uint8),
            torch.randint(0, 5, (6,), generator=generator),
        )
        for _ in range(judged + 1)
    ]
    return algorithm, batches


@pytest.mark.parametrize("truncation", [1, 3])
def test_meta_gradient_of_a_sequence(truncation, slow, images):
    """`run_sequence` against differences of the true outer loss, network gradients constant."""
    judged = 6
    slow = {n: t.requires_grad_() for n, t in double(slow).items()}
    algorithm, batches = linear_setup(slow, images, judged)
    optimizer = Recorder(slow)
    recipe = meta.MGGRecipe(truncation=truncation, alpha=0.05, clip=0.0)
    meta.run_sequence(algorithm, algorithm.source, iter(batches), slow, optimizer, recipe)
    assert len(optimizer.grads) == judged // truncation

    def play(slow, params, state, window):
        """Updates 0, 1, ... of a window from fixed (params, state): outer loss, what follows."""
        rule, total = GradientMemory(0.05, slow), 0.0
        for inner, outer in window:
            first = evaluate(algorithm.backbone, algorithm.objective, params, inner)
            params, state = rule.step(params, state, first, algorithm.situation(inner))
            judged = evaluate(algorithm.backbone, algorithm.objective, params, outer)
            total += judged.loss.item()
        return total, params, state

    fixed = {n: t.detach() for n, t in slow.items()}
    floats = [(images.double() / 255).float().double() for images, _ in batches]
    pairs = list(itertools.pairwise(floats))
    params = algorithm.source
    # At the very start the memory is the learned one and moves with the slow weights; later
    # windows start from a memory that is a constant (truncation).
    state = None
    for i, grads in enumerate(optimizer.grads):
        window = pairs[i * truncation : (i + 1) * truncation]

        def outcome(slow, params=params, state=state, window=window):
            start = GradientMemory(0.05, slow).init(params) if state is None else state
            return play(slow, params, start, window)[0]

        slopes = finite_differences(fixed, outcome)
        agree_where_it_counts(slopes, grads)
        start = GradientMemory(0.05, fixed).init(params) if state is None else state
        _, params, state = play(fixed, params, start, window)
    assert slopes["W1"].abs().max() == 0  # the learned start is behind the truncation


def agree_where_it_counts(slopes, grads):
    largest = max(s.abs().max() for s in slopes.values())
    assert largest > 1e-4
    for name, slope in slopes.items():
        assert (slope - grads[name]).abs().max() < 1e-7 * max(1, largest), name


@pytest.mark.parametrize("labelled", [False, True])
def test_meta_gradient_on_a_real_network(labelled, slow, make_model, make_net, images):
    """Truncation 3 on a ViT, the network gradients recorded and then held constant."""
    slow = {n: t.requires_grad_() for n, t in double(slow).items()}
    net = make_net("mgg", make_model("layernorm", F64), lr=0.02, discrepancy=0.0)
    algorithm = net.algorithm(memory(slow))  # with slow weights that require gradients
    backbone, source = net.backbone, algorithm.source
    generator = torch.Generator().manual_seed(4)
    batches = [
        (
            (images(3, seed) * 255).byte(),
            torch.randint(0, 10, (3,), generator=generator),
        )
        for seed in range(4)
    ]
    optimizer = Recorder(slow)
    recipe = meta.MGGRecipe(truncation=3, alpha=0.02, labelled=labelled)
    meta.run_sequence(algorithm, source, iter(batches), slow, optimizer, recipe)
    (grads,) = optimizer.grads

    # Once along the sequence, to record what the network says at the unperturbed weights.
    fixed = {n: t.detach() for n, t in slow.items()}
    rule, params, inner, outer = GradientMemory(0.02, fixed), source, [], []
    state = rule.init(params)
    for index, (picture, labels) in enumerate(batches):
        picture = (picture.float() / 255).double()
        first = evaluate(backbone, algorithm.objective, params, picture)
        judgement = first
        if labelled:
            objective = Objective(
                "label", lambda z, f, first, labels=labels: Loss(F.cross_entropy(z, labels))
            )
            judgement = evaluate(backbone, objective, params, picture)
        if index:
            outer.append(scope.flatten(judgement.grads))
        inner.append(scope.flatten(first.grads))
        params, state = rule.step(params, state, first, algorithm.situation(picture))

    def outcome(slow):
        """sum over the window of <theta_{t+1}, gradient of its judgement>"""
        state = gradient_memory.init_state(slow, len(inner[0]))
        theta, total = scope.flatten(source), 0.0
        for g, judge in zip(inner, outer, strict=False):
            update, state = gradient_memory.step(slow, state, g)
            theta = theta - 0.02 * update
            total += (theta * judge).sum().item()
        return total

    slopes = finite_differences(fixed, outcome)
    agree_where_it_counts(slopes, grads)


# -- the step size where entropy is alone --------------------------------------------------


def test_entropy_alone_takes_smaller_steps(make_model, images, same_tensors):
    """Without source statistics as with that step size, with them as without the bound."""
    model = make_model("groupnorm")

    def after(fitted=False, **fields):
        net = tp.wrap(model, "mgg", window=1, **fields)
        if fitted:
            net.fit_source_statistics([images(8, 5)], progress=False)
        for seed in range(2):
            net(images(4, seed))
        return {n: t for n, t in net.adaptation_state().items() if n.startswith("params.")}

    assert same_tensors(after(lr=1e-2, lr_alone=1e-3), after(lr=1e-3, lr_alone=None))
    assert same_tensors(after(lr=1e-4, lr_alone=1e-3), after(lr=1e-4, lr_alone=None))
    fitted = after(True, lr=1e-2, lr_alone=1e-3)
    assert same_tensors(fitted, after(True, lr=1e-2, lr_alone=None))
    assert not same_tensors(fitted, after(lr=1e-2, lr_alone=1e-3))
    source = {f"params.{n}": p for n, p in model.named_parameters()}
    plain = {n.replace("params.model.", "params."): t for n, t in after(lr=0.0).items()}
    assert all(torch.equal(t, source[n]) for n, t in plain.items())
    assert "step size is 0.001" in tp.wrap(model, "mgg", lr=1e-2, lr_alone=1e-3).describe()


def test_a_batchnorm_model_is_never_on_entropy_alone(make_model):
    net = tp.wrap(make_model("batchnorm"), "mgg")
    assert net.config.lr_alone is not None
    assert "alone" not in net.describe().split("objective")[1]
    net = tp.wrap(make_model("batchnorm"), "mgg", discrepancy=0.0)
    assert "discrepancy=0), so lr_alone is without effect" in net.describe()


def test_the_bound_is_a_number():
    with pytest.raises(tp.InputError, match="lr_alone"):
        tp.MGG(lr_alone=-1.0)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_hand_made_rules_on_the_same_objective(rule, make_model, images):
    """A step equals torch.optim's on the gradient of the same loss; lr=0 is the plain model."""
    model = make_model("batchnorm")
    common = {"window": 1, "rule": rule, "statistics": "mix", "guard": False}
    net = tp.wrap(model, "mgg", lr=1e-2, **common)
    algorithm = net.algorithm()
    leaves = {n: p.clone().requires_grad_() for n, p in algorithm.source.items()}
    first = evaluate(net.backbone, algorithm.objective, dict(leaves), images(8))
    classes = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    options = {} if rule == "adam" else {"momentum": 0.9}
    optimizer = classes[rule](leaves.values(), lr=1e-2, **options)
    for name, leaf in leaves.items():
        leaf.grad = first.grads[name]
    optimizer.step()
    net(images(8))
    for name, tensor in net.adaptation_state().items():
        if name.startswith("params."):
            wanted = leaves[name.removeprefix("params.")].detach()
            torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)
    still = tp.wrap(model, "mgg", lr=0, **common)
    still(images(8))
    same = {"statistics": net.config.statistics, "prior": net.config.prior}
    assert torch.equal(still(images(8)), tp.wrap(model, "source", **same)(images(8)))


def test_mixed_statistics_do_not_hide_the_shift_from_mgg(make_model, images):
    model = make_model("batchnorm")
    x = images(8)
    found = []
    for kind in ({"statistics": "batch"}, {"statistics": "mix", "prior": 0.0}):
        net = tp.wrap(model, "mgg", **kind)
        with torch.no_grad(), net.backbone.recording() as record:
            net.backbone(x)
        found.append(feature_statistics(record))
    for batch, mix in zip(*found, strict=True):
        assert torch.allclose(batch, mix, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loader", [None, 3, [{"image": torch.zeros(4, 3, 32, 32)}], [()]])
def test_loaders_of_clean_images(loader, make_model):
    net = tp.wrap(make_model("groupnorm"), "mgg")
    with pytest.raises(tp.InputError, match="loader"):
        net.fit_source_statistics(loader)


def test_clean_images_in_a_folder_that_is_not_there(make_model):
    net = tp.wrap(make_model("groupnorm"), "mgg")
    with pytest.raises(tp.DataError, match="abc: no such file or folder"):
        net.fit_source_statistics("abc")
