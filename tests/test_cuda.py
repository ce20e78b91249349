"""The lane "cuda without a GPU"; its tests are in `cuda_lane.py`.

It takes more than a minute and pretends to be a GPU inside one process, which does not work beside
other tests on every machine. ``TTT_CUDA_LANE=1 pytest -n0 tests/test_cuda.py`` runs it.
"""

import os

import pytest
from simulated_cuda import run_tests

pytestmark = pytest.mark.skipif(
    os.environ.get("TTT_CUDA_LANE") != "1", reason="run by TTT_CUDA_LANE=1 pytest -n0"
)


@pytest.mark.parametrize("part", ["adapter", "not adapter"])
def test_on_simulated_devices(part, tmp_path):
    run_tests("cuda_lane.py", part, tmp_path)
