"""Methods of other packages: found, checked, and harmless when broken."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import ttt_plugins as tp
from ttt_plugins import testing
from ttt_plugins.core import registry, scope, updates
from ttt_plugins.core.algorithm import Algorithm, Outcome
from ttt_plugins.methods import register_update_rule
from ttt_plugins.testing import check_method

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "plugin"
OURS = ["mgg", "mt3", "sar", "source", "tent", "ttt"]


@pytest.fixture
def empty_registry(monkeypatch):
    """The registry before anybody looked for plugins; left as it was."""
    monkeypatch.setattr(registry, "_METHODS", {n: registry._METHODS[n] for n in OURS})
    monkeypatch.setattr(registry, "_discovered", False)


@pytest.fixture
def plugin(empty_registry, monkeypatch, tmp_path):
    """``plugin(name, code, value=name)`` installs a package, as its files lie after pip."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, code, value=None):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {value or name}\n")
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield install
    for name in [n for n in sys.modules if n.startswith("plug_")]:
        del sys.modules[name]


GOOD = """
    from dataclasses import dataclass
    from ttt_plugins.methods import register_update_rule
    from ttt_plugins.core.updates import SGD

    @dataclass(frozen=True)
    class Plain:
        lr: float = 1e-3
        statistics: str = "source"
        prior: float = 16.0
        params: str = "norm"

    {}register_update_rule("plain", Plain, lambda config: SGD(config.lr, 0.0))
"""


def test_a_plugin_is_found_when_it_is_asked_for(plugin, make_model, images):
    plugin("plug_good", GOOD.format(""))
    assert registry.get_method("tent")
    assert "plug_good" not in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = tp.wrap(make_model("groupnorm"), "plain", lr=0.01)
    assert net(images(3)).shape == (3, 10)
    assert tp.list_methods() == sorted([*OURS, "plain"])
    assert registry.get_method(net.config).name == "plain"


def test_an_entry_point_may_name_the_method_itself(plugin):
    code = GOOD.format("METHOD = ") + "    from ttt_plugins.core import registry\n"
    plugin("plug_named", code + "    del registry._METHODS['plain']\n", "plug_named:METHOD")
    assert "plain" in tp.list_methods()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import a_package_that_is_not_there", "ModuleNotFoundError.*a_package_that"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("def f(:", "SyntaxError"),
        (GOOD.format("") + "    raise KeyError('late')\n", "KeyError: 'late'"),
        (GOOD.format("").replace('"plain"', '"mgg"'), "would replace.*mgg"),
        (GOOD.format("").replace('"plain"', '"my-rule"'), "letters, digits and _"),
        (GOOD.format("").replace("frozen=True", ""), "Plain of 'plain' must be a frozen data"),
        ("from ttt_plugins.core import registry; registry.register('mgg')", "takes a Method"),
    ],
)
def test_a_broken_plugin_is_one_warning(plugin, code, reason):
    plugin("plug_broken", code)
    plugin("plug_fine", GOOD.format("").replace('"plain"', '"other"'))
    mgg = registry.get_method("mgg")
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        names = tp.list_methods()
    assert names == sorted([*OURS, "other"])
    assert registry.get_method("mgg") is mgg
    assert len(caught) == 1
    said = str(caught[0].message)
    assert "'plug_broken'" in said
    assert "plug_broken 1.2" in said
    assert "\n" not in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tp.list_methods() == names  # said once


def test_an_unknown_method_is_still_an_error(plugin):
    with pytest.raises(tp.InputError, match="unknown method 'plain'"):
        registry.get_method("plain")


# -- the public contract suite -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of the rules below."""

    lr: float = 1e-2
    statistics: str = "source"
    prior: float = 16.0
    params: str = "norm"


class Rule(updates.SGD):
    """SGD whose direction a subclass spoils."""

    def step(self, params, state, first, situation):
        return super().step(params, state, self.spoil(params, first), situation)


class Chance(Rule):
    def spoil(self, params, first):
        return first._replace(grads={n: g + torch.rand_like(g) for n, g in first.grads.items()})


class Writes(Rule):
    def spoil(self, params, first):
        next(iter(params.values())).add_(1e-3)
        return first


class Remembers(Rule):
    calls: ClassVar[list] = []

    def spoil(self, params, first):
        self.calls.append(1)
        scale = len(self.calls)
        return first._replace(grads={n: scale * g for n, g in first.grads.items()})


class Stands(Rule):
    def spoil(self, params, first):
        return first._replace(grads={n: 0 * g for n, g in first.grads.items()})


@pytest.mark.parametrize(
    ("rule", "law"),
    [(Chance, ""), (Writes, ""), (Remembers, ""), (Stands, "it_adapts")],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_method_that_breaks_a_law_is_caught(empty_registry, rule, law):
    register_update_rule("spoiled", Config, lambda c: rule(c.lr, 0.0))
    with pytest.raises(AssertionError, match=f"spoiled on batchnorm: not {law}"):
        check_method("spoiled")


def test_a_rule_of_chance_breaks_the_law_on_seeds(empty_registry, make_model, images):
    register_update_rule("spoiled", Config, lambda c: Chance(c.lr, 0.0))
    build = testing._Build(make_model("groupnorm"), "spoiled", {})
    with pytest.raises(AssertionError):
        testing.LAWS["the_seed_decides"](build, images)
    register_update_rule("spoiled", Config, lambda c: Writes(c.lr, 0.0))
    with pytest.raises(AssertionError):
        testing.LAWS["the_wrapped_model_is_untouched"](build, images)


def test_a_good_method_passes(make_model, monkeypatch):
    held = check_method(tp.Tent(lr=1e-2), model=make_model("groupnorm"))
    assert held == [f"{law} on PreActResNet" for law in testing.LAWS]
    # Three networks by default; test_contract.py holds every method to all laws.
    monkeypatch.setattr(testing, "LAWS", dict([*testing.LAWS.items()][:2]))
    assert len(check_method("mgg")) == 3 * 2
    with pytest.raises(tp.InputError, match="does not adapt"):
        check_method("source")


# -- the example -------------------------------------------------------------------------


def test_the_example_is_small():
    files = [p for p in EXAMPLE.rglob("*") if p.suffix in (".py", ".toml")]
    assert sum(len(p.read_text().splitlines()) for p in files) < 60


SESSION = """
import json, sys, torch
torch.set_num_threads(1)
import ttt_plugins as tp
from ttt_plugins.cli import main
from ttt_plugins.testing import check_method, tiny_model

assert "ttt_plugins_signsgd" not in sys.modules
names = tp.list_methods()
held = check_method("signsgd", lr=1e-2)
net = tp.wrap(tiny_model("groupnorm"), "signsgd", lr=1e-2, mean=0.5, std=0.25)
folder = net.save_pretrained("artifact")
again = tp.from_pretrained(folder, backbone=tiny_model("groupnorm"))
x = torch.rand(4, 3, 32, 32)
same = [torch.equal(net(x), again(x)) for _ in range(2)]
codes = [main(["list"]), main(["info", "artifact"])]
print(json.dumps({"names": names, "held": len(held), "same": same, "codes": codes,
                  "file": sys.modules["ttt_plugins_signsgd"].__file__}))
"""


def test_the_example_installed_into_a_fresh_environment(tmp_path):
    """A real ``pip install``, without a connection, into a new environment that sees our own."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building the package needs setuptools, which the extra test brings")
    # A build writes beside the source.
    source = shutil.copytree(EXAMPLE, tmp_path / "plugin")
    other = shutil.copytree(ROOT / "examples" / "plugin_dataset", tmp_path / "plugin_dataset")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = next(p for p in (venv / "bin/python", venv / "Scripts/python.exe") if p.exists())
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    seen = [p for p in sys.path if p and Path(p).is_dir() and "site-packages" in p]
    (site / "ours.pth").write_text("\n".join([str(ROOT), *seen]))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--disable-pip-version-check", "--target", site]
    install += [source, other]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    session = subprocess.run(
        [python, "-W", "ignore", "-c", SESSION], capture_output=True, text=True, cwd=tmp_path
    )
    assert session.returncode == 0, session.stderr
    *printed, last = session.stdout.strip().splitlines()
    found = json.loads(last)
    assert found["names"] == sorted([*tp.list_methods(), "signsgd"])
    assert found["held"] == 3 * len(testing.LAWS)
    assert found["same"] == [True, True]
    assert found["codes"] == [0, 0]
    assert Path(found["file"]).is_relative_to(venv)
    assert "  signsgd" in printed
    assert "  cameras: Cameras" in printed
    assert any("method:" in p and "signsgd" in p for p in printed)


# -- an algorithm written to the docstrings ----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bare:
    """A config without any field that the library gives a meaning."""

    lr: float = 1e-2


@dataclasses.dataclass(frozen=True)
class Pull:
    """`core.algorithm.Algorithm`, and nothing of ours beyond `scope.call`."""

    backbone: object
    lr: float
    source: dict

    def init(self):
        return {}

    def adapt(self, params, state, images):
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        with torch.enable_grad():
            logits = scope.call(self.backbone, leaves, images)
            grads = torch.autograd.grad(
                logits.square().mean(),
                list(leaves.values()),
                materialize_grads=True,
                allow_unused=True,
            )
        moved = {n: p - self.lr * g for (n, p), g in zip(params.items(), grads, strict=True)}
        return Outcome(logits.detach(), moved, state)

    def describe(self):
        return ["step: one gradient step on the squared logits"]


def test_an_algorithm_written_to_the_docstring_works(empty_registry, make_model, images):
    def build(config, backbone, source, tensors, seed):
        return Pull(backbone, config.lr, source)

    registry.register(registry.Method("pull", Bare, build))
    model = make_model("groupnorm")
    net = tp.wrap(model, "pull")
    assert net.names == [n for n, _ in model.named_parameters()]  # no `params`: all there is
    assert "squared logits" in net.describe()
    with pytest.raises(tp.InputError, match="no field 'params'"):
        tp.wrap(model, "pull", params="norm")
    assert len(check_method("pull", model=model)) == len(testing.LAWS)


def test_the_fields_of_a_config_are_its_own(empty_registry, make_model, images):
    """Only a method that says so has a rank, a split or statistics of its own."""

    @dataclasses.dataclass(frozen=True)
    class Odd:
        lr: float = 1e-2
        params: str = "lora"
        rank: str = "not of low-rank changes"
        split: str = "nowhere"
        discrepancy: float = 1.0

    register_update_rule("odd", Odd, lambda config: updates.SGD(config.lr, 0.0))
    net = tp.wrap(make_model("layernorm"), "odd")
    assert net(images(2)).shape == (2, 10)
    assert "split: the trunk" not in net.describe()
    with pytest.raises(tp.InputError, match="compares no feature statistics"):
        net.fit_source_statistics([images(4)])


def test_our_algorithms_are_typed_by_the_same_protocol(make_model, make_net, images):
    for method in ("tent", "sar", "mgg", "ttt", "mt3"):
        algorithm = make_net(method, make_model("groupnorm")).algorithm()
        public = {name for name in vars(Algorithm) if not name.startswith("_")}
        assert public == {"source", "init", "adapt", "describe"}
        assert all(hasattr(algorithm, name) for name in public)
