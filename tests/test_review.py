"""What a reviewer found once, and shall not find again."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

import ttt_plugins as tp
from ttt_plugins.artifacts.saving import save_with_model
from ttt_plugins.backbones.statistics import feature_statistics
from ttt_plugins.train.mgg import MGGRecipe


class _Payload:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_model_args_cannot_make_timm_unpickle_a_file(make_model, tmp_path):
    model = make_model("groupnorm")
    args = {"width": 8, "depth": 8, "groups": 4}
    folder = save_with_model(model, "ttt_resnet26", args, tmp_path / "source-x")
    assert tp.wrap(str(folder), "source").num_classes == 10
    evil, marker = tmp_path / "evil.pth", tmp_path / "marker"
    evil.write_bytes(pickle.dumps(_Payload(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = args | {"checkpoint_path": str(evil)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(tp.ArtifactError):
        tp.from_pretrained(folder)
    assert not marker.exists()


def test_a_foreign_folder_with_a_config_json_is_not_replaced(make_model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "precious.bin").write_text("keep me")
    with pytest.raises(tp.ArtifactError, match="not an artifact"):
        tp.wrap(make_model("groupnorm"), "tent").save_pretrained(tmp_path)
    assert (tmp_path / "precious.bin").read_text() == "keep me"


def test_a_file_in_the_way_of_a_save(make_model, tmp_path):
    (tmp_path / "here").write_text("a file")
    with pytest.raises(tp.ArtifactError, match="not an artifact"):
        tp.wrap(make_model("groupnorm"), "tent").save_pretrained(tmp_path / "here")


def test_loading_weights_into_the_shared_model_is_refused(make_model):
    model = make_model("batchnorm")
    net = tp.wrap(model, "tent")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(tp.InputError, match="shares its model's weights"):
        net.load_state_dict({n: t + 1 for n, t in net.state_dict().items()})
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())


def test_the_seed_decides_the_weights_of_an_untrained_model(images):
    global_state = torch.get_rng_state()
    first, again, other = (
        tp.wrap("ttt_resnet26", "source", seed=seed)(images(2)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(global_state, torch.get_rng_state())


@pytest.mark.parametrize("method", ["tent", "sar", "mgg"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapts_without_breaking(make_model, method, dtype, images):
    net = tp.wrap(make_model("groupnorm").to(dtype), method, window=1)
    for seed in range(3):
        assert torch.isfinite(net(images(4, seed=seed))).all()
    assert net.skipped_updates == 0
    params = [t for n, t in net.adaptation_state().items() if n.startswith("params.")]
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in params)


def test_mixed_statistics_do_not_hide_the_shift_from_mgg(make_model, images):
    model = make_model("batchnorm")
    x = images(8)
    found = []
    for kind in ({"statistics": "batch"}, {"statistics": "mix", "prior": 0.0}):
        net = tp.wrap(model, "mgg", **kind)
        with torch.no_grad(), net.backbone.recording() as record:
            net.backbone(x)
        found.append(feature_statistics(record))
    for batch, mix in zip(*found, strict=True):
        assert torch.allclose(batch, mix, rtol=1e-3, atol=1e-4)


def test_a_models_own_fault_is_not_called_a_shape(images):
    class Faulty(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x):
            raise RuntimeError("out of coffee")

    net = tp.wrap(Faulty(), "tent", window=1, normalize=False)
    with pytest.raises(RuntimeError, match=r"^out of coffee$"):
        net(images(2))


@pytest.mark.parametrize(
    "field", ["epochs", "sequences", "length", "batch_size", "truncation", "validate_every"]
)
def test_a_recipe_of_nothing_is_refused(field):
    with pytest.raises(tp.InputError, match=field):
        MGGRecipe(**{field: 0})


def test_a_bundled_optimizer_keeps_the_statistics_of_its_own_network(make_model):
    own = tp.wrap("bundled:source-resnet26-cifar10", "mgg")
    assert "source.mean" in own.learned_tensors()
    other = tp.wrap(make_model("groupnorm"), "mgg")
    assert "source.mean" not in other.learned_tensors()
    assert "has no effect" in other.describe()
