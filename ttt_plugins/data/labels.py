"""Sets of labels: ImageNet's classes and the subsets that ImageNet-R and ImageNet-A have."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.resources import files

from timm.data import ImageNetInfo

from ..errors import InputError
from .datasets import Dataset

__all__ = [
    "LABEL_SETS",
    "class_folders",
    "class_names",
    "dataset_positions",
    "imagenet_positions",
    "label_positions",
    "label_set",
    "positions",
]

#: Name of a set -> timm's file of its WordNet identifiers.
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
        InputError: there is no set of that name.
    """
    if name not in _TABLES:
        raise InputError(f"unknown set of labels {name!r}; known sets are {LABEL_SETS}")
    text = (files("timm.data") / "_info" / _TABLES[name]).read_text("utf-8")
    return tuple(text.split())


def positions(name: str, among: str = "imagenet-1k") -> list[int]:
    """Positions of the classes of a set among those of another.

    Raises:
        InputError: there is no such set, or it is not a subset of the other.
    """
    places = {synset: i for i, synset in enumerate(label_set(among))}
    missing = [synset for synset in label_set(name) if synset not in places]
    if missing:
        raise InputError(f"{name} is not a subset of {among}, which has no {missing[0]}")
    return [places[synset] for synset in label_set(name)]


def class_names(classes: int | None, own: Sequence[str] | None = None) -> list[str] | None:
    """Names of a model's classes.

    Args:
        classes: number of classes; None if unknown.
        own: names that come with the images, used if their number matches; WordNet identifiers
            among them are replaced by words.

    Returns:
        The images' own names, or timm's for the 1,000 classes of ImageNet; None if neither fits.
    """
    if classes == 1000 and (own is None or len(own) != classes):
        own = label_set("imagenet-1k")
    if own is None or len(own) != classes:
        return None
    words = ImageNetInfo().label_descriptions(as_dict=True)
    assert isinstance(words, dict)
    return [words.get(name, name) for name in own]


def label_positions(classes: int | None, own: Sequence[str] | None) -> list[int] | None:
    """Positions of the images' classes among a model's classes.

    Args:
        classes: number of the model's classes; None if unknown.
        own: names of the images' classes by label; None if they have none.

    Returns:
        Each label's position among the model's classes; None if it cannot be determined. If the
        numbers of classes agree, or the images' classes have no names, labels are the model's own;
        folders named by WordNet identifiers, or by words of timm's tables that belong to one class
        only ("tench", "great_white_shark"), are located among ImageNet's 1,000 classes.
    """
    if classes is None:
        return None
    if own is None or len(own) == classes:
        return list(range(classes))
    return imagenet_positions(own) if classes == 1000 else None


def imagenet_positions(names: Sequence[str]) -> list[int] | None:
    """Positions of classes among ImageNet's 1,000 by name, as for `label_positions`."""
    for places in ({s: i for i, s in enumerate(label_set("imagenet-1k"))}, _words()):
        located = [places.get(_plain(name)) for name in names]
        if None not in located and len(set(located)) == len(located):
            return located  # pyright: ignore[reportReturnType]
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").strip()


@functools.cache
def _words() -> dict[str, int]:
    """Positions by word or list of words that timm gives to one of ImageNet's classes only."""
    texts = ImageNetInfo().label_descriptions(as_dict=True)
    assert isinstance(texts, dict)
    places: dict[str, list[int]] = {}
    for place, synset in enumerate(label_set("imagenet-1k")):
        for word in {_plain(texts[synset]), *map(_plain, texts[synset].split(","))}:
            places.setdefault(word, []).append(place)
    return {word: owners[0] for word, owners in places.items() if len(owners) == 1}


def class_folders(spec: Dataset) -> list[str]:
    """Names of a data set's class folders, in the order of its classes."""
    if spec.labels is None:
        return [str(label) for label in range(spec.classes)]
    return list(label_set(spec.labels) if isinstance(spec.labels, str) else spec.labels)


def dataset_positions(spec: Dataset, classes: int | None) -> list[int] | None:
    """Positions of a data set's classes among those of a model with ``classes`` classes.

    Returns:
        the positions among ImageNet's 1,000 classes if the data set has only some of them and the
        model has all; None if the data set's classes are the model's own.
    """
    if spec.layout != "folders" or not isinstance(spec.labels, str):
        return None
    return positions(spec.labels) if classes == 1000 != spec.classes else None
