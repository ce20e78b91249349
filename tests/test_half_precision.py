"""Models in half precision: what adapts is kept in float32 and cast on the way into the model."""

import pytest
import torch
from conftest import PER_IMAGE

import ttt_plugins as tp

HALVES = (torch.bfloat16, torch.float16)


def stream(net, images, dtype, batches):
    """Logits of as many batches of 8."""
    return [net(images(8, seed, dtype)) for seed in range(batches)]


def params_of(net):
    """The adapted tensors."""
    state = net.adaptation_state()
    return {n: t for n, t in state.items() if n.startswith("params.")}


def share_moved(net):
    """The share of adapted scalars that differ from the wrapped model's."""
    source = dict(net.backbone.model.named_parameters())
    changed = [t != source[n.removeprefix("params.model.")] for n, t in params_of(net).items()]
    return torch.cat([c.flatten() for c in changed]).double().mean().item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["batchnorm", "groupnorm"])
def test_tent_moves_nearly_all_scalars(kind, dtype, make_model, images):
    net = tp.wrap(make_model(kind, dtype), "tent", lr=1e-3, window=1)
    stream(net, images, dtype, 16)
    assert net.skipped_updates == 0
    assert share_moved(net) > 0.99
    assert {t.dtype for t in params_of(net).values()} == {torch.float32}


@pytest.mark.parametrize("statistics", ["batch", "mix"])
def test_mgg_skips_no_update(statistics, make_net, make_model, images):
    # Sums of squares over a batch's feature maps exceed what float16 holds.
    dtype = torch.float16
    net = make_net("mgg", make_model("batchnorm", dtype), statistics=statistics, window=1)
    for seed in range(8):
        net(images(32, seed, dtype))
    assert net.skipped_updates == 0
    assert share_moved(net) > 0.99


@pytest.mark.parametrize("dtype", HALVES)
def test_parameters_follow_those_of_single_precision(dtype, make_model, images):
    model = make_model("groupnorm", dtype)
    net, exact = (
        tp.wrap(model, "tent", lr=1e-3, window=1),
        tp.wrap(model.float(), "tent", lr=1e-3, window=1),
    )
    source = params_of(exact)
    for each, kind in ((net, dtype), (exact, torch.float32)):
        stream(each, images, kind, 8)
    moves = [
        torch.cat([(t - source[n]).flatten() for n, t in params_of(each).items()])
        for each in (net, exact)
    ]
    assert torch.cosine_similarity(*moves, dim=0) > 0.9


@pytest.mark.parametrize("dtype", HALVES)
def test_without_a_step_the_adapter_is_the_model(dtype, method, kind, make_net, make_model, images):
    options = {} if method == "source" else {"lr": 0.0}
    if method in ("tent", "sar", "mgg"):
        options |= {"statistics": "source", "window": 1}
    net = make_net(method, make_model(kind, dtype), **options)
    plain = make_net("source", make_model(kind, dtype))
    batches = 1 if method in PER_IMAGE else 3
    for ours, theirs in zip(
        stream(net, images, dtype, batches), stream(plain, images, dtype, batches), strict=True
    ):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("params", ["norm", "all", "lora"])
def test_episodes_and_streams_take_steps(params, make_net, make_model, images):
    for method, options in (("ttt", {"mode": "online"}), ("ttt", {"mode": "batch"}), ("mt3", {})):
        for chunk in (1, 3):
            settings = options | {"params": params, "chunk_size": chunk}
            model = make_model("layernorm" if params == "lora" else "groupnorm", torch.bfloat16)
            net, plain = make_net(method, model, lr=0.01, **settings), make_net("source", model)
            x = images(3, 0, torch.bfloat16)
            logits = net(x)
            assert logits.dtype == torch.bfloat16
            assert net.skipped_updates == 0
            assert {t.dtype for t in params_of(net).values()} == {torch.float32}
            assert not torch.equal(logits, plain(x))


@pytest.mark.parametrize("method", ["tent", "sar", "mgg", "ttt"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_saved_state_resumes(method, dtype, make_net, make_model, images, same_tensors):
    options = {"mode": "online", "lr": 1e-3, "steps": 1} if method == "ttt" else {"window": 1}
    net = make_net(method, make_model("groupnorm", dtype), **options)
    stream(net, images, dtype, 3)
    other = make_net(method, make_model("groupnorm", dtype), **options)
    other.load_adaptation_state(net.adaptation_state())
    assert torch.equal(other(images(8, 5, dtype)), net(images(8, 5, dtype)))
    assert same_tensors(other.adaptation_state(), net.adaptation_state())
    net.reset()
    fresh = make_net(method, make_model("groupnorm", dtype), **options)
    assert torch.equal(net(images(8, 0, dtype)), fresh(images(8, 0, dtype)))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_saved_in_half_precision_resumes(dtype, make_model, images):
    net = tp.wrap(make_model("groupnorm", dtype), "tent", lr=0.1, window=1)
    stream(net, images, dtype, 3)
    # Earlier versions saved parameters in the model's precision, the rule's state in float32.
    old = {
        n: t.to(dtype) if n.startswith("params.") else t for n, t in net.adaptation_state().items()
    }
    net.load_adaptation_state(old)
    for name, tensor in net.adaptation_state().items():
        assert torch.equal(tensor, old[name].to(tensor.dtype))
    assert {t.dtype for t in params_of(net).values()} == {torch.float32}
    with pytest.raises(tp.InputError, match="another adapter"):
        net.load_adaptation_state({n: t.double() for n, t in old.items()})


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("start", [torch.float32, *HALVES])
def test_moving_an_adapter_keeps_what_was_learned(start, dtype, make_model, images):
    net = tp.wrap(make_model("groupnorm", start), "tent", lr=1e-3, window=1)
    stream(net, images, start, 3)
    before = params_of(net)
    net.to(dtype)
    after = params_of(net)
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())
    assert net(images(8, 3, dtype)).dtype == dtype
    assert share_moved(net.half()) > 0.9


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("params", ["norm", "lora"])
def test_an_exported_model_has_its_own_precision(params, dtype, make_model, images):
    model = make_model("layernorm" if params == "lora" else "groupnorm", dtype)
    net = tp.wrap(model, "tent", params=params, lr=0.01, window=1)
    stream(net, images, dtype, 3)
    plain = net.export()
    assert {t.dtype for t in plain.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(plain(images(8, 7, dtype)), net(images(8, 7, dtype)))


@pytest.mark.parametrize("dtype", HALVES)
def test_what_was_learned_is_not_rounded(dtype, make_net, make_model, images, same_tensors):
    """Neither by wrapping a model of half precision nor by a cast, nor by fitting statistics."""
    single, half = make_model("groupnorm"), make_model("groupnorm", dtype)
    for method in ("mgg", "ttt", "mt3"):
        exact = make_net(method, single)
        learned = exact.learned_tensors()
        given = tp.wrap(half, exact.config, tensors=learned)
        assert same_tensors(given.learned_tensors(), learned)
        assert same_tensors(exact.to(dtype).learned_tensors(), learned)
        logits = given(images(4, 0, dtype))
        assert logits.dtype == dtype
        assert torch.equal(logits, exact(images(4, 0, dtype)))
        assert {t.dtype for t in exact.double().learned_tensors().values()} == {torch.float64}
    net = make_net("mgg", half).fit_source_statistics([images(16, 0, dtype)], progress=False)
    fitted = net.learned_tensors()["source.mean"]
    assert fitted.dtype == torch.float32
    assert not torch.equal(fitted, fitted.to(dtype).float())
    net(images(4, 0, dtype))
    assert net.skipped_updates == 0


@pytest.mark.parametrize("method", ["tent", "sar", "mgg"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapts_without_breaking(make_model, method, dtype, images):
    net = tp.wrap(make_model("groupnorm").to(dtype), method, window=1)
    for seed in range(3):
        assert torch.isfinite(net(images(4, seed=seed))).all()
    assert net.skipped_updates == 0
    params = [t for n, t in net.adaptation_state().items() if n.startswith("params.")]
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["tent", "sar", "mgg"])
def test_another_precision_in_the_middle_of_a_stream(method, dtype, make_model, images):
    net = tp.wrap(make_model("batchnorm"), method, window=1)
    net(images(4))
    net.to(dtype)
    assert torch.isfinite(net(images(4, 1).to(dtype))).all()
    assert net.batches == 2
    assert net.skipped_updates == 0
    fresh = tp.wrap(make_model("batchnorm").to(dtype), method, window=1)
    fresh(images(4).to(dtype))
    kinds = [{k: t.dtype for k, t in n.adaptation_state().items()} for n in (net, fresh)]
    assert kinds[0] == kinds[1]
