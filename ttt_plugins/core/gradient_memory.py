"""The learned optimizer of MGG: a small network that turns gradients into updates.

Paper: Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time
Training Layers" (AAAI 2025, arXiv 2412.16901); the layer is TTT-Linear of Sun et al. 2024
(arXiv 2407.04620). The gradients of each adapted scalar form a sequence over time. All scalars
share the slow weights; each has fast weights (W, b) of its own, which are trained by one gradient
step per update to reconstruct features of the gradient.

Computed for each scalar with gradient g         -> where
    m, v and x = [m^/(sqrt v^ + e), g/(sqrt v^ + e)]  -> `gradient_features`
    q, k, v = linear maps of x; step size eta         -> `step`, "projections"
    1/2 ||f(k) - (v - k)||^2, one step on (W, b)      -> `step`, "memorise"
    h = q + f_new(q); update = tanh(W_o LN(h))        -> `step`, "recall"

Everything is a pure function of slow weights, state and gradients: adaptation calls it without a
graph, meta-training with one. One call processes all scalars.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArtifactError

__all__ = ["SLOW_SHAPES", "check_slow", "gradient_features", "init_slow", "init_state", "step"]

_EPS = 1e-6  # epsilon of both layer norms, as in the released code
_WIDTH = 8

#: Tensors of the released checkpoint, without their common prefix ``seq_modeling_block.``.
SLOW_SHAPES: dict[str, tuple[int, ...]] = {
    "W1": (1, _WIDTH, _WIDTH),
    "b1": (1, 1, _WIDTH),
    "q_proj.weight": (_WIDTH, 2),
    "k_proj.weight": (_WIDTH, 2),
    "v_proj.weight": (_WIDTH, 2),
    "o_proj.weight": (1, _WIDTH),
    "learnable_ttt_lr_weight": (1, 1, 2),
    "learnable_ttt_lr_bias": (1, 1),
    "learnable_token_idx": (1,),
    "ttt_norm_weight": (1, _WIDTH),
    "ttt_norm_bias": (1, _WIDTH),
    "post_norm.weight": (_WIDTH,),
    "post_norm.bias": (_WIDTH,),
}


def init_slow(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random slow weights, 164 scalars, to start meta-training from."""
    slow = {name: torch.zeros(shape, dtype=dtype) for name, shape in SLOW_SHAPES.items()}
    slow["W1"].normal_(0, 0.02, generator=generator)
    for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"):
        # The usual bound of a linear layer, 1 / sqrt(inputs).
        bound = slow[name].shape[1] ** -0.5
        slow[name].uniform_(-bound, bound, generator=generator)
    slow["learnable_ttt_lr_weight"].normal_(0, 0.02, generator=generator)
    slow["ttt_norm_weight"].fill_(1)
    slow["post_norm.weight"].fill_(1)
    return slow


def check_slow(slow: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check slow weights, and return them in the canonical order.

    Raises:
        ArtifactError: a tensor is missing, unexpected, not finite, or of another shape.
    """
    if missing := sorted(SLOW_SHAPES.keys() - slow.keys()):
        raise ArtifactError(f"not an MGG optimizer: tensor {missing[0]!r} is missing")
    if extra := sorted(slow.keys() - SLOW_SHAPES.keys()):
        raise ArtifactError(f"not an MGG optimizer: unexpected tensor {extra[0]!r}")
    for name, shape in SLOW_SHAPES.items():
        if tuple(slow[name].shape) != shape:
            raise ArtifactError(
                f"MGG optimizer: {name!r} has shape {tuple(slow[name].shape)}, not {shape}"
            )
        if not torch.isfinite(slow[name]).all():
            raise ArtifactError(f"MGG optimizer: {name!r} holds non-finite values")
    return {name: slow[name] for name in SLOW_SHAPES}


def init_state(slow: dict[str, Tensor], scalars: int) -> dict[str, Tensor]:
    """The initial state for n ``scalars``: m, v (n,), t (), W (d, d, n), b (d, n).

    The dimension of the scalars is last, because operations on all of them then read contiguous
    memory.
    """
    like = slow["W1"]
    return {
        "m": like.new_zeros(scalars),
        "v": like.new_zeros(scalars),
        "t": torch.zeros((), dtype=torch.int64, device=like.device),
        # Views of the learned initial values, so no memory is allocated before the first update.
        "W": like[0][:, :, None].expand(-1, -1, scalars),
        "b": slow["b1"][0, 0][:, None].expand(-1, scalars),
    }


def gradient_features(grad: Tensor, m: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """The network's input x (2, n), both rows of order one, and the new running moments m and v.

    ``t`` is the number of updates including this one. The exponent of the bias correction is t + 1
    as in the released code, which increments t and then adds one; the paper writes t.
    """
    m = 0.9 * m + 0.1 * grad
    v = 0.99 * v + 0.01 * grad.square()
    exponent = (t + 1).to(grad.dtype)
    root = (v / (1 - 0.99**exponent)).sqrt() + 1e-8
    return torch.stack([m / (1 - 0.9**exponent) / root, grad / root]), m, v


def _layer_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised columns of z (d, n), and their reciprocal standard deviations (n,)."""
    centred = z - z.mean(0)
    scale = torch.rsqrt(centred.square().mean(0) + _EPS)
    return centred * scale, scale


def step(
    slow: dict[str, Tensor], state: dict[str, Tensor], grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients (n,) -> updates (n,) in [-1, 1], and the new state; equation 5 of the paper.

    The parameters change by minus the step size times the update. See the module's docstring.
    """
    t = state["t"] + 1
    x, m, v = gradient_features(grad.to(slow["W1"].dtype), state["m"], state["v"], t)

    # projections: one matrix product for q, k, v and the step size's logit
    maps = [slow[f"{name}_proj.weight"] for name in "qkv"]
    out = torch.cat([*maps, slow["learnable_ttt_lr_weight"][0]]) @ x
    q, k, value, gate = out.split([_WIDTH, _WIDTH, _WIDTH, 1])
    rate = torch.sigmoid(gate + slow["learnable_ttt_lr_bias"])
    rate = rate * (1 + slow["learnable_token_idx"]).clamp_min(0) / _WIDTH
    gain, bias = slow["ttt_norm_weight"].T, slow["ttt_norm_bias"].T

    # memorise: one step on 1/2 ||f(k) - (v - k)||^2, the gradient of f(z) = LN(zW + b) by hand
    W, b = state["W"], state["b"]
    pairs = torch.stack([k, q], 1)[:, :, None] * W[:, None]  # (d in, k and q, d out, n)
    keys, queries = (pairs.sum(0) + b).unbind(0)
    normed, scale = _layer_norm(keys)
    error = (gain * normed + bias - (value - k)) * gain
    error = error - error.mean(0)
    delta = (error - normed * (error * normed).mean(0)) * (scale * rate)
    new_b = b - delta

    # recall with the updated memory: q (W - k delta') + b' without forming W first
    recalled = queries - ((q * k).sum(0) + 1) * delta
    h = q + gain * _layer_norm(recalled)[0] + bias
    h = slow["post_norm.weight"][:, None] * _layer_norm(h)[0] + slow["post_norm.bias"][:, None]
    update = torch.tanh(slow["o_proj.weight"] @ h).squeeze(0)

    new_W = torch.addcmul(W, k[:, None], delta, value=-1)
    return update, {"m": m, "v": v, "t": t, "W": new_W, "b": new_b}
