"""The lane "cuda without a GPU"; its tests are in `cuda_lane.py`."""

import pytest
from simulated_cuda import run_tests


@pytest.mark.parametrize("part", ["adapter", "not adapter"])
def test_on_simulated_devices(part, tmp_path):
    run_tests("cuda_lane.py", part, tmp_path)
