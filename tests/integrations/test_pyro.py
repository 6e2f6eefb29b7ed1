"""The adapter inside Pyro itself."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

import reparam_kernels as rk
from reparam_kernels.integrations import pyro as ours

pytestmark = pytest.mark.integrations

LOC = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
SCALE = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) + 0.5


def test_normal_subclasses_pyro_and_ours():
    q, like = ours.Normal(LOC, SCALE), dist.Normal(LOC, SCALE)
    assert isinstance(q, (rk.distributions.Normal,))
    assert isinstance(q, dist.Normal)
    torch.manual_seed(0)
    z = q(torch.Size([2]))
    torch.manual_seed(0)
    assert torch.equal(z, rk.distributions.Normal(LOC, SCALE).rsample((2,)))
    for make in (
        lambda d: d.to_event(1),
        lambda d: d.expand_by([2]),
        lambda d: d.expand([2, 4, 3]).to_event(2),
        lambda d: d.mask(LOC > 0),
        lambda d: d.mask(False),
    ):
        a, b = make(q), make(like)
        assert (a.batch_shape, a.event_shape) == (b.batch_shape, b.event_shape)
        value = b.sample()
        assert a.sample().shape == value.shape
        assert torch.equal(a.log_prob(value), b.log_prob(value))
    assert type(q.expand([2, 4, 3])) is ours.Normal


@pytest.mark.parametrize("swap", [(True, True), (True, False), (False, True)])
def test_kl_matches_pyro(swap):
    a, b = (ours.Normal if mine else dist.Normal for mine in swap)
    want = kl_divergence(dist.Normal(LOC, SCALE).to_event(1), dist.Normal(0.5, SCALE * 2).to_event(1))
    got = kl_divergence(a(LOC, SCALE).to_event(1), b(0.5, SCALE * 2).to_event(1))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


DATA = torch.tensor([1.5, 2.5, 2.0, 3.0])


def model():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("x", dist.Normal(mean, 2.0), obs=DATA)


def guide():
    loc = pyro.param("loc", lambda: torch.tensor(0.0))
    scale = pyro.param("scale", lambda: torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("mean", dist.Normal(loc, scale))


def test_a_trace_has_the_densities_that_pyro_gives_it():
    pyro.clear_param_store()
    with ours.patch():
        trace = poutine.trace(guide).get_trace()
        assert type(trace.nodes["mean"]["fn"]) is ours.Normal
        ours_sum = poutine.trace(poutine.replay(model, trace)).get_trace().log_prob_sum()
    trace.nodes["mean"]["fn"] = dist.Normal(0.0, 1.0)
    assert torch.equal(poutine.trace(poutine.replay(model, trace)).get_trace().log_prob_sum(), ours_sum)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_inference_finds_the_exact_posterior(elbo):
    """Prior N(0, 1), likelihood N(mean, 2^2), four observations: precision 2, mean (9 / 4) / 2."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with ours.patch():
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.995}), elbo(num_particles=8))
        for _ in range(600):
            svi.step()
    assert pyro.param("loc").item() == pytest.approx(1.125, abs=0.05)
    assert pyro.param("scale").item() == pytest.approx(2**-0.5, abs=0.05)


def test_patch_restores_pyro():
    theirs = dist.Normal
    with ours.patch() as patch:
        assert dist.Normal is ours.Normal
        assert "pyro.distributions.Normal" in patch.rebound
    assert dist.Normal is theirs
