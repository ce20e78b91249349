"""Checkpoints with the released names and shapes, made here, become artifacts that adapt."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import ttt_plugins as tp
from ttt_plugins.backbones.networks import PreActUnit
from ttt_plugins.cli import main
from ttt_plugins.core import gradient_memory
from ttt_plugins.core.heads import rotation_logits
from ttt_plugins.train import released as convert


@pytest.fixture
def released(slow):
    """MGG's released file, as a dict."""
    return {"model_state_dict": {f"seq_modeling_block.{n}": t for n, t in slow.items()}}


def released_variables(seed=0):
    """MT3's released variables, and some that are not ours."""
    rng = np.random.default_rng(seed)
    shapes = {"model/_init_conv/kernel": (3, 3, 3, 32)}
    width_in = 32
    for block, width in enumerate((32, 64, 128), 1):
        for unit in range(4):
            prefix = f"model/_block{block}/layer_with_weights-{unit}"
            shapes |= {f"{prefix}/_bn1/{n}": (width_in,) for n in ("gamma", "beta")}
            shapes |= {f"{prefix}/_bn2/{n}": (width,) for n in ("gamma", "beta")}
            shapes |= {f"{prefix}/_conv1/kernel": (3, 3, width_in, width)}
            shapes |= {f"{prefix}/_conv2/kernel": (3, 3, width, width)}
            shapes |= {f"{prefix}/_conv{i}/bias": (width,) for i in (1, 2)}
            width_in = width
    shapes |= {"model/_last_bn/gamma": (128,), "model/_last_bn/beta": (128,)}
    shapes |= {"model/_pre_hidden/kernel": (128, 256)}
    shapes |= {"model/_mlp_dense_out/kernel": (256, 10), "model/_mlp_dense_out/bias": (10,)}
    for part, width in (("projector", 256), ("predictor", 128)):
        shapes |= {f"model/{part}/dense_in/kernel": (width, 256)}
        shapes |= {f"model/{part}/dense_in/bias": (256,)}
        shapes |= {f"model/{part}/dense1_out/kernel": (256, 128)}
        shapes |= {f"model/{part}/dense1_out/bias": (128,)}
    shapes |= {"optimizer/learning_rate": (), "save_counter": ()}
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    scale = {n: 1.6 / max(1, np.prod(s[:-1])) ** 0.5 for n, s in shapes.items()}
    return {
        n + suffix: (rng.normal(size=s) * scale[n]).astype(np.float32) for n, s in shapes.items()
    }


def test_mgg_fits_any_model(released, tmp_path, make_model, images, slow):
    torch.save(released, tmp_path / "mgg_ckpt.pth")
    folder = convert.convert_mgg(tmp_path / "mgg_ckpt.pth", tmp_path / "out")
    net = tp.from_pretrained(folder, backbone=make_model("groupnorm"))
    learned = net.learned_tensors()
    assert learned.keys() == {f"memory.{n}" for n in gradient_memory.SLOW_SHAPES}
    assert all(torch.equal(learned[f"memory.{n}"], t) for n, t in slow.items())
    assert (net.config.lr, net.config.discrepancy) == (1e-3, 0.4)
    assert torch.isfinite(net(images(4))).all()


@pytest.mark.parametrize("rows", [True, False])
def test_mgg_with_the_statistics_of_vit_b(rows, released, tmp_path, capsys):
    mean, std = torch.randn(12, 768), torch.rand(12, 768)
    pair = (list(std), list(mean)) if rows else (std, mean)
    torch.save(released, tmp_path / "mgg_ckpt.pth")
    torch.save(pair, tmp_path / "train_info.pt")
    command = ["convert", "mgg", str(tmp_path / "mgg_ckpt.pth"), "--out", str(tmp_path / "out")]
    # They belong to one classifier's weights, which must be named, and not to random ones.
    command += ["--statistics", str(tmp_path / "train_info.pt")]
    for more, said in (([], "--statistics needs --model"), (["vit_base_patch16_224"], "random")):
        assert main([*command, *(["--model"] if more else []), *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    model = timm.create_model("vit_base_patch16_224", num_classes=10).eval()
    convert.convert_mgg(
        tmp_path / "mgg_ckpt.pth", tmp_path / "out", tmp_path / "train_info.pt", model
    )
    net = tp.from_pretrained(tmp_path / "out", backbone=model)
    other = timm.create_model("vit_base_patch16_224", num_classes=10)
    with pytest.raises(tp.ArtifactError, match="was made for"):
        tp.from_pretrained(tmp_path / "out", backbone=other)
    assert torch.equal(net.learned_tensors()["source.mean"], mean.flatten())
    assert torch.equal(net.learned_tensors()["source.std"], std.flatten())
    # In the order of the blocks: each after the next block's first norm, the last after the final.
    assert list(net.backbone.tapped) == [f"blocks.{i}.norm1" for i in range(1, 12)] + ["norm"]
    assert net._algorithm_now().objective.needs_features


def test_mgg_files_that_are_something_else(released, tmp_path, capsys):
    file, out = tmp_path / "file.pth", tmp_path / "out"
    state = released["model_state_dict"]
    bad = [
        {},
        [1, 2],
        {"model_state_dict": {}},
        {"model_state_dict": {n: t for n, t in state.items() if "W1" not in n}},
        {"model_state_dict": state | {"seq_modeling_block.b1": torch.zeros(3)}},
        {"model_state_dict": state | {"seq_modeling_block.b1": "text"}},
    ]
    for content in bad:
        torch.save(content, file)
        assert main(["convert", "mgg", str(file), "--out", str(out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    file.write_bytes(b"no checkpoint")
    assert main(["convert", "mgg", str(file), "--out", str(out)]) == 2
    torch.save({"model_state_dict": Path("code")}, file)
    capsys.readouterr()
    assert main(["convert", "mgg", str(file), "--out", str(out)]) == 2
    assert "objects other than tensors" in (said := capsys.readouterr().err)
    assert "weights_only" not in said  # no advice to load it all the same
    torch.save(released, file)
    for content in ((torch.ones(3),), (torch.ones(3), torch.ones(4)), ("a", "b"), {"a": 1}):
        torch.save(content, tmp_path / "info.pt")
        with pytest.raises(tp.ArtifactError, match=r"info.pt"):
            convert.convert_mgg(file, out, tmp_path / "info.pt", "vit_base_patch16_224")
    assert not out.exists()


def same_padding(x, kernel, bias, stride):
    """TensorFlow's SAME convolution: what is missing is added at the end first."""
    size = x.shape[-1]
    missing = max((-(-size // stride) - 1) * stride + kernel.shape[0] - size, 0)
    x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
    return F.conv2d(x, torch.from_numpy(kernel).permute(3, 2, 0, 1), bias, stride)


def restated(variables, x):
    """MT3's network on normalised images, from arXiv 2103.16201 and its released code."""
    v = {n.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"): a for n, a in variables.items()}

    def norm(x, name):
        gamma, beta = (torch.from_numpy(v[f"{name}/{n}"]) for n in ("gamma", "beta"))
        return F.relu(F.group_norm(x, 16, gamma, beta, 1e-3))

    def conv(x, name, stride):
        return same_padding(x, v[f"{name}/kernel"], torch.from_numpy(v[f"{name}/bias"]), stride)

    x = same_padding(x, v["model/_init_conv/kernel"], None, 1)
    for block in (1, 2, 3):
        for unit in range(4):
            name = f"model/_block{block}/layer_with_weights-{unit}"
            stride = 2 if unit == 0 and block > 1 else 1
            active = norm(x, f"{name}/_bn1")
            shortcut = active if (block, unit) == (1, 0) else x
            if stride == 2:
                shortcut = F.avg_pool2d(shortcut, 2)
                half = shortcut.shape[1] // 2
                shortcut = F.pad(shortcut, (0, 0, 0, 0, half, half))
            x = conv(
                norm(conv(active, f"{name}/_conv1", stride), f"{name}/_bn2"), f"{name}/_conv2", 1
            )
            x = x + shortcut
    x = norm(x, "model/_last_bn").mean((2, 3))
    h = F.relu(x @ torch.from_numpy(v["model/_pre_hidden/kernel"]))
    kernel, bias = (torch.from_numpy(v[f"model/_mlp_dense_out/{n}"]) for n in ("kernel", "bias"))
    return h @ kernel + bias


def test_mt3_is_the_released_network(tmp_path, images):
    variables = released_variables()
    folder = convert.mt3_artifact(variables, tmp_path / "out")
    net = tp.from_pretrained(folder, copies=2)
    assert net.method == "mt3"
    assert net.config.lr == 0.1
    x = images(2)
    plain = tp.wrap(str(folder), "source")
    model = plain.backbone.model
    with torch.no_grad():
        expected = restated(variables, x)  # on images in [0, 1], as they are
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert torch.allclose(plain(x), expected, atol=1e-4)
    assert torch.isfinite(net(x)).all()
    assert not torch.equal(net(x), plain(x))
    kernel = variables["model/projector/dense_in/kernel/.ATTRIBUTES/VARIABLE_VALUE"]
    learned = net.learned_tensors()["projector.in.weight"]
    assert np.array_equal(learned.numpy(), kernel.T)
    assert any(isinstance(m, PreActUnit) and m.pad_end for m in model.modules())


def test_mt3_checkpoints_of_other_networks(tmp_path):
    variables = released_variables()
    name = "model/_last_bn/gamma/.ATTRIBUTES/VARIABLE_VALUE"
    missing = {n: v for n, v in variables.items() if n != name}
    with pytest.raises(tp.ArtifactError, match="_last_bn/gamma"):
        convert.mt3_artifact(missing, tmp_path / "out")
    other = variables | {name: np.zeros(64, np.float32)}
    with pytest.raises(tp.ArtifactError, match="another network"):
        convert.mt3_artifact(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_tensorflow_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "tensorflow.train", None)
    assert main(["convert", "mt3", "prefix", "--out", str(tmp_path / "out")]) == 2
    assert "pip install tensorflow-cpu" in capsys.readouterr().err


def test_a_real_tensorflow_checkpoint(tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    variables = released_variables()

    class Node(tensorflow.Module):
        pass

    root = Node()
    for name, value in variables.items():
        node, *path, leaf = [root, *name.removesuffix(convert._SUFFIX).split("/")]
        for part in path:
            if not hasattr(node, part):
                setattr(node, part, Node())
            node = getattr(node, part)
        setattr(node, leaf, tensorflow.Variable(value))
    prefix = tensorflow.train.Checkpoint(model=root.model).write(str(tmp_path / "ckpt"))
    folder = convert.convert_mt3(prefix, tmp_path / "out")
    assert tp.from_pretrained(folder, copies=1).method == "mt3"


# -- TTT -----------------------------------------------------------------------------------------


def ttt_tensors(depth=26, width=16, batch_norm=False, shared="layer2", seed=0):
    """A released file's ``net`` and ``head``: the names and shapes of TTT's own networks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, around=0.0):
        return around + torch.randn(*shape, generator=generator) / max(1, shape[-1] * 3) ** 0.5

    def norm(name, channels):
        tensors = {
            f"{name}.weight": draw(channels, around=1.0),
            f"{name}.bias": draw(channels),
        }
        if batch_norm:
            tensors[f"{name}.running_mean"] = draw(channels)
            tensors[f"{name}.running_var"] = draw(channels).abs() + 0.5
            tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)
        return tensors

    def units(prefix, inputs, outputs):
        tensors = {}
        for unit in range((depth - 2) // 6):
            name = f"{prefix}{unit}"
            tensors |= norm(f"{name}.bn1", inputs)
            tensors[f"{name}.conv1.weight"] = draw(outputs, inputs, 3, 3)
            tensors |= norm(f"{name}.bn2", outputs)
            tensors[f"{name}.conv2.weight"] = draw(outputs, outputs, 3, 3)
            inputs = outputs
        return tensors

    net = {"conv1.weight": draw(width, 3, 3, 3)}
    net |= units("layer1.", width, width) | units("layer2.", width, 2 * width)
    net |= units("layer3.", 2 * width, 4 * width) | norm("bn", 4 * width)
    net |= {"fc.weight": draw(10, 4 * width), "fc.bias": draw(10)}
    if shared == "layer3":
        return net, {"weight": draw(4, 4 * width), "bias": draw(4)}
    head = units("0.", 2 * width, 4 * width) | norm("1", 4 * width)
    return net, head | {"5.weight": draw(4, 4 * width), "5.bias": draw(4)}


def ttt_restated(net, head, x, groups, dtype=torch.float64):
    """Logits and rotation logits of TTT's network on images in [0, 1], layer by layer."""
    net, head = ({n: t.to(dtype) for n, t in part.items()} for part in (net, head))
    x = (x.to(dtype) - 0.5) / 0.5

    def norm(tensors, name, x):
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        if f"{name}.running_mean" in tensors:
            mean, var = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
            x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        else:
            parts = x.view(len(x), groups, -1)
            var = parts.var(2, unbiased=False, keepdim=True)
            x = ((parts - parts.mean(2, keepdim=True)) / (var + 1e-5).sqrt()).view(x.shape)
        return (x * weight[:, None, None] + bias[:, None, None]).clamp_min(0)

    def stage(tensors, prefix, x, stride):
        count = sum(n.startswith(prefix) and n.endswith("conv1.weight") for n in tensors)
        for unit in range(count):
            step = stride if unit == 0 else 1
            name = f"{prefix}{unit}"
            out = norm(tensors, f"{name}.bn1", x)
            out = F.conv2d(out, tensors[f"{name}.conv1.weight"], None, step, 1)
            out = norm(tensors, f"{name}.bn2", out)
            out = F.conv2d(out, tensors[f"{name}.conv2.weight"], None, 1, 1)
            if step > 1:
                x = F.avg_pool2d(x, 2)
                x = torch.cat([x, torch.zeros_like(x)], 1)
            x = x + out
        return x

    middle = stage(
        net, "layer2.", stage(net, "layer1.", F.conv2d(x, net["conv1.weight"], None, 1, 1), 1), 2
    )
    features = norm(net, "bn", stage(net, "layer3.", middle, 2)).mean((2, 3))
    logits = features @ net["fc.weight"].T + net["fc.bias"]
    if "weight" in head:
        return logits, features @ head["weight"].T + head["bias"]
    own = norm(head, "1", stage(head, "0.", middle, 2)).mean((2, 3))
    return logits, own @ head["5.weight"].T + head["5.bias"]


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, 8),
        ({"depth": 8, "width": 8}, 4),
        ({"depth": 8, "batch_norm": True}, 8),
        ({"depth": 8, "shared": "layer3"}, 8),
    ],
)
def test_ttt_is_the_released_network(options, groups, tmp_path, images):
    net, head = ttt_tensors(**options)
    # As the authors' training saves it: beside error rates of numpy's and the optimizer.
    saved = {"err_cls": np.float64(0.09), "err_ssh": 0, "net": net, "head": head}
    saved |= {"optimizer": {"state": {}, "param_groups": [{"lr": 0.001, "params": [0]}]}}
    torch.save(saved, tmp_path / "ckpt.pth")
    command = ["convert", "ttt", str(tmp_path / "ckpt.pth"), "--out", str(tmp_path / "out")]
    assert main([*command, "--groups", str(groups)]) == 0
    x = images(3)
    plain = tp.wrap(str(tmp_path / "out"), "source")
    expected, turned = ttt_restated(net, head, x, groups)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    assert torch.allclose(plain(x).double(), expected, atol=1e-4)
    double = plain.backbone.model.double()
    with torch.no_grad():
        assert torch.allclose(double((x.double() - 0.5) / 0.5), expected, atol=1e-10)
    adapter = tp.from_pretrained(tmp_path / "out", copies=2, steps=1)
    assert adapter.config.split == ("end" if "shared" in options else -1)
    ours = rotation_logits(adapter.backbone, {}, adapter.learned_tensors(), x)
    assert torch.allclose(ours.double(), turned, atol=1e-4)
    assert torch.isfinite(adapter(x)).all()


def test_ttt_files_of_their_time(tmp_path):
    """Without a zip archive, numbers under numpy's old name, from several GPUs."""
    net, head = ttt_tensors(depth=8)
    saved = {"err_cls": np.float64(0.09), "net": {f"module.{n}": t for n, t in net.items()}}
    torch.save(saved | {"head": head}, tmp_path / "new.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "new.pth").read_bytes().replace(b"cnumpy._core.", b"cnumpy.core.")
    (tmp_path / "old.pth").write_bytes(old)
    for name in ("new", "old"):
        convert.convert_ttt(tmp_path / f"{name}.pth", tmp_path / name)
    first, second = (tp.from_pretrained(tmp_path / n).backbone.model for n in ("new", "old"))
    assert torch.equal(first.stem.weight, net["conv1.weight"])
    assert torch.equal(second.stem.weight, net["conv1.weight"])


def test_ttt_files_that_are_something_else(tmp_path, capsys):
    net, head = ttt_tensors(depth=8)
    wide, _ = ttt_tensors(depth=8, width=32)
    bad = [
        [1, 2],
        {"net": net},
        {"net": net, "head": {}},
        {"net": {n: t for n, t in net.items() if n != "fc.bias"}, "head": head},
        {"net": {n: t for n, t in net.items() if n != "bn.bias"}, "head": head},
        {"net": net, "head": {n: t for n, t in head.items() if n != "1.bias"}},
        {"net": net, "head": head | {"7.weight": torch.ones(2)}},
        {"net": net | {"fc.weight": torch.ones(10, 3)}, "head": head},
        {"net": wide | {"conv1.weight": net["conv1.weight"]}, "head": head},
        {"net": net, "head": head, "code": Path("code")},
    ]
    for content in bad:
        torch.save(content, tmp_path / "file.pth")
        command = ["convert", "ttt", str(tmp_path / "file.pth"), "--out", str(tmp_path / "out")]
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
    torch.save({"net": net, "head": head}, tmp_path / "file.pth")
    for more in (["--groups", "5"], ["--groups", "0"], ["--statistics", "file"], ["--pretrained"]):
        assert main([*command, *more]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_zeros_after_the_other_channels_are_an_option(images):
    made = {
        last: timm.create_model("ttt_resnet26", depth=8, width=8, groups=4, zeros_last=last).eval()
        for last in (False, True)
    }
    made[True].load_state_dict(made[False].state_dict())
    assert not torch.allclose(made[True](images(2)), made[False](images(2)), atol=1e-3)
