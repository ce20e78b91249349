"""CUDA devices without a GPU: shapes, types and devices are true, values are not there.

Under a `Simulation` everything on the CPU is real, and a tensor on a cuda device is a fake one
(``FakeTensorMode``). An operation on tensors of two devices raises as it would on a GPU. What a
program has to wait for does not raise but is recorded: a look at a value (``if``, ``item``,
``nonzero``) or a copy to the CPU is a read, a copy from the CPU is an upload. Operations are
counted, one for each call that launches kernels; views and allocations are none.

PyTorch's backward pass wants a device for the thread that runs it, and the C++ below pretends that
there are two. That cannot be undone, so `run_tests` runs tests in a process of their own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ttt_plugins

aten = torch.ops.aten
has_kernel = functools.cache(torch._C._dispatch_has_kernel_for_dispatch_key)
PACKAGE = str(Path(ttt_plugins.__file__).parent) + os.sep
MEMORY = 140 << 30
#: Names the file of the compiled C++ to the process that pretends.
LIBRARY = "TTT_SIMULATED_CUDA"
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
        truth: what every look at a bool finds.
        number: what every look at a number finds.
        reads, uploads: how often something was waited for, by place and operation.
        operations: how often each operation ran on a cuda device.
    """

    def __init__(self):
        super().__init__()
        self.truth, self.number = True, 1
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
        if func.namespace == "aten" and has_kernel(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode such operations arrive whole
                return func.decompose(*args, **kwargs)
        read, found = self._read(func, args, target)
        if read:
            self.reads[place(func)] += 1
            return found
        given = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, FakeTensor)]
        if func in (aten._to_copy.default, aten.copy_.default) and given:
            self.uploads[place(func)] += 1
            with unset_fake_temporarily():  # another object: the fake mode holds on to what it sees
                args = tree_map_only(Tensor, real_alias, args)
        name = func._schema.name.split("::")[-1]
        if func.namespace == "aten" and not func.is_view and not name.startswith(FREE):
            self.operations[name] += 1
        kwargs = {n: None if n == "generator" else v for n, v in kwargs.items()}
        if func is aten._pin_memory.default:
            return args[0]
        return func(*args, **kwargs)  # the fake mode below this one takes it

    def _read(self, func, args, target) -> tuple[bool, Any]:
        """Whether an operation waits for a value, and what it finds then."""
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            if dtype == torch.bool:
                return True, self.truth
            return True, float(self.number) if dtype.is_floating_point else self.number
        if func is aten.equal.default:
            return True, True  # whatever ``truth`` is: no model here writes its own tensors
        if func is aten._to_copy.default and target == "cpu":
            with unset_fake_temporarily():
                return True, self._known(torch.empty(args[0].shape, dtype=args[0].dtype))
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return True, self._known(args[0])
        if func is aten.nonzero.default:
            shape = (args[0].numel(), args[0].ndim)
            return True, torch.zeros(shape, dtype=torch.int64, device=args[0].device)
        if func is aten.index.Tensor and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        ):
            (mask,) = args[1]
            return True, args[0].flatten(0, mask.ndim - 1)
        return False, None

    def _known(self, tensor: Tensor) -> Tensor:
        return tensor.fill_(self.truth) if tensor.dtype == torch.bool else tensor.fill_(1)


class Generator(torch.Generator):
    """A generator that says it is where it was made, and draws nothing there."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.place = torch.device(device)

    @property
    def device(self):
        return self.place


def real_alias(tensor: Tensor) -> Tensor:
    """The tensor if it is fake, otherwise another object for it."""
    return tensor if isinstance(tensor, FakeTensor) else tensor.detach()


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


def pytest_configure() -> None:
    """As a plugin of pytest: make this process believe in two devices, for good."""
    ctypes.CDLL(os.environ[LIBRARY]).pretend()
    torch.Generator = Generator
    # The fake mode holds weak references to parameters; they may change places all the same.
    torch.utils.weakref = SimpleNamespace(getweakrefs=lambda _: [])
    torch.Tensor.pin_memory = lambda self, *_: self
    save = torch.save
    torch.save = lambda saved, *args: save(tree_map_only(FakeTensor, Tensor.cpu, saved), *args)
    answers = {
        "is_bf16_supported": True, "device_count": 2, "_lazy_init": None, "set_device": None,
        "mem_get_info": (MEMORY, MEMORY), "memory_reserved": 0, "memory_allocated": 0,
        "max_memory_allocated": 0, "reset_peak_memory_stats": None,
        "get_device_name": "a simulated device", "get_device_capability": (9, 0),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False


def run_tests(file: str, folder: Path) -> None:
    """Run the tests of a file in a process that pretends; ``folder`` is for what is compiled."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("the simulated device needs a C++ compiler")
    built, home = folder / "pretend.so", Path(torch.__file__).parent
    command = [compiler, "-x", "c++", "-", "-std=c++20", "-shared", "-fPIC", "-o", built]
    command += [f"-I{home}/include", f"-L{home}/lib", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, input=SOURCE, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"torch {torch.__version__}: {done.stderr.strip().splitlines()[0]}")
    tests = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    command += ["-p", "simulated_cuda", str(tests)]
    there = os.environ | {LIBRARY: str(built)}
    there["PYTHONPATH"] = os.pathsep.join([str(tests.parent), there.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=there, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout[-12000:] + done.stderr[-2000:], pytrace=False)


@pytest.fixture
def simulation():
    """A `Simulation` that a test of `run_tests` runs under."""
    with Simulation() as active:
        yield active
