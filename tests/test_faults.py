"""After a failed allocation or an exception around the ops, the error is clean and the next call is correct."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.autograd.graph import saved_tensors_hooks

import reparam_kernels as rk
from tests.cases import assert_near, inputs, linux, noise, truth
from tests.test_backends import python

ROOT = Path(__file__).parent.parent


class Sum:
    """The loss of one call and its gradients, checked against the reference in float64."""

    def __init__(self):
        self.mu, self.x = inputs((4, 5), requires_grad=True)
        self.z, self.kl = rk.reparameterize_kl(self.mu, self.x, seed=7)
        self.loss = self.z.square().sum() + self.kl.sum()

    def again(self):
        """Check that a second backward through the same graph is correct."""
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
    """Check that a whole call is correct."""
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
    """The limit fails the allocation of the first output, the second, a gradient, or the sums inside the kernel."""
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
    )  # else freed memory is reused by the next call
    assert out.split("\n") == ["RuntimeError True"] * 5 + ["MemoryError False", ""]


@pytest.mark.slow
@linux
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is over glibc's")
def test_another_allocator_gives_the_same_bits(tmp_path):
    """The preloaded allocator aligns less than torch asks for, and fills memory with garbage."""
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler")
    library = tmp_path / "allocator.so"
    subprocess.run([cc, "-O1", "-fPIC", "-shared", ROOT / "tests/cpp/allocator.c", "-o", library], check=True)
    out = python(ALLOCATED + "\nraw = torch.empty(1000); print(raw.data_ptr() % 64, raw.view(torch.uint8)[-1].item())",
                 LD_PRELOAD=str(library))  # fmt: skip
    *preloaded, alignment, garbage = out.split()
    assert (int(alignment) % 16, int(garbage)) == (0, 0xA5)
    usual = python(ALLOCATED).split()
    assert len(usual) == 25
    assert preloaded[1:] == usual[1:]
    assert int(usual[0]) == 0 < int(preloaded[0])


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
    """The same graph can be used again."""
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
    """As Ctrl-C does, it raises between any two lines of Python in forward and backward; the next call is correct."""
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
