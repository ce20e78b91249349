"""CUDA devices without a GPU: shapes, types and devices are true, values are not there.

Under a `Simulation` everything on the CPU is real, and a tensor on a cuda device is a fake one
(``FakeTensorMode``). An operation on tensors of two devices raises as it would on a GPU. What a
program has to wait for does not raise but is recorded: a look at a value (``if``, ``item``,
``nonzero``) or a copy to the CPU is a read, a copy from the CPU is an upload. Operations are
counted, one for each call that launches kernels; views and allocations are none.

PyTorch's backward pass wants a device for the thread that runs it, and the C++ below pretends that
there are two. That cannot be undone, so the fixture `on_gpu` runs a function in a fork.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ttt_plugins
from ttt_plugins.utils.processes import FileLock

aten = torch.ops.aten
PACKAGE = str(Path(ttt_plugins.__file__).parent) + os.sep
MEMORY = 140 << 30
#: Operations that launch nothing, beside views.
FREE = ("empty", "new_empty", "detach", "_unsafe_view", "alias", "lift_fresh", "_pin_memory")

SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 2; }
} guard;
struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  long versionRuntimeCuDNN() const override { return 90000; }
} hooks;
extern "C" void pretend() {
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
  auto& real = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&real) = *reinterpret_cast<void**>(&hooks);  // its virtual functions
}
"""


class Simulation(TorchDispatchMode):
    """See the module's docstring.

    Attributes:
        truth: what every look at a bool finds; numbers are found to be 1.
        reads, uploads: how often something was waited for, by place and operation.
        operations: how often each operation ran on a cuda device.
    """

    def __init__(self, truth: bool = True):
        super().__init__()
        self.truth = truth
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.reads, self.uploads, self.operations = Counter(), Counter(), Counter()

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    @contextmanager
    def watching(self):
        """Count anew inside the block."""
        self.reads, self.uploads, self.operations = Counter(), Counter(), Counter()
        yield self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        there = [t for t in leaves if isinstance(t, FakeTensor)]
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        if not there and target != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        read, found = self._read(func, args, target)
        if read:
            self.reads[place(func)] += 1
            return found
        given = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, FakeTensor)]
        if func in (aten._to_copy.default, aten.copy_.default) and given:
            self.uploads[place(func)] += 1
        name = func._schema.name.split("::")[-1]
        if func.namespace == "aten" and not func.is_view and not name.startswith(FREE):
            self.operations[name] += 1
        if func is aten._pin_memory.default:
            return args[0]
        return func(*args, **kwargs)  # the fake mode below this one takes it

    def _read(self, func, args, target) -> tuple[bool, Any]:
        """Whether an operation waits for a value, and what it finds then."""
        if func is aten._local_scalar_dense.default:
            number = 1.0 if args[0].dtype.is_floating_point else 1
            return True, self.truth if args[0].dtype == torch.bool else number
        if func is aten.equal.default:
            return True, self.truth
        if func is aten._to_copy.default and target == "cpu":
            with unset_fake_temporarily():
                return True, self._known(torch.empty(args[0].shape, dtype=args[0].dtype))
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return True, self._known(args[0])
        if func is aten.nonzero.default:
            shape = (args[0].numel(), args[0].ndim)
            return True, torch.zeros(shape, dtype=torch.int64, device=args[0].device)
        if func is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1]):
            (mask,) = args[1]
            return True, args[0].flatten(0, mask.ndim - 1)
        return False, None

    def _known(self, tensor: Tensor) -> Tensor:
        return tensor.fill_(self.truth) if tensor.dtype == torch.bool else tensor.fill_(1)


def place(func) -> str:
    """The function of this package that calls an operation."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    name = func._schema.name.split("::")[-1]
    if frame is None:
        return f"a test: {name}"
    file = frame.f_code.co_filename.removeprefix(PACKAGE)
    return f"{file}:{frame.f_code.co_name} {name}"


def _pretend(library: Path) -> None:
    """Make this process believe in two devices, for good."""
    ctypes.CDLL(str(library)).pretend()
    generator = torch.Generator
    torch.Generator = lambda device="cpu": generator("cpu")
    torch.Tensor.pin_memory = lambda self, *_: self
    answers = {
        "is_bf16_supported": True, "device_count": 2, "_lazy_init": None,
        "mem_get_info": (MEMORY, MEMORY), "memory_reserved": 0, "memory_allocated": 0,
        "max_memory_allocated": 0, "reset_peak_memory_stats": None, "set_device": None,
        "get_device_name": "a simulated device", "get_device_capability": (9, 0),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False


@pytest.fixture(scope="session")
def pretending_library(tmp_path_factory) -> Path:
    """The compiled C++, made by one of the test processes."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or not hasattr(os, "fork"):
        pytest.skip("the simulated device needs a C++ compiler and fork")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder
    built, home = folder / "pretend.so", Path(torch.__file__).parent
    with FileLock(folder / "pretend.lock") as lock:
        lock.take(patience=120)
        if not built.exists():
            command = [compiler, "-x", "c++", "-", "-std=c++20", "-shared", "-fPIC", "-o", built]
            command += [f"-I{home}/include", f"-L{home}/lib", "-lc10", "-ltorch_cpu"]
            done = subprocess.run(command, input=SOURCE, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"torch {torch.__version__}: {done.stderr.strip().splitlines()[0]}")
    return built


@pytest.fixture
def on_gpu(pretending_library) -> Callable[..., Any]:
    """``on_gpu(function, truth=True)`` -> what ``function(simulation)`` returns in a fork."""

    def run(function: Callable[[Simulation], Any], truth: bool = True) -> Any:
        receiving, sending = os.pipe()
        child = os.fork()
        if not child:
            try:
                _pretend(pretending_library)
                with Simulation(truth) as simulation:
                    outcome = (function(simulation), None)
            except BaseException:
                outcome = (None, traceback.format_exc())
            with os.fdopen(sending, "wb") as pipe:
                pipe.write(pickle.dumps(outcome))
            os._exit(0)
        os.close(sending)
        with os.fdopen(receiving, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        result, error = pickle.loads(answer) if answer else (None, "the process died")
        if error is not None:
            pytest.fail(error, pytrace=False)
        return result

    return run
