"""Many calls in one process keep no memory, and the last is as correct as the first."""

import numpy as np
import pytest
from scipy import stats

from tests import oracle
from tests.cases import linux
from tests.test_backends import python

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
    """A leak of one word per call would be 80, 160 and 560 kB; a leaked tensor, megabytes."""
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
    """Noise, z, KL and gradients of each step match float64, with seeds from torch, and training converges."""
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
    """With schedules of min_std and clamp, the caches stay within their bounds and each call has its own options."""
    out = python("""
import resource, torch, reparam_kernels as rk
from reparam_kernels import spec
from reparam_kernels.ops.latent import cpu
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
