"""The sample with its log-density and the Monte Carlo KL, against float64 torch, closed forms and quadrature."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import reparam_kernels as rk
from reparam_kernels.ops.latent.arguments import Density, make_arguments
from reparam_kernels.ops.latent.op import LATENT
from tests.cases import DTYPES, PARAMS, UNIT, sigma_of

PATHS = (False, True)


def inputs(param, shape=(6, 5), dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    mu, x = (scale * torch.randn(shape, generator=g) for _ in range(2))
    return mu.to(dtype), (x.abs() + 0.1 if param == "std" else x).to(dtype)


def wide(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def true_log_q(mu, x, eps, param, *, squash=None, path=False, prior=None, min_std=0.0):
    """In float64, elementwise: z, the log-density or log-ratio, and the magnitude of its terms."""
    sigma = sigma_of(x, param, min_std)
    u = mu + sigma * eps
    m, s = (mu.detach(), sigma.detach()) if path else (mu, sigma)
    # the value and the derivative of ((u - m) / s)^2, where u - m loses no digits
    e = eps + (u - u.detach()) / s - (m - m.detach()) / s - eps * (s / s.detach() - 1)
    log_q = -(e**2) / 2 - s.log() - math.log(2 * math.pi) / 2
    magnitude = (e**2 / 2 + s.log().abs() + 1).detach()
    if squash:
        jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u, threshold=50))
        log_q, magnitude = log_q - jacobian, magnitude + jacobian.abs().detach() + u.abs().detach()
    if prior is not None:
        mu_p, s_p = prior[0], sigma_of(prior[1], param, min_std)
        v = (u - mu_p) / s_p
        log_p = -(v**2) / 2 - s_p.log() - math.log(2 * math.pi) / 2
        log_q, magnitude = log_q - log_p, magnitude + log_p.abs().detach()
    return torch.tanh(u) if squash else u, log_q, magnitude


def unit_prior(param, like, min_std=0.0):
    second = {"logvar": 0.0, "logstd": 0.0, "std": 1.0, "softplus": math.log(math.expm1(1 - min_std))}[param]
    return torch.zeros_like(like), torch.full_like(like, second)


@pytest.mark.parametrize("squash", [None, "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param", PARAMS)
def test_log_q_is_that_of_torch_and_z_has_the_bits_of_reparameterize(backend, param, dtype, squash):
    mu, x = inputs(param, dtype=dtype)
    for samples, event_ndim in (((), None), ((3,), 1), ((2, 2), 0), ((3,), 2)):
        z, log_q = rk.reparameterize_log_prob(
            mu, x, param=param, seed=7, sample_shape=samples, event_ndim=event_ndim, squash=squash
        )
        eps = rk.randn(*samples, *mu.shape, seed=7).double()
        true_z, each, magnitude = true_log_q(*wide(mu, x), eps, param, squash=squash)
        dims = tuple(range(-(1 if event_ndim is None else event_ndim), 0))
        want, terms = (t.sum(dims) if dims else t for t in (each, magnitude))
        assert log_q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert log_q.shape == want.shape
        assert ((log_q - want).abs() <= (1e-12 if dtype == torch.float64 else 1e-6) * terms).all()
        if squash:
            torch.testing.assert_close(z.double(), true_z, rtol=4 * UNIT[dtype] + 1e-6, atol=1e-6)
        else:
            assert torch.equal(z, rk.reparameterize(mu, x, param=param, seed=7, sample_shape=samples))


@pytest.mark.parametrize("given", ["none", "whole", "row", "numbers"])
@pytest.mark.parametrize("param", PARAMS)
def test_the_monte_carlo_kl_is_the_difference_of_the_densities(backend, param, given):
    mu, x = inputs(param)
    p = {
        "none": None,
        "whole": inputs(param, seed=1),
        "row": inputs(param, (5,), seed=1),
        "numbers": (0.5, 0.7),
    }[given]
    tensors = unit_prior(param, mu.double()) if p is None else [torch.as_tensor(t).double() for t in p]
    z, kl = rk.reparameterize_mc_kl(mu, x, param=param, prior=p, seed=3, sample_shape=(4,))
    eps = rk.randn(4, *mu.shape, seed=3).double()
    _, each, magnitude = true_log_q(*wide(mu, x), eps, param, prior=tensors)
    assert torch.equal(z, rk.reparameterize(mu, x, param=param, seed=3, sample_shape=(4,)))
    assert ((kl - each.sum(-1)).abs() <= 1e-6 * magnitude.sum(-1)).all()


GRADIENTS = [(squash, path, False) for squash in (None, "tanh") for path in PATHS] + [(None, p, True) for p in PATHS]


@pytest.mark.parametrize(("squash", "path", "prior"), GRADIENTS)
@pytest.mark.parametrize("param", PARAMS)
def test_gradients_are_those_of_float64(backend, param, squash, path, prior):
    """With path_derivative, of the density whose parameters are detached."""
    tensors = [*inputs(param, (10, 7)), *(inputs(param, (7,), seed=1) if prior else ())]
    leaves = [t.clone().requires_grad_() for t in tensors]
    options = {"param": param, "seed": 5, "sample_shape": (3,), "path_derivative": path}
    if prior:
        z, log_q = rk.reparameterize_mc_kl(*leaves[:2], prior=tuple(leaves[2:]), **options)
    else:
        z, log_q = rk.reparameterize_log_prob(*leaves, squash=squash, **options)
    g = torch.Generator().manual_seed(2)
    dz, dlog_q = torch.randn(z.shape, generator=g), torch.randn(log_q.shape, generator=g)
    true = wide(*tensors)
    eps = rk.randn(*z.shape, seed=5).double()
    true_z, each, _ = true_log_q(*true[:2], eps, param, squash=squash, path=path, prior=true[2:] if prior else None)
    for gz, gl in ((dz, dlog_q), (None, dlog_q), (dz, None)):
        pairs = [(z, true_z, gz), (log_q, each.sum(-1), gl)]
        got = torch.autograd.grad(
            [y for y, _, g in pairs if g is not None], leaves, [g for *_, g in pairs if g is not None],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        want = torch.autograd.grad(
            [y for _, y, g in pairs if g is not None], true, [g.double() for *_, g in pairs if g is not None],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            if b is None:
                assert a is None or not a.any()
                continue
            assert (a - b).abs().max() <= 2e-5 * b.square().mean().sqrt() + 1e-12


@pytest.mark.parametrize("squash", [None, "tanh"])
@pytest.mark.parametrize("param", PARAMS)
def test_gradcheck_and_gradgradcheck_of_the_total_derivative(param, squash):
    leaves = [t.requires_grad_() for t in inputs(param, (2, 3), torch.float64)]

    def density(mu, x):
        return rk.reparameterize_log_prob(mu, x, param=param, squash=squash, seed=1, sample_shape=(2,))

    prior = inputs(param, (2, 3), torch.float64, seed=1)

    def ratio(mu, x):
        return rk.reparameterize_mc_kl(mu, x, param=param, prior=prior, seed=1)

    for op in (density, *([] if squash else [ratio])):
        assert torch.autograd.gradcheck(op, leaves)
        assert torch.autograd.gradgradcheck(op, leaves)


def test_the_densities_integrate_to_one():
    """By the trapezoidal rule over the samples themselves, whose eps is a grid."""
    eps = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    mu, x = torch.full_like(eps, 0.7), torch.full_like(eps, -0.4)
    for squash in (None, "tanh"):
        z, log_q = rk.reparameterize_log_prob(mu, x, eps=eps, event_ndim=0, squash=squash)
        assert torch.trapezoid(log_q.exp(), z).item() == pytest.approx(1, abs=1e-6)


def test_tanh_agrees_with_the_transformed_distribution_of_torch():
    mu, x = inputs("std", dtype=torch.float64)
    z, log_q = rk.reparameterize_log_prob(mu, x, param="std", squash="tanh", seed=3, event_ndim=0)
    torch.testing.assert_close(log_q, TransformedDistribution(Normal(mu, x), TanhTransform()).log_prob(z))


def test_means_are_the_entropy_and_the_closed_form_kl():
    mu, x = inputs("logvar", (1, 3))
    n = 200_000
    _, log_q = rk.reparameterize_log_prob(mu, x, seed=1, sample_shape=(n,))
    _, kl = rk.reparameterize_mc_kl(mu, x, seed=1, sample_shape=(n,))
    entropy = Normal(mu, (x / 2).exp()).entropy().sum(-1)
    for values, want in ((-log_q, entropy), (kl, rk.kl_divergence(mu, x))):
        error = values.double().std(0) / n**0.5
        assert ((values.double().mean(0) - want).abs() <= 5 * error).all()


@pytest.mark.parametrize("op", ["density", "ratio"])
def test_total_less_path_is_the_score_whose_mean_is_zero(op):
    n = 50_000
    mu, x = (t.expand(n, 3).clone().requires_grad_() for t in inputs("logstd", (1, 3)))
    grads = []
    for path in PATHS:
        call = rk.reparameterize_log_prob if op == "density" else rk.reparameterize_mc_kl
        _, log_q = call(mu, x, param="logstd", seed=1, path_derivative=path)
        grads.append(torch.autograd.grad(log_q.sum(), (mu, x)))
    eps = rk.randn(n, 3, seed=1).double()
    score = eps / x.detach().double().exp(), eps**2 - 1
    for total, path, want in zip(*grads, score, strict=True):
        difference = (total - path).double()
        torch.testing.assert_close(difference, want, rtol=1e-4, atol=1e-4)
        assert (difference.mean(0).abs() <= 5 * difference.std(0) / n**0.5).all()


def test_the_path_derivative_vanishes_where_posterior_and_prior_agree(backend):
    mu, x = (t.requires_grad_() for t in inputs("logvar"))
    _, kl = rk.reparameterize_mc_kl(mu, x, prior=(mu.detach(), x.detach()), seed=2, path_derivative=True)
    assert torch.equal(kl, torch.zeros(6))
    assert all(not g.any() for g in torch.autograd.grad(kl.sum(), (mu, x)))


@pytest.mark.parametrize("param", PARAMS)
def test_the_monte_carlo_kl_near_collapse_keeps_its_digits(backend, param):
    p = unit_prior(param, torch.zeros(50, 8))
    mu, x = (t + 1e-3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(i)) for i, t in enumerate(p))
    _, kl = rk.reparameterize_mc_kl(mu, x, param=param, prior=p, seed=2, event_ndim=0)
    _, want, _ = true_log_q(*wide(mu, x), rk.randn(50, 8, seed=2).double(), param, prior=[t.double() for t in p])
    assert (kl - want).abs().max() <= 2e-6 * want.abs().max()


def test_the_log_density_at_the_ends_of_float32(backend):
    std = torch.tensor([1e-45, 1e-38, 1.1e-38, 1.1e38, 1.3e38, 2e38, 2.5e38, 3.3e38])
    eps = torch.linspace(-0.9, 0.9, len(std))
    _, log_q = rk.reparameterize_log_prob(torch.zeros_like(std), std, param="std", eps=eps, event_ndim=0)
    want = -(eps.double() ** 2) / 2 - std.double().log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_q.double(), want, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saturated_tanh_gives_no_infinity_and_no_nan(backend, dtype):
    mu = torch.tensor([[-1000.0, -50.0, -9.0, 0.0, 9.0, 50.0, 1000.0]], dtype=dtype).requires_grad_()
    x = torch.zeros(1, 7, dtype=dtype).requires_grad_()
    for path in PATHS:
        z, log_q = rk.reparameterize_log_prob(mu, x, squash="tanh", seed=1, event_ndim=0, path_derivative=path)
        grads = torch.autograd.grad((z.float().sum() + log_q.sum()), (mu, x))
        for t in (z, log_q, *grads):
            assert t.isfinite().all()
        _, want, _ = true_log_q(*wide(mu, x), rk.randn(1, 7, seed=1).double(), "logvar", squash="tanh")
        torch.testing.assert_close(log_q.double(), want, rtol=1e-6, atol=1e-5)


def test_no_samples_have_no_gradient(backend):
    leaves = [t.requires_grad_() for t in (*inputs("logvar"), *inputs("logvar", seed=1))]
    z, kl = rk.reparameterize_mc_kl(*leaves[:2], prior=tuple(leaves[2:]), sample_shape=(0,))
    assert kl.shape == (0, 6)
    assert all(torch.equal(g, torch.zeros(6, 5)) for g in torch.autograd.grad(kl.sum() + z.sum(), leaves))


def test_compile_vmap_and_checkpoint():
    mu, x = (t.requires_grad_() for t in inputs("logvar"))

    def loss(m, v):
        z, log_q = rk.reparameterize_log_prob(m, v, seed=4, squash="tanh", sample_shape=(2,))
        return z.square().sum() + (log_q * log_q).sum()

    want = torch.autograd.grad(loss(mu, x), (mu, x))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(mu, x), (mu, x))
    held = torch.utils.checkpoint.checkpoint(loss, mu, x, use_reentrant=False)
    for a, b, c in zip(want, compiled, torch.autograd.grad(held, (mu, x)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)

    def row(m, v, eps):
        return rk.reparameterize_log_prob(m, v, eps=eps, event_ndim=1)[1]

    eps = rk.randn(6, 5, seed=4)
    each = torch.stack([row(*parts) for parts in zip(mu, x, eps, strict=True)])
    torch.testing.assert_close(torch.func.vmap(row)(mu, x, eps), each, rtol=1e-6, atol=1e-6)


def test_errors():
    mu, x = inputs("logvar")
    with pytest.raises(ValueError, match="squash must be None or \"tanh\"; got 'sigmoid'"):
        rk.reparameterize_log_prob(mu, x, squash="sigmoid")
    with pytest.raises(ValueError, match="squash must be None"):
        rk.reparameterize_log_prob(mu, x, squash=["tanh"])
    rk.reparameterize_log_prob(mu, x, path_derivative=True)  # whose options are kept, and True equals 1
    with pytest.raises(TypeError, match="path_derivative must be True or False; got 1"):
        rk.reparameterize_log_prob(mu, x, path_derivative=1)
    with pytest.raises(TypeError, match="squash"):
        rk.reparameterize_mc_kl(mu, x, squash="tanh")
    with pytest.raises(ValueError, match=r"^reparameterize_mc_kl: mu_p"):
        rk.reparameterize_mc_kl(mu, x, prior=(torch.zeros(7), torch.zeros(5)))
    with pytest.raises(ValueError, match=r"^reparameterize_log_prob: event_ndim must lie in"):
        rk.reparameterize_log_prob(mu, x, event_ndim=3)


def test_diagonal_gaussian_has_the_same_in_one_call():
    moments = torch.cat(inputs("logvar", (6, 4)), 1)
    q = rk.DiagonalGaussian.from_moments(moments)
    z, log_q = q.rsample_and_log_prob((3,), seed=4)
    assert torch.equal(z, q.rsample((3,), seed=4))
    torch.testing.assert_close(log_q, q.log_prob(z), rtol=1e-5, atol=1e-5)
    assert not q.sample_and_log_prob(seed=4)[1].requires_grad


@pytest.mark.parametrize("shapes", [((), ()), ((4,), ()), ((), (4,)), ((3, 1), (4,))])
def test_normal_and_tanh_normal_return_the_log_prob_of_torch(shapes):
    loc, scale = torch.randn(shapes[0], dtype=torch.float64), torch.rand(shapes[1], dtype=torch.float64) + 0.2
    normal = rk.distributions.Normal(loc, scale)
    z, log_prob = normal.rsample_and_log_prob((5,))
    assert z.shape == normal.rsample((5,)).shape
    torch.testing.assert_close(log_prob, Normal(loc, scale).log_prob(z))
    squashed = rk.distributions.TanhNormal(loc, scale)
    z, log_prob = squashed.rsample_and_log_prob((5,))
    theirs = TransformedDistribution(Normal(loc, scale), TanhTransform())
    torch.testing.assert_close(log_prob, theirs.log_prob(z), rtol=1e-6, atol=1e-6)
    assert squashed.expand((2, 3, 4)).rsample().shape == (2, 3, 4)
    assert torch.equal(squashed.mode, torch.tanh(normal.loc))


def test_the_registered_op_refuses_to_compute_kl_and_log_q_at_once(backend):
    arguments = make_arguments("test", torch.zeros(2, 3), torch.zeros(2, 3), True, True, density=Density())
    with pytest.raises(ValueError, match="latent: at most one of kl and log_q must be asked for; got both"):
        LATENT.registered(arguments)
