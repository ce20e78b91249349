"""``wrap`` and ``from_pretrained``, which create an adapter from a name or a module.

Both load a classifier and the tensors that the method has learned for it, and build an adapter from
these. `wrap` starts from the classifier, `from_pretrained` from the learned tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .artifacts import hub
from .artifacts.classifiers import (
    Origin,
    carried_model,
    check_fingerprint,
    described_model,
    load_model,
    refuse_random,
)
from .artifacts.folder import Artifact, list_bundled, read_artifact
from .artifacts.hub_access import Access
from .artifacts.learned import Learned, check_fits_any, find_learned, stored_fields
from .artifacts.schema import OWN_WEIGHTS, timm_part
from .artifacts.tensor_files import fingerprint
from .backbones.backbone import Backbone
from .backbones.kinds import Output, check_output, read_preprocess, settings_of
from .backbones.refused import check_adaptable
from .backbones.statistics import NormStatistics
from .core.registry import HEAD, Method, configure, get_method
from .data.labels import positions
from .errors import ArtifactError, InputError
from .utils.checks import check_device, check_seed
from .utils.precision import single_dtype

__all__ = ["from_pretrained", "wrap"]

#: Loads the model that is its first argument.
_Load = partial[tuple[nn.Module, Origin, Artifact | None]]


@dataclass(frozen=True)
class _Setting:
    """The preprocessing of images, the adapter's device, and its seed.

    Raises:
        InputError: one of them is invalid.
    """

    mean: Any = None
    std: Any = None
    normalize: bool = True
    device: str | torch.device | None = None
    seed: int | None = None
    classes: Any = None  # a sequence of indices once a label set's name is looked up
    normalized_input: bool = False
    output: Output | None = None
    preprocess: Any = None

    def __post_init__(self):
        for name in ("normalize", "normalized_input"):
            if not isinstance(value := getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, got {value!r}")
        if self.seed is not None:
            check_seed(self.seed)
        check_device(self.device)
        check_output(self.output)
        known = None if self.preprocess is None else read_preprocess(self.preprocess)
        object.__setattr__(self, "preprocess", known)
        if isinstance(self.classes, str):
            object.__setattr__(self, "classes", positions(self.classes))


def wrap(
    model: str | nn.Module,
    method: str | Any,
    *,
    params: str | list[str] | None = None,
    mean: Any = None,
    std: Any = None,
    normalize: bool = True,
    pretrained: bool = False,
    device: str | torch.device | None = None,
    seed: int | None = None,
    model_dir: str | Path = "models",
    tensors: dict[str, Tensor] | None = None,
    head: str | Path | None = None,
    data: Any = None,
    classes: Sequence[int] | str | None = None,
    normalized_input: bool = False,
    source_images: Any = None,
    preprocess: Any = None,
    output: Output | None = None,
    labels: Sequence[str] | None = None,
    **overrides: Any,
) -> Adapter:
    """Wrap an image classifier so that it adapts itself at inference.

    A module's weights and buffers are shared and never written. Changing them later changes what
    the adapter starts from and `Adapter.reset` returns to, unless you wrap a ``copy.deepcopy``.

    Args:
        model: a name (timm, ``"hf:org/name[@revision]"``, ``"torchvision:<name>"``,
            ``"robustbench:<dataset>/<name>"``, an artifact's with a model), a folder, an adapter,
            whose unadapted model is used, or any ``nn.Module`` that maps normalised images
            (B, C, H, W) to logits; ``docs/models.md`` lists all kinds.
        method: a name from `list_methods()` or a config object (``tp.MGG(lr=1e-3)``).
        params: what adapts: ``"norm"``, ``"all"``, ``"lora"``, a regular expression, or names.
        mean: mean of the pixels per channel; by default from the ``pretrained_cfg``.
        std: standard deviation of the pixels per channel; by default from the ``pretrained_cfg``.
        normalize: False if the model normalises images itself (known for RobustBench's models).
        pretrained: whether to download the weights of timm or torchvision.
        device: device for the adapter; by default the model stays on its device.
        seed: seed for everything random; without it, untrained timm models use torch's generator.
        model_dir: folder with RobustBench's checkpoints.
        tensors: tensors that the method has learned beforehand, by name, instead of an artifact's.
        head: an artifact with a self-supervised head for these weights, or ``"train"`` for one.
        data: clean, unlabelled images for that: like ``source_images``, or a tensor (N, C, S, S).
        classes: the classes that occur, as indices of the model's logits; only these logits are
            used, in this order. ``"imagenet-r"`` or ``"imagenet-a"`` mean 200 of ImageNet's.
        normalized_input: whether images are already normalised with mean and std; see `Adapter`.
        source_images: what `Adapter.fit_source_statistics` takes, for MGG.
        preprocess: what knows mean, std and the size of pictures: an image processor of
            transformers, torchvision's weights or ``transforms()``, or a ``Compose`` of such steps.
        output: key, attribute or position of the logits, unless only one tensor is returned.
        labels: names of the classes, for an open_clip model; see `zero_shot`.
        **overrides: fields of the method's config.

    Returns:
        An `Adapter`, which maps images (B, C, H, W) in [0, 1] to logits (B, classes).

    Raises:
        InputError: the model, the method or a field is unknown, or there is nothing to adapt.
        ArtifactError: an artifact cannot be loaded (`HubError` if the Hub is the reason).
    """
    setting = _Setting(
        mean, std, normalize, device, seed, classes, normalized_input, output, preprocess
    )
    load = partial(load_model, model, pretrained, model_dir, seed, labels=labels)
    overrides |= {} if params is None else {"params": _names(params)}
    net = _wrapped(load, method, overrides, tensors, head, data, setting)
    return net if source_images is None else net.fit_source_statistics(source_images)


def _names(params: Any) -> Any:
    """What adapts, in a form that a frozen config can hold."""
    return tuple(params) if isinstance(params, (list, set)) else params


def _check_learned(tensors: Any, head: Any, data: Any) -> None:
    """Refuse contradictory arguments about what the method has learned."""
    by_name = tensors is None or isinstance(tensors, Mapping)
    if not by_name or not all(isinstance(t, Tensor) for t in (tensors or {}).values()):
        raise InputError("tensors must be a dict of tensors by name")
    if not isinstance(head, (str, Path, type(None))):
        raise InputError(f'head must be "train" or an artifact, got {type(head).__name__}')
    if head is not None and tensors is not None:
        raise InputError("head and tensors both say what the method has learned; give one of them")
    if (head == "train") != (data is not None):
        raise InputError(
            'head="train" and data=, the images to train it on, must be given together'
        )


def _wrapped(
    load: _Load,
    method: str | Any,
    overrides: dict[str, Any],
    tensors: dict[str, Tensor] | None,
    head: str | Path | None,
    data: Any,
    setting: _Setting,
) -> Adapter:
    """The adapter of a model and what the method has learned, or learns now from ``data``."""
    _check_learned(tensors, head, data)
    record, (model, pretrained, *_) = get_method(method), load.args
    if head == "train":
        config = configure(record.config() if isinstance(method, str) else method, overrides)
        if record.fit is None or record.fits != HEAD:
            raise InputError(f"{record.name} has no head that is trained on a finished model")
        refuse_random(model, pretrained)
        module, origin, _ = load()
        return _build(
            module, record, config, None, origin, _inherited(setting, model, origin), data
        )
    module, origin, carried = load()
    given = None if tensors is None else Learned(tensors, "tensors")
    learned = given or find_learned(record, module, head, carried, str(model))
    config = configure(_start(method, record, learned), overrides)
    return _build(module, record, config, learned, origin, _inherited(setting, model, origin))


def _inherited(setting: _Setting, model: Any, origin: Origin) -> _Setting:
    """The setting with the preprocessing of the model, if it is an adapter's or RobustBench's."""
    if origin["source"] == "robustbench":
        setting = replace(setting, normalize=False)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, Adapter):
        return setting
    backbone = model.backbone
    setting = replace(
        setting,
        classes=backbone.classes if setting.classes is None else setting.classes,
        output=backbone.output if setting.output is None else setting.output,
    )
    if setting.preprocess is not None or setting.mean is not None or setting.std is not None:
        return setting
    if not backbone.normalize:
        return replace(setting, normalize=False)
    return replace(setting, mean=backbone.mean, std=backbone.std, normalize=True)


def _start(method: str | Any, record: Method, learned: Learned | None) -> Any:
    """The config before overrides; learned tensors are used with their own step size."""
    if not isinstance(method, str):
        return method
    if learned is None or learned.config is None:
        return record.config()
    return stored_fields(record, learned.config, learned.where)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    backbone: str | nn.Module | None = None,
    strict_backbone: bool = True,
    device: str | torch.device | None = None,
    seed: int | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    normalized_input: bool = False,
    **overrides: Any,
) -> Adapter:
    """Load an adapter.

    Args:
        name: ``"org/name"`` or ``"org/name@revision"`` on the Hugging Face Hub,
            ``"bundled:<name>"``, or a local folder.
        revision: branch, tag or commit on the Hub; by default the default branch. It is resolved
            once, and all files are taken from that commit.
        backbone: the classifier, if the artifact does not name one or to replace the one it names,
            in any form that `wrap` accepts (a timm name gets its pretrained weights).
        strict_backbone: whether it is an error, rather than a warning, if the classifier's weights
            are not those that the adapter was made for. It has no effect if the artifact declares
            that it fits any architecture.
        device: device for the adapter; by default a module passed as ``backbone`` stays on its
            device.
        seed: seed for everything random.
        cache_dir: cache folder for files from the Hub (by default huggingface_hub's cache, where
            timm always keeps its own weights).
        local_files_only: whether to use only the cache, without a connection.
        token: access token of the Hub, by default that of ``hf auth login`` or HF_TOKEN; False for
            none.
        normalized_input: as in `wrap`.
        **overrides: fields of the method's config to change.

    Returns:
        An `Adapter`, which maps images (B, C, H, W) in [0, 1] to logits (B, classes).

    Raises:
        ArtifactError: the artifact is missing, damaged, or made for another classifier.
        HubError: (an `ArtifactError`) the Hub has no such repository or revision, refuses access,
            or cannot be reached.
        InputError: a field is unknown, or a revision is given for something not on the Hub.
    """
    setting = _Setting(device=device, seed=seed, normalized_input=normalized_input)
    access = Access(revision, cache_dir, local_files_only, token)
    place = _place(name, access)
    artifact = read_artifact(place.folder, place.name)
    learned = Learned(artifact.tensors, place.name, artifact.config)
    record = get_method(artifact.config["method"])
    config = _changed(learned, record, overrides)
    access = replace(access, revision=None)  # the revision is the adapter's, not the classifier's
    classifier = _Classifier(record, config, artifact, place.name, access, strict_backbone)
    module, origin, preprocessing = classifier.load(backbone, seed)
    return _build(module, record, config, learned, origin, replace(setting, **preprocessing))


def _place(name: str | Path, access: Access) -> hub.Place:
    place = hub.find(name, access)
    if place is None:
        raise ArtifactError(
            f"{str(name)[:200]!r} is neither a folder with a config.json nor ORG/NAME on the Hub "
            f"nor bundled; bundled are {['bundled:' + n for n in list_bundled()]}"
        )
    return place


def _changed(learned: Learned, record: Method, overrides: dict[str, Any]) -> Any:
    """The config of an artifact, with some fields replaced."""
    config = stored_fields(record, learned.config or {}, learned.where)
    try:
        return configure(config, overrides)
    except InputError as error:
        raise InputError(f"{learned.where} is an adapter of {record.name}: {error}") from error


@dataclass(frozen=True)
class _Classifier:
    """The classifier for an artifact: contained in it, named by it, or given by the user."""

    record: Method
    config: Any
    artifact: Artifact
    where: str
    access: Access
    strict: bool

    def load(
        self, given: str | nn.Module | None, seed: int | None
    ) -> tuple[nn.Module, Origin, dict[str, Any]]:
        """The classifier, its origin and its preprocessing.

        Raises:
            ArtifactError: it is not the classifier that the artifact was made for.
        """
        made_for = self.artifact.config["backbone"]
        fits_any = check_fits_any(
            self.record, self.config, self.artifact.tensors, made_for, self.where
        )
        preprocessing = {key: made_for.get(key) for key in ("mean", "std")}
        preprocessing["normalize"] = made_for.get("normalize", True)
        preprocessing |= {key: made_for.get(key) for key in ("classes", "output")}
        if given is None and self.artifact.weights is not None:
            timm_keys = timm_part(self.artifact.config)
            origin = {"source": OWN_WEIGHTS, "name": self.where, "timm": timm_keys}
            return carried_model(self.artifact, self.where), origin, preprocessing
        if given is None:
            module, origin = described_model(made_for, self.where, self.access)
            check_fingerprint(module, made_for, self.where, self.strict)
            return module, origin, preprocessing
        pretrained = made_for.get("pretrained", True)
        module, origin, _ = load_model(given, pretrained, seed=seed, access=self.access)
        if not fits_any:
            check_fingerprint(module, made_for, self.where, self.strict)
        elif fingerprint(module.state_dict()) != made_for.get("fingerprint"):
            # A classifier other than the artifact's has its own preprocessing.
            start = _Setting(classes=preprocessing["classes"], output=preprocessing["output"])
            setting = _inherited(start, given, origin)
            preprocessing = {key: getattr(setting, key) for key in preprocessing}
        return module, origin, preprocessing


def _build(
    module: nn.Module,
    record: Method,
    config: Any,
    learned: Learned | None,
    origin: Origin,
    setting: _Setting,
    images: Any = None,
) -> Adapter:
    """Build the adapter from a classifier, a method, and its learned tensors or source images."""
    if record.build is not None:
        check_adaptable(module)
    settings = setting.preprocess and settings_of(module).with_preprocessing(setting.preprocess)
    with torch.inference_mode(False):
        backbone = Backbone(
            module,
            mean=setting.mean,
            std=setting.std,
            normalize=setting.normalize,
            statistics=NormStatistics.of(config),
            classes=setting.classes,
            output=setting.output,
            settings=settings,
        )
        if setting.device is not None:
            backbone = backbone.to(setting.device)
        seed = 0 if setting.seed is None else setting.seed
        tensors = {} if learned is None else learned.tensors
        if images is not None and record.fit is not None:
            tensors = record.fit(config, backbone, images, seed)
        where = "tensors" if learned is None else learned.where
        if record.check is not None:
            tensors = record.check(config, backbone, tensors, where)
        elif tensors:
            raise ArtifactError(f"{where}: {record.name} learns no tensors, got {sorted(tensors)}")
        precision = single_dtype(backbone.dtype)
        tensors = {n: t.to(backbone.device, precision) for n, t in tensors.items()}
        return Adapter(
            backbone,
            record,
            config,
            tensors=tensors,
            origin=origin,
            seed=seed,
            normalized_input=setting.normalized_input,
        )
