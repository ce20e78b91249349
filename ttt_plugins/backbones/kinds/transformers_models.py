"""Hugging Face transformers' image classifiers and image processors.

A repository's ``config.json`` may come from anybody. Only types of models in `_TYPES` are built,
from the fields that their own configuration class declares, and only from plain values: nothing
that transformers would take for code to run, for weights to fetch, or for another kernel.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from ...errors import InputError, MissingDependencyError
from ...utils.pictures import Pictures
from .kind import ModelKind, Settings

#: The types of ``config.json`` that are built: image classifiers of PyTorch layers alone.
_TYPES = frozenset(
    {
        "beit",
        "bit",
        "clip",
        "convnext",
        "convnextv2",
        "cvt",
        "data2vec-vision",
        "deit",
        "dinov2",
        "dinov2_with_registers",
        "efficientnet",
        "focalnet",
        "hgnet_v2",
        "hiera",
        "ijepa",
        "levit",
        "mobilenet_v1",
        "mobilenet_v2",
        "mobilevit",
        "mobilevitv2",
        "poolformer",
        "pvt",
        "pvt_v2",
        "regnet",
        "resnet",
        "segformer",
        "siglip",
        "swiftformer",
        "swin",
        "swinv2",
        "vit",
        "vit_msn",
    }
)
#: Largest number of entries of a list, and largest number, in a configuration.
_MOST, _LARGEST = 256, 1 << 16
#: PIL's numbers of its filters.
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_PROCESSOR = "preprocessor_config.json"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"this model needs Hugging Face transformers: pip install transformers ({error})"
        ) from error
    return transformers


# -- preprocessing -------------------------------------------------------------------------------


def _side(size: Any, name: str) -> int | tuple[int, int] | None:
    """A size of a processor: the short side, or (height, width); None if it is neither."""
    if isinstance(size, int):
        return size
    size = size if isinstance(size, Mapping) else {}
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return int(size["shortest_edge"])
    if size:
        raise InputError(f"the processor's {name} {dict(size)} is no size of a classifier's images")
    return None


def _pictures(processor: Mapping[str, Any]) -> Pictures | None:
    """How a processor resizes and crops: each family has a rule of its own for the short side."""
    if not processor.get("do_resize", True):
        return None
    resize = _side(processor.get("size"), "size")
    crop = _side(processor.get("crop_size"), "crop_size") if _crops(processor) else None
    crop = (crop, crop) if isinstance(crop, int) else crop
    if resize is None:
        return None
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type"))
    share = processor.get("crop_pct")
    if kind.startswith("ConvNext") and isinstance(resize, int):
        side = resize
        # Large images are resized to the square as a whole, others are cropped from larger ones.
        whole = side >= 384
        resize = (side, side) if whole else int(side / (share or 224 / 256))
        crop = None if whole else (side, side)
    elif kind.startswith("Levit") and isinstance(resize, int):
        resize = int(256 / 224 * resize)
    elif kind.startswith("PoolFormer") and share:
        resize = int((resize if isinstance(resize, int) else resize[0]) / share)
    number = processor.get("resample", 3)
    known = isinstance(number, int) and 0 <= number < len(_FILTERS)
    return Pictures(resize, crop, _FILTERS[number] if known else "bicubic")


def _crops(processor: Mapping[str, Any]) -> bool:
    return bool(processor.get("do_center_crop", False))


def _read(processor: Mapping[str, Any]) -> Settings:
    """The settings of a ``preprocessor_config.json``, in whose words each is written."""
    if processor.get("do_flip_channel_order"):
        raise InputError(
            "the processor turns RGB into BGR (do_flip_channel_order), which an adapter does not: "
            "wrap a module that flips the channels and then runs the model, with normalize=False"
        )
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    if abs(scale * 255 - 1) > 1e-6 or processor.get("rescale_offset"):
        raise InputError(
            f"the processor scales 8-bit pixels by {scale:.6g} instead of 1/255: give mean= and "
            "std= for images in [0, 1] instead"
        )
    pictures = _pictures(processor)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", mean is not None) or mean is None or std is None:
        return Settings(normalize=False, pictures=pictures)
    mean, std = ([v] if isinstance(v, (int, float)) else list(v) for v in (mean, std))
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type"))
    if kind.startswith("EfficientNet") and processor.get("include_top", True):
        std = [s * s for s in std]  # such a processor divides twice
    return Settings(tuple(map(float, mean)), tuple(map(float, std)), pictures=pictures)


def _own_processor(model: nn.Module) -> Mapping[str, Any] | None:
    """The processor beside the files that a model was loaded from, without a connection."""
    config: Any = model.config
    name = str(getattr(config, "name_or_path", "") or getattr(config, "_name_or_path", ""))
    if not name:
        return None
    file: Any = Path(name) / _PROCESSOR
    if not file.is_file():
        revision = getattr(config, "_commit_hash", None)
        try:
            file = try_to_load_from_cache(name, _PROCESSOR, revision=revision)
        except ValueError:  # no name of a repository
            return None
    if not isinstance(file, (str, Path)):
        return None
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# -- models of repositories ----------------------------------------------------------------------


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is a number, a short word, or a list of these at most two deep."""
    if isinstance(value, list):
        return depth < 2 and len(value) <= _MOST and all(_plain(v, depth + 1) for v in value)
    if isinstance(value, str):
        return len(value) <= 64 and value.replace("_", "").replace("-", "").isalnum()
    return value is None or (isinstance(value, (int, float)) and abs(value) <= _LARGEST)


def _own_fields(config_class: type, base: type) -> set[str]:
    """The fields that a configuration class declares itself, without those of all models."""
    own = set(inspect.signature(config_class).parameters)
    common = set(inspect.signature(base).parameters) | {"self", "args", "kwargs"}
    # What would fetch another model: the part of a model that other models are built around.
    fetches = {"backbone", "backbone_config", "backbone_kwargs"}
    fetches |= {"use_pretrained_backbone", "use_timm_backbone"}
    return {n for n in own - common - fetches if not n.startswith("_")}


def _configuration(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of the model that a ``config.json`` describes, and its configuration.

    Raises:
        ValueError: it is none of `_TYPES`, or a value is not plain.
    """
    transformers = _transformers()
    kind = config.get("model_type")
    if kind not in _TYPES:
        raise ValueError(
            f"models of type {str(kind)[:40]!r} are not built; known are {sorted(_TYPES)}"
        )
    try:
        config_class = transformers.CONFIG_MAPPING[kind]
        built = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[config_class]
    except KeyError as error:
        version = transformers.__version__
        raise ValueError(f"transformers {version} has no image classifier {kind!r}") from error
    if isinstance(built, (tuple, list)):  # the first of several, unless the other is asked for
        named = config.get("architectures")
        named = named if isinstance(named, list) else []
        built = next((c for c in built if c.__name__ in named), built[0])
    values = {}
    base = transformers.PretrainedConfig
    fields = _own_fields(config_class, base)
    if kind in ("clip", "siglip"):  # whose picture half has a configuration of its own
        values["vision_config"] = _vision(config.get("vision_config"), kind, base)
    for name in sorted(fields & config.keys() - {"text_config", "vision_config"}):
        if not _plain(config[name]):
            raise ValueError(f"{name} cannot be {str(config[name])[:60]!r}")
        values[name] = config[name]
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
    if not isinstance(count, int) or not 1 <= count <= 10**6:
        raise ValueError("the number of classes is missing")
    return built, config_class(**values | {"num_labels": count})


def _vision(part: Any, kind: str, base: type) -> dict[str, Any]:
    part = part if isinstance(part, Mapping) else {}
    config_class = _transformers().CONFIG_MAPPING[f"{kind}_vision_model"]
    own = {n: part[n] for n in _own_fields(config_class, base) & part.keys()}
    if wrong := sorted(n for n, value in own.items() if not _plain(value)):
        raise ValueError(f"vision_config: {wrong[0]} cannot be {str(own[wrong[0]])[:60]!r}")
    return own


class _Transformers(ModelKind):
    def owns(self, model: nn.Module) -> bool:
        names = {f"{c.__module__.split('.')[0]}.{c.__name__}" for c in type(model).__mro__}
        return "transformers.PreTrainedModel" in names

    def settings(self, model: nn.Module) -> Settings:
        config: Any = model.config
        timm_part = getattr(getattr(model, "timm_model", None), "pretrained_cfg", None)
        size = getattr(config, "image_size", None) or getattr(
            getattr(config, "vision_config", None), "image_size", None
        )
        size = (size, size) if isinstance(size, int) else size
        sides = tuple(size) if isinstance(size, (list, tuple)) else ()
        own = Settings(
            input_size=(int(sides[0]), int(sides[1])) if len(sides) == 2 else None,
            num_classes=getattr(config, "num_labels", None),
        )
        if isinstance(timm_part, Mapping) and timm_part.get("mean"):
            return _with_timm(own, timm_part)
        processor = _own_processor(model)
        return own if processor is None else own.with_preprocessing(_read(processor))

    def read(self, preprocess: Any) -> Settings | None:
        timm_part = getattr(preprocess, "data_config", None)
        if isinstance(timm_part, Mapping) and "mean" in timm_part:  # TimmWrapperImageProcessor
            return _with_timm(Settings(), timm_part)
        if hasattr(preprocess, "image_mean") and callable(getattr(preprocess, "to_dict", None)):
            preprocess = preprocess.to_dict()
        if isinstance(preprocess, Mapping) and ("image_mean" in preprocess or "size" in preprocess):
            return _read(preprocess)
        return None

    def classifier(self, model: nn.Module, labels: Any) -> nn.Module:
        if "ForImageClassification" not in type(model).__name__:
            raise InputError(
                f"{type(model).__name__} of transformers is no image classifier: load it with "
                "AutoModelForImageClassification"
            )
        return super().classifier(model, labels)

    def repository(self, config: Mapping[str, Any]) -> bool:
        kind = config.get("model_type")
        return isinstance(kind, str) and kind in _TYPES

    def ready(self) -> None:
        _transformers().MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING  # noqa: B018 - imported when asked for

    def build(self, config: Mapping[str, Any], weights: Mapping[str, Any] | None) -> nn.Module:
        built, own = _configuration(config)
        if weights is None:
            with torch.device("meta"):
                return built(own)
        floating = {t.dtype for t in weights.values() if t.is_floating_point()}
        # transformers renames tensors of files from other versions when it gets them all itself.
        model, told = built.from_pretrained(
            None,
            config=own,
            state_dict=dict(weights),
            output_loading_info=True,
            dtype=floating.pop() if len(floating) == 1 else torch.float32,
        )
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, told[what])):
                told = what.replace("_keys", "")
                raise ValueError(f"the weights do not fit {built.__name__}: {told} {names[0][:80]}")
        return model.eval()


def _with_timm(own: Settings, timm_part: Mapping[str, Any]) -> Settings:
    """The preprocessing of a timm model inside a model of transformers."""
    size = timm_part.get("input_size") or (3, 224, 224)
    crop = (int(size[1]), int(size[2]))
    share = float(timm_part.get("crop_pct") or 0.875)
    pictures = Pictures(
        int(crop[0] / share), crop, str(timm_part.get("interpolation") or "bicubic")
    )
    mean, std = (tuple(map(float, timm_part[key])) for key in ("mean", "std"))
    return own.with_preprocessing(Settings(mean, std, pictures=pictures))


KIND = _Transformers()
