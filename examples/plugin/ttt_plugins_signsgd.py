"""A plugin: signSGD as an update rule (Bernstein et al., ICML 2018, arXiv 1802.04434).

After ``pip install ./examples/plugin`` the method ``signsgd`` is available to `wrap`, to artifacts
and on the command line; ``ttt_plugins.testing.check_method("signsgd")`` checks it.
"""

from dataclasses import dataclass

from ttt_plugins.methods import register_update_rule


@dataclass(frozen=True)
class SignSGD:
    """Entropy minimisation by the sign of the gradients' momentum.

    Attributes:
        lr: how far each scalar moves in a step, at least 0.
        momentum: weight of past gradients in the direction, in [0, 1].
        statistics, prior, window, params: as in Tent.
    """

    lr: float = 1e-4
    momentum: float = 0.9
    statistics: str = "batch"
    prior: float = 16.0
    window: int = 64
    params: str | tuple[str, ...] = "norm"


@dataclass(frozen=True)
class SignRule:
    """Algorithm 2; ``init`` and ``step`` are pure functions, and the state is a dict of tensors."""

    config: SignSGD
    passes = 1  # forward and backward passes of a step

    def init(self, params):
        return {name: p.new_zeros(p.shape) for name, p in params.items()}

    def step(self, params, state, first, situation):
        state = {n: g.lerp(state[n], self.config.momentum) for n, g in first.grads.items()}
        return {n: p - self.config.lr * state[n].sign() for n, p in params.items()}, state


register_update_rule("signsgd", SignSGD, SignRule, "Bernstein et al., arXiv:1802.04434")
