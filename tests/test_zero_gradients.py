"""An incoming gradient of 0 times an infinite or NaN slope is 0, so a padded position does not spoil a whole batch."""

import itertools
import math

import pytest
import torch
from torch import distributions

import reparam_kernels as rk
from tests.cases import PARAMS

pytestmark = pytest.mark.usefixtures("says_where")

INF, NAN = math.inf, math.nan


def wild(dtype, prior):
    """Return mu, x and, if asked, mu_p and x_p for which many slopes are infinite or NaN."""
    points = itertools.product((1.0, INF, NAN), (1.0, 0.0, 3e4, INF, -INF, NAN), (0.0, INF), (1.0, 0.0, -1e4, INF, NAN))
    columns = list(zip(*points, strict=True))[: 4 if prior else 2]
    return [torch.tensor(column, dtype=torch.float64).to(dtype).requires_grad_() for column in columns]


@pytest.mark.parametrize("prior", [False, True], ids=["unit", "prior"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("param", PARAMS)
def test_zero_times_any_slope_is_zero(backend_or_reference, param, dtype, prior):
    leaves = wild(dtype, prior)
    pair = {"prior": tuple(leaves[2:])} if prior else {}
    eps = torch.tensor([INF, 0.5, NAN]).to(dtype).repeat(len(leaves[0]) // 3)
    for noise in ({"seed": 1}, {"eps": eps}):
        for create_graph in (False, True):
            out = rk.reparameterize_kl(*leaves[:2], param=param, event_ndim=0, **noise, **pair)
            grads = torch.autograd.grad(out, leaves, [torch.zeros_like(t) for t in out], create_graph=create_graph)
            assert all((g == 0).all() for g in grads)


def test_rk_reference_has_the_rule_too():
    mu, x = wild(torch.float32, False)
    out = rk.reference.reparameterize_kl(mu, x, event_ndim=0)
    assert all((g == 0).all() for g in torch.autograd.grad(out, (mu, x), [torch.zeros_like(t) for t in out]))


@pytest.mark.parametrize(("param", "bad"), [("logvar", 90.0), ("logvar", 200.0), ("logvar", NAN), ("std", 0.0)])
def test_a_padded_position_leaves_the_weights_behind_it_alone(backend_or_reference, param, bad):
    shift = torch.tensor(0.0, requires_grad=True)
    x = torch.tensor([0.5, 2.0, bad]) + shift
    z, kl = rk.reparameterize_kl(torch.zeros(3), x, param=param, event_ndim=0, eps=torch.ones(3))
    (rk.losses.masked_mean(kl, torch.tensor([1, 1, 0])) + z[:2].sum()).backward()
    x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    slopes = x.expm1() / 4 + (x / 2).exp() / 2 if param == "logvar" else (x - 1 / x) / 2 + 1
    torch.testing.assert_close(shift.grad, slopes.sum().float())


def test_a_gradient_that_is_not_zero_still_meets_the_slope(backend_or_reference):
    x = torch.tensor([NAN, 90.0, 200.0], requires_grad=True)
    z, kl = rk.reparameterize_kl(torch.zeros(3), x, event_ndim=0, eps=torch.ones(3))
    (from_kl,) = torch.autograd.grad(kl, x, torch.full((3,), 1e-30), retain_graph=True)
    (from_z,) = torch.autograd.grad(z, x, torch.full((3,), 1e-30))
    assert from_kl.isnan().tolist() == from_z.isnan().tolist() == [True, False, False]
    assert from_z[2] > 1e12
    assert from_kl[1] > 1e8


def test_a_finite_product_keeps_its_bits(backend):
    """A product of zeros has the sign that IEEE 754 gives it."""
    mu = torch.tensor([2.0, -2.0, 2.0, -2.0], requires_grad=True)
    kl = rk.kl_divergence(mu, torch.zeros(4), event_ndim=0)
    zeros = torch.tensor([0.0, 0.0, -0.0, -0.0])
    (grad,) = torch.autograd.grad(kl, mu, zeros)
    assert grad.signbit().tolist() == (zeros * mu).signbit().tolist()


@pytest.mark.parametrize("graph_of", ["kl", "z"])
def test_a_hessian_vector_product_at_a_stationary_point(backend_or_reference, graph_of):
    """For (f - c)^2 / 2 at f = c the gradient is 0, and the Hessian is the square of the slope."""
    x = torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64, requires_grad=True)
    eps = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    z, kl = rk.reparameterize_kl(torch.zeros(3, dtype=torch.float64), x, event_ndim=0, eps=eps)
    f, slope = (kl, x.detach().expm1() / 2) if graph_of == "kl" else (z, (x.detach() / 2).exp() / 2 * eps)
    (grad,) = torch.autograd.grad(((f - f.detach()) ** 2).sum() / 2, x, create_graph=True)
    assert (grad == 0).all()
    vector = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (product,) = torch.autograd.grad(grad, x, vector)
    torch.testing.assert_close(product, slope**2 * vector)


def test_second_derivatives_are_not_poisoned_either(backend_or_reference):
    x = torch.tensor([0.5, INF, NAN], requires_grad=True)
    kl = rk.kl_divergence(torch.zeros(3), x, event_ndim=0)
    (grad,) = torch.autograd.grad(kl, x, torch.tensor([1.0, 0.0, 0.0]), create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, torch.tensor([math.exp(0.5) / 2, 0.0, 0.0]))


@pytest.mark.parametrize("loc", [0.0, 3.0])
def test_a_prior_of_infinite_scale_gives_the_limit(backend_or_reference, loc):
    scale = torch.tensor([0.5, 1.0, 4.0], requires_grad=True)
    wide = distributions.Normal(torch.full((3,), loc), torch.full((3,), INF))
    want = distributions.kl_divergence(distributions.Normal(torch.ones(3), scale), wide)
    got = rk.kl_divergence(torch.ones(3), scale, param="std", prior=(wide.loc, wide.scale), event_ndim=0)
    assert got.tolist() == want.tolist() == [INF] * 3
    (slope,) = torch.autograd.grad(got.sum(), scale)  # torch's is NaN
    torch.testing.assert_close(slope, -1 / scale.detach())
