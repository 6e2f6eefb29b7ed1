"""More than 2^31 elements, bytes and rows on the CPU are correct on both sides of every wrap of a 32-bit index.

Each test runs in its own process, whose peak memory is reported. Operands repeat with prime periods, so that an index
that wraps at a power of two reads another number; windows are compared with float64 and tests/oracle.py.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import reparam_kernels as rk
from reparam_kernels.ops.latent import cpu
from tests import oracle
from tests.cases import assert_near

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

N = 2**31 + 5  # elements; in bfloat16 their bytes wrap at 2^30 and 2^31 elements, in float32 at 2^29 and 2^30
PLACES = [slice(0, 64), *(slice(at - 64, at + 64) for at in (2**29, 2**30)), slice(2**31 - 64, N)]
MU = (torch.arange(65521) % 401 - 200).double() / 128  # exact in bfloat16
X = (torch.arange(65519) % 251 - 125).double() / 64


def kibibytes(file, field):
    return int(Path("/proc", file).read_text().split(field + ":")[1].split()[0])


def alone(test, record, needs):
    """Run a test in a fresh process, and record and bound its peak memory; `needs` is in GB."""
    if kibibytes("meminfo", "MemAvailable") * 1024 < (needs + 1) * 1e9:
        pytest.skip(f"needs {needs} GB of free memory")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        peak = process.submit(measured, test).result()
    record("peak memory", f"{peak / 1e9:.1f} GB")
    assert peak < needs * 1e9


def measured(test):
    """Run a test and return VmHWM in bytes, since getrusage's maximum is inherited through exec."""
    cpu.empty = unwritten
    test()
    return kibibytes("self/status", "VmHWM") * 1024


def unwritten(like):
    return torch.full(like.shape, float("nan"), dtype=like.dtype)


def assert_written(t):
    assert not any(part.isnan().any() for part in t.view(-1).split(2**26))


def repeated(pattern, n, dtype=torch.bfloat16):
    """Repeat a pattern without a temporary."""
    out = torch.empty(n, dtype=dtype)
    whole = n // len(pattern)
    out[: whole * len(pattern)].view(whole, -1).copy_(pattern)
    out[whole * len(pattern) :] = pattern[: n % len(pattern)]
    return out


def total(pattern, n):
    return n // len(pattern) * pattern.sum() + pattern[: n % len(pattern)].sum()


def at(pattern, place):
    return pattern[torch.arange(place.start, place.stop) % len(pattern)]


def eps_at(seed, place):
    return torch.from_numpy(oracle.randn(seed, place.stop - place.start, first=place.start)).double()


def one_row():
    mu, x = repeated(MU, N).requires_grad_(), repeated(X, N).requires_grad_()
    z, kl = rk.reparameterize_kl(mu, x, seed=3)
    assert kl.shape == ()
    assert abs(kl.item() / ((total(MU**2, N) + total(X.expm1() - X, N)) / 2) - 1) < 1e-6
    assert_written(z)
    for place in PLACES:
        assert_near(z[place], at(MU, place) + (at(X, place) / 2).exp() * eps_at(3, place), units=2.01, atol=1e-6)
    outputs = torch.autograd.graph.get_gradient_edge(z), kl
    del z
    dz = torch.full((1,), 0.5, dtype=torch.bfloat16).expand(N)
    dmu, dx = torch.autograd.grad(outputs, (mu, x), (dz, torch.tensor(2.0)))
    for t in (dmu, dx):
        assert_written(t)
    for place in PLACES:
        m, v = at(MU, place), at(X, place)
        assert_near(dmu[place], 0.5 + 2 * m, units=2.01)
        assert_near(dx[place], 0.25 * (v / 2).exp() * eps_at(3, place) + v.expm1(), units=2.01, atol=1e-6)


def test_one_row_of_more_than_two_to_the_31(record_property):
    """Forward and backward with an expanded dz; mu, logvar and both gradients are 4.3 GB each."""
    alone(one_row, record_property, 18)


ROWS = 2**28 + 1


def many_rows():
    """Eight columns; row r has the seed 3 r."""
    mu = repeated(MU, 8 * ROWS).view(ROWS, 8).requires_grad_()
    x, seed = torch.linspace(-1, 1, 8).bfloat16().expand(ROWS, 8).requires_grad_(), torch.arange(0, 3 * ROWS, 3)
    dkl = repeated(X, ROWS, torch.float32)
    z, kl = rk.reparameterize_kl(mu, x, seed=seed)
    wide = x[0].detach().double()

    def rows():
        """Some rows: their numbers, mu and eps."""
        for first in (0, 2**26 - 4, 2**27 - 4, 2**28 - 7):
            place = slice(8 * first, 8 * first + 64)
            eps = torch.cat([eps_at(3 * r, slice(0, 8)) for r in range(first, first + 8)])
            yield slice(first, first + 8), at(MU, place).view(8, 8), eps.view(8, 8)

    assert_written(z)
    for place, m, eps in rows():
        assert_near(z[place], m + (wide / 2).exp() * eps, units=2.01, atol=1e-6)
        assert_near(kl[place], (m**2 + wide.expm1() - wide).sum(1) / 2, rtol=1e-6)
    outputs = torch.autograd.graph.get_gradient_edge(z), kl
    del z
    dz = torch.full((1, 1), 0.5, dtype=torch.bfloat16).expand(ROWS, 8)
    dmu, dx = torch.autograd.grad(outputs, (mu, x), (dz, dkl))
    for t in (dmu, dx):
        assert_written(t)
    for place, m, eps in rows():
        g = at(X, place)[:, None]
        assert_near(dmu[place], 0.5 + g * m, units=2.01, atol=1e-6)
        assert_near(dx[place], 0.25 * (wide / 2).exp() * eps + g * wide.expm1() / 2, units=2.01, atol=1e-6)


def test_many_rows_of_more_than_two_to_the_31_together(record_property):
    """2^28 + 1 rows, a seed for each."""
    alone(many_rows, record_property, 18)


def elements():
    mu, x = repeated(MU, N).requires_grad_(), torch.full((1,), 0.5, dtype=torch.bfloat16).expand(N)
    kl = rk.kl_divergence(mu, x, event_ndim=0)
    for place in PLACES:
        assert_near(kl[place], (at(MU, place) ** 2 + torch.tensor(0.5).double().expm1() - 0.5) / 2, rtol=1e-6)
    (dmu,) = torch.autograd.grad(kl, mu, torch.tensor(2.0).expand(N))
    assert_written(dmu)
    for place in PLACES:
        assert_near(dmu[place], 2 * at(MU, place), units=2.01)


def test_a_kl_of_more_than_two_to_the_31(record_property):
    """One for each element: 8.6 GB of float32."""
    alone(elements, record_property, 18)


def noise():
    out = rk.randn(N, seed=3, dtype=torch.bfloat16)
    for place in PLACES:
        assert torch.equal(out[place], eps_at(3, place).bfloat16())


def test_noise_of_more_than_two_to_the_31(record_property):
    alone(noise, record_property, 5)


def far_apart():
    base = torch.empty(2**33, dtype=torch.bfloat16)  # untouched pages take no memory
    wide = (torch.arange(6).view(3, 2) / 8).double()
    for inner in (2**30 + 2, 2**30 - 2):  # one dim after merging, or two
        mu = base.as_strided((3, 2), (2**31 + 4, inner))
        mu.copy_(wide)
        z, kl = rk.reparameterize_kl(mu, mu, seed=3)
        assert_near(z, wide + (wide / 2).exp() * eps_at(3, slice(0, 6)).view(3, 2), units=2.01)
        assert_near(kl, (wide**2 + wide.expm1() - wide).sum(1) / 2, rtol=1e-6)


def test_strides_of_more_than_two_to_the_31(record_property):
    alone(far_apart, record_property, 1)


def test_ten_million_rows():
    mu = torch.full((1, 3), 2.0).expand(10**7, 3)
    z, kl = rk.reparameterize_kl(mu, mu * 0, seed=3)
    assert (kl == 6).all()
    place = slice(3 * 10**7 - 64, 3 * 10**7)
    assert torch.equal(z.view(-1)[place], 2 + eps_at(3, place).float())
