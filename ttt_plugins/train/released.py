"""Released checkpoints of the papers' authors, turned into our artifacts.

MT3 (arXiv 2103.16201) released a TensorFlow checkpoint of its meta-model; MGG (arXiv 2412.16901) a
PyTorch file of its learned optimizer and one of ViT-B/16's source statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from ..artifacts.saving import save_learned, save_with_model
from ..backbones.networks import MT3_NETWORK
from ..core.gradient_memory import check_slow
from ..errors import ArtifactError, MissingDependencyError
from ..methods import MGG, MT3

__all__ = ["convert_mgg", "convert_mt3", "mt3_state"]

#: The network of MT3's released checkpoint: TensorFlow pads on two sides only at stride 2.
_MT3_RELEASED = {**MT3_NETWORK, "pad_end": True}
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_MGG_PREFIX = "seq_modeling_block."
#: The model that MGG's optimizer was released for.
_MGG_MODEL = "vit_base_patch16_224"
_MGG_FEATURES = 12 * 768


def _load(file: Path, what: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways; none of them runs code
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "weights_only" in str(error):
            # PyTorch's text goes on to advise a load that may run code from the file.
            reason = "it is damaged, or holds more than tensors, which are all that is read"
        raise ArtifactError(f"{file} is not {what}: {reason}") from error


def convert_mgg(
    checkpoint: str | Path, out: str | Path, statistics: str | Path | None = None
) -> Path:
    """MGG's released optimizer as an artifact.

    Args:
        checkpoint: a dict with the one key ``model_state_dict``.
        out: folder for the artifact.
        statistics: the pair (std, mean), each of twelve times 768 features of ViT-B/16's blocks.
            Without it the optimizer fits any model; with it, that one.

    Raises:
        ArtifactError: a file is not what it should be; nothing is written.
    """
    saved = _load(Path(checkpoint), "a checkpoint of MGG's optimizer")
    state = saved.get("model_state_dict") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ArtifactError(f"{checkpoint} has no 'model_state_dict' with tensors")
    slow = check_slow({n.removeprefix(_MGG_PREFIX): t.float() for n, t in state.items()})
    tensors = {f"memory.{n}": t for n, t in slow.items()}
    if statistics is not None:
        tensors |= _statistics(Path(statistics))
    backbone = {"source": "timm", "name": _MGG_MODEL, "pretrained": True, "num_classes": 1000}
    backbone |= {"normalize": True, "mean": [0.5] * 3, "std": [0.5] * 3}
    training = {
        "note": "Converted from the optimizer that the authors of arXiv 2412.16901 released "
        f"(`ttt-plugins convert mgg`, file {Path(checkpoint).name})."
    }
    return save_learned(MGG(), tensors, backbone, out, training=training)


def _statistics(file: Path) -> dict[str, Tensor]:
    pair = _load(file, "a pair of source statistics")
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ArtifactError(f"{file} must hold the pair (std, mean), got {type(pair).__name__}")
    flat = []
    for part in pair:
        rows = part if isinstance(part, (tuple, list)) else [part]
        if not rows or not all(isinstance(t, Tensor) and t.is_floating_point() for t in rows):
            raise ArtifactError(f"{file}: the statistics must be floating-point tensors")
        flat.append(torch.cat([t.reshape(-1) for t in rows]).float())
    std, mean = flat
    if len(std) != _MGG_FEATURES or len(mean) != _MGG_FEATURES:
        raise ArtifactError(
            f"{file}: {len(std)} deviations and {len(mean)} means, expected {_MGG_FEATURES} each"
        )
    if not (torch.isfinite(std).all() and torch.isfinite(mean).all() and (std >= 0).all()):
        raise ArtifactError(f"{file} holds deviations below zero or values that are not finite")
    return {"source.mean": mean, "source.std": std}


def _kernel(value: np.ndarray) -> np.ndarray:
    """Height, width, in, out -> out, in, height, width; (in, out) -> (out, in)."""
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def _mt3_names() -> dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Our name -> the released variable and how to turn it (methods.md, section 7)."""

    def same(value):
        return value

    names = {"stem.weight": ("model/_init_conv/kernel", _kernel)}
    for stage in range(3):
        for unit in range(4):
            theirs = f"model/_block{stage + 1}/layer_with_weights-{unit}"
            for number in (1, 2):
                ours = f"stages.{stage}.{unit}"
                names[f"{ours}.norm{number}.weight"] = (f"{theirs}/_bn{number}/gamma", same)
                names[f"{ours}.norm{number}.bias"] = (f"{theirs}/_bn{number}/beta", same)
                names[f"{ours}.conv{number}.weight"] = (f"{theirs}/_conv{number}/kernel", _kernel)
                names[f"{ours}.conv{number}.bias"] = (f"{theirs}/_conv{number}/bias", same)
    names["norm.weight"] = ("model/_last_bn/gamma", same)
    names["norm.bias"] = ("model/_last_bn/beta", same)
    names["pre_logits.weight"] = ("model/_pre_hidden/kernel", _kernel)
    names["head.weight"] = ("model/_mlp_dense_out/kernel", _kernel)
    names["head.bias"] = ("model/_mlp_dense_out/bias", same)
    for part in ("projector", "predictor"):
        for ours, theirs in (("in", "dense_in"), ("out", "dense1_out")):
            names[f"{part}.{ours}.weight"] = (f"model/{part}/{theirs}/kernel", _kernel)
            names[f"{part}.{ours}.bias"] = (f"model/{part}/{theirs}/bias", same)
    return names


def mt3_state(variables: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The released variables as the network's ``state_dict`` and the heads' tensors.

    Args:
        variables: by their names in the checkpoint, with or without the suffix that TensorFlow
            puts on them. The optimizer's and TensorFlow's own are passed over.

    Raises:
        ArtifactError: one is missing or has another shape.
    """
    plain = {n.removesuffix(_SUFFIX): v for n, v in variables.items()}
    found = {}
    for ours, (theirs, turn) in _mt3_names().items():
        if theirs not in plain:
            raise ArtifactError(f"the checkpoint has no variable {theirs!r}")
        value = np.ascontiguousarray(turn(np.asarray(plain[theirs])))
        found[ours] = torch.from_numpy(value).float()
    heads = {n: t for n, t in found.items() if n.startswith(("projector.", "predictor."))}
    return {n: t for n, t in found.items() if n not in heads}, heads


def _read_tensorflow(prefix: str) -> dict[str, np.ndarray]:
    try:
        import tensorflow
    except ImportError as error:
        raise MissingDependencyError(
            "reading a TensorFlow checkpoint needs tensorflow: pip install tensorflow-cpu"
        ) from error
    try:
        reader = tensorflow.train.load_checkpoint(prefix)
        wanted = {theirs for theirs, _ in _mt3_names().values()}
        names = [n for n in reader.get_variable_to_shape_map() if n.removesuffix(_SUFFIX) in wanted]
        return {name: reader.get_tensor(name) for name in names}
    except Exception as error:  # TensorFlow's own, of many kinds
        raise ArtifactError(
            f"{prefix} cannot be read as a TensorFlow checkpoint: {error}"
        ) from error


def convert_mt3(
    prefix: str | Path,
    out: str | Path,
    read: Callable[[str], Mapping[str, np.ndarray]] = _read_tensorflow,
) -> Path:
    """MT3's released meta-model as an artifact.

    Args:
        prefix: path of the checkpoint without ``.index``.
        out: folder for the artifact.
        read: prefix -> variables by name.

    Raises:
        MissingDependencyError: TensorFlow is not installed.
        ArtifactError: the checkpoint is another network's; nothing is written.
    """
    state, heads = mt3_state(read(str(prefix)))
    model = timm.create_model("ttt_resnet26", num_classes=10, **_MT3_RELEASED)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(f"{prefix} holds another network: {error}") from error
    # The released network is fed images in [0, 1] as they are.
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    training = {
        "note": "Converted from the meta-model that the authors of arXiv 2103.16201 released "
        "(`ttt-plugins convert mt3`)."
    }
    return save_with_model(
        model.eval(),
        "ttt_resnet26",
        _MT3_RELEASED,
        out,
        config=MT3(),
        tensors=heads,
        training=training,
    )
