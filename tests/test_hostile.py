"""Hostile tensors and numbers that torch can make give an exception or a result, never a crash or a hang.

Each family runs in its own process, so that a crash is a failure and not the end of the suite. Tensor descriptions that
torch cannot make, and several bad arguments at once, are covered by tests/cpp/fuzz_binding.cpp.
"""

import subprocess
import sys

import pytest
import torch

import reparam_kernels as rk

START = """
import torch, reparam_kernels as rk
from reparam_kernels import _C
from reparam_kernels.ops.latent import cpu
from torch._subclasses import FakeTensorMode

torch.set_num_threads(1)
tried = 0

def attempt(call):
    "Runs it; only a clean exception may come out."
    global tried
    tried += 1
    try:
        return call()
    except (ValueError, TypeError, RuntimeError, MemoryError, NotImplementedError, OverflowError):
        return None
    except AssertionError as error:  # torch's own, where fake and real tensors meet
        assert "FakeTensor" in str(error)
        return None

def each_and_all(call, plain, like_mu):
    "Each argument in turn, and all that have the shape of mu at once, by each hostile tensor."
    for t in tensors:
        for places in (*((i,) for i in range(len(plain))), like_mu):
            args = [t.clone() if isinstance(t, torch.Tensor) else t for t in plain]
            for i in places:
                args[i] = t
            attempt(lambda: call(args))

with FakeTensorMode():
    fake = torch.zeros(4, 3)
base = torch.zeros(24)
tensors = [
    base.view(24)[:12].view(4, 3), base.as_strided((4, 3), (0, 0)), base.as_strided((4, 3), (1, 1)),
    base.as_strided((4, 3), (6, 2)), base[::2].view(4, 3), torch.zeros(3, 4).t(), torch.zeros(4, 0), torch.zeros(()),
    torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.complex64), torch.zeros(4, 3).half(),
    torch.zeros(4, 3).double(), torch.zeros(4, 3, dtype=torch.float8_e5m2), torch.zeros(4, 3, dtype=torch.bool),
    torch.zeros(4, 3, device="meta"), torch.zeros(4, 3).to_sparse(), torch.eye(4, 3).to_sparse_csr(), fake,
    torch.zeros(1).expand(2**63 - 1), torch.zeros(1).expand(2**62 + 1), torch.zeros(0, 2**62), torch.zeros(4, 3, 1),
    torch.zeros((1,) * 64), torch.nn.Parameter(torch.zeros(4, 3)), torch.zeros(4, 3)._neg_view(),
    torch.quantize_per_tensor(torch.zeros(4, 3), 0.1, 0, torch.qint8), None, 3, "mu", [[0.0]],
]
"""

FAMILIES = {
    "forward": """
plain = [torch.zeros(4, 3), torch.zeros(4, 3), None, None, torch.tensor([1]), None, torch.zeros(4, 3)]
plain += [torch.zeros(4), None]
options = _C.Options(_C.Param.logvar, 0.0, False, 0.0, 0.0)
each_and_all(lambda args: _C.latent_forward(options, 1, *args), plain, (0, 1, 6))
""",
    "backward": """
full = [torch.zeros(4, 3) for _ in range(13)]
full[4], full[5], full[7], full[8] = torch.tensor([1]), None, torch.zeros(4), None
options = _C.Options(_C.Param.std, 0.0, True, 0.0, 0.0)
each_and_all(lambda args: _C.latent_backward(options, 1, *args), full, (0, 1, 2, 3, 6, 9, 10, 11, 12))
""",
    "numbers": """
mu = torch.zeros(4, 3)
for value in (0, -1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 1e300, float("nan"), float("inf"), None, "7", mu):
    attempt(lambda: rk.reparameterize(mu, mu, seed=value))
    attempt(lambda: rk.kl_divergence(mu, mu, event_ndim=value))
    attempt(lambda: rk.kl_divergence(mu, mu, clamp=(value, value)))
    attempt(lambda: rk.kl_divergence(mu, mu, param="softplus", min_std=value))
    attempt(lambda: _C.randn(torch.tensor([1]), torch.zeros(9), value))
    attempt(lambda: _C.test_eps(value, value, 7))
    attempt(lambda: _C.test_eps(1, 2**63 - 1, value))
    attempt(lambda: _C.test_box_muller(value, value))
    attempt(lambda: _C.Options(value, value, value, value, value))
    attempt(lambda: _C.set_isa(value))
    for numbers in ((value,), (value, 9), (9, value), value):
        attempt(lambda: _C.randn(torch.tensor([1]), torch.zeros(2, 3), 1, numbers, (0, 0)))
        attempt(lambda: _C.randn(torch.tensor([1, 2]), torch.zeros(2, 3), 1, (9, 9), numbers))
        windowed = attempt(lambda: _C.Options(_C.Param.std, 0.0, False, 0.0, 0.0, whole=numbers, start=(0, 1)))
        outputs = torch.zeros(2, 3), None, None
        args = torch.ones(2, 3), torch.ones(2, 3), None, None, torch.tensor([1]), None
        attempt(lambda: _C.latent_forward(windowed, 1, *args, *outputs))
    attempt(lambda: _C.Options(_C.Param(value), 0.0, False, 0.0, 0.0))
for value in (-1, 4, 17, 2**31 - 1):
    assert attempt(lambda: _C.Options(_C.Param(value), 0.0, False, 0.0, 0.0)) is None
""",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hostile_call_is_an_exception_or_a_result(family, record_property):
    program = START + FAMILIES[family] + "print(tried)"
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 100
    record_property("calls", int(done.stdout))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (64, 20), (3, 4097)], ids=str)
def test_tensors_may_lie_at_any_byte(isa, dtype, shape):
    def moved(t):
        held = bytearray(t.numel() * t.element_size() + 1)
        return torch.frombuffer(held, dtype=dtype, offset=1).view(shape).copy_(t).requires_grad_()

    plain = [(torch.rand(shape) + 0.1).to(dtype).requires_grad_() for _ in range(2)]
    odd = [moved(t.detach()) for t in plain]
    results = []
    for mu, x in (plain, odd):
        z, kl = rk.reparameterize_kl(mu, x, seed=3)
        dz = torch.ones_like(z) if mu is plain[0] else moved(torch.ones_like(z)).detach()
        results.append([z, kl, *torch.autograd.grad((z, kl), (mu, x), (dz, torch.ones_like(kl)))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
