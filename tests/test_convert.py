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
from ttt_plugins.train import released as convert


@pytest.fixture
def released(slow):
    """MGG's released file, as a dict."""
    return {"model_state_dict": {f"seq_modeling_block.{n}": t for n, t in slow.items()}}


def released_variables(seed=0):
    """MT3's released variables (methods.md, section 7), and some that are not ours."""
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
def test_mgg_with_the_statistics_of_vit_b(rows, released, tmp_path):
    mean, std = torch.randn(12, 768), torch.rand(12, 768)
    pair = (list(std), list(mean)) if rows else (std, mean)
    torch.save(released, tmp_path / "mgg_ckpt.pth")
    torch.save(pair, tmp_path / "train_info.pt")
    command = ["convert", "mgg", str(tmp_path / "mgg_ckpt.pth"), "--out", str(tmp_path / "out")]
    assert main([*command, "--statistics", str(tmp_path / "train_info.pt")]) == 0
    model = timm.create_model("vit_base_patch16_224", num_classes=1000)
    net = tp.from_pretrained(tmp_path / "out", backbone=model, strict_backbone=False)
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
    assert "more than tensors" in (said := capsys.readouterr().err)
    assert "weights_only" not in said  # no advice to load it all the same
    torch.save(released, file)
    for content in ((torch.ones(3),), (torch.ones(3), torch.ones(4)), ("a", "b"), {"a": 1}):
        torch.save(content, tmp_path / "info.pt")
        with pytest.raises(tp.ArtifactError, match=r"info.pt"):
            convert.convert_mgg(file, out, tmp_path / "info.pt")
    assert not out.exists()


def same_padding(x, kernel, bias, stride):
    """TensorFlow's SAME convolution: what is missing is added at the end first."""
    size = x.shape[-1]
    missing = max((-(-size // stride) - 1) * stride + kernel.shape[0] - size, 0)
    x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
    return F.conv2d(x, torch.from_numpy(kernel).permute(3, 2, 0, 1), bias, stride)


def restated(variables, x):
    """MT3's network on normalised images, from methods.md's sections 2 and 7."""
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
    folder = convert.convert_mt3("prefix", tmp_path / "out", read=lambda prefix: variables)
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
        convert.convert_mt3("prefix", tmp_path / "out", read=lambda prefix: missing)
    other = variables | {name: np.zeros(64, np.float32)}
    with pytest.raises(tp.ArtifactError, match="another network"):
        convert.convert_mt3("prefix", tmp_path / "out", read=lambda prefix: other)
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
