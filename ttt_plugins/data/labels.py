"""Sets of labels: ImageNet's classes and the subsets that ImageNet-R and ImageNet-A have."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.resources import files

from timm.data import ImageNetInfo

from ..errors import InputError

__all__ = ["LABEL_SETS", "class_names", "label_positions", "label_set", "positions"]

#: Name of a set -> its list of WordNet identifiers among timm's tables.
_TABLES = {
    "imagenet-1k": "imagenet_synsets.txt",
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
}
LABEL_SETS = tuple(_TABLES)


@functools.cache
def label_set(name: str) -> tuple[str, ...]:
    """The WordNet identifiers of a set of labels, in the order of its classes.

    Raises:
        InputError: no set of that name.
    """
    if name not in _TABLES:
        raise InputError(f"no set of labels {name!r}; there are {LABEL_SETS}")
    text = (files("timm.data") / "_info" / _TABLES[name]).read_text("utf-8")
    return tuple(text.split())


def positions(name: str, among: str = "imagenet-1k") -> list[int]:
    """Where the classes of a set stand among those of another.

    Raises:
        InputError: no such set, or one that is not part of the other.
    """
    places = {synset: i for i, synset in enumerate(label_set(among))}
    missing = [synset for synset in label_set(name) if synset not in places]
    if missing:
        raise InputError(f"{name} is no part of {among}: {missing[0]} is not in it")
    return [places[synset] for synset in label_set(name)]


def class_names(classes: int | None, own: Sequence[str] | None = None) -> list[str] | None:
    """What to call a model's classes.

    Args:
        classes: how many there are, None while unknown.
        own: names that come with the images, used if they are as many; WordNet identifiers among
            them are put into words.

    Returns:
        The names: the images' own, or timm's for the 1,000 of ImageNet; None if neither fits.
    """
    if classes == 1000 and (own is None or len(own) != classes):
        own = label_set("imagenet-1k")
    if own is None or len(own) != classes:
        return None
    words = ImageNetInfo().label_descriptions(as_dict=True)
    assert isinstance(words, dict)
    return [words.get(name, name) for name in own]


def label_positions(classes: int | None, own: Sequence[str] | None) -> list[int] | None:
    """Where the classes of images stand among a model's.

    Args:
        classes: how many the model has, None while unknown.
        own: the names of the images' classes by label, None if they have none.

    Returns:
        By label, the position among the model's classes; None if that cannot be told. As many
        classes as the model's, or none by name, are the model's own; folders named by WordNet
        identifiers are found among ImageNet's 1,000.
    """
    if classes is None:
        return None
    if own is None or len(own) == classes:
        return list(range(classes))
    places = {synset: i for i, synset in enumerate(label_set("imagenet-1k"))}
    if classes == 1000 and all(name in places for name in own):
        return [places[name] for name in own]
    return None
