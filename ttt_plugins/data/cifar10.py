"""Facts on CIFAR-10."""

from __future__ import annotations

__all__ = ["CIFAR10_CLASSES", "EXTRA_ROWS"]


#: In CIFAR-10's own order.
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


#: The last rows of the training file carry the four extra corruptions that MGG is meta-trained
#: on; no other training may see them.
EXTRA_ROWS = 1024
