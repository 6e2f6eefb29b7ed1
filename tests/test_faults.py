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
from scipy import stats
from torch.autograd.graph import saved_tensors_hooks

import reparam_kernels as rk
from reparam_kernels import backends
from tests import oracle
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


STEPS = """
import resource, numpy as np, torch, reparam_kernels as rk
torch.set_num_threads(1)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def fixed():
    mu, x = (torch.linspace(-1, 1, 20).view(4, 5).requires_grad_() for _ in "ab")
    z, kl = rk.reparameterize_kl(mu, x, seed=7)
    grads = torch.autograd.grad((z, kl), (mu, x), (mu.detach(), torch.ones(4)))
    return b"".join(t.detach().numpy().tobytes() for t in (z, kl, *grads))

first, target = fixed(), torch.linspace(-1, 1, 20).view(4, 5)
mu, x = (torch.zeros(4, 5, requires_grad=True) for _ in "ab")
optimizer = torch.optim.SGD([mu, x], 0.01)
kept = [np.full((n, 4, 5), np.nan, np.float32) for _ in range(5)] + [np.full((n, 4), np.nan, np.float32)]
torch.manual_seed(0)
for i in range(n):
    kept[0][i], kept[1][i] = mu.detach().numpy(), x.detach().numpy()
    z, kl = rk.reparameterize_kl(mu, x)
    optimizer.zero_grad()
    ((z - target).square().sum() / 2 + kl.sum()).backward()
    for into, t in zip(kept[2:], (z, mu.grad, x.grad, kl)):
        into[i] = t.detach().numpy()
    optimizer.step()
    if i == 1000:
        before = resident()
print(resident() - before, fixed() == first)
torch.manual_seed(0)
seeds = np.array([torch.randint(2**63 - 1, (1,)).item() for _ in range(n)], np.uint64)
np.savez(path, *kept, seeds)
"""


@pytest.mark.slow
@linux
def test_a_million_training_steps(tmp_path, record_property):
    """Noise, z, KL and gradients of each against float64, the seeds being torch's own; then where training settles."""
    n, path = 10**6, tmp_path / "steps.npz"
    grown, same = python(f"n, path = {n}, {str(path)!r}\n{STEPS}", timeout=1200).split()
    assert same == "True"
    assert int(grown) < 2**20
    mu, x, z, dmu, dx, kl, seeds = np.load(path).values()
    assert len(np.unique(seeds)) == n
    target = np.linspace(-1, 1, 20).reshape(4, 5)
    made, worst = np.empty(z.shape), np.zeros(4)
    for part in np.array_split(np.arange(n), 20):
        m, v, got_z = (t[part].astype(np.float64) for t in (mu, x, z))
        eps = np.stack(oracle.box_muller(*oracle.words(seeds[part, None], 0, 5)), -1).reshape(m.shape)
        sigma = np.exp(v / 2)
        made[part] = (got_z - m) / sigma
        true_kl = (m**2 + np.expm1(v) - v).sum(2) / 2
        dz = got_z - target
        true = m + sigma * eps, dz + m, dz * sigma * eps / 2 + np.expm1(v) / 2, true_kl
        errors = [
            np.abs(got[part] - want) / (1 + np.abs(want)) for got, want in zip((z, dmu, dx, kl), true, strict=True)
        ]
        worst = np.maximum(worst, [e.max() for e in errors])
    assert (worst < 1e-6).all()
    mean, variance = made.mean() * made.size**0.5, (made.var() - 1) * (made.size / 2) ** 0.5
    ks = stats.kstest(made.reshape(-1), "norm").pvalue
    assert abs(mean) < 4.9  # p = 1e-6
    assert abs(variance) < 4.9
    assert ks > 1e-6
    # The loss is least at mu = target / 2 and variance 1/2, and so are the means over all steps, to 1 / sqrt(n).
    assert np.abs(mu.mean(0, dtype=np.float64) - target / 2).max() < 0.002
    assert np.abs(np.exp(x.astype(np.float64)).mean(0) - 0.5).max() < 0.004
    record_property("steps", n)
    record_property("resident memory grew by", f"{int(grown) // 1024} KiB")
    record_property("largest error", f"{worst.max():.1e}")
    record_property(
        "the 2e7 normals", f"mean {mean:+.1f} and variance {variance:+.1f} standard errors, KS p = {ks:.2g}"
    )


@pytest.mark.slow
@linux
def test_options_that_differ_on_each_call_are_not_kept(record_property):
    """Schedules of min_std and clamp: the caches stay within their bounds, and each call has its own options."""
    out = python("""
import resource, torch, reparam_kernels as rk
from reparam_kernels import spec
from reparam_kernels.backends import cpu
torch.set_num_threads(1)
mu, x = torch.linspace(-1, 1, 20).view(4, 5), torch.linspace(-3, 3, 20).view(4, 5)
eps = rk.randn(4, 5, seed=7)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

for i in range(100_000):
    options = dict(param="softplus", min_std=i * 1e-6, clamp=(-2 - i * 1e-5, 2.0))
    got = rk.reparameterize_kl(mu, x, seed=7, **options)
    if i == 10_000:
        before = resident()
    if i % 1000 == 0:
        want = rk.reference.reparameterize_kl(*(t.double() for t in (mu, x)), eps=eps.double(), **options)
        assert all(torch.allclose(g.double(), w, rtol=1e-6, atol=1e-6) for g, w in zip(got, want))
print(resident() - before, *(c.cache_info().currsize for c in (spec._known_spec, cpu._options)))
""")
    grown, *sizes = map(int, out.split())
    record_property("calls", 100_000)
    record_property("resident memory grew by", f"{grown // 1024} KiB")
    assert grown < 2**20
    assert sizes == [1024, 256]


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


@linux
def test_a_signal_handler_that_raises_at_any_moment():
    """As Ctrl-C does: between any two lines of Python, in forward and in backward; the next call is right."""
    out = python("""
import random, signal, torch, reparam_kernels as rk
torch.set_num_threads(1)

class Stop(Exception):
    pass

def stop(*_):
    raise Stop

def work():
    mu, x = (torch.full((64, 5), v, requires_grad=True) for v in (0.5, -0.25))
    z, kl = rk.reparameterize_kl(mu, x, seed=7)
    grads = torch.autograd.grad((z, kl), (mu, x), (mu.detach(), torch.ones(64)))
    return b"".join(t.detach().numpy().tobytes() for t in (z, kl, *grads))

want, stopped = work(), 0
signal.signal(signal.SIGALRM, stop)
for _ in range(3000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-4))
        try:
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Stop:
        stopped += 1
    assert work() == want
print(stopped)
""")
    assert int(out) > 300


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


FORKS = """
import os, signal, sys, threading, time, warnings, torch, reparam_kernels as rk
warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
torch.set_num_threads(2)
# Made here, and compared as bytes: torch's own parallel ops would hang in a child.
mu, x, dz = (torch.full((1 << 14, 8), v) for v in (0.5, -0.25, 2.0))
dkl = torch.ones(1 << 14)

def work():
    leaves = mu.detach().requires_grad_(), x.detach().requires_grad_()
    outputs = rk.reparameterize_kl(*leaves, seed=7)
    return [t.detach().numpy().tobytes() for t in (*outputs, *torch.autograd.grad(outputs, leaves, (dz, dkl)))]

def right(*_):
    torch.set_num_threads(2)
    return work() == want

def in_threads():
    found = []
    threads = [threading.Thread(target=lambda: found.append(right())) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    return found == [True] * 3

def in_a_child(body):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs is killed, and its status says so
        os._exit(0 if body() else 1)
    return os.waitpid(child, 0)[1] == 0

want = work()
"""

BUSY = (
    FORKS
    + """
stop, rounds, wrong = threading.Event(), [0] * 3, []

def busy(i):
    torch.set_num_threads(2)
    while not stop.is_set():
        rounds[i] += 1
        if work() != want: wrong.append(i)

def several():
    return right() and in_threads() and in_a_child(right) and right()

threads = [threading.Thread(target=busy, args=(i,)) for i in range(3)]
for t in threads: t.start()
while min(rounds) == 0: time.sleep(0.01)
passed = []
for i in range(40):
    seen, body = sum(rounds), (right, in_threads, lambda: in_a_child(right), several)[i % 4]
    passed.append(in_a_child(body))
    if not passed[-1]: break
    while sum(rounds) == seen: time.sleep(0.001)  # the parent's threads go on
    if i == 20:  # from a thread with workers of its own
        t = threading.Thread(target=lambda: passed.append(right() and in_a_child(several)))
        t.start(); t.join()
stop.set()
for t in threads: t.join()

def workers():
    torch.set_num_threads(2)
    time.sleep(1)  # for the workers of threads that ended to end
    before = len(os.listdir("/proc/self/task"))
    work()
    passed.append(len(os.listdir("/proc/self/task")) == before + 1)

t = threading.Thread(target=workers)  # the parent's calls still get a team
t.start(); t.join()
print(passed.count(False), len(passed), wrong, right())
"""
)


@linux
def test_forks_while_threads_are_inside_an_op():
    """Children, their children and their threads finish with the right bits; the parent's threads too."""
    assert python(BUSY, timeout=300).strip() == "0 42 [] True"


@linux
def test_a_pool_of_forked_processes():
    """multiprocessing's, after the parent has used its threads: forward and backward in each worker, repeatedly."""
    code = """
from multiprocessing import get_context
with get_context("fork").Pool(3) as pool:
    print(pool.map_async(right, range(30), chunksize=1).get(40) == [True] * 30, right())
"""
    assert python(FORKS + code).split() == ["True", "True"]


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


def another_module(folder, source):
    """A shared library of a few lines of C."""
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler")
    (folder / "other.c").write_text(source)
    subprocess.run([cc, "-shared", "-fPIC", folder / "other.c", "-o", folder / "other.so"], check=True)
    return (folder / "other.so").read_bytes()


@linux
@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda tmp, whole: None, "cannot import name '_C'"),
        (lambda tmp, whole: b"", "file too short"),
        (lambda tmp, whole: whole[:100], "cannot read file data"),
        (lambda tmp, whole: b"garbage" * 1000, "invalid ELF header"),
        (lambda tmp, whole: whole[:18] + b"\xf3\0" + whole[20:], "cannot open shared object file"),
        (lambda tmp, whole: another_module(tmp, "int other;"), "does not define module export function"),
        (
            lambda tmp, whole: another_module(tmp, "int gone(void); int PyInit__C(void) { return gone(); }"),
            "undefined symbol: gone",
        ),
    ],
    ids=["absent", "empty", "half a header", "garbage", "of another machine", "another library", "of another Python"],
)
def test_a_broken_extension(tmp_path, made, why):
    """One warning that says what is wrong, and the reference; an error where the CPU kernels are forced."""
    from reparam_kernels import _C

    extension = Path(_C.__file__)
    shutil.copytree(ROOT / "reparam_kernels", tmp_path / "reparam_kernels", ignore=shutil.ignore_patterns("_C*.so"))
    found = made(tmp_path, extension.read_bytes())
    if found is not None:
        (tmp_path / "reparam_kernels" / extension.name).write_bytes(found)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
{SAMPLE}; rk.randn(3); print(rk.__file__)
"""
    out = python(code, LD_BIND_NOW="1")
    assert out.startswith("reference 1.78875")
    assert str(tmp_path / "reparam_kernels/__init__.py") in out
    assert out.count("Warning") == out.count("runs in plain torch on cpu, slower: ") == 1
    assert why in out.split("slower: ")[1].split("\n")[0]
    forced = python(code, 1, REPARAM_BACKEND="cpu")
    assert "RuntimeError: REPARAM_BACKEND=cpu: every tensor must be one that this backend takes; got" in forced
    assert why in forced.split("takes; got")[1]


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
