"""Conversion of the papers' released checkpoints into artifacts.

TTT (arXiv 1909.13231) released PyTorch files of its CIFAR-10 networks with their rotation heads,
MT3 (arXiv 2103.16201) a TensorFlow checkpoint of its meta-model, and MGG (arXiv 2412.16901) a
PyTorch file of its learned optimizer and one of ViT-B/16's source statistics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ..artifacts.classifiers import refuse_random
from ..artifacts.saving import save_learned, save_with_model
from ..backbones.networks import MT3_NETWORK
from ..core.gradient_memory import check_slow
from ..errors import ArtifactError, InputError, MissingDependencyError
from ..methods import MGG, MT3, TTT
from ..wrapping import wrap

__all__ = ["convert_mgg", "convert_mt3", "convert_ttt", "mt3_artifact", "mt3_state", "ttt_state"]

#: The network of MT3's released checkpoint; at stride 2, TensorFlow pads only two sides.
_MT3_RELEASED = {**MT3_NETWORK, "pad_end": True}
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_MGG_PREFIX = "seq_modeling_block."
#: The model that MGG's optimizer was released for.
_MGG_MODEL = "vit_base_patch16_224"
_MGG_FEATURES = 12 * 768
#: The constructor of numpy scalars, under its names in old and new files: TTT's released files
#: hold error rates beside their tensors.
_NUMBER = np.float64(0).__reduce__()[0]
_SAFE = [
    *((_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    type(np.dtype(np.float64)),
]


def _load(file: Path, what: str) -> Any:
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways; none of them runs code
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "weights_only" in str(error):
            # PyTorch's own message recommends a way of loading that may run code in the file.
            reason = "it is damaged or holds objects other than tensors, which are not loaded"
        raise ArtifactError(f"{file} is not {what}: {reason}") from error


def _tensors(state: Any, where: str) -> dict[str, Tensor]:
    """Check a state dict and remove the prefix that training on several GPUs adds.

    Raises:
        ArtifactError: it is not a dict of tensors.
    """
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(t, Tensor) for t in state.values())
    ):
        raise ArtifactError(f"{where} must be a dict of tensors")
    return {str(n).removeprefix("module."): t for n, t in state.items()}


# -- TTT -----------------------------------------------------------------------------------------


def convert_ttt(checkpoint: str | Path, out: str | Path, *, groups: int = 8) -> Path:
    """Convert one of TTT's released CIFAR-10 files into an artifact.

    Args:
        checkpoint: file with a dict of ``net`` and ``head``, the state dicts of the classifier and
            of the layers that only its rotation task uses.
        out: folder for the artifact.
        groups: number of groups of the group norms, which the file does not record; it has no
            effect on a file with BatchNorm.

    Returns:
        the folder of the artifact.

    Raises:
        ArtifactError: the file has other contents; nothing is written.
    """
    saved = _load(Path(checkpoint), "one of TTT's released checkpoints")
    if not isinstance(saved, dict):
        raise ArtifactError(f"{checkpoint} must hold a dict, got {type(saved).__name__}")
    net, head = (_tensors(saved.get(n), f"{checkpoint}: {n!r}") for n in ("net", "head"))
    arch, arguments, state = ttt_state(net, groups)
    try:
        model = timm.create_model(arch, num_classes=len(state["head.bias"]), **arguments)
        model.load_state_dict(state)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{checkpoint} holds another network: {reason}") from error
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    model.pretrained_cfg = {**model.pretrained_cfg, **settings}
    tensors, split = _ttt_head(head)
    config = TTT(split=split)
    wrap(model.eval(), config, tensors=tensors)  # refuses a head that does not fit
    note = "Converted from a checkpoint of the kind that the authors of arXiv 1909.13231 released "
    return save_with_model(
        model,
        arch,
        arguments,
        out,
        config=config,
        tensors=tensors,
        training={"note": f"{note}(`ttt-plugins convert ttt`, file {Path(checkpoint).name})."},
    )


def ttt_state(
    net: Mapping[str, Tensor], groups: int = 8
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The network of a released file: its architecture, arguments, and ``state_dict``.

    Args:
        net: the state dict ``net`` in the file.
        groups: number of groups of the group norms.

    Raises:
        ArtifactError: a tensor is missing, or the network is wider than its first layer.
    """
    for name in ("conv1.weight", "layer3.0.conv1.weight", "fc.weight", "fc.bias"):
        if name not in net:
            raise ArtifactError(f"the released network has no tensor {name!r}")
    width = len(net["conv1.weight"])
    if len(net["layer3.0.conv1.weight"]) != 4 * width:
        raise ArtifactError(
            "the released network is wider than its first layer, which is not supported"
        )
    units = sum(bool(re.fullmatch(r"layer1\.\d+\.conv1\.weight", n)) for n in net)
    arguments = {"depth": 6 * units + 2, "width": width, "zeros_last": True}
    batch_norm = "bn.running_mean" in net
    if not batch_norm:
        arguments["groups"] = groups
    state = {_ttt_name(n): t.float() if t.is_floating_point() else t for n, t in net.items()}
    return "ttt_resnet26_bn" if batch_norm else "ttt_resnet26", arguments, state


def _ttt_name(name: str) -> str:
    """Convert a tensor's name in the released network to its name in `ttt_resnet26`."""
    name = re.sub(r"^layer(\d)", lambda m: f"stages.{int(m[1]) - 1}", name)
    if name.startswith("stages."):
        return name.replace(".bn", ".norm")
    first, _, rest = name.partition(".")
    ours = {"conv1": "stem", "bn": "norm", "fc": "head"}
    return f"{ours.get(first, first)}.{rest}"


def _ttt_head(head: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int | str]:
    """The rotation head's tensors under this package's names, and where the trunk ends.

    The released head is one linear layer on the pooled features, or a sequence that starts with a
    copy of the last stage: stage, norm, ReLU, pooling, flattening, linear layer.
    """
    if set(head) == {"weight", "bias"}:
        return {f"head.{n}": t.float() for n, t in head.items()}, "end"
    tensors = {}
    for name, tensor in head.items():
        index, _, rest = name.partition(".")
        ours = {"0": "rest.stages.2.", "1": "rest.norm.", "5": "head."}.get(index)
        if ours is None:
            raise ArtifactError(f"the released rotation head has an unknown tensor {name!r}")
        if not name.endswith("num_batches_tracked"):
            tensors[ours + rest.replace("bn", "norm")] = tensor.float()
    return tensors, -1


# -- MGG -----------------------------------------------------------------------------------------


def convert_mgg(
    checkpoint: str | Path,
    out: str | Path,
    statistics: str | Path | None = None,
    model: str | nn.Module | None = None,
    **options: Any,
) -> Path:
    """Convert MGG's released optimizer into an artifact.

    Args:
        checkpoint: file with a dict whose only key is ``model_state_dict``.
        out: folder for the artifact.
        statistics: file with the pair (std, mean), each of the 12 * 768 features of ViT-B/16's
            blocks. Without it the optimizer fits any model.
        model: the classifier that the statistics were measured on, in any form that `wrap`
            accepts; the artifact then fits only its weights.
        **options: options of `wrap` (pretrained, mean, std, …).

    Returns:
        the folder of the artifact.

    Raises:
        ArtifactError: a file has unexpected contents; nothing is written.
        InputError: statistics without their model, or a model without statistics.
    """
    saved = _load(Path(checkpoint), "a checkpoint of MGG's optimizer")
    state = saved.get("model_state_dict") if isinstance(saved, dict) else None
    state = _tensors(state, f"{checkpoint}: 'model_state_dict'")
    slow = check_slow({n.removeprefix(_MGG_PREFIX): t.float() for n, t in state.items()})
    tensors = {f"memory.{n}": t for n, t in slow.items()}
    training = {
        "note": "Converted from the optimizer that the authors of arXiv 2412.16901 released "
        f"(`ttt-plugins convert mgg`, file {Path(checkpoint).name})."
    }
    if statistics is None:
        if model is not None:
            raise InputError("a model has no effect without source statistics; leave out the model")
        backbone = {"source": "timm", "name": _MGG_MODEL, "pretrained": True, "num_classes": 1000}
        backbone |= {"normalize": True, "mean": [0.5] * 3, "std": [0.5] * 3}
        return save_learned(MGG(), tensors, backbone, out, training=training)
    tensors |= _statistics(Path(statistics))
    if model is None:
        raise InputError(
            "source statistics belong to one classifier's weights: name the model that they were "
            f"measured on (the released ones: {_MGG_MODEL}, with its pretrained weights)"
        )
    if isinstance(model, str):
        refuse_random(model, options.get("pretrained", False))
    return wrap(model, MGG(), tensors=tensors, **options).save_pretrained(out, training=training)


def _statistics(file: Path) -> dict[str, Tensor]:
    pair = _load(file, "a pair of source statistics")
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ArtifactError(f"{file} must hold the pair (std, mean), got {type(pair).__name__}")
    flat = []
    for statistic in pair:
        blocks = statistic if isinstance(statistic, (tuple, list)) else [statistic]
        if not blocks or not all(isinstance(t, Tensor) and t.is_floating_point() for t in blocks):
            raise ArtifactError(f"{file}: the statistics must be floating-point tensors")
        flat.append(torch.cat([t.reshape(-1) for t in blocks]).float())
    std, mean = flat
    if len(std) != _MGG_FEATURES or len(mean) != _MGG_FEATURES:
        raise ArtifactError(
            f"{file}: {len(std)} deviations and {len(mean)} means, expected {_MGG_FEATURES} each"
        )
    if not (torch.isfinite(std).all() and torch.isfinite(mean).all() and (std >= 0).all()):
        raise ArtifactError(f"{file} holds deviations below zero or values that are not finite")
    return {"source.mean": mean, "source.std": std}


# -- MT3 -----------------------------------------------------------------------------------------


def convert_mt3(prefix: str | Path, out: str | Path) -> Path:
    """Convert MT3's released meta-model into an artifact.

    Args:
        prefix: path of the TensorFlow checkpoint without ``.index``.
        out: folder for the artifact.

    Returns:
        the folder of the artifact.

    Raises:
        MissingDependencyError: TensorFlow is not installed.
        ArtifactError: the checkpoint holds another network; nothing is written.
    """
    return mt3_artifact(_read_tensorflow(str(prefix)), out)


def mt3_artifact(variables: Mapping[str, np.ndarray], out: str | Path) -> Path:
    """Convert MT3's released variables into an artifact; arguments and errors as in `mt3_state`."""
    state, heads = mt3_state(variables)
    model = timm.create_model("ttt_resnet26", num_classes=10, **_MT3_RELEASED)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(f"the checkpoint holds another network: {error}") from error
    # The released network takes images in [0, 1] without normalisation.
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


def mt3_state(variables: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Convert the released variables into the network's ``state_dict`` and the heads' tensors.

    Args:
        variables: arrays by their names in the checkpoint, with or without the suffix that
            TensorFlow appends. Variables of the optimizer and of TensorFlow itself are ignored.

    Raises:
        ArtifactError: a variable is missing.
    """
    plain = {n.removesuffix(_SUFFIX): v for n, v in variables.items()}
    tensors = {}
    for ours, (theirs, transpose) in _mt3_names().items():
        if theirs not in plain:
            raise ArtifactError(f"the checkpoint has no variable {theirs!r}")
        value = np.ascontiguousarray(transpose(np.asarray(plain[theirs])))
        tensors[ours] = torch.from_numpy(value).float()
    heads = {n: t for n, t in tensors.items() if n.startswith(("projector.", "predictor."))}
    return {n: t for n, t in tensors.items() if n not in heads}, heads


def _kernel(value: np.ndarray) -> np.ndarray:
    """Transpose (height, width, in, out) to (out, in, height, width), or (in, out) to (out, in)."""
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def _mt3_names() -> dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Map this package's names to the released variables' names and how to transpose them."""

    def unchanged(value):
        return value

    names = {"stem.weight": ("model/_init_conv/kernel", _kernel)}
    for stage in range(3):
        for unit in range(4):
            theirs = f"model/_block{stage + 1}/layer_with_weights-{unit}"
            for number in (1, 2):
                ours = f"stages.{stage}.{unit}"
                names[f"{ours}.norm{number}.weight"] = (f"{theirs}/_bn{number}/gamma", unchanged)
                names[f"{ours}.norm{number}.bias"] = (f"{theirs}/_bn{number}/beta", unchanged)
                names[f"{ours}.conv{number}.weight"] = (f"{theirs}/_conv{number}/kernel", _kernel)
                names[f"{ours}.conv{number}.bias"] = (f"{theirs}/_conv{number}/bias", unchanged)
    names["norm.weight"] = ("model/_last_bn/gamma", unchanged)
    names["norm.bias"] = ("model/_last_bn/beta", unchanged)
    names["pre_logits.weight"] = ("model/_pre_hidden/kernel", _kernel)
    names["head.weight"] = ("model/_mlp_dense_out/kernel", _kernel)
    names["head.bias"] = ("model/_mlp_dense_out/bias", unchanged)
    for part in ("projector", "predictor"):
        for ours, theirs in (("in", "dense_in"), ("out", "dense1_out")):
            names[f"{part}.{ours}.weight"] = (f"model/{part}/{theirs}/kernel", _kernel)
            names[f"{part}.{ours}.bias"] = (f"model/{part}/{theirs}/bias", unchanged)
    return names


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
    except Exception as error:  # TensorFlow raises many kinds of exceptions
        raise ArtifactError(
            f"{prefix} cannot be read as a TensorFlow checkpoint: {error}"
        ) from error
