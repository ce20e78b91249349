"""The demo: methods compared on real images, with a picture of the results."""

from .picture import draw
from .result import DemoResult, Frames
from .run import (
    build_adapters,
    build_per_image_adapters,
    predict_frames,
    predict_sample,
    run_demo,
    run_per_image,
)
from .sample import Sample, load_sample

__all__ = [
    "DemoResult",
    "Frames",
    "Sample",
    "build_adapters",
    "build_per_image_adapters",
    "draw",
    "load_sample",
    "predict_frames",
    "predict_sample",
    "run_demo",
    "run_per_image",
]
