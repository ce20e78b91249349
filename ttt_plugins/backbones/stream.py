"""BatchNorm statistics over a stream, balanced by predicted class (``statistics="stream"``).

A layer is normalised with an average of the source's statistics and an estimate over the stream,
so that the prediction of a single image uses the images before it. The estimate is kept in groups
of predicted classes, because in a stream sorted by class the latest images say more about their
class than about the shift.

A batch is processed in four steps:

1. One image in `EVERY`, and of the first batch every image up to `START`, is also predicted by the
   source with its own statistics (`Stream.places`). The mean squared distance between the means of
   the layers' inputs and the source's, relative to its variances and corrected for the small number
   of images, measures how far the stream is from the source (`Stream.probe`). Below `NEAR` only the
   source's statistics are used, because no estimate is as good on the source's own images; above
   `FAR` the average of step 2 is used.
2. Every layer averages the groups, each counted for at most its share of `HORIZON` images, the
   batch, and the source, which counts for ``prior`` images (`Stream.choose`).
   Images whose classes repeat count for less: ``n`` of them count for
   ``n / (1 + n * CLUSTERING * excess)``, the design effect of cluster samples (Kish, Survey
   Sampling, 1965, section 5.4), where ``excess`` is the excess over chance of the probability that
   two of them are of the same class. This applies to the batch, and to the whole estimate as long
   as few classes have been seen. The classes of a batch are unknown before it is predicted, so the
   repetition in earlier batches is used, and for the first batch that in the source's predictions.
3. The model predicts the batch with these statistics.
4. Each image is added to the group of its predicted class (`Stream.joined`). The groups forget
   everything while the stream is near the source.

Before these steps, a change of the shift makes the groups forget everything, so that the batch is
processed like the first of a stream (`Stream.watch`). The change is detected in the images alone
(`ttt_plugins.backbones.look`).

The groups are those of balanced BatchNorm (Su et al., TRIBE, arXiv 2309.14949, equations 4 to 6),
except that the number of images that a group stands for is bounded, instead of using a momentum,
and that classes beyond `GROUPS` share groups, so memory does not grow with the number of classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.precision import single
from .look import NUMBERS, Watch

__all__ = ["GROUPS", "HORIZON", "STREAM", "Stream"]

#: Largest number of images that all groups together count for.
HORIZON = 256
#: Largest number of groups of classes.
GROUPS = 16
#: Variance of an image's moments between classes, relative to that within classes; chosen on sorted
#: and on independent streams of the four extra corruptions.
CLUSTERING = 2.0
#: One image in this many is also predicted by the source, and at most this many of a first batch.
EVERY, START = 16, 64
#: Number of images predicted by the source that the distance from it extends over, and number from
#: which the measured distance is fully trusted.
PROBES, SURE = 16, 8
#: Squared distances from the source between which its statistics are replaced by the stream's. On
#: clean images of CIFAR-10 it is 0.014, on clean photographs of ImageNet's classes 0.017 to 0.020
#: (EfficientNet-Lite0; up to 0.041 in the order of the classes). On the four extra corruptions at
#: severity 5 it is 0.030 to 0.078 and 0.037 to 0.200. Lower values gain more on mild corruptions
#: (0.022 and 0.030: 2.3 points on those four) but lose to the source on clean photographs.
NEAR, FAR = 0.035, 0.060
#: Variance of the mean of an image between images, relative to the variance of a channel.
SPREAD = 0.12
#: Repetition of classes in the source's predictions of images that are shifted but not repeated.
COLLAPSED = 0.1
#: Smallest number of images from which the repetition of classes is estimated.
_FEWEST = 8

#: Prefix of the names of the estimate's tensors.
STREAM = "statistics."
_COUNTS = STREAM + "counts"
_REPEATS = STREAM + "repeats"
_SEEN = STREAM + "seen"
_SHIFT = STREAM + "shift"
_PROBED = STREAM + "probed"
_LOOKS = STREAM + "looks"
_LOOKED = STREAM + "looked"
_LAYER = STREAM + "layer."

_Pair = tuple[Tensor, Tensor]


class Stream:
    """The estimate before, during and after a batch.

    Args:
        estimate: result of `joined` after the last batch; empty at the start of a stream.
        prior: number of images that the source's statistics count for.

    Attributes:
        probed: positions in the batch of the images that the source also predicted.
        by_source: its logits (n, classes) for them; None if there are none.
        changed: whether the shift changed with the batch, a bool tensor (); None if `watch` was not
            called.
    """

    def __init__(self, estimate: Mapping[str, Tensor], prior: float):
        self._past = {n: t for n, t in estimate.items() if n.startswith(STREAM)}
        self._prior = prior
        self._weighed: _Pair | None = None
        self._chosen: dict[str, _Pair] = {}
        self._moments: dict[str, Tensor] = {}
        self._observed: dict[str, Tensor] = {}
        self.probed: list[int] = []
        self.by_source: Tensor | None = None
        self.changed: Tensor | None = None

    def watch(self, images: Tensor) -> None:
        """Detect whether the shift has changed with images (B, C, H, W), and forget if it has."""
        if _LOOKS in self._past:
            known = Watch(self._past[_LOOKS], self._past[_LOOKED])
        else:
            known = Watch.start(images.device)
        self.changed, known = known.after(images)
        self._past |= {_LOOKS: known.looks, _LOOKED: known.counts}
        if _COUNTS in self._past:
            self._past[_COUNTS] = self._past[_COUNTS] * ~self.changed
        if (probed := self._past.get(_PROBED)) is not None:
            self._past[_PROBED] = probed * ~self.changed

    def places(self, images: int) -> list[int]:
        """Positions of the images that the source also predicts, counted across batches."""
        if _SEEN not in self._past:
            return list(range(min(images, START)))
        return list(range(-int(self._past[_SEEN]) % EVERY, images, EVERY))

    def observe(self, name: str, x: Tensor, images: int, source: _Pair) -> None:
        """Measure a layer's input (N, C, ...) while the source predicts some images."""
        means = _moments_of(x, images, source[0])[:, 0]
        fine = torch.isfinite(means).all(1)
        mean = means.where(fine[:, None], 0).sum(0) / fine.sum().clamp_min(1)
        self._observed[name] = mean * torch.rsqrt(single(source[1]) + 1e-5)

    def probe(self, places: list[int], logits: Tensor) -> None:
        """Update the distance from the source by its logits (n, classes) at some positions."""
        self.probed, self.by_source = places, logits
        if not self._observed:
            return
        shift, new = torch.cat(list(self._observed.values())), len(logits)
        if _PROBED in self._past:
            old = self._past[_PROBED].clamp_max(PROBES)
            past = self._past[_SHIFT].to(shift)
            shift, probed = torch.lerp(past, shift, (new / (old + new)).to(shift)), old + new
        else:
            probed = shift.new_tensor(float(new))
        self._past |= {_SHIFT: shift, _PROBED: probed}
        if _REPEATS not in self._past and new >= _FEWEST:
            self._past[_REPEATS] = (_repeats(_groups(logits))[0] - COLLAPSED).clamp_min(0)

    @property
    def openness(self) -> Tensor | None:
        """From 0 near the source to 1 far from it; None if the distance was not measured."""
        if _PROBED not in self._past:
            return None
        distance = self._past[_SHIFT].square().mean() - SPREAD / self._past[_PROBED].clamp_min(1)
        openness = ((distance - NEAR) / (FAR - NEAR)).clamp(0, 1)
        # A few images say little, and a shift is the reason to adapt at all.
        return 1 - (1 - openness) * (self._past[_PROBED] / SURE).clamp_max(1)

    def choose(self, name: str, x: Tensor, images: int, source: _Pair) -> _Pair:
        """Mean and variance (C,) that a layer normalises with.

        They are computed in the layer's first pass over a batch. Later passes, at other parameters
        or over a window of images that were already seen, use the same.

        Args:
            name: name of the layer.
            x: input (N, C, ...) of the layer.
            images: number of images in the batch, of which a layer may see several rows each.
            source: source mean and variance of the layer, (C,) each.
        """
        if name not in self._chosen:
            self._moments[name] = moments = _moments_of(x, images, source[0])
            fine = torch.isfinite(moments).all(2).all(1)
            mean = moments.where(fine[:, None, None], 0).sum(0) / fine.sum().clamp_min(1)
            if self._weighed is None:
                self._weighed = self._weigh(mean.new_full((), float(images)))
            self._chosen[name] = self._average(name, source, mean, *self._weighed)
        return self._chosen[name]

    def at_rest(self, name: str, source: _Pair) -> _Pair:
        """Mean and variance (C,) of a layer from the estimate alone, without a batch."""
        if _LAYER + name not in self._past:
            return source
        past = self._past[_LAYER + name]
        none = torch.zeros_like(past[0])
        return self._average(name, source, none, *self._weigh(past.new_zeros(())))

    def _weigh(self, images: Tensor) -> _Pair:
        """Weights of the batch and of each group, which sum to one; and the estimate's weight.

        The latter is the weight of the estimate in its average with the source.
        """
        repeats = self._past.get(_REPEATS, images.new_zeros(())).to(images)
        counts = (images / (1 + (images - 1).clamp_min(0) * CLUSTERING * repeats))[None]
        total, excess = counts[0], 0.0
        if _COUNTS in self._past:
            groups = _bounded(self._past[_COUNTS]).to(images)
            chance = 1 / len(groups)
            counts = torch.cat([counts, groups])
            total = counts.sum()
            # Excess over chance of the probability that two images are of the same class.
            same_class = torch.ones_like(counts)
            same_class[0] = chance + (1 - chance) * repeats
            pairs = (counts.square() * same_class).sum() - total
            excess = (pairs / (total * (total - 1)).clamp_min(1) - chance).clamp_min(0)
        effective = total / (1 + total * CLUSTERING * excess)
        share = effective / (effective + self._prior).clamp_min(1e-6)
        if self.openness is not None:
            share = share * self.openness
        return counts / total.clamp_min(1e-6), share

    def _average(
        self, name: str, source: _Pair, mean: Tensor, weights: Tensor, share: Tensor
    ) -> _Pair:
        """Average mean and variance (C,) of batch (moments ``mean``), groups and source."""
        own_mean, own_var = single(source[0]), single(source[1])
        moments = mean[None]
        if (past := self._past.get(_LAYER + name)) is not None:
            moments = torch.cat([moments, past.to(mean)])
        shift, square = (weights[:, None, None] * moments).sum(0)
        var = torch.lerp(own_var, (square - shift.square()).clamp_min(0), share)
        return (own_mean + share * shift).to(source[0].dtype), var.to(source[1].dtype)

    def joined(self, logits: Tensor) -> dict[str, Tensor]:
        """The estimate with the batch added, without images whose logits are not finite.

        Args:
            logits: logits (B, classes) of the batch.
        """
        if not self._moments:
            return self._past
        member = _groups(logits)
        new = member.sum(0)
        old = _bounded(self._past[_COUNTS]) if _COUNTS in self._past else torch.zeros_like(new)
        if self.openness is not None:
            # Images near the source would distort the estimate when another stream begins.
            old, new = old * self.openness, new * self.openness
        share = new / (old + new).clamp_min(1e-6)
        estimate = self._past | {_COUNTS: old + new, _REPEATS: self._repeats_after(member)}
        estimate[_SEEN] = torch.tensor(len(logits)) + self._past.get(_SEEN, torch.tensor(0)).cpu()
        for name, moments in self._moments.items():
            fresh = (member[:, :, None, None] * moments.nan_to_num(0, 0, 0)[:, None]).sum(0)
            fresh = fresh / member.sum(0).clamp_min(1)[:, None, None]
            past = self._past.get(_LAYER + name)
            past = torch.zeros_like(fresh) if past is None else past.to(fresh)
            estimate[_LAYER + name] = torch.lerp(past, fresh, share[:, None, None])
        return estimate

    def _repeats_after(self, member: Tensor) -> Tensor:
        """The repetition of classes, updated in proportion to the size of the batch."""
        now, pairs = _repeats(member)
        if (known := self._past.get(_REPEATS)) is None:
            return now
        return torch.lerp(known.to(now), now, pairs / (pairs + 2 * GROUPS))


def check_stream(name: str, tensor: Tensor, channels: Mapping[str, int]) -> None:
    """Check that a tensor of a saved state can be part of an estimate.

    Args:
        name: name of the tensor in the adaptation state.
        tensor: the tensor.
        channels: numbers of channels by the names of the layers; empty for other statistics.

    Raises:
        InputError: the tensor cannot, or is damaged.
    """
    shape, known = tuple(tensor.shape), {_LAYER + n: c for n, c in channels.items()}
    groups = shape[0] if shape and 0 < shape[0] <= GROUPS else 0
    scalars = dict.fromkeys((_REPEATS, _SEEN, _PROBED), ())
    expected = scalars | {_COUNTS: (groups,), _SHIFT: (sum(channels.values()),)}
    looks = {_LOOKS: (3, NUMBERS), _LOOKED: (2,)}
    fits = bool(channels) and shape == expected.get(name, (groups, 2, known.get(name)))
    fits = shape == looks[name] if name in looks else fits
    if not fits:
        raise InputError(
            f"this adaptation state belongs to another adapter: {name!r} of shape "
            f"{shape} is unknown here"
        )
    if not torch.isfinite(tensor).all():
        raise InputError(f"this adaptation state is damaged: {name!r} is not finite")


def _bounded(counts: Tensor) -> Tensor:
    return counts.clamp_max(HORIZON / len(counts))


def _groups(logits: Tensor) -> Tensor:
    """One-hot groups (B, groups) of the images; zeros for logits that are not finite."""
    groups = min(logits.shape[1], GROUPS)
    fine = torch.isfinite(logits).all(1)
    member = torch.nn.functional.one_hot(logits.nan_to_num().argmax(1) % groups, groups)
    return single(member.to(logits.dtype)) * fine[:, None]


def _repeats(member: Tensor) -> _Pair:
    """Excess over chance, in [0, 1], of two images being in one group, and the number of pairs."""
    counts, groups = member.sum(0), member.shape[1]
    total = counts.sum()
    pairs = total * (total - 1)
    same = (counts.square().sum() - total) / pairs.clamp_min(1)
    return ((same - 1 / groups) / (1 - 1 / groups)).clamp_min(0) if groups > 1 else same * 0, pairs


@torch.no_grad()
def _moments_of(x: Tensor, images: int, centre: Tensor) -> Tensor:
    """Mean and mean square (B, 2, C) of each image relative to ``centre`` (C,)."""
    rows = single(x).flatten(2) if x.ndim > 2 else single(x)[:, :, None]
    first = rows.mean(2).double()
    # A norm reads the tensor only once and allocates no tensor of its size.
    square = torch.linalg.vector_norm(rows, dim=2).double().square() / rows.shape[2]
    centre = centre.double()
    square = square - 2 * centre * first + centre.square()
    moments = torch.stack([first - centre, square], 1).to(rows.dtype)
    return (
        moments.view(images, -1, *moments.shape[1:]).mean(1) if len(moments) > images else moments
    )
