"""DiagonalGaussian and GaussianHead give the results of the ops."""

import copy
import inspect
import pickle

import pytest
import torch
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as torch_kl

import reparam_kernels as rk
from tests.cases import PARAMS, inputs

pytestmark = pytest.mark.usefixtures("says_where")


@pytest.mark.parametrize("param", PARAMS)
def test_diagonal_gaussian_agrees_with_torch_distributions(backend, param):
    mu, x = inputs((4, 3), torch.float64, param)
    mu_p, x_p = inputs((4, 3), torch.float64, param, seed=1)
    q, p = rk.DiagonalGaussian(mu, x, param=param), rk.DiagonalGaussian(mu_p, x_p, param=param)
    theirs_q, theirs_p = (Independent(Normal(d.mean, d.std), 1) for d in (q, p))
    torch.testing.assert_close(q.kl(p), torch_kl(theirs_q, theirs_p))
    torch.testing.assert_close(q.kl(), torch_kl(theirs_q, Independent(Normal(torch.zeros_like(mu), 1.0), 1)))
    z = q.rsample((5,), seed=3)
    assert z.shape == (5, 4, 3)
    torch.testing.assert_close(q.log_prob(z), theirs_q.log_prob(z))
    torch.testing.assert_close(z, q.mean + q.std * rk.randn(5, 4, 3, seed=3, dtype=torch.float64))
    torch.testing.assert_close(q.logvar, 2 * q.std.log())
    assert torch.equal(q.mode(), mu)


def test_sample_is_rsample_without_gradients(backend):
    moments = torch.randn(2, 6, requires_grad=True)
    q = rk.DiagonalGaussian.from_moments(moments)
    assert torch.equal(q.sample(seed=3), q.rsample(seed=3))
    assert not q.sample().requires_grad
    assert q.rsample().requires_grad


def test_packed_and_separate_are_one_distribution(backend):
    moments = torch.randn(2, 6, 5)
    packed = rk.DiagonalGaussian.from_moments(moments, clamp=(-0.5, 0.5), event_ndim=1)
    apart = rk.DiagonalGaussian(*moments.chunk(2, 1), clamp=(-0.5, 0.5), event_ndim=1)
    for a, b in zip(packed.rsample_kl(apart, seed=3), apart.rsample_kl(packed, seed=3), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(packed.std, apart.std)
    assert torch.equal(packed.kl(apart), torch.zeros(2, 3))  # each clamps its own
    assert torch.equal(packed.log_prob(moments[:, :3]), apart.log_prob(moments[:, :3]))


def test_kl_of_a_distribution_to_itself_is_zero(backend):
    for clamp in (None, (-0.5, 0.5)):
        q = rk.DiagonalGaussian(torch.randn(3, 4), torch.randn(3, 4), clamp=clamp)
        assert torch.equal(q.kl(q), torch.zeros(3))


def test_head_is_two_layers_and_the_op(backend):
    torch.manual_seed(0)
    head = rk.GaussianHead(7, 3, clamp=(-1.0, 1.0))
    h = torch.randn(5, 7)
    z, kl = head(h, seed=4)
    expected = rk.reparameterize_kl(head.mu(h), head.logvar(h), seed=4, clamp=(-1.0, 1.0))
    assert torch.equal(z, expected[0])
    assert torch.equal(kl, expected[1])
    assert set(head.state_dict()) == {"mu.weight", "mu.bias", "logvar.weight", "logvar.bias"}
    (z.sum() + kl.sum()).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_head_gives_the_mean_in_eval_where_asked(backend):
    h = torch.randn(5, 7)
    head = rk.GaussianHead(7, 3, mean_in_eval=True)
    assert not torch.equal(head(h)[0], head.mu(h))
    head.eval()
    z, kl = head(h, sample_shape=(2,))
    assert torch.equal(z, head.mu(h).expand(2, 5, 3))
    assert torch.equal(kl, rk.kl_divergence(head.mu(h), head.logvar(h)))
    always = rk.GaussianHead(7, 3).eval()
    assert not torch.equal(always(h)[0], always.mu(h))


def test_head_takes_every_keyword_of_the_function():
    own = {*inspect.signature(rk.GaussianHead).parameters, *inspect.signature(rk.GaussianHead.forward).parameters}
    assert set(inspect.signature(rk.reparameterize_kl).parameters) - {"mu", "logvar"} <= own


@pytest.mark.parametrize("training", [True, False])
def test_head_sums_kl_over_the_event_dims_it_was_given(backend, training):
    """A mask of (B, T) goes with a kl of (B, T), not of (B,)."""
    head = rk.GaussianHead(7, 3, mean_in_eval=True, event_ndim=1).train(training)
    h = torch.randn(2, 5, 7)
    z, kl = head(h, seed=4)
    assert z.shape == (2, 5, 3)
    assert torch.equal(kl, rk.kl_divergence(head.mu(h), head.logvar(h), event_ndim=1))
    assert rk.GaussianHead(7, 3)(h)[1].shape == (2,)
    assert "event_ndim=1" in repr(head)


def test_head_survives_copies():
    head = rk.GaussianHead(7, 3, param="softplus", min_std=0.1)
    h = torch.randn(5, 7)
    expected = head(h, seed=1)
    other = rk.GaussianHead(7, 3, param="softplus", min_std=0.1)
    other.load_state_dict(head.state_dict())
    for clone in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), other):
        assert all(torch.equal(a, b) for a, b in zip(clone(h, seed=1), expected, strict=True))
    assert "param='softplus', min_std=0.1" in repr(head)
