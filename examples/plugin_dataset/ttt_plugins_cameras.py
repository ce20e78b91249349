"""A plugin: a data set for ``ttt-plugins benchmark --dataset cameras``.

Its pictures are ``DIR/day/<class>/<file>`` and ``DIR/night/<class>/<file>``.
"""

from ttt_plugins.data.datasets import Dataset

CAMERAS = Dataset(
    title="Cameras",
    classes=3,
    corruptions=("day", "night"),
    layout="folders",
    severities=(0,),
    folders=("day", "night"),
    labels=("deer", "boar", "fox"),  # the model's classes, in its order
)
