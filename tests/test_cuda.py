"""The lane "cuda without a GPU": the tests of `cuda_lane.py`, in a process that pretends."""

import pytest
from simulated_cuda import run_tests


@pytest.mark.timeout(1200)  # many tests, each of which has the suite's usual time
def test_on_simulated_devices(tmp_path):
    run_tests("cuda_lane.py", tmp_path)
