"""Models from everywhere: each kind of docs/models.md, tiny and with random weights."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms as T

import ttt_plugins as tp
from ttt_plugins.backbones import kinds as package
from ttt_plugins.backbones.kinds import Settings, kinds, read_preprocess
from ttt_plugins.core.pictures import picture_transform

DOCS = Path(__file__).parent.parent / "docs" / "models.md"
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed")


def normalised(x, mean=MEAN, std=STD):
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def processor(**given):
    given = {"size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD} | given
    return library("transformers").ViTImageProcessor(**given)


def spread(model):
    """Random weights at which predictions differ; running statistics of the model's own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (2 / max(p[0].numel(), 1)) ** 0.5 if p.ndim > 1 else p)
    return model.eval()


def hugging_face():
    transformers = library("transformers")
    model = spread(transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)))
    return model, {"preprocess": processor()}, lambda x: model(pixel_values=normalised(x)).logits


def hugging_face_resnet():
    transformers = library("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
    model = spread(transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)))
    return model, {"preprocess": processor()}, lambda x: model(normalised(x)).logits


def timm_wrapper():
    transformers = library("transformers")
    config = transformers.TimmWrapperConfig(
        architecture="ttt_resnet26_bn", model_args={"width": 8, "depth": 8}, num_labels=5
    )
    model = spread(transformers.TimmWrapperForImageClassification(config))
    told = model.timm_model.pretrained_cfg
    return model, {}, lambda x: model(normalised(x, told["mean"], told["std"])).logits


def plain_timm():
    model = spread(timm.create_model("ttt_resnet26", num_classes=5, width=8, depth=8))
    told = model.pretrained_cfg
    return model, {}, lambda x: model(normalised(x, told["mean"], told["std"]))


def of_torchvision():
    model = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64
    )
    for stage in (model.layer3, model.layer4):  # as small as the classes of its layers allow
        stage[0] = nn.Identity()
    model.fc = nn.Linear(128, 5)
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    preset = weights.transforms()
    model = spread(model)
    return model, {"preprocess": weights}, lambda x: model(normalised(x, preset.mean, preset.std))


def of_open_clip():
    open_clip = library("open_clip")
    torch.manual_seed(0)
    picture = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    words = {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, picture, words | {"context_length": 77}).eval()
    names = ["cat", "dog", "fish", "frog", "bird"]
    tokens = open_clip.tokenize([f"a photo of a {n}." for n in names])
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD

    def logits(x):
        found = model(normalised(x, mean, std), tokens)
        return found[2] * found[0] @ found[1].T

    return model, {"labels": names}, logits


class Returns(nn.Module):
    """A small network whose logits ``form`` puts into what the network returns."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.head, self.other = nn.Linear(8, 5), nn.Linear(8, 5)
        self.form = form

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.form(self.head(x), x, self.other(x))


def returns(form, **given):
    def make():
        model = spread(Returns(form))
        plain = Returns(lambda logits, *_: logits).eval()
        plain.load_state_dict(model.state_dict())
        return model, {"mean": MEAN, "std": STD, **given}, lambda x: plain(normalised(x))

    return make


def zoo():
    """A model as RobustBench's zoo has them: they normalise their input themselves."""
    inside = timm.create_model("ttt_resnet26_bn", num_classes=5, width=8, depth=8)
    model = spread(nn.Sequential(T.Normalize(MEAN, STD), inside))
    return model, {"normalize": False}, model


#: Name of the row in docs/models.md -> makes model, arguments of wrap, and the logits expected.
CASES = {
    "timm": plain_timm,
    "transformers": hugging_face,
    "transformers, BatchNorm": hugging_face_resnet,
    "TimmWrapper": timm_wrapper,
    "torchvision": of_torchvision,
    "open_clip": of_open_clip,
    "RobustBench": zoo,
    "a module that returns a tensor": returns(lambda logits, *_: logits),
    "a module that returns a tuple": returns(lambda *out: out[::-1], output=2),
    "a module that returns a dict": returns(
        lambda logits, x, other: {"aux": other, "scores": logits}, output="scores"
    ),
    "a dict with logits": returns(lambda logits, x, other: {"aux": other, "logits": logits}),
}


def test_the_table_is_what_is_tested():
    rows = re.findall(
        r"^\| ([^|]+?) \| [^|]+ \| [^|]+ \| [^|]+ \|$", DOCS.read_text(), re.MULTILINE
    )
    assert set(rows) - {"kind"} == {n for n in CASES if ", " not in n and n != "a dict with logits"}


@pytest.mark.filterwarnings("ignore:the model seems to normalise")
@pytest.mark.parametrize("case", CASES)
def test_every_kind_adapts_and_is_its_own_library_unadapted(case, make_net, images, tmp_path):
    model, given, expected = CASES[case]()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    x = images(4)
    with torch.no_grad():
        wanted = expected(x)
    source = tp.wrap(model, "source", **given)
    torch.testing.assert_close(source(x), wanted, rtol=1e-5, atol=1e-5)
    assert source.num_classes == 5
    for method in ("tent", "mgg"):
        net = make_net(method, model, **given, lr=0.1)
        first, second = net(x), net(x)
        assert torch.isfinite(second).all()
        assert not torch.equal(first, second), method
    net = make_net("ttt", None, backbone=source.backbone, lr=0.1, split="end", steps=1, copies=2)
    first = net(x[:2])
    assert torch.equal(net(x[:2]), first)  # what one batch taught is forgotten
    assert not torch.equal(first, source(x[:2]))
    again = tp.wrap(source, "source")
    torch.testing.assert_close(again(x), wanted, rtol=1e-5, atol=1e-5)
    saved = tp.wrap(model, "tent", window=1, statistics="source", **given)
    folder = saved.save_pretrained(tmp_path / "tent")
    restored = tp.from_pretrained(folder, backbone=again.backbone.model)
    torch.testing.assert_close(restored(x), wanted, rtol=1e-5, atol=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# -- what a model returns --------------------------------------------------------------------------


def test_which_output_holds_the_logits(images):
    several = Returns(lambda *out: {"a": out[0], "b": out[2]})
    with pytest.raises(tp.InputError, match=r"returns a dict of 'a' \(4, 5\).*output="):
        tp.wrap(several, "source", normalize=False)(images(4))
    with pytest.raises(tp.InputError, match="no output='c'"):
        tp.wrap(several, "source", normalize=False, output="c")(images(4))
    with pytest.raises(tp.InputError, match="returns 2 outputs"):
        tp.wrap(several, "source", normalize=False, output=2)(images(4))
    plain = Returns(lambda logits, *_: logits)
    with pytest.raises(tp.InputError, match="returns a Tensor"):
        tp.wrap(plain, "source", normalize=False, output=0)(images(4))
    for wrong in (-1, 64, True, "__class__", "", "a b", 1.0):
        with pytest.raises(tp.InputError, match="output= is"):
            tp.wrap(several, "source", normalize=False, output=wrong)
    net = tp.wrap(Returns(lambda *out: (out[0],)), "source", normalize=False)
    assert net(images(4)).shape == (4, 5)


def test_the_output_is_part_of_an_artifact(images, tmp_path):
    model = spread(Returns(lambda *out: out[::-1]))
    net = tp.wrap(model, "tent", normalize=False, output=2)
    folder = net.save_pretrained(tmp_path / "tent")
    restored = tp.from_pretrained(folder, backbone=model)
    assert torch.equal(restored(images(4)), net(images(4)))
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["output"] = "__dict__"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(tp.ArtifactError, match="'output' cannot be"):
        tp.from_pretrained(folder, backbone=model)


# -- what cannot work ------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [lambda m: m, lambda m: nn.Sequential(nn.Identity(), m)])
def test_replicas_are_refused(put):
    with pytest.raises(tp.InputError, match=r"DataParallel.*\.module"):
        tp.wrap(put(nn.DataParallel(Returns(None))), "source", normalize=False)


def test_probabilities_are_told(images):
    model = spread(Returns(lambda logits, *_: logits.softmax(1)))
    net = tp.wrap(model, "tent", normalize=False, window=1)
    with pytest.warns(RuntimeWarning, match="probabilities.*without its last softmax"):
        net(images(4))
    tp.wrap(model, "source", normalize=False)(images(4))  # nothing adapts, nothing is told


def test_no_classifier_and_no_labels(images):
    transformers = library("transformers")
    headless = transformers.ViTModel(transformers.ViTConfig(**VIT))
    with pytest.raises(tp.InputError, match="AutoModelForImageClassification"):
        tp.wrap(headless, "source")
    for wrong in ("cat", ["cat"], ["cat", "cat"], [1, 2]):
        with pytest.raises(tp.InputError, match="labels are the names"):
            tp.wrap(Returns(None), "source", labels=wrong)
    with pytest.raises(tp.InputError, match="labels= is for models that compare"):
        tp.wrap(Returns(None), "source", labels=["cat", "dog"])
    with pytest.raises(tp.InputError, match="labels= needs a module"):
        tp.wrap("ttt_resnet26", "source", labels=["cat", "dog"])
    clip = of_open_clip()[0]
    with pytest.raises(tp.InputError, match="compares images with texts: give the names"):
        tp.wrap(clip, "tent")


# -- preprocessing ---------------------------------------------------------------------------------


def prepared(processor, picture):
    return processor(picture, return_tensors="pt")["pixel_values"][0]


def test_pictures_are_prepared_as_by_the_library(images, tmp_path):
    """torchvision's preset, a Compose, and transformers' processors, on a picture of any size."""
    picture = Image.fromarray((images(1, size=90)[0, :, :50].permute(1, 2, 0) * 255).byte().numpy())
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    compose = T.Compose([T.Resize(40), T.CenterCrop(32), T.ToTensor(), T.Normalize(MEAN, STD)])
    theirs = {
        "preset": (weights, lambda p: weights.transforms()(p)),
        "compose": (compose, compose),
    }
    for name, given in {
        "ViTImageProcessor": {"size": {"height": 32, "width": 32}},
        "BitImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": 32},
        "ConvNextImageProcessor": {"size": {"shortest_edge": 32}},
        "LevitImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": 32},
        "EfficientNetImageProcessor": {"size": {"height": 32, "width": 32}},
    }.items():
        made = getattr(library("transformers"), name)(**given)
        theirs[name] = made, partial(prepared, made)
    for name, (preprocess, call) in theirs.items():
        net = tp.wrap(Returns(lambda logits, *_: logits), "source", preprocess=preprocess)
        ours = picture_transform(net.backbone)(picture)[None].float() / 255
        ours = net.backbone._normalised(ours)[0]
        wanted = torch.as_tensor(call(picture))
        assert ours.shape == wanted.shape, name
        assert (ours - wanted).abs().mean() < 0.02, name  # the libraries' resampling differs a bit


@pytest.mark.parametrize(
    ("preprocess", "words"),
    [
        (3, "preprocess= takes"),
        ({"image_mean": [0.5], "image_std": [0.5], "do_flip_channel_order": True}, "BGR"),
        ({"image_mean": [0.5], "image_std": [0.5], "rescale_factor": 1 / 127.5}, "1/255"),
        ({"size": {"longest_edge": 3}}, "is no size"),
        (T.Compose([T.RandomCrop(3)]), "a step RandomCrop"),
        (T.Compose([T.CenterCrop(3)]), "without a Resize"),
    ],
)
def test_preprocessing_that_an_adapter_cannot_do(preprocess, words):
    with pytest.raises(tp.InputError, match=words):
        tp.wrap(Returns(None), "source", preprocess=preprocess)


def test_what_says_nothing_changes_nothing():
    none = {"do_normalize": False, "image_mean": [0.5], "image_std": [0.5], "size": {}}
    assert read_preprocess(none) == Settings(normalize=False)
    net = tp.wrap(Returns(None), "source", preprocess=none)
    assert not net.backbone.normalize


# -- by name ---------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """A folder as transformers writes it, the model, and the logits it should have."""
    model, given, expected = hugging_face()
    model.save_pretrained(tmp_path / "vit")
    given["preprocess"].save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", model, expected


def test_a_folder_of_transformers(repository, images):
    folder, _, expected = repository
    transformers = library("transformers")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    for model in (f"local-dir:{folder}", loaded):  # whose processor is found beside its files
        net = tp.wrap(model, "source")
        with torch.no_grad():
            assert torch.equal(net(images(4)), expected(images(4)))
        assert net.input_size == (3, 32, 32)


def test_a_timm_model_in_transformers_form(tmp_path, images):
    model, _, expected = timm_wrapper()
    model.save_pretrained(tmp_path / "wrapped")
    net = tp.wrap(f"local-dir:{tmp_path / 'wrapped'}", "source")
    with torch.no_grad():
        assert torch.equal(net(images(4)), expected(images(4)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "shieldgemma2"}, "not built"),
        ({"model_type": "../x"}, "not built"),
        ({"hidden_size": 4096}, "far larger|do not fit"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers cannot be"),
        ({"hidden_act": "import os"}, "hidden_act cannot be"),
        ({"hidden_act": "nothing"}, "nothing"),
        ({"hidden_act": {"a": 1}}, "hidden_act cannot be"),
        ({"num_hidden_layers": 1}, "unexpected"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"id2label": None, "num_labels": "x"}, "number of classes"),
    ],
)
def test_a_strangers_config_is_data(repository, change, words):
    folder, *_ = repository
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(tp.ArtifactError, match=words):
        tp.wrap(f"local-dir:{folder}", "source")


def test_nothing_of_a_strangers_runs_or_is_fetched(repository, images, monkeypatch):
    """Code, kernels, quantization and other models that a config names are left alone."""
    folder, _, expected = repository
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForImageClassification": "evil--evil.Model"},
        "_attn_implementation": "kernels-community/evil",
        "attn_implementation": "kernels-community/evil",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "_name_or_path": "somebody/else",
        "dtype": "float8",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit")
    net = tp.wrap(f"local-dir:{folder}", "source")
    with torch.no_grad():
        assert torch.equal(net(images(4)), expected(images(4)))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(tp.ArtifactError, match="pickled weights are not read"):
        tp.wrap(f"local-dir:{folder}", "source")


def test_torchvision_by_name(tmp_path, images, monkeypatch):
    name = "torchvision:shufflenet_v2_x0_5"
    net = tp.wrap(name, "tent", seed=3, window=1, statistics="source")
    again = tp.wrap(name, "source", seed=3)
    x = images(2, size=64)
    assert torch.equal(net(x), again(x))
    preset = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.transforms()
    assert net.backbone.mean.flatten().tolist() == pytest.approx(preset.mean)
    assert net.input_size == (3, 224, 224)
    with pytest.raises(tp.InputError, match="random weights: request torchvision's weights"):
        tp.wrap(name, "ttt", head="train", data=x)
    # Pretrained weights come from torchvision's own cache.
    plain = torchvision.models.shufflenet_v2_x0_5()
    url = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(plain.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trained = tp.wrap(name, "tent", pretrained=True, window=1, statistics="source")
    with torch.no_grad():
        wanted = plain.eval()(normalised(x, preset.mean, preset.std))
    torch.testing.assert_close(trained(x), wanted)
    # An artifact names it, and the user says that it may be loaded.
    folder = trained.save_pretrained(tmp_path / "tent")
    assert f'backbone="{name}"' in (folder / "README.md").read_text()
    with pytest.raises(tp.ArtifactError, match=f'pass backbone="{name}"'):
        tp.from_pretrained(folder)
    torch.testing.assert_close(tp.from_pretrained(folder, backbone=name)(x), wanted)
    for wrong, words in (
        ("resnet19", "did you mean 'resnet18'"),
        ("resnet18.X", "no weights 'X'"),
        ("maskrcnn_resnet50_fpn", "no classifier"),
        ("", "no classifier"),
    ):
        with pytest.raises(tp.InputError, match=words):
            tp.wrap(f"torchvision:{wrong}", "tent")


def test_no_artifact_reaches_a_kinds_loader(tmp_path, make_model, monkeypatch):
    folder = tp.wrap(make_model("groupnorm"), "tent").save_pretrained(tmp_path / "tent")
    config = json.loads((folder / "config.json").read_text())
    for kind in kinds():
        monkeypatch.setattr(type(kind), "named", lambda *_: pytest.fail("was loaded"))
    for source, name in (
        ("torchvision", "torchvision:resnet18"),
        ("torchvision", "resnet18"),
        ("torchvision", "../x"),
        ("hf", "google/vit-base-patch16-224"),
        ("timm", "torchvision:resnet18"),
        ("hub", "torchvision:resnet18"),
        ("robustbench", "torchvision:resnet18"),
    ):
        config["backbone"] |= {"source": source, "name": name, "pretrained": True}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(tp.ArtifactError):
            tp.from_pretrained(folder)


OWN = """
from ttt_plugins.backbones.kinds.kind import ModelKind, Settings


class Own(ModelKind):
    prefix = "own"

    def owns(self, model):
        return type(model).__name__ == "Returns"

    def settings(self, model):
        return Settings((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), input_size=(32, 32), num_classes=5)

    def named(self, name, pretrained):
        return CLASSES[name]()


CLASSES = {}
KIND = Own()
"""


def test_a_kind_of_your_own_is_one_file(tmp_path, monkeypatch, images):
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    model, _, expected = CASES["a module that returns a tensor"]()
    kinds.cache_clear()
    try:
        kind = next(kind for kind in kinds() if kind.prefix == "own")
        monkeypatch.setitem(sys.modules[type(kind).__module__].CLASSES, "small", lambda: model)
        for given in (model, "own:small"):
            net = tp.wrap(given, "source")
            torch.testing.assert_close(net(images(2)), expected(images(2)).detach())
            assert (net.input_size, net.num_classes) == ((3, 32, 32), 5)
    finally:
        kinds.cache_clear()


# -- open_clip -------------------------------------------------------------------------------------


def test_zero_shot_with_other_sentences(images):
    """The embeddings of several sentences are averaged, then normalised again."""
    model, given, _ = of_open_clip()
    open_clip = library("open_clip")
    sentences = ("a {}.", "a bad photo of {}.")
    found = tp.zero_shot(model, given["labels"], sentences)
    unit = nn.functional.normalize
    with torch.no_grad():
        tokens = [open_clip.tokenize([s.format(n) for n in given["labels"]]) for s in sentences]
        words = unit(sum(unit(model.encode_text(t), dim=-1) for t in tokens) / 2, dim=-1)
        x = images(3)
        wanted = model.logit_scale.exp() * unit(model.encode_image(x), dim=-1) @ words.T
        torch.testing.assert_close(found(x), wanted)
    assert found.visual is model.visual  # shared, not copied
    for wrong in ("a {}", (), ("a photo",)):
        with pytest.raises(tp.InputError, match="templates"):
            tp.zero_shot(model, given["labels"], wrong)
    with pytest.raises(tp.InputError, match="no open_clip model"):
        tp.zero_shot(nn.Linear(2, 2), given["labels"])
