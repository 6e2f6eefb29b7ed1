"""Runs every test with Triton's interpreter, one torch thread, and outputs that hold NaN until they are written.

If TEST_DEVICE names a GPU, the tests of the Triton kernels run there, and no others.
"""

import atexit
import importlib
import os
import shutil
import sys
import tempfile

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # else the usual one may hold what another version has compiled
    folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
os.environ["TRITON_INTERPRET"] = "1" if os.environ.get("TEST_DEVICE", "cpu") == "cpu" else "0"  # before triton's import

import numpy as np
import pytest
import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from reparam_kernels import _C
from reparam_kernels.core import backends
from tests.on_device import Kernels
from tests.oracle import fma
from tests.report import pytest_addoption, pytest_configure, pytest_terminal_summary  # noqa: F401

DEVICE = os.environ.get("TEST_DEVICE")

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):
    # this interpreter does not fuse tl.fma
    from triton.runtime import interpreter

    def exact_fma(self, x, y, z):
        exact = fma if x.data.dtype == np.float32 else lambda a, b, c: a * b + c
        return interpreter.TensorHandle(exact(x.data, y.data, z.data), x.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = exact_fma

    # numpy 2.4 and later refuse int() of an array of one element that is not 0-dim
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_its_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor_and_its_index


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread; the tests of threads ask for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new outputs with NaN, so that an element that a kernel does not write is found."""

    def poison(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            if type(t) is torch.Tensor and t.is_floating_point() and t.device.type in ("cpu", "cuda", "xpu"):
                with torch.no_grad():
                    t.fill_(float("nan"))
            return t

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(params=["cpu", "triton"] if DEVICE is None else ["triton"])
def backend(request, monkeypatch):
    """Run the test on the C++ kernels, then on the Triton kernels in the interpreter; on TEST_DEVICE if it is set."""
    use_backend(monkeypatch, request.param)
    yield request.param
    forget()


@pytest.fixture(params=["cpu", "triton", "reference"])
def backend_or_reference(request, monkeypatch):
    """Run the test on the kernels, as `backend` does, then on the formula in plain torch."""
    use_backend(monkeypatch, request.param)
    yield request.param
    forget()


def pytest_collection_modifyitems(config, items):
    if DEVICE is None:
        return
    here = [
        item
        for item in items
        if "use_backend" in item.function.__code__.co_names
        or "triton" in getattr(item, "callspec", item).__dict__.get("params", {}).values()
        or item.get_closest_marker("cuda")
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in here])
    items[:] = here


def use_backend(monkeypatch, name):
    monkeypatch.setattr(backends, "FORCED", name)
    if DEVICE is not None:
        monkeypatch.setattr(backends, "interpreting", lambda: True)  # CPU tensors may come
        monkeypatch.setattr(backends, "kernels", kernels_on_device)
    forget()


def kernels_on_device(package, device):
    name = backends.backend_name(device.type)
    if name == "reference":
        return None
    kernels = importlib.import_module(f"{package}.{name}")
    return Kernels(kernels, DEVICE) if name == "triton" else kernels


def forget():
    backends.backend_name.cache_clear()
    if DEVICE is None:
        backends.kernels.cache_clear()


@pytest.fixture(params=_C.available_isas())
def isa(request):
    """Run the test on each instruction set that this CPU has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


_device_constructors()  # torch caches them, before `poisoned` replaces some


class RequiresDevice(TorchFunctionMode):
    """Raises if the package makes a tensor without a device, since it would be on torch's default device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _device_constructors() and "device" not in kwargs and kwargs.get("out") is None:
            frame = sys._getframe(1)
            while frame.f_code.co_filename == __file__:  # `poisoned` wraps some of them
                frame = frame.f_back
            module = frame.f_globals.get("__name__", "")
            if module.partition(".")[0] == "reparam_kernels":
                raise AssertionError(f"{module}:{frame.f_lineno}: {func.__name__} must say on which device")
        return func(*args, **kwargs)


@pytest.fixture
def validating():
    """torch.compile turns torch's validation off for the whole process, in whichever test it runs first."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(True)
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


@pytest.fixture
def says_where():
    """Check in the tests of ops that the package names the device of every tensor that it makes."""
    with RequiresDevice():
        yield
