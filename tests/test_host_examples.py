"""The examples of hosts run as they stand, with the real packages."""

import os
import runpy
import sys
from pathlib import Path

import forked
import huggingface_hub
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


def _run(name, arguments, path):
    script = EXAMPLES / f"{name}.py"
    os.chdir(ROOT)
    sys.argv, sys.path[:0] = [str(script), *arguments], [str(script.parent), *path]
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    runpy.run_path(str(script), run_name="__main__")


def run(name, file, arguments=(), path=()):
    """What an example prints as a script; everything is made, so nothing may touch the network."""
    process = forked.start(
        _run, name, arguments, path, output=file, environment={"HF_HUB_OFFLINE": "1"}
    )
    process.join()
    assert process.exitcode == 0, file.read_text()
    return file.read_text()


@pytest.mark.parametrize("name", SAYS)
def test_examples_run(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    output = run(name, tmp_path / "said")
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
        place = tmp_path / "host" / name
        place.parent.mkdir(exist_ok=True, parents=True)
        place.write_text(text)
    cfg = ("--cfg", "ttt_plugins/hosts/cfgs/cifar10_c/ttt.yaml")
    options = ("TTT_PLUGINS.FIELDS.mode", "online")
    arguments = (str(tmp_path / "host"), *cfg, *options)
    output = run("online_tta", tmp_path / "said", arguments, [str(ROOT / "tests")])
    assert output.startswith("TTT ")
    assert "mode: online" in output
    assert {n: (tmp_path / "host" / n).read_text() for n in files} == files
