"""What fails around the ops, or is missing: each failure is clean, and the next call is right."""

import ctypes
import importlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import reparam_kernels as rk
from reparam_kernels import backends
from tests.cases import assert_near, inputs, noise, truth
from tests.conftest import forget
from tests.test_backends import SAMPLE, python

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks or preloads")


class Sum:
    """A loss of one call and its gradients, against the reference in float64."""

    def __init__(self):
        self.mu, self.x = inputs((4, 5), requires_grad=True)
        self.z, self.kl = rk.reparameterize_kl(self.mu, self.x, seed=7)
        self.loss = self.z.square().sum() + self.kl.sum()

    def again(self):
        """Backward through the same graph once more is right."""
        self.mu.grad = self.x.grad = None
        self.loss.backward()
        self.check()

    def check(self):
        (mu, x), _, (z, kl) = truth(self.mu, self.x, noise((4, 5), 7))
        (z.square().sum() + kl.sum()).backward()
        assert_near(self.z, z, units=8, atol=1e-6)
        assert_near(self.kl, kl, rtol=1e-6)
        assert_near(self.mu.grad, mu.grad, rtol=1e-5, atol=1e-6)
        assert_near(self.x.grad, x.grad, rtol=1e-5, atol=1e-6)


def whole():
    """Another call, start to end, is right."""
    s = Sum()
    s.loss.backward()
    s.check()


class Stop(Exception):
    pass


class Fails:
    """A hook that raises on its n-th call and on no other."""

    def __init__(self, n=1):
        self.left = n

    def __call__(self, t):
        self.left -= 1
        if self.left == 0:
            raise Stop
        return t


# ---- memory


@linux
def test_out_of_memory_is_an_error_and_the_next_call_is_right():
    """The limit stops the first output, the second, a gradient, or the sums inside the kernel."""
    out = python(
        """
import resource, torch, reparam_kernels as rk
torch.set_num_threads(1)
M = 1 << 20

def limit(spare):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))

def attempt(f):
    try:
        f()
        print("none")
    except Exception as error:
        print(type(error).__name__, "allocate" in str(error))

mu, x = (torch.full((4 * M, 1), v, requires_grad=True) for v in (0.5, -0.25))  # 16 MB each
big, one = torch.zeros(1).expand(1 << 36), torch.ones(1)
forward = lambda: rk.reparameterize_kl(mu, x, seed=3)
outputs = forward()
before = [rk.reparameterize_kl(mu[:99], x[:99], seed=3), rk.randn(99, seed=3)]
grads = one.expand(4 * M, 1), one.expand(4 * M)
backward = lambda: torch.autograd.grad(outputs, (mu, x), grads, retain_graph=True)
want = [g[:9].clone() for g in backward()]
for spare, f in ((8, forward), (24, forward), (8, lambda: rk.randn(32 * M, seed=3)), (8, backward), (24, backward),
                 (64, lambda: rk.kl_divergence(big, big))):  # its 2^26 partial sums
    limit(spare * M)
    attempt(f)
    after = [rk.reparameterize_kl(mu[:99], x[:99], seed=3), rk.randn(99, seed=3)]
    assert all(map(torch.equal, (*before[0], before[1]), (*after[0], after[1])))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert all(map(torch.equal, want, (g[:9] for g in backward())))
""",
        MALLOC_MMAP_THRESHOLD_="1048576",
    )  # or freed memory is kept, and serves the next call
    assert out.split("\n") == ["RuntimeError True"] * 5 + ["MemoryError False", ""]


LEAK = """
import resource, torch, reparam_kernels as rk
torch.set_num_threads(1)
mu, x = (torch.zeros(4, 5, requires_grad=True) for _ in "ab")
grads = torch.ones(4, 5), torch.ones(4)

def alone():
    with torch.no_grad():
        rk.reparameterize_kl(mu, x)

def pair():
    torch.autograd.grad(rk.reparameterize_kl(mu, x), (mu, x), grads)

def refused():
    try:
        rk.reparameterize(mu, x[:2])
    except ValueError:
        pass

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

for f, calls in ((alone, 70_000), (pair, 20_000), (refused, 10_000)):
    for _ in range(1000):
        f()
    before = resident()
    for _ in range(calls):
        f()
    print(resident() - before)
"""


@pytest.mark.slow
@linux
def test_a_hundred_thousand_calls_keep_no_memory():
    """One lost word a call would be 80, 160 and 560 kB; a lost tensor, megabytes."""
    grown = [int(n) for n in python(LEAK).split()]
    assert len(grown) == 3
    assert max(grown) < 2**20


@pytest.mark.slow
@linux
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is over glibc's")
def test_another_allocator_gives_the_same_bits(tmp_path):
    """Preloaded; it gives less alignment than torch asks for, and memory full of garbage."""
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler")
    library = tmp_path / "allocator.so"
    subprocess.run([cc, "-O1", "-fPIC", "-shared", ROOT / "tests/cpp/allocator.c", "-o", library], check=True)
    out = python(ALLOCATED + "\nraw = torch.empty(1000); print(raw.data_ptr() % 64, raw.view(torch.uint8)[-1].item())",
                 LD_PRELOAD=str(library))  # fmt: skip
    *found, alignment, garbage = out.split()
    assert (int(alignment) % 16, int(garbage)) == (0, 0xA5)
    usual = python(ALLOCATED).split()
    assert len(usual) == 25
    assert found[1:] == usual[1:]
    assert int(usual[0]) == 0 < int(found[0])


ALLOCATED = """
import hashlib, torch, reparam_kernels as rk
torch.set_num_threads(2)
low, lines = 0, []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape in ((7,), (65, 33), (3, 20000)):
        ramp = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).to(dtype)
        mu, x = ramp.clone().requires_grad_(), (ramp / 2).requires_grad_()
        z, kl = rk.reparameterize_kl(mu, x, seed=7)
        grads = torch.autograd.grad((z, kl), (mu, x), (torch.ones_like(z), torch.ones_like(kl)))
        for t in (z, kl, *grads):
            assert t.isfinite().all()
            low += t.data_ptr() % 64 != 0
            lines.append(hashlib.sha256(t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
print(low, *(a + b for a, b in zip(lines[::2], lines[1::2])))
"""


# ---- exceptions in the middle


@pytest.mark.parametrize("saved", [1, 2, 3])
def test_a_hook_that_fails_to_pack_a_saved_tensor(saved):
    with pytest.raises(Stop), saved_tensors_hooks(Fails(saved), lambda t: t):
        Sum()
    whole()


@pytest.mark.parametrize("saved", [1, 2, 3])
def test_a_hook_that_fails_to_unpack_a_saved_tensor(saved):
    """The same graph can be gone through again."""
    with saved_tensors_hooks(lambda t: t, Fails(saved)):
        s = Sum()
    with pytest.raises(Stop):
        s.loss.backward(retain_graph=True)
    whole()
    s.again()


@pytest.mark.parametrize("name", ["z", "kl", "mu", "x"])
def test_a_backward_hook_that_fails(name):
    s = Sum()
    getattr(s, name).register_hook(Fails())
    with pytest.raises(Stop):
        s.loss.backward(retain_graph=True)
    whole()
    s.again()


# ---- processes


@linux
def test_a_child_forked_before_the_first_call_does_not_hang():
    """The parent has imported the package and used torch's threads, which the child has not."""
    code = """
import os, torch, reparam_kernels as rk
torch.set_num_threads(2)
torch.ones(1 << 22).sum()
child = os.fork()
if child == 0:
    os._exit(0 if rk.randn(1 << 20, seed=3)[:2].equal(rk.randn(2, seed=3)) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert python("import warnings; warnings.simplefilter('ignore')\n" + code).strip() == "0"


# ---- what is missing, old or wrong


def other_version():
    """A capsule as torch's own, of a DLPack version that nobody knows."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    other_version.memory = (ctypes.c_uint32 * 64)(99)
    return new(ctypes.addressof(other_version.memory), b"dlpack_exchange_api", None)


@pytest.mark.parametrize(
    ("lent", "why"),
    [(None, "no attribute '__dlpack_c_exchange_api__'"), (object(), "PyCapsule"), (other_version, "unknown DLPack")],
    ids=["absent", "foreign", "version"],
)
def test_a_torch_that_does_not_lend_its_tensors(monkeypatch, lent, why):
    """As torch 2.9 does not: one warning that names the torch, and the reference."""
    if lent is None:
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    else:
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", lent() if callable(lent) else lent)
    monkeypatch.delitem(sys.modules, "reparam_kernels.backends.cpu", raising=False)
    monkeypatch.delattr(backends, "cpu", raising=False)
    forget()
    try:
        with pytest.raises(ImportError, match=f"torch {torch.__version__.replace('+', '.')} does not lend its tensors"):
            importlib.import_module("reparam_kernels.backends.cpu")
        with pytest.warns(UserWarning, match=f"runs in plain torch on cpu, slower: .*{why}") as seen:
            whole()
        assert len(seen) == 1
        assert rk.backend_for(torch.zeros(1)) == "reference"
    finally:
        monkeypatch.undo()
        forget()
    whole()
    assert rk.backend_for(torch.zeros(1)) == "cpu"


NO_TRITON = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else find(name, *rest)
sys.meta_path.insert(0, Refuse())
"""


def test_without_triton_the_cpu_runs_and_the_report_says_so():
    code = """
z, kl = rk.GaussianHead(3, 2)(torch.zeros(5, 3)); (z.sum() + kl.sum()).backward()
sys.argv = ["reparam_kernels"]
from reparam_kernels.__main__ import report; report()
"""
    out = python(NO_TRITON + SAMPLE + code)
    assert out.startswith("cpu 1.788757")
    assert "triton backend   missing: No module named 'triton'" in out
    forced = python(NO_TRITON + SAMPLE, 1, REPARAM_BACKEND="triton", TRITON_INTERPRET="1")
    assert "must be one that this backend takes; got No module named 'triton'" in forced


@pytest.mark.parametrize("asked", ["sse9", ""])
def test_an_unknown_instruction_set_is_an_error(asked):
    from reparam_kernels import _C

    has = ", ".join(_C.available())
    assert (
        f"ValueError: instruction set: must be one that this CPU and build have ({has}); got '{asked}'. "
        "Correct or unset REPARAM_CPU_ISA."
    ) in python(SAMPLE, 1, REPARAM_CPU_ISA=asked)


@pytest.mark.arm
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "baseline"), ("SandyBridge", "baseline"), ("Haswell", "avx2")])
def test_the_extension_on_an_older_cpu(cpu, isa):
    """The module that users import, by itself, under an emulator: what it chooses, refuses and computes."""
    from reparam_kernels import _C

    assert shutil.which("qemu-x86_64"), "qemu-x86_64 must be installed (Debian: qemu-user)"
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("reparam_kernels._C", {_C.__file__!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
try:
    _C.use("avx512")
except ValueError as error:
    print(_C.isa(), "got 'avx512'" in str(error), _C.noise(7, 5, 1000).hex())
"""
    command = ["qemu-x86_64", "-cpu", cpu, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [isa, "True", _C.noise(7, 5, 1000).hex()], done.stderr


@pytest.mark.slow
@linux
def test_triton_without_a_cache_folder_to_write_in(tmp_path):
    """Compiled for a GPU that need not be there; a file stands where the folder would be, which stops root as well."""
    (tmp_path / "file").touch()
    code = f"""
import os, torch, reparam_kernels as rk
from bench.compiled import compiling

def launch():
    with compiling("sm_90") as launches:
        rk.randn(4096, seed=1)
    return len(launches)

try:
    launch()
except OSError as error:
    print("file/cache" in str(error))
print(rk.backend_for(torch.zeros(1)))
os.environ["TRITON_CACHE_DIR"] = {str(tmp_path / "whole")!r}
print(launch())
"""
    out = python(code, TRITON_CACHE_DIR=str(tmp_path / "file/cache"))
    assert out.split() == ["True", "cpu", "1"]
    interpreted = python(
        SAMPLE, REPARAM_BACKEND="triton", TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path / "file/cache")
    )
    assert interpreted.startswith("triton 1.788757")
