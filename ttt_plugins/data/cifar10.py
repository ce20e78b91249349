"""Facts about CIFAR-10."""

from __future__ import annotations

__all__ = ["CIFAR10_CLASSES", "EXTRA_ROWS"]


#: Names of the classes in CIFAR-10's own order.
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


#: Number of rows at the end of the training file from which the four extra corruptions for MGG's
#: meta-training are made; nothing else may be trained on these rows.
EXTRA_ROWS = 1024
