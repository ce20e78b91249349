"""MGG, MT3 and TTT under the contract of mariodoebler/test-time-adaptation."""

import importlib
import sys
from pathlib import Path

import online_tta_host
import pytest
import torch
from conftest import random_heads
from yacs.config import CfgNode

import ttt_plugins as tp
from ttt_plugins.core.registry import get_method

MODULE = "ttt_plugins.hosts.online_tta"
CFGS = Path(tp.__file__).parent / "hosts" / "cfgs"
FIELDS = {
    "mgg": {"window": 1},
    "mt3": {"copies": 2},
    "ttt": {"copies": 2},
    "ttt online": {"copies": 2, "mode": "online"},
}


@pytest.fixture
def host(monkeypatch):
    """``host.get(name)`` -> a class of the registry."""
    registry = online_tta_host.install(monkeypatch).ADAPTATION_REGISTRY
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    importlib.import_module(MODULE)
    yield registry
    sys.modules.pop(MODULE, None)


def merge(cfg, other):
    cfg.merge_from_other_cfg(CfgNode(other))


def command_line(cfg, *options):
    """As its ``load_cfg_from_args`` does with what follows ``--cfg FILE``."""
    cfg.merge_from_list(list(options))


@pytest.fixture
def config(host, make_model, tmp_path):
    """``config(method, model, **sections)`` -> the configuration, and our own adapter."""
    cfg = sys.modules["conf"].cfg

    def make(case, model, lr=0.01, steps=1, **other):
        method = case.split()[0]
        merge(cfg, other)
        cfg.MODEL.ADAPTATION, cfg.OPTIM.LR, cfg.OPTIM.STEPS = method, lr, steps
        fields = FIELDS[case] | {"lr": lr}
        merge(cfg, {"TTT_PLUGINS": {"FIELDS": FIELDS[case]}})
        if method == "mgg":
            net = tp.wrap(model, "mgg", normalize=False, seed=1, **fields)
        else:
            heads = random_heads(method, model)
            fields["steps"] = steps
            net = tp.wrap(model, method, tensors=heads, normalize=False, seed=1, **fields)
            cfg.TTT_PLUGINS.ARTIFACT = str(net.save_pretrained(tmp_path / method))
        return cfg, net

    return make


@pytest.mark.parametrize("case", list(FIELDS))
@pytest.mark.parametrize("setting", ["continual", "reset_each_shift", "mixed_domains"])
def test_a_stream_is_the_adapters_own(host, config, make_model, images, case, setting):
    """As its evaluation goes: domains, severities, batches; gradual and correlated are orders."""
    model = make_model("batchnorm")
    cfg, net = config(case, model, SETTING=setting)
    hosted = host.get(cfg.MODEL.ADAPTATION)(cfg=cfg, model=model, num_classes=10)
    domains = [[0]] if setting == "mixed_domains" else [[0, 1], [2]]
    with torch.no_grad():
        for place, domain in enumerate(domains):
            if place == 0 or "reset_each_shift" in setting:
                hosted.reset()
                net.reset()
            for seed in domain:
                x = images(3, seed)
                assert torch.equal(hosted(x), net(x))
    assert torch.equal(hosted([images(3, 5), images(3, 6)]), net(images(3, 5)))  # with its views
    assert hosted.trainable > 0


def test_steps_of_an_online_method_are_updates(host, config, make_model, images):
    model = make_model("groupnorm")
    cfg, net = config("mgg", model, steps=3)
    hosted = host.get("MGG")(cfg, model, 10)
    for seed in range(2):
        for _ in range(3):
            expected = net(images(4, seed))
        assert torch.equal(hosted(images(4, seed)), expected)


def test_steps_of_a_per_image_method_are_its_own(host, config, make_model, images):
    model = make_model("groupnorm")
    cfg, net = config("ttt", model, steps=2)
    hosted = host.get("ttt")(cfg, model, 10)
    assert hosted.model.config.steps == 2
    assert torch.equal(hosted(images(2)), net(images(2)))
    assert hosted.model.forwards == net.forwards


@pytest.mark.parametrize("kind", ["batchnorm", "groupnorm"])
def test_single_samples_through_a_window(host, config, make_model, images, kind):
    """Predictions from the window; one update when all of it is new."""
    model = make_model(kind)
    cfg, net = config("mgg", model, TEST={"WINDOW_LENGTH": 3})
    hosted = host.get("mgg")(cfg, model, 10)
    samples = images(6)
    outputs = [hosted(x[None]) for x in samples]
    assert hosted.model.batches == 2
    first, second = net(samples[:3]), net(samples[3:])
    assert torch.equal(outputs[2], first[2:])
    assert torch.equal(outputs[5], second[2:])
    same = {"statistics": net.config.statistics, "prior": net.config.prior}
    plain = tp.wrap(model, "source", normalize=False, **same)
    seen = samples[:2] if kind == "batchnorm" else samples[1:2]
    assert torch.equal(outputs[1], plain(seen)[-1:])


@pytest.mark.parametrize("case", ["mt3", "ttt online"])
def test_single_samples_need_no_window_where_each_image_adapts(
    host, config, make_model, images, case
):
    model = make_model("batchnorm")
    cfg, net = config(case, model, TEST={"WINDOW_LENGTH": 4})
    hosted = host.get(case[:3])(cfg, model, 10)
    for image in images(3):
        assert torch.equal(hosted(image[None]), net(image[None]))


def test_episodic_and_counted_resets(host, config, make_model, images):
    model = make_model("batchnorm")
    cfg, net = config("mgg", model, MODEL={"RESET_AFTER_NUM_UPDATES": 2})
    hosted = host.get("mgg")(cfg, model, 10)
    expected = [net(images(4, seed)) for seed in range(2)]
    for seed in (0, 1, 0, 1):
        assert torch.equal(hosted(images(4, seed)), expected[seed])
    merge(cfg, {"MODEL": {"RESET_AFTER_NUM_UPDATES": 0, "EPISODIC": True}})
    hosted = host.get("mgg")(cfg, model, 10)
    for _ in range(2):
        assert torch.equal(hosted(images(4, 0)), expected[0])


def test_mixed_precision(host, config, make_model, images):
    model = make_model("groupnorm")
    cfg, net = config("mgg", model, MIXED_PRECISION=True)
    hosted = host.get("mgg")(cfg, model, 10)
    exact = tp.wrap(model, "mgg", normalize=False, lr=0.01, window=1)(images(4))
    for seed in range(2):
        logits = hosted(images(4, seed))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits, net(images(4, seed)))
    assert not torch.equal(hosted(images(4)), exact)


def test_the_model_and_its_modes_are_left_alone(host, config, make_model, images, same_tensors):
    model = make_model("batchnorm")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    cfg, _ = config("mgg", model)
    hosted = host.get("mgg")(cfg, model, 10)
    hosted(images(4))
    assert same_tensors(model.state_dict(), before)
    assert not model.training


@pytest.fixture
def shipped(host):
    """``shipped(path, *options)`` -> the frozen configuration, as the command line makes it."""

    def load(path, *options):
        cfg = sys.modules["conf"].cfg
        cfg.merge_from_file(str(CFGS / path))
        command_line(cfg, *options)
        cfg.freeze()
        return cfg

    return load


def test_a_bundled_artifact_brings_its_classifier(host, shipped, make_model, images):
    options = ("OPTIM.STEPS", "2", "TTT_PLUGINS.FIELDS.copies", "2")
    cfg = shipped("cifar10_c/ttt.yaml", *options)
    hosted = host.get("ttt")(cfg, make_model("groupnorm"), 10)
    net = tp.from_pretrained("bundled:ttt-resnet26-cifar10", seed=1, steps=2, copies=2)
    assert torch.equal(hosted(images(1)), net(images(1)))


@pytest.mark.parametrize(
    ("path", "artifact"),
    [
        ("cifar10_c/mgg.yaml", "bundled:mgg-resnet26-cifar10"),
        ("cifar10_c/mt3.yaml", "bundled:mt3-resnet26-cifar10"),
        ("cifar10_c/ttt.yaml", "bundled:ttt-resnet26-cifar10"),
    ],
)
def test_configurations_take_the_artifacts_own_values(host, shipped, path, artifact):
    model = tp.from_pretrained("bundled:source-resnet26-cifar10").export()
    hosted = host.get(Path(path).stem)(shipped(path), model.model, 10)
    assert hosted.model.config == tp.from_pretrained(artifact).config


def test_what_is_set_goes_before_the_artifacts_own_values(host, shipped, make_model):
    cfg = shipped("cifar10_c/mgg.yaml", "OPTIM.LR", "0.005")
    assert host.get("mgg")(cfg, make_model("groupnorm"), 10).model.config.lr == 0.005
    cfg.defrost()  # the repository's own default can be set, too, by the field's name
    command_line(cfg, "TTT_PLUGINS.FIELDS.lr", "0.001")
    assert host.get("mgg")(cfg, make_model("groupnorm"), 10).model.config.lr == 0.001


@pytest.mark.parametrize(
    ("method", "steps", "words"),
    [
        ("ttt", 1, "is a mgg adapter .* needs ttt"),
        ("mt3", 1, "is a mgg adapter .* needs mt3"),
        ("ttt", 2, "is an adapter of mgg: MGG has no field 'steps'"),
    ],
)
def test_an_artifact_of_another_method(host, config, make_model, method, steps, words):
    cfg = sys.modules["conf"].cfg
    cfg.MODEL.ADAPTATION, cfg.OPTIM.STEPS = method, steps
    cfg.TTT_PLUGINS.ARTIFACT = "bundled:mgg-universal"
    with pytest.raises(tp.InputError, match=words):
        host.get(method)(cfg, make_model("groupnorm"), 10)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (("mode", "online"), {"mode": "online"}),
        (("split", "-2", "threshold", "0.9"), {"split": -2, "threshold": 0.9}),
        (("params", "norm", "adapt_head", "True"), {"params": "norm", "adapt_head": True}),
        (("params", "['a.weight', 'b.weight']"), {"params": ["a.weight", "b.weight"]}),
    ],
)
def test_fields_on_the_command_line_and_in_yaml(shipped, tmp_path, options, fields):
    names = [f"TTT_PLUGINS.FIELDS.{o}" if i % 2 == 0 else o for i, o in enumerate(options)]
    cfg = shipped("cifar10_c/ttt.yaml", *names)
    assert {n: v for n, v in cfg.TTT_PLUGINS.FIELDS.items() if v is not None} == fields
    saved = tmp_path / "saved.yaml"
    saved.write_text(cfg.TTT_PLUGINS.dump())
    fresh = CfgNode(dict.fromkeys(cfg.TTT_PLUGINS.FIELDS))
    again = CfgNode({"ARTIFACT": "", "ITS_MODEL": False, "CLEAN_IMAGES": 0, "FIELDS": fresh})
    again.merge_from_file(str(saved))
    assert again == cfg.TTT_PLUGINS


def test_online_mode_runs_from_the_command_line(host, shipped, make_model, images):
    options = ("TTT_PLUGINS.FIELDS.mode", "online", "TTT_PLUGINS.FIELDS.copies", "2")
    hosted = host.get("ttt")(shipped("cifar10_c/ttt.yaml", *options), make_model("groupnorm"), 10)
    name = "bundled:ttt-resnet26-cifar10"
    net = tp.from_pretrained(name, seed=1, mode="online", copies=2)
    for seed in range(2):
        assert torch.equal(hosted(images(2, seed)), net(images(2, seed)))


def test_source_statistics_are_measured_there(host, shipped, make_model, images):
    model = make_model("groupnorm")
    cfg = shipped("cifar10_c/mgg.yaml", "TTT_PLUGINS.CLEAN_IMAGES", "130")
    hosted = host.get("mgg")(cfg, model, 10)
    net = tp.wrap(model, "mgg", normalize=False)
    own = {"dataset_name": "cifar10_c", "adaptation": "mgg", "preprocess": None}
    paths = {"data_root_dir": ".", "use_clip": False}
    loader = online_tta_host.get_source_loader(
        **own, **paths, batch_size=64, num_samples=130, workers=0
    )[1]
    net.fit_source_statistics(loader, progress=False)
    assert torch.equal(hosted(images(4)), net(images(4)))
    assert hosted.model.learned_tensors().keys() == net.learned_tensors().keys()


def test_a_missing_folder_is_no_lookup_on_the_hub(host, shipped, make_model, monkeypatch):
    monkeypatch.setattr("ttt_plugins.artifacts.hub.download", None)
    with pytest.raises(tp.ArtifactError, match="is neither a folder"):
        host.get("mt3")(shipped("cifar100_c/mt3.yaml"), make_model("groupnorm"), 100)


def test_the_file_works_as_a_copy_in_that_repository(monkeypatch, tmp_path, make_model, images):
    registry = online_tta_host.install(monkeypatch).ADAPTATION_REGISTRY
    source = Path(tp.__file__).parent / "hosts" / "online_tta.py"
    (tmp_path / "copied_methods.py").write_text(source.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("copied_methods")
    monkeypatch.delitem(sys.modules, "copied_methods")
    assert registry.get("mgg").__module__ == "copied_methods"
    model = make_model("groupnorm")
    hosted = registry.get("mgg")(sys.modules["conf"].cfg, model, 10)
    net = tp.wrap(model, "mgg", normalize=False)
    assert torch.equal(hosted(images(3)), net(images(3)))


def test_mistakes(host, config, make_model):
    model = make_model("groupnorm")
    cfg, _ = config("ttt", model)
    with pytest.raises(tp.InputError, match="with 100"):
        host.get("ttt")(cfg, model, 100)
    with pytest.raises(tp.InputError, match="is a ttt adapter"):
        host.get("mt3")(cfg, model, 10)
    with pytest.raises(tp.ArtifactError, match="weights"):
        host.get("ttt")(cfg, make_model("groupnorm", seed=1), 10)


def test_outside_that_repository(monkeypatch):
    for name in ("conf", "methods", "utils"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(tp.MissingDependencyError, match="test-time-adaptation") as caught:
        importlib.import_module(MODULE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", sorted(CFGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_configuration_files(host, shipped, path):
    cfg = shipped(path)
    assert path.parent.name == cfg.CORRUPTION.DATASET
    assert path.stem == cfg.MODEL.ADAPTATION
    assert host.get(path.stem)
    fields = {n: v for n, v in cfg.TTT_PLUGINS.FIELDS.items() if v is not None}
    get_method(path.stem).config(**fields)


def test_there_are_nine_configuration_files():
    assert len(list(CFGS.rglob("*.yaml"))) == 9
