"""The examples of hosts run as they stand, with the real packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "hosts"
SAYS = {
    "plain_loop": ("adapted batches",),
    "lightning_predict": ("classes [", "accuracy"),
    "transformers_pipeline": ("{'",),
    "torch_ttt_engine": ("self-supervised loss",),
}
NEEDS = {
    "lightning_predict": "lightning",
    "transformers_pipeline": "transformers",
    "torch_ttt_engine": "torch_ttt",
}


def run(name, *arguments, **environment):
    """Standard output of an example; everything is made, so nothing may touch the network."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SAYS)
def test_examples_run(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    output = run(name)
    for words in SAYS[name]:
        assert words in output


def test_every_example_is_run_by_a_test():
    elsewhere = {"online_tta", "timm_validate"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SAYS.keys() | elsewhere


def test_the_online_tta_example_leaves_the_checkout_as_it_is(tmp_path):
    """On a folder laid out as that repository's ``classification``."""
    files = {
        "conf.py": "from online_tta_host import configuration\ncfg = configuration()\n",
        "methods/__init__.py": "",
        "methods/base.py": "from online_tta_host import TTAMethod\n",
        "utils/__init__.py": "",
        "utils/registry.py": "import online_tta_host\n"
        "ADAPTATION_REGISTRY = online_tta_host.Registry()\n",
        "test_time.py": "import sys\nfrom conf import cfg\n"
        "from utils.registry import ADAPTATION_REGISTRY\n"
        "cfg.merge_from_file(sys.argv[sys.argv.index('--cfg') + 1])\n"
        "cfg.merge_from_list(sys.argv[3:])\n"
        "print(ADAPTATION_REGISTRY.get(cfg.MODEL.ADAPTATION).__name__, cfg.TTT_PLUGINS.FIELDS)\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    cfg = ("--cfg", "ttt_plugins/hosts/cfgs/cifar10_c/ttt.yaml")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    options = ("TTT_PLUGINS.FIELDS.mode", "online")
    output = run("online_tta", str(tmp_path), *cfg, *options, PYTHONPATH=paths)
    assert output.startswith("TTT ")
    assert "mode: online" in output
    assert {n: (tmp_path / n).read_text() for n in files} == files
