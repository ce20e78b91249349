"""A guard over online adaptation: never worse than not adapting, as far as no label tells.

One image in `EVERY` is also predicted by the source, on its own parameters and statistics, which
costs two per cent of an update's forward and backward passes. Running means over the last `HORIZON`
of them, and over all images between them, are the signals (`Guard.health`). After an update they
decide what becomes of it:

- *one class*: the source and the adapted model see one class for long (a camera that shows a wall,
  noise, a single object). Such images teach nothing about the others: the parameters go half of
  the way back to the source, after every update while it lasts.
- *collapse*: the adapted model predicts far fewer classes than the source does on the same stream
  (the entropy of its predicted classes is `COLLAPSE` nats lower), which is how entropy minimisation
  fails: parameters and rule start again from the source, and every later update goes half as far
  as the rule would have it, because what failed once would fail again.
- *less sure*: the adapted model is less confident than the source on the same images, by
  `LESS_SURE` and by `ERRORS` standard errors: half of the way back.
- *not finite*: a prediction is not a number. Nothing that is not finite is kept, whatever happens,
  so the event is noted only.

Everything here is tensors on the model's device, and decisions are made by `torch.where`, so that
an accelerator is never waited for. What it knows is part of the adaptation state.

Where similar signals are used: the entropy of the mean prediction (SHOT, Liang et al., arXiv
2002.08546, equation 4), a restart when a loss says that a model has collapsed (SAR, Niu et al.,
arXiv 2302.12400, section 4.2), agreement of two models as a measure of accuracy without labels
(Jiang et al., arXiv 2106.13799).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..errors import InputError
from ..utils.precision import single
from .algorithm import Outcome, Tensors
from .objectives import entropy
from .scope import flatten
from .updates import choose
from .window import Window

__all__ = ["GUARD", "GUARDED", "Event", "Guard"]

#: What the names of its state's tensors begin with.
GUARD = "guard."
#: One image in as many is predicted by the source too.
EVERY = 16
#: Images predicted by both that the running means reach back.
HORIZON = 32
#: Images predicted by both before anything is decided.
ENOUGH = 12
#: Share of pairs of images that are of one class, from which on a stream shows one class only.
ONE_CLASS = 0.5
COLLAPSE = 0.7
LESS_SURE = 0.03
ERRORS = 2.5
#: Events that are remembered.
EVENTS = 64

_SEEN, _MEANS, _LOG = GUARD + "seen", GUARD + "means", GUARD + "events"
_SCALE = GUARD + "scale"
_SOURCE, _ADAPTED = GUARD + "source", GUARD + "adapted"
_MEAN_NAMES = ("probed", "agreement", "confidence", "source_confidence", "gap", "squared_gap")
_REASONS = ("one class", "collapse", "less sure", "not finite")
_ACTIONS = ("softened", "reset", "softened", "noted")


GUARDED = (
    "the guard softened or reset the adaptation, since its predictions looked worse than the "
    "source's; net.guard_events tells what it did, net.health() on what signals (warned once)"
)


class Event(NamedTuple):
    """Something that the guard did.

    Attributes:
        images: how many images the stream had when it happened, the last batch among them.
        reason: ``"one class"``, ``"collapse"``, ``"less sure"`` or ``"not finite"``.
        action: ``"softened"`` (half of the way back to the source), ``"reset"`` or ``"noted"``.
    """

    images: int
    reason: str
    action: str


class Probe(NamedTuple):
    """Images that the source predicts too: their places in a batch, and its logits."""

    places: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Guard:
    """See the module's docstring.

    Attributes:
        on: whether there is one.
        pull: how far the parameters go back to the source after every update, in [0, 1].
    """

    on: bool = False
    pull: float = 0.0

    @classmethod
    def of(cls, config: Any) -> Guard:
        """The choice in a config's fields ``guard`` and ``pull``; without them, neither."""
        named = {field.name for field in dataclasses.fields(config)}
        return cls(
            config.guard if "guard" in named else False,
            config.pull if "pull" in named else 0.0,
        )

    def step(
        self,
        window: Window,
        adapt: Callable[[Tensors, Tensors, Tensor], Outcome],
        backbone: Backbone,
        start: tuple[Tensors, Callable[[], Tensors]],
        now: tuple[Tensors, Tensors],
        waiting: Tensors,
        images: Tensor,
    ) -> tuple[Outcome, Tensors]:
        """As `Window.step`, with the pull and the guard after an update.

        Args:
            window: when updates are made.
            adapt: an algorithm's step.
            backbone: the classifier.
            start: the source's tensors, and what makes a rule's state at the start.
            now: adapted tensors and the rule's state.
            waiting: what waits, and what the guard knows.
            images: (B, C, H, W) in [0, 1].
        """
        known = {n: t for n, t in waiting.items() if n.startswith(GUARD)}
        waiting = {n: t for n, t in waiting.items() if n not in known}
        probe = self._probe(backbone, known, images) if self.on else None
        outcome, waiting = window.step(adapt, backbone, *now, waiting, images)
        if self.pull and outcome.backwards:
            outcome = outcome._replace(params=_towards(start[0], outcome.params, 1 - self.pull))
        if not self.on:
            return outcome, waiting
        known = _measured(known, outcome.logits, probe)
        if outcome.backwards:
            outcome, known = _decided(known, outcome, now[0], *start)
        if probe is not None:
            outcome = outcome._replace(forwards=outcome.forwards + len(probe.places))
        return outcome, waiting | known

    def _probe(self, backbone: Backbone, known: Tensors, images: Tensor) -> Probe | None:
        """The source's predictions of one image in `EVERY`, wherever batches begin and end."""
        seen = int(known[_SEEN]) if _SEEN in known else 0
        places = list(range(-seen % EVERY, len(images), EVERY))
        return Probe(places, backbone.source_logits(images[places])) if places else None

    def health(self, known: Tensors, params: Tensors | None, source: Tensors) -> dict[str, float]:
        """The signals as numbers; only ``distance`` before the first image.

        Args:
            known: the guard's state.
            params: the adapted tensors; None at the source.
            source: the tensors that adapt, at their start.
        """
        apart = torch.zeros(()) if params is None else flatten(params) - flatten(source)
        found = {"distance": float(apart.norm() / flatten(source).norm().clamp_min(1e-12))}
        if _MEANS not in known:
            return found
        means = dict(zip(_MEAN_NAMES, known[_MEANS].tolist(), strict=True))
        weight = means.pop("probed")
        means.pop("squared_gap")
        found |= {name: value / max(weight, 1e-12) for name, value in means.items()}
        for name, key in (("source_classes", _SOURCE), ("classes", _ADAPTED)):
            found[name] = float(_balance(known[key]).exp())
        found |= {"seen": float(known[_SEEN]), "scale": float(known[_SCALE])}
        return found | {"repetition": float(_same(known[_SOURCE]))}

    def events(self, known: Tensors) -> list[Event]:
        """What the guard did, the oldest first; the last `EVENTS` of it."""
        if _LOG not in known:
            return []
        rows = [row for row in known[_LOG].tolist() if row[0]]
        return [Event(seen, _REASONS[reason], _ACTIONS[reason]) for seen, reason in rows]

    def check(self, name: str, tensor: Tensor, classes: int | None) -> None:
        """Refuse a tensor that can be no part of its state.

        Raises:
            InputError: it cannot.
        """
        shapes = {
            _SEEN: (),
            _SCALE: (),
            _MEANS: (len(_MEAN_NAMES),),
            _LOG: (EVENTS, 2),
            _SOURCE: (classes or len(tensor) if tensor.ndim else 0,),
        }
        shapes[_ADAPTED] = shapes[_SOURCE]
        if not self.on or tuple(tensor.shape) != shapes.get(name):
            raise InputError(
                f"this adaptation state belongs to another adapter: {name!r} of shape "
                f"{tuple(tensor.shape)} is unknown here"
            )
        if not torch.isfinite(tensor).all() or (name != _MEANS and (tensor < 0).any()):
            raise InputError(f"this adaptation state is damaged: {name!r} is out of range")

    def describe(self) -> list[str]:
        """Lines on what it watches."""
        lines = []
        if self.pull:
            lines.append(f"pull: {self.pull:g} of the way back to the source after every update")
        if self.on:
            lines.append(
                f"guard: the source predicts one image in {EVERY} too; updates are softened or "
                "reset where predictions say that adapting hurts (health(), guard_events)"
            )
        return lines


def _towards(source: Tensors, params: Tensors, share: float | Tensor) -> Tensors:
    """``source + share * (params - source)``, one of the two bit for bit at 0 and 1."""
    return {
        n: torch.lerp(source[n], p, torch.as_tensor(share, dtype=p.dtype, device=p.device))
        for n, p in params.items()
    }


def _measured(known: Tensors, logits: Tensor, probe: Probe | None) -> Tensors:
    """The state once a batch's logits (B, classes) and the source's on some of them are in."""
    logits = single(logits)
    if not known:
        classes = logits.new_zeros(logits.shape[1])
        known = {
            _SEEN: torch.zeros((), dtype=torch.int64),
            _SCALE: logits.new_ones(()),
            _MEANS: logits.new_zeros(len(_MEAN_NAMES)),
            _SOURCE: classes,
            _ADAPTED: classes.clone(),
            _LOG: torch.zeros(EVENTS, 2, dtype=torch.int64, device=logits.device),
        }
    keep = 1 - 1 / HORIZON
    fine = torch.isfinite(logits).all(1)
    p = logits.nan_to_num().softmax(1)
    after = {
        _SEEN: known[_SEEN].cpu() + len(logits),
        _ADAPTED: known[_ADAPTED] * keep ** (len(logits) / EVERY) + _labels(p, fine).sum(0),
    }
    reason = torch.full_like(known[_LOG][0, 0], _REASONS.index("not finite"))
    after[_LOG] = _noted(known[_LOG], after[_SEEN], reason, ~fine.all())
    if probe is not None:
        q = single(probe.logits)
        ours, sure = p[probe.places], fine[probe.places] & torch.isfinite(q).all(1)
        q = q.nan_to_num().softmax(1)
        gap = ours.amax(1) - q.amax(1)
        agree = (ours.argmax(1) == q.argmax(1)).to(q)
        values = [torch.ones_like(gap), agree, ours.amax(1), q.amax(1), gap, gap.square()]
        decay = keep ** len(probe.places)
        after[_MEANS] = known[_MEANS] * decay + (torch.stack(values) * sure).sum(1)
        after[_SOURCE] = known[_SOURCE] * decay + _labels(q, sure).sum(0)
    return known | after


def _decided(
    known: Tensors,
    outcome: Outcome,
    before: Tensors,
    source: Tensors,
    init: Callable[[], Tensors],
) -> tuple[Outcome, Tensors]:
    """What becomes of an update from ``before``."""
    moved = _towards(before, outcome.params, known[_SCALE])
    outcome = outcome._replace(params=moved)
    weight, _, _, _, gap, squares = known[_MEANS].unbind()
    enough = weight >= ENOUGH
    gap = gap / weight.clamp_min(1)
    error = (
        (squares / weight.clamp_min(1) - gap.square()).clamp_min(0) / weight.clamp_min(1)
    ).sqrt()
    one = enough & (torch.minimum(_same(known[_SOURCE]), _same(known[_ADAPTED])) > ONE_CLASS)
    collapsed = enough & ~one & (_balance(known[_ADAPTED]) < _balance(known[_SOURCE]) - COLLAPSE)
    unsure = enough & ~one & ~collapsed & (gap < -LESS_SURE) & (gap < -ERRORS * error)
    acts = one | collapsed | unsure
    if acts.device.type == "cpu" and not acts:
        return outcome, known
    share = torch.where(collapsed, 0.0, torch.where(acts, 0.5, 1.0))
    params = _towards(source, outcome.params, share)
    state = choose(collapsed, init(), outcome.state)
    reason = torch.where(collapsed, 1, torch.where(one, 0, 2))
    # What was decided on is no evidence any more, unless one class goes on being seen.
    after = {
        _MEANS: known[_MEANS] * ~(collapsed | unsure),
        _ADAPTED: known[_ADAPTED] * ~collapsed,
    }
    after[_SCALE] = torch.where(collapsed, known[_SCALE] / 2, known[_SCALE])
    after[_LOG] = _noted(known[_LOG], known[_SEEN], reason, acts)
    return outcome._replace(params=params, state=state), known | after


def _labels(p: Tensor, counted: Tensor) -> Tensor:
    """Predicted classes as (B, classes) of ones and zeros; zeros for images that do not count."""
    return torch.nn.functional.one_hot(p.argmax(1), p.shape[1]).to(p) * counted[:, None]


def _noted(log: Tensor, seen: Tensor, reason: Tensor, happened: Tensor) -> Tensor:
    row = torch.stack([seen.to(log.device), reason])
    return torch.where(happened, torch.cat([log[1:], row[None]]), log)


def _balance(mass: Tensor) -> Tensor:
    """Entropy in nats of how often each class (classes,) was predicted."""
    return entropy((mass / mass.sum().clamp_min(1e-12)).clamp_min(1e-12).log()[None])[0]


def _same(mass: Tensor) -> Tensor:
    """How probably two images are predicted to be of one class."""
    return (mass / mass.sum().clamp_min(1e-12)).square().sum()
