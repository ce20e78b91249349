"""Learning rate schedules: the factor on the peak rate at every step of a training."""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "cosine", "schedule_factor"]

SCHEDULES = ("constant", "cosine", "step", "one-cycle", "constant-then-decay")


def cosine(step: int, steps: int, warmup: float) -> float:
    """Linear rise to 1 over the fraction ``warmup`` of the steps, then half a cosine down to 0."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return _fall(step - rise, max(1, steps - rise))


def schedule_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate.

    Args:
        schedule: ``"constant"``; ``"cosine"`` (see `cosine`); ``"step"`` (a tenth from one half of
            training on, a hundredth from five sixths on, as in arXiv 1909.13231); ``"one-cycle"``
            (half a cosine up from 1/25 in the first 30 % of training, half a cosine down to 0 in
            the rest, as in arXiv 1708.07120); or ``"constant-then-decay"`` (constant for three
            quarters of training, then half a cosine down to 0).
        step: number of the step, from 0.
        steps: number of steps of the whole training.
        warmup: fraction of the steps in which ``"cosine"`` rises.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return cosine(step, steps, warmup)
    if schedule == "step":
        return 0.1 ** ((step >= steps / 2) + (step >= steps * 5 / 6))
    if schedule == "one-cycle":
        top = 0.3 * steps
        if step < top:
            return 1 - (1 - 1 / 25) * _fall(step, top)
        return _fall(step - top, steps - top)
    hold = 0.75 * steps  # "constant-then-decay"
    return 1.0 if step < hold else _fall(step - hold, steps - hold)


def _fall(step: float, steps: float) -> float:
    """Half a cosine from 1 at step 0 down to 0 after ``steps``."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
