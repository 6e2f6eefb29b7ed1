"""Extreme values: what z, KL and the gradients are, by the formula's limit, in C++ and in Triton's interpreter."""

import math

import pytest
import torch

import reparam_kernels as rk

INF, NAN = math.inf, math.nan
EPS = -0.5

# mu, logvar: z, kl, then dz/dlogvar, dkl/dmu, dkl/dlogvar, for eps = -1/2 in float32. dz/dmu is 1 everywhere.
TABLE = [
    (0.0, 0.0, (-0.5, 0.0, -0.25, 0.0, 0.0)),
    (-0.0, -0.0, (-0.5, 0.0, -0.25, 0.0, 0.0)),
    (1e-45, 1e-45, (-0.5, 0.0, -0.25, 1e-45, 0.0)),  # subnormals: sigma is 1 to the last digit
    (1.0, -1e4, (1.0, 5000.0, 0.0, 1.0, -0.5)),  # sigma underflows to 0; the kl is (mu^2 - 1 - logvar) / 2
    (1.0, -200.0, (1.0, 100.0, 0.0, 1.0, -0.5)),
    (1.0, 1e4, (-INF, INF, -INF, 1.0, INF)),  # beyond float32
    (1.0, INF, (-INF, NAN, -INF, 1.0, INF)),  # the kl is inf - inf, as in plain torch
    (1.0, -INF, (1.0, INF, 0.0, 1.0, -0.5)),
    (1.0, NAN, (NAN, NAN, NAN, 1.0, NAN)),
    (NAN, 0.0, (NAN, NAN, -0.25, NAN, 0.0)),
    (INF, 0.0, (INF, INF, -0.25, INF, 0.0)),
    (-INF, 0.0, (-INF, INF, -0.25, -INF, 0.0)),
    (1e38, 0.0, (1e38, INF, -0.25, 1e38, 0.0)),  # mu^2 is beyond float32
]


def gradients(mu, x, **options):
    mu = torch.tensor([mu], requires_grad=True)
    x = torch.tensor([x], requires_grad=True)
    z, kl = rk.reparameterize_kl(mu, x, eps=torch.tensor([EPS]), event_ndim=0, **options)
    dz = torch.autograd.grad(z.sum(), (mu, x), retain_graph=True)
    dkl = torch.autograd.grad(kl.sum(), (mu, x))
    return [t.item() for t in (z, kl, *dz, *dkl)]


@pytest.mark.parametrize(("mu", "x", "limits"), TABLE)
def test_each_value_is_the_limit_of_its_formula(backend, mu, x, limits):
    z, kl, dx, dkl_mu, dkl_x = limits
    got = gradients(mu, x)
    assert got == pytest.approx([z, kl, 1.0, dx, dkl_mu, dkl_x], rel=1e-6, abs=1e-44, nan_ok=True)


@pytest.mark.parametrize("logvar", [12.0, 22.0, -24.0, 6e-8, 65504.0, -65504.0])
def test_float16_at_its_edges(backend, logvar):
    """sigma beyond 65504 is inf in z, sigma below 6e-8 is 0 there; the kl is float32 and goes on."""
    mu, x = torch.tensor([0.0]).half(), torch.tensor([logvar]).half()
    z, kl = rk.reparameterize_kl(mu, x, eps=torch.tensor([-1.0]).half(), event_ndim=0)
    wide = x.double()
    assert z.double().equal(-(wide / 2).exp().half().double())
    torch.testing.assert_close(kl, ((wide.expm1() - wide) / 2).float(), rtol=1e-6, atol=0.0)


@pytest.mark.xfail(strict=True, reason="0 * inf: the reciprocal of sigma_p overflows, and softplus'/sigma is 0 / 0")
@pytest.mark.parametrize(
    ("options", "which", "limit"),
    [({"prior": (torch.zeros(1), torch.tensor([-200.0]))}, 1, 0.0), ({"param": "softplus"}, -1, -1.0)],
)
def test_a_finite_limit_that_float32_does_not_reach(backend, options, which, limit):
    """Where sigma is too small for float32: KL(q || q) is 0; dkl/dx, (sigma^2 - 1) sigmoid(x) / sigma, goes to -1."""
    assert gradients(0.0, -200.0, **options)[which] == limit
