"""Distributions as priors, and DiagonalGaussian among torch's distributions."""

import math

import pytest
import torch
from torch import distributions as td

import reparam_kernels as rk
from reparam_kernels.distributions import Normal
from tests.cases import PARAMS, sigma_of

pytestmark = pytest.mark.usefixtures("says_where")

G = torch.Generator().manual_seed(0)
MU, X, MU_P, X_P = torch.randn(4, 3, 5, generator=G) * 0.5


def truth(param, param_p):
    """Compute the KL by torch in float64."""
    posterior = td.Normal(MU.double(), sigma_of(valid(X, param).double(), param))
    return td.kl_divergence(posterior, td.Normal(MU_P.double(), sigma_of(valid(X_P, param_p).double(), param_p)))


def valid(x, param):
    return x.abs() + 0.3 if param == "std" else x


@pytest.mark.parametrize("param", ["logvar", "logstd", "std"])
@pytest.mark.parametrize("param_p", [*PARAMS, "Normal", "torch's Normal"])
def test_a_distribution_as_a_prior(param, param_p):
    given = {"Normal": Normal, "torch's Normal": td.Normal}
    if param_p in given:
        loc, scale = MU_P.clone().requires_grad_(), valid(X_P, "std").requires_grad_()
        prior, want = given[param_p](loc, scale), truth(param, "std")
    else:
        loc, scale = MU_P.clone().requires_grad_(), valid(X_P, param_p).clone().requires_grad_()
        prior, want = rk.DiagonalGaussian(loc, scale, param=param_p), truth(param, param_p)
    x = valid(X, param)
    q = rk.DiagonalGaussian(MU, x, param=param)
    for kl in (
        q.kl(prior),
        td.kl_divergence(q, prior),
        q.rsample_kl(prior)[1],
        rk.kl_divergence(MU, x, param=param, prior=prior),
        rk.reparameterize_kl(MU, x, param=param, prior=prior)[1],
        rk.reference.kl_divergence(MU, x, param=param, prior=prior),
        rk.losses.balanced_kl(MU, x, prior, to_prior=0.5, to_posterior=0.5, param=param),
    ):
        torch.testing.assert_close(kl.double(), want.sum(-1), rtol=1e-5, atol=1e-6)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(q.kl(prior).sum(), (loc, scale)))


def test_softplus_takes_a_prior_of_its_own_kind_only():
    q, p = (rk.DiagonalGaussian(m, x, param="softplus", min_std=0.1) for m, x in ((MU, X), (MU_P, X_P)))
    assert torch.equal(q.kl(p), rk.kl_divergence(MU, X, param="softplus", min_std=0.1, prior=(MU_P, X_P)))
    with pytest.raises(ValueError, match=r"must have its param and min_std, \('softplus', 0.1\); got \('std', 0.0\)"):
        q.kl(td.Normal(0.0, 1.0))


def test_numbers_and_the_clamp_of_the_prior():
    q = rk.DiagonalGaussian(MU, X)
    torch.testing.assert_close(q.kl(td.Normal(0.0, 1.0)), q.kl())
    clamped = rk.DiagonalGaussian(MU_P, X_P, clamp=(-0.1, 0.1))
    assert torch.equal(q.kl(clamped), rk.kl_divergence(MU, X, prior=(MU_P, X_P.clamp(-0.1, 0.1))))


@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("event_ndim", [0, 1, 2])
def test_entropy_and_shapes_are_those_of_torch(param, event_ndim):
    x = valid(X, param)
    q = rk.DiagonalGaussian(MU, x, param=param, event_ndim=event_ndim)
    like = td.Independent(td.Normal(MU.double(), sigma_of(x.double(), param)), event_ndim)
    torch.testing.assert_close(q.entropy().double(), like.entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.log_prob(MU + 1).double(), like.log_prob(MU.double() + 1), rtol=1e-5, atol=1e-5)
    assert (q.batch_shape, q.event_shape) == (like.batch_shape, like.event_shape)
    assert q.entropy().shape == q.kl().shape == q.batch_shape


def test_entropy_of_half_precision_is_float32():
    q = rk.DiagonalGaussian(torch.zeros(2, 3).half(), torch.zeros(2, 3).half())
    assert q.entropy().dtype == torch.float32
    torch.testing.assert_close(q.entropy(), torch.full((2,), 1.5 * (1 + math.log(2 * math.pi))))


def test_repr_says_what_it_is():
    assert repr(rk.DiagonalGaussian(MU, X, clamp=(-1.0, 2.0))) == (
        "DiagonalGaussian(batch_shape=(3,), event_shape=(5,), param='logvar', min_std=0.0, clamp=(-1.0, 2.0), "
        "dtype=torch.float32, device=cpu)"
    )
