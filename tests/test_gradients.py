"""gradcheck in float64 of every op and option and of a whole ELBO; other dtypes are compared with float64."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

import reparam_kernels as rk
from examples.vae.model import VAE
from tests.cases import PARAMS, UNIT, double, inputs, noise, truth
from tests.conftest import forget, use_backend

pytestmark = pytest.mark.usefixtures("says_where")

SEEDS = torch.tensor([3, 2**41, 9])
OPTIONS = [
    {},
    {"event_ndim": 0},
    {"event_ndim": 2},
    {"clamp": (0.3, 0.9)},
    {"sample_shape": (2,)},
    {"seed": SEEDS, "sample_shape": (2, 1)},
    {"prior": "whole"},
    {"prior": "row", "sample_shape": (2,)},
    {"prior": "number"},
]


def leaves(shape, param):
    mu, x = inputs(shape, torch.float64, param)
    return mu.requires_grad_(), (x.abs() + 0.2).requires_grad_()  # away from the kinks, positive for std


def split_options(options, param, shape):
    """Split options into the keywords of a call and the leaves of the prior."""
    options = {"seed": 7, "param": param, **options}
    if param == "softplus":
        options["min_std"] = 0.05
    kind = options.pop("prior", None)
    if kind == "number":
        return {**options, "prior": (0.5, 1.5)}, ()
    if kind is None:
        return options, ()
    return options, leaves(shape if kind == "whole" else shape[-1:], param)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("param", PARAMS)
def test_gradcheck_of_z_and_kl(backend, param, options):
    shape = (3, 2)
    keywords, prior = split_options(options, param, shape)
    mu, x = leaves(shape, param)

    def op(mu, x, *prior):
        return rk.reparameterize_kl(mu, x, **keywords, **({"prior": prior} if prior else {}))

    assert gradcheck(op, (mu, x, *prior), fast_mode=backend == "triton")


@pytest.mark.parametrize("param", PARAMS)
def test_gradcheck_of_each_op_alone(backend, param):
    mu, x = leaves((3, 5), param)
    fast = backend == "triton"
    assert gradcheck(lambda m, s: rk.reparameterize(m, s, seed=7, param=param), (mu, x), fast_mode=fast)
    assert gradcheck(lambda m, s: rk.kl_divergence(m, s, param=param), (mu, x), fast_mode=fast)
    eps = torch.randn(3, 5, dtype=torch.float64)
    assert gradcheck(lambda m, s: rk.reparameterize(m, s, eps=eps, param=param), (mu, x), fast_mode=fast)


def test_gradcheck_of_packed_moments(backend):
    moments = inputs((2, 4, 3), torch.float64).mu.requires_grad_()
    for dim in (1, -2):
        assert gradcheck(lambda m, dim=dim: rk.DiagonalGaussian.from_moments(m, dim).rsample_kl(seed=7), moments)


def test_gradcheck_of_a_gradient_to_eps(backend):
    mu, x = leaves((3, 2), "logvar")
    eps = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda m, s, e: rk.reparameterize_kl(m, s, eps=e), (mu, x, eps))


@pytest.mark.parametrize("param", PARAMS)
def test_second_derivatives(backend, param):
    mu, x = leaves((2, 3), param)
    prior = leaves((3,), param)

    def op(mu, x, *prior):
        return rk.reparameterize_kl(mu, x, seed=7, param=param, prior=prior)

    assert torch.autograd.gradgradcheck(op, (mu, x, *prior))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_gradcheck_of_the_whole_elbo_in_every_parameter(backend, likelihood):
    torch.manual_seed(0)
    model = VAE(pixels=4, latent=2, hidden=3, likelihood=likelihood).double()
    x = torch.rand(3, 4, dtype=torch.float64)
    names, values = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)

    def elbo(*parameters):
        terms = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x, 5))
        return (terms.nll + terms.kl).mean()

    leaves = tuple(p.detach().clone().requires_grad_() for p in values)
    assert gradcheck(elbo, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("samples", [(), (3,)], ids=str)
@pytest.mark.parametrize("param", PARAMS)
def test_gradients_match_float64(backend, param, samples, dtype):
    """All four match within the rounding of the dtype and of the sum over samples, also for small KLs."""
    for scale in (1.0, 1e-3):
        mu, x = inputs((16, 33), dtype, param, scale, requires_grad=True)
        prior = tuple(inputs((33,), dtype, param, scale, seed=1, requires_grad=True))
        z, kl = rk.reparameterize_kl(mu, x, seed=5, param=param, prior=prior, sample_shape=samples)
        wide, wide_prior, true = truth(
            mu, x, noise(z.shape, 5, samples), param=param, prior=prior, sample_shape=samples
        )
        dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        dkl = torch.randn(kl.shape, generator=torch.Generator().manual_seed(3))
        got = torch.autograd.grad((z, kl), (mu, x, *prior), (dz, dkl))
        want = torch.autograd.grad(true, (*wide, *wide_prior), (dz.double(), dkl.double()))
        for name, g, w in zip(("mu", "x", "mu_p", "x_p"), got, want, strict=True):
            assert g.dtype == dtype
            rounding = max(4 * UNIT[dtype], 2e-6)
            w = torch.where(w.abs() < torch.finfo(dtype).max, w, w.to(dtype).double())  # float16 ends at 65504
            largest = w[w.isfinite()].abs().max().item()
            torch.testing.assert_close(g.double(), w, rtol=rounding, atol=2e-6 * largest, msg=name)


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
def test_the_gradient_of_clamp_is_kept_at_a_bound(monkeypatch, name):
    """torch.clamp keeps it up to torch 2.13, and sets it to 0 from 2.14 on."""
    use_backend(monkeypatch, name)
    x = torch.tensor([-3.0, -1.0, 0.0, 2.0, 5.0, float("nan")], requires_grad=True)
    mu = torch.zeros(6)
    z, kl = rk.reparameterize_kl(mu, x, seed=1, clamp=(-1.0, 2.0))
    (got,) = torch.autograd.grad(z[:5].sum() + kl, x)
    assert got[0] == 0
    assert got[1] != 0
    assert got[3] != 0
    assert got[4] == 0
    assert got[5] == 0
    points = torch.zeros(5, 1)
    (got,) = torch.autograd.grad(rk.mixture_log_prob(points, points, x[:5, None], clamp=(-1.0, 2.0)).sum(), x)
    assert (got != 0).tolist() == [False, True, True, True, False, False]
    forget()


def test_unneeded_gradients_stay_none(backend):
    mu, x = inputs((4, 3))
    for want_mu, want_x in ((True, False), (False, True)):
        m, s = mu.clone().requires_grad_(want_mu), x.clone().requires_grad_(want_x)
        z, kl = rk.reparameterize_kl(m, s, seed=1)
        (z.sum() + kl.sum()).backward()
        assert (m.grad is not None) == want_mu
        assert (s.grad is not None) == want_x


def test_z_or_kl_alone_may_be_used(backend):
    mu, x = inputs((4, 3), requires_grad=True)
    z, kl = rk.reparameterize_kl(mu, x, seed=1)
    only_z = torch.autograd.grad(z.sum(), (mu, x), retain_graph=True)
    only_kl = torch.autograd.grad(kl.sum(), (mu, x), retain_graph=True)
    both = torch.autograd.grad(z.sum() + kl.sum(), (mu, x))
    for a, b, c in zip(only_z, only_kl, both, strict=True):
        torch.testing.assert_close(a + b, c)
    torch.testing.assert_close(only_kl[0], mu.detach())


def test_backward_twice_gives_the_same_bits(backend):
    mu, x = inputs((4, 37), requires_grad=True)
    z, kl = rk.reparameterize_kl(mu, x, sample_shape=(2,))
    first = torch.autograd.grad(z.sum() + kl.sum(), (mu, x), retain_graph=True)
    torch.randn(10)  # the seed was drawn at the call, so later draws do not matter
    second = torch.autograd.grad(z.sum() + kl.sum(), (mu, x))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


CALLS_AND_KEPT = {
    "z and KL": (rk.reparameterize_kl, {"mu", "x"}),
    "z": (rk.reparameterize, {"x"}),
    "KL": (rk.kl_divergence, {"mu", "x"}),
    "z and log q": (rk.reparameterize_log_prob, {"x"}),
    "squashed": (partial(rk.reparameterize_log_prob, squash="tanh"), {"mu", "x"}),
    "z and log q - log p": (rk.reparameterize_mc_kl, {"mu", "x"}),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CALLS_AND_KEPT)
def test_what_backward_does_not_read_is_not_kept(name, compiled, backend):
    """The gradient of mu + sigma eps does not depend on mu, nor does that of log q, a function of eps and sigma."""
    if compiled and backend != "cpu":
        pytest.skip("Triton's interpreter is not traced")
    f, kept = CALLS_AND_KEPT[name]
    mu, x = inputs((64, 32), requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t.data_ptr())
        return t

    torch.manual_seed(0)
    call = torch.compile(f, backend="aot_eager") if compiled else f
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(mu, x)
    names = {mu.data_ptr(): "mu", x.data_ptr(): "x"}
    assert {names[p] for p in saved if p in names} == kept
    out = out if isinstance(out, tuple) else (out,)
    grads = torch.autograd.grad([y.sum() for y in out], (mu, x))
    torch.manual_seed(0)
    seed = rk.draw_seed()
    wide = double((mu, x))
    of_reference = getattr(rk.reference, getattr(f, "func", f).__name__)
    options = getattr(f, "keywords", {}) | ({} if name == "KL" else {"eps": rk.randn(64, 32, seed=seed).double()})
    want = of_reference(*wide, **options)
    want = want if isinstance(want, tuple) else (want,)
    for got, right in zip(grads, torch.autograd.grad([y.sum() for y in want], wide), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


def test_only_the_inputs_and_the_seed_are_saved(backend):
    saved = []

    def pack(t):
        saved.append(t)
        return t

    mu, x = inputs((64, 32), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rk.reparameterize_kl(mu, x)
    assert {t.data_ptr() for t in saved if t.numel() > 1} == {mu.data_ptr(), x.data_ptr()}
    assert [t.shape for t in saved if t.dtype == torch.int64] == [(1,)]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rk.reparameterize_kl(*(t.detach() for t in (mu, x)))
    assert not saved


def test_prior_gradients_have_the_shape_of_the_prior(backend):
    mu, x = inputs((2, 4, 5))
    prior = (torch.zeros(4, 1, requires_grad=True), torch.tensor(0.5, requires_grad=True))
    kl = rk.kl_divergence(mu, x, prior=prior)
    dmu_p, dx_p = torch.autograd.grad(kl.sum(), prior)
    assert dmu_p.shape == (4, 1)
    assert dx_p.shape == ()
    wide = double(prior)
    want = torch.autograd.grad(rk.reference.kl_divergence(mu.double(), x.double(), prior=wide).sum(), wide)
    torch.testing.assert_close(dmu_p.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx_p.double(), want[1], rtol=1e-5, atol=1e-5)


def test_the_gradient_estimates_the_gradient_of_an_expectation():
    """The mean pathwise gradient of E[z^2] = mu^2 + sigma^2 is within five of its standard errors."""
    mu, logvar = torch.tensor([0.7], requires_grad=True), torch.tensor([-0.4], requires_grad=True)
    n = 1_000_000
    z = rk.reparameterize(mu, logvar, sample_shape=(n,), seed=6)
    dmu, dlogvar = torch.autograd.grad((z**2).mean(), (mu, logvar))
    sigma = torch.exp(logvar / 2)
    error_mu = 2 * sigma / n**0.5
    error_logvar = (sigma * (mu**2 + 2 * sigma**2).sqrt()) / n**0.5
    assert abs(dmu - 2 * mu) < 5 * error_mu
    assert abs(dlogvar - sigma**2) < 5 * error_logvar
