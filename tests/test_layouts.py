"""Strides of every kind are read correctly, and inputs and incoming gradients are never written."""

import pytest
import torch

import reparam_kernels as rk
from tests.cases import assert_near, copies_refused, inputs, noise, truth

pytestmark = pytest.mark.usefixtures("says_where")


def strided(shape, kind, seed=0):
    """Make a tensor with the same numbers as a contiguous one, in another layout."""
    t = inputs(shape, seed=seed).mu
    if kind == "contiguous":
        return t
    if kind == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "every other":
        return torch.stack([t, t + 1], dim=-1)[..., 0]
    if kind == "rows apart":
        return torch.cat([t, t + 1], dim=-1)[..., : shape[-1]]
    if kind == "offset":
        return torch.cat([torch.zeros(3), t.reshape(-1)])[3:].reshape(shape)
    if kind == "channels last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "expanded":
        return t[:1].expand(shape)
    assert kind == "permuted"
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


KINDS = ["contiguous", "transposed", "every other", "rows apart", "offset", "channels last", "expanded", "permuted"]


@pytest.mark.parametrize("kind_x", KINDS)
@pytest.mark.parametrize("kind_mu", KINDS)
def test_any_strides(backend, kind_mu, kind_x):
    shape = (2, 3, 4, 5)
    mu = strided(shape, kind_mu).detach().requires_grad_()
    x = strided(shape, kind_x, seed=1).detach().requires_grad_()
    prior = (strided(shape, kind_x, seed=2), strided(shape, kind_mu, seed=3))
    z, kl = rk.reparameterize_kl(mu, x, seed=8, prior=prior)
    dz = strided(shape, kind_x, seed=4)
    dkl = strided((2, 2), "transposed", seed=5)[0]
    (wide_mu, wide_x), _, true = truth(mu, x, noise(shape, 8), prior=prior)
    assert_near(z, true[0], atol=1e-6)
    assert_near(kl, true[1], rtol=1e-6)
    got = torch.autograd.grad((z, kl), (mu, x), (dz, dkl))
    want = torch.autograd.grad(true, (wide_mu, wide_x), (dz.double(), dkl.double()))
    for g, w, kind in zip(got, want, (kind_mu, kind_x), strict=True):
        assert g.is_contiguous(
            memory_format=torch.channels_last if kind == "channels last" else torch.contiguous_format
        )
        assert_near(g, w, atol=2e-6)


@pytest.mark.parametrize("event_ndim", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_packed_in_packed_gradient_out(backend, dim, event_ndim):
    shape = [4, 4, 4, 6]
    moments = inputs(shape).mu.requires_grad_()
    z, kl = rk.DiagonalGaussian.from_moments(moments, dim, event_ndim=event_ndim).rsample_kl(seed=3)
    mu, x = moments.detach().double().requires_grad_().chunk(2, dim)
    _, _, true = truth(mu, x, noise(z.shape, 3), event_ndim=event_ndim)
    assert_near(z, true[0], atol=1e-6)
    assert_near(kl, true[1], rtol=1e-6)
    wide = moments.detach().double().requires_grad_()
    true = rk.reference.reparameterize_kl(*wide.chunk(2, dim), eps=noise(z.shape, 3).double(), event_ndim=event_ndim)
    dz, dkl = torch.randn(z.shape), torch.randn(kl.shape)
    (got,) = torch.autograd.grad((z, kl), moments, (dz, dkl))
    (want,) = torch.autograd.grad(true, wide, (dz.double(), dkl.double()))
    assert got.is_contiguous()
    assert_near(got, want, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_moments_are_not_copied(backend, dtype):
    """The kernels see the halves through their strides, without contiguous(), a chunk gradient or cat."""
    moments = torch.randn(3, 8, 5, 7).to(dtype).requires_grad_()
    with copies_refused(moments.numel() // 2):
        z, kl = rk.DiagonalGaussian.from_moments(moments).rsample_kl(seed=3)
        (z.sum() + kl.sum()).backward()
    assert moments.grad.shape == moments.shape
    assert moments.grad.isfinite().all()


def test_inputs_and_incoming_gradients_are_unchanged(backend):
    mu, x = inputs((6, 5), requires_grad=True)
    prior = tuple(inputs((5,), seed=3, requires_grad=True))
    dz, dkl = torch.randn(2, 6, 5), torch.randn(6)
    everything = [mu, x, *prior, dz, dkl]
    before = [t.detach().clone() for t in everything]
    z, kl = rk.reparameterize_kl(mu, x, seed=3, prior=prior, sample_shape=(2,), clamp=(-0.5, 0.5))
    torch.autograd.grad((z, kl), (mu, x, *prior), (dz, dkl))
    assert all(torch.equal(t, b) for t, b in zip(everything, before, strict=True))


def test_an_expanded_gradient_is_read_in_place(backend):
    """z.sum() gives a gradient of one number with strides of 0."""
    mu, x = inputs((4, 6), requires_grad=True)
    (mu_grad,) = torch.autograd.grad(rk.reparameterize(mu, x, seed=3, sample_shape=(5,)).sum(), mu)
    assert torch.equal(mu_grad, torch.full((4, 6), 5.0))


def test_negative_views_are_resolved(backend):
    """The imaginary part of a conjugate is a view with a lazy negation."""
    base = torch.complex(*inputs((4, 6)))
    negative = base.conj().imag
    assert negative.is_neg()
    mu = torch.zeros(4, 6)
    expected = rk.reparameterize_kl(mu, negative.clone(), seed=3)
    for got, want in zip(rk.reparameterize_kl(mu, negative, seed=3), expected, strict=True):
        assert torch.equal(got, want)
    leaf = mu.clone().requires_grad_()
    (got,) = torch.autograd.grad(rk.reparameterize(leaf, mu, seed=3), leaf, negative)
    assert torch.equal(got, negative.clone())


@pytest.mark.parametrize("cols", [40, 1024, 3001])
def test_the_kl_of_an_item_does_not_depend_on_the_others(backend, cols):
    """In Triton a part with seeds of its own has to have several items: one seed gives another tile."""
    mu, x = inputs((5, cols))
    seed = torch.arange(5)
    kl, parts = rk.reparameterize_kl(mu, x, seed=seed)[1], ((0, 2), (2, 5))
    assert torch.equal(torch.cat([rk.reparameterize_kl(mu[i:j], x[i:j], seed=seed[i:j])[1] for i, j in parts]), kl)
    kl = rk.kl_divergence(mu, x)
    assert torch.equal(torch.cat([rk.kl_divergence(mu[i : i + 1], x[i : i + 1]) for i in range(5)]), kl)
