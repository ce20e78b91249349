"""The real RobustBench in processes of their own: what a failed import of it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ttt_plugins.errors import MissingDependencyError
from ttt_plugins.utils import robustbench as bridge

FAILS = """
try:
    import robustbench
except ModuleNotFoundError as error:
    assert "autoattack" in str(error), error
else:
    raise AssertionError("autoattack is installed here")
"""


#: A process that has imported nothing but ttt_plugins, and runs each code in a copy of itself.
SERVER = """
import json, os, sys, traceback
import ttt_plugins
for line in sys.stdin:
    read, write = os.pipe()
    if not (child := os.fork()):
        os.dup2(write, 1)
        try:
            exec(json.loads(line), {})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
    os.close(write)
    with open(read) as stream:
        said = stream.read()
    print(json.dumps([os.waitpid(child, 0)[1], said]), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """``run(code)``: its output in a fresh process."""
    try:
        bridge.import_robustbench()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as server:

        def ask(code):
            print(json.dumps(code), file=server.stdin, flush=True)
            status, said = json.loads(server.stdout.readline())
            assert status == 0, said
            return said

        yield ask
        server.stdin.close()


def test_a_failed_import_spoils_nothing(run):
    found = run(
        FAILS
        + """
import sys
assert [name for name in sys.modules if name.startswith("robustbench.")]
from ttt_plugins.utils.robustbench import import_robustbench
found = import_robustbench()
print(found.data.__name__, found.model_zoo.__name__, found.utils.__name__, found.loaders.__name__)
assert sys.modules["robustbench.data"] is found.data
"""
    )
    assert found.split() == [f"robustbench.{n}" for n in ("data", "model_zoo", "utils", "loaders")]


def test_a_zoo_name_after_a_failed_import(run, tmp_path):
    found = run(
        FAILS
        + f"""
import ttt_plugins as tp
try:
    tp.wrap("robustbench:cifar10/Standart", "tent", model_dir={str(tmp_path)!r})
except tp.InputError as error:
    print(error)
"""
    )
    assert "close names: " in found


def test_after_our_host_a_plain_import_works(run):
    found = run(
        FAILS
        + """
import sys
import ttt_plugins.hosts.robustbench
import robustbench
from robustbench.data import load_cifar10c
from robustbench.model_zoo.architectures.utils_architectures import normalize_model
from robustbench.utils import clean_accuracy, load_model
from robustbench.eval import benchmark
print(robustbench.data.load_cifar10c is load_cifar10c)
print([name for name in sys.modules if name.split(".")[0] == "autoattack"])
"""
    )
    assert found.splitlines() == ["True", "[]"]


def test_two_failures_one_after_the_other(run):
    """Each failure is explained, and what is installed later is found."""
    found = run(
        FAILS
        + """
import sys
from ttt_plugins.errors import MissingDependencyError
from ttt_plugins.utils.robustbench import import_robustbench
sys.modules["pkg_resources"] = None  # as with setuptools 82
for _ in range(2):
    try:
        import_robustbench()
    except MissingDependencyError as error:
        print(error)
    assert not [name for name in sys.modules if name.split(".")[0] == "robustbench"]
del sys.modules["pkg_resources"]
print(import_robustbench().data.__name__)
"""
    )
    *failures, last = found.splitlines()
    assert len(failures) == 2
    assert all("setuptools" in failure for failure in failures)
    assert last == "robustbench.data"
