"""A guard over online adaptation, which limits the damage of updates that make predictions worse.

One image in `EVERY` is also predicted by the source, with its own parameters and statistics, which
costs two per cent of the forward and backward passes of an update. The signals are running means
over the last `HORIZON` of these images, and over all images between them (`Guard.health`). After an
update they decide what happens to it:

- *one class*: for a long time the source and the adapted model have predicted only one class (a
  camera that shows a wall, noise, or a single object). Such images teach nothing about the others,
  so the parameters go half of the way back to the source after every such update.
- *collapse*: the adapted model predicts far fewer classes than the source on the same stream (the
  entropy of its predicted classes is lower by `COLLAPSE` nats), which is how entropy minimisation
  fails. Parameters and rule return to the source, and the step of every later update is halved,
  because the same steps would fail again.
- *less sure*: the adapted model is less confident than the source on the same images, by
  `LESS_SURE` and by `ERRORS` standard errors. The parameters go half of the way back.
- on BatchNorm models with ``statistics="stream"``, updates near the source are undone, and the
  parameters go half of the way back to it, because there is nothing to adapt to (no event). The
  distance of a stream is measured by `ttt_plugins.backbones.stream`.
- *new shift*: the images look unlike those before (`ttt_plugins.backbones.look`). What was learned
  on another shift can be worse than no adaptation, so parameters and rule return to the source
  before the batch is predicted.
- *not finite*: a prediction is not finite. Adaptation never keeps values that are not finite, so
  the event is only recorded.

All values are tensors on the model's device, and decisions use `torch.where`, so nothing waits for
the device. The guard's state is part of the adaptation state.

Similar signals are used elsewhere: the entropy of the mean prediction (SHOT, Liang et al., arXiv
2002.08546, equation 4), a reset if a loss shows that a model has collapsed (SAR, Niu et al.,
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
from ..backbones.stream import EVERY
from ..errors import InputError
from ..utils.precision import single
from .algorithm import Outcome, Tensors
from .memory import Balanced
from .objectives import entropy
from .scope import flatten
from .updates import choose
from .window import WINDOW, Window

__all__ = ["GUARD", "GUARDED", "Event", "Guard"]

#: Prefix of the names of the tensors of its state.
GUARD = "guard."
#: Number of images predicted by both that the running means extend over.
HORIZON = 32
#: Number of images predicted by both before any decision is made.
ENOUGH = 12
#: Fraction of pairs of images of the same class above which a stream counts as one class.
ONE_CLASS = 0.5
COLLAPSE = 0.7
LESS_SURE = 0.03
ERRORS = 2.5
#: Number of events that are kept.
EVENTS = 64

_SEEN, _MEANS, _LOG = GUARD + "seen", GUARD + "means", GUARD + "events"
_SCALE = GUARD + "scale"
_SOURCE, _ADAPTED = GUARD + "source", GUARD + "adapted"
_MEAN_NAMES = ("probed", "agreement", "confidence", "source_confidence", "gap", "squared_gap")
_REASONS = ("one class", "collapse", "less sure", "not finite", "new shift")
_ACTIONS = ("softened", "reset", "softened", "noted", "reset")


GUARDED = (
    "the guard softened or reset the adaptation, because its predictions looked worse than the "
    "source's; net.guard_events lists what it did and net.health() its signals (this warning is "
    "given once)"
)


class Event(NamedTuple):
    """An action of the guard.

    Attributes:
        images: number of images in the stream so far, including the last batch.
        reason: ``"one class"``, ``"collapse"``, ``"less sure"``, ``"not finite"`` or
            ``"new shift"``.
        action: ``"softened"`` (half of the way back to the source), ``"reset"`` or ``"noted"``.
    """

    images: int
    reason: str
    action: str


class Probe(NamedTuple):
    """Images that the source also predicts: their positions in a batch, and its logits."""

    places: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Guard:
    """The guard and the pull; see the module's docstring.

    Attributes:
        on: whether the guard is active.
        pull: fraction of the way back to the source that the parameters go after every update, in
            [0, 1].
    """

    on: bool = False
    pull: float = 0.0

    @classmethod
    def of(cls, config: Any) -> Guard:
        """The guard of a config's fields ``guard`` and ``pull``, by default neither."""
        named = {field.name for field in dataclasses.fields(config)}
        return cls(
            config.guard if "guard" in named else False,
            config.pull if "pull" in named else 0.0,
        )

    def step(
        self,
        window: Window | Balanced,
        adapt: Callable[[Tensors, Tensors, Tensor], Outcome],
        backbone: Backbone,
        start: tuple[Tensors, Callable[[], Tensors]],
        now: tuple[Tensors, Tensors],
        waiting: Tensors,
        images: Tensor,
    ) -> tuple[Outcome, Tensors]:
        """`Window.step`, followed by pull and guard after an update.

        Args:
            window: what decides when updates are made, and on which images.
            adapt: the step of an algorithm.
            backbone: the classifier.
            start: the source's tensors, and a function that returns the rule's initial state.
            now: adapted tensors, and the rule's state.
            waiting: waiting images, and the guard's state.
            images: images (B, C, H, W) in [0, 1].
        """
        known = {n: t for n, t in waiting.items() if n.startswith(GUARD)}
        gathered = {n: t for n, t in waiting.items() if n.startswith(WINDOW)}
        places = self._places(known, len(images)) if self.on else []
        with backbone.streaming(waiting, images, places, self.on) as stream:
            if self.on and stream.changed is not None:
                now, known = _anew(stream.changed, now, start, known)
            outcome, gathered = window.step(adapt, backbone, *now, gathered, images)
        outcome = outcome._replace(forwards=outcome.forwards + len(stream.probed))
        waiting = gathered | stream.joined(outcome.logits)
        if self.pull and outcome.backwards:
            outcome = outcome._replace(params=_towards(start[0], outcome.params, 1 - self.pull))
        if not self.on:
            return outcome, waiting
        probe = None
        if places and stream.by_source is not None:
            probe = Probe(places, stream.by_source[[stream.probed.index(p) for p in places]])
        known = _measured(known, outcome.logits, probe)
        if outcome.backwards:
            outcome = _as_far_as(known[_SCALE], stream.openness, now[0], outcome, start[0])
            outcome, known = _decided(known, outcome, *start)
        return outcome, waiting | known

    def _places(self, known: Tensors, images: int) -> list[int]:
        """Positions of the images that the source also predicts, counted across batches."""
        seen = int(known[_SEEN]) if _SEEN in known else 0
        return list(range(-seen % EVERY, images, EVERY))

    def health(self, known: Tensors, params: Tensors | None, source: Tensors) -> dict[str, float]:
        """The signals as numbers; before the first image only ``distance``.

        Args:
            known: the guard's state.
            params: adapted tensors; None if they are the source's.
            source: initial values of the tensors that adapt.
        """
        apart = torch.zeros(()) if params is None else flatten(params) - flatten(source)
        signals = {"distance": float(apart.norm() / flatten(source).norm().clamp_min(1e-12))}
        if _MEANS not in known:
            return signals
        means = dict(zip(_MEAN_NAMES, known[_MEANS].tolist(), strict=True))
        weight = means.pop("probed")
        means.pop("squared_gap")
        signals |= {name: value / max(weight, 1e-12) for name, value in means.items()}
        for name, key in (("source_classes", _SOURCE), ("classes", _ADAPTED)):
            signals[name] = float(_balance(known[key]).exp())
        signals |= {"seen": float(known[_SEEN]), "scale": float(known[_SCALE])}
        return signals | {"repetition": float(_same(known[_SOURCE]))}

    def events(self, known: Tensors) -> list[Event]:
        """The last `EVENTS` actions of the guard, the oldest first."""
        if _LOG not in known:
            return []
        rows = [row for row in known[_LOG].tolist() if row[0]]
        return [Event(seen, _REASONS[reason], _ACTIONS[reason]) for seen, reason in rows]

    def harmful(self, known: Tensors) -> int:
        """Number of these events that mean that something went wrong; a new shift does not."""
        return sum(event.reason != "new shift" for event in self.events(known))

    def check(self, name: str, tensor: Tensor, classes: int | None) -> None:
        """Check that a tensor of a saved state can be part of the guard's state.

        Raises:
            InputError: the tensor cannot, or is damaged.
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
        """Lines that describe the guard and the pull."""
        lines = []
        if self.pull:
            lines.append(f"pull: {self.pull:g} of the way back to the source after every update")
        if self.on:
            lines.append(
                f"guard: the source predicts one image in {EVERY} too; updates are softened or "
                "reset if predictions suggest that adapting hurts, or images that the shift has "
                "changed (health(), guard_events)"
            )
        return lines


def _towards(source: Tensors, params: Tensors, share: float | Tensor) -> Tensors:
    """``source + share * (params - source)``, exact for a share of 0 or 1."""
    # Adapted tensors have single precision, the source's may have half precision.
    return {
        n: torch.lerp(source[n].to(p), p, torch.as_tensor(share, dtype=p.dtype, device=p.device))
        for n, p in params.items()
    }


def _measured(known: Tensors, logits: Tensor, probe: Probe | None) -> Tensors:
    """The state after a batch, from its logits (B, classes) and the source's for some images."""
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


def _anew(
    changed: Tensor,
    now: tuple[Tensors, Tensors],
    start: tuple[Tensors, Callable[[], Tensors]],
    known: Tensors,
) -> tuple[tuple[Tensors, Tensors], Tensors]:
    """Adapted tensors, the rule's state and the guard's state, reset if the shift has changed."""
    if not known or (changed.device.type == "cpu" and not changed):
        return now, known
    params, state = choose(changed, start[0], now[0]), choose(changed, start[1](), now[1])
    reason = torch.full_like(known[_LOG][0, 0], _REASONS.index("new shift"))
    after = {name: known[name] * ~changed for name in (_MEANS, _SOURCE, _ADAPTED)}
    after[_LOG] = _noted(known[_LOG], known[_SEEN], reason, changed)
    return (params, state), known | after


def _as_far_as(
    scale: Tensor, openness: Tensor | None, before: Tensors, outcome: Outcome, source: Tensors
) -> Outcome:
    """Scale an update by ``scale``; near the source, undo it and halve the distance from it."""
    if openness is None:
        return outcome._replace(params=_towards(before, outcome.params, scale))
    params = _towards(before, outcome.params, scale * openness)
    return outcome._replace(params=_towards(source, params, (1 + openness) / 2))


def _decided(
    known: Tensors, outcome: Outcome, source: Tensors, init: Callable[[], Tensors]
) -> tuple[Outcome, Tensors]:
    """Decide what happens to an update."""
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
    # Signals that have led to a decision are reset, except while one class is still seen.
    after = {
        _MEANS: known[_MEANS] * ~(collapsed | unsure),
        _ADAPTED: known[_ADAPTED] * ~collapsed,
    }
    after[_SCALE] = torch.where(collapsed, known[_SCALE] / 2, known[_SCALE])
    after[_LOG] = _noted(known[_LOG], known[_SEEN], reason, acts)
    return outcome._replace(params=params, state=state), known | after


def _labels(p: Tensor, counted: Tensor) -> Tensor:
    """Predicted classes, one-hot (B, classes); zeros for images that do not count."""
    return torch.nn.functional.one_hot(p.argmax(1), p.shape[1]).to(p) * counted[:, None]


def _noted(log: Tensor, seen: Tensor, reason: Tensor, happened: Tensor) -> Tensor:
    row = torch.stack([torch.full_like(reason, int(seen)), reason])  # the count is on the CPU
    return torch.where(happened, torch.cat([log[1:], row[None]]), log)


def _balance(mass: Tensor) -> Tensor:
    """Entropy in nats of the frequencies (classes,) of predicted classes."""
    return entropy((mass / mass.sum().clamp_min(1e-12)).clamp_min(1e-12).log()[None])[0]


def _same(mass: Tensor) -> Tensor:
    """Probability that two images are predicted to be of the same class."""
    return (mass / mass.sum().clamp_min(1e-12)).square().sum()
