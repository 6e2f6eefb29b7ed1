"""For extreme values, z, KL, log-densities and every gradient match the formula in every backend.

The formula is evaluated in 400 bits (mpmath) and rounded to the dtype, so a number beyond its range is inf. If it has a
value for finite inputs, no result may be NaN. For infinite inputs the expected result is the limit, if there is one.
"""

import functools
import itertools
import math

import mpmath
import pytest
import torch

import reparam_kernels as rk
from tests.cases import DTYPES, PARAMS
from tests.conftest import forget, use_backend
from tests.report import table

pytestmark = pytest.mark.usefixtures("says_where")

INF, NAN = math.inf, math.nan
EPS = -0.5
NAMES = ("z", "kl", "dz/dmu", "dz/dx", "dkl/dmu", "dkl/dx", "dkl/dmu_p", "dkl/dx_p")


def results(mu, x, prior=None, **options):
    """Return NAMES for lists of numbers, each as a list; eps is -1/2."""
    dtype = options.pop("dtype", torch.float32)
    leaves = [torch.tensor(t, dtype=torch.float64).to(dtype).requires_grad_() for t in (mu, x, *(prior or ()))]
    if prior:
        options["prior"] = tuple(leaves[2:])
    z, kl = rk.reparameterize_kl(*leaves[:2], eps=torch.full_like(leaves[0], EPS), event_ndim=0, **options)
    dz = torch.autograd.grad(z.sum(), leaves[:2], retain_graph=True)
    dkl = torch.autograd.grad(kl.sum(), leaves)
    return [t.tolist() for t in (z, kl, *dz, *dkl)]


# param, mu, x, prior: z, kl, then dz/dx and kl's gradients to mu, x, mu_p and x_p; dz/dmu is 1 everywhere.
TABLE = [
    ("logvar", (0.0, 0.0), (-0.5, 0.0, -0.25, 0.0, 0.0), "posterior and prior are one"),
    ("logvar", (-0.0, -0.0), (-0.5, 0.0, -0.25, 0.0, 0.0), "the same"),
    ("logvar", (1e-45, 1e-45), (-0.5, 0.0, -0.25, 1e-45, 0.0), "subnormals: sigma is 1 to the last digit"),
    ("logvar", (1.0, -200.0), (1.0, 100.0, 0.0, 1.0, -0.5), "sigma is 0 as a number; kl is (mu^2 - 1 - logvar) / 2"),
    ("logvar", (1.0, -1e4), (1.0, 5000.0, 0.0, 1.0, -0.5), "the same"),
    ("logvar", (1.0, 1e4), (-INF, INF, -INF, 1.0, INF), "sigma is beyond float32"),
    ("logvar", (1.0, INF), (-INF, NAN, -INF, 1.0, INF), "kl is inf - inf, as in plain torch"),
    ("logvar", (1.0, -INF), (1.0, INF, 0.0, 1.0, -0.5), "sigma is 0, its logarithm -inf"),
    ("logvar", (1.0, NAN), (NAN, NAN, NAN, 1.0, NAN), "NaN goes through, where it has a say"),
    ("logvar", (NAN, 0.0), (NAN, NAN, -0.25, NAN, 0.0), "the same"),
    ("logvar", (INF, 0.0), (INF, INF, -0.25, INF, 0.0), "kl grows as mu^2"),
    ("logvar", (-INF, 0.0), (-INF, INF, -0.25, -INF, 0.0), "the same"),
    ("logvar", (1e38, 0.0), (1e38, INF, -0.25, 1e38, 0.0), "mu^2 is beyond float32, the gradient is not"),
    ("logvar", (0.0, -200.0, 0.0, -200.0), (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), "two of one width, however narrow"),
    (
        "logvar",
        (1.0, -200.0, 0.0, -200.0),
        (1.0, INF, 0.0, INF, 0.0, -INF, -INF),
        "delta is exp(100), its square too much",
    ),
    ("logvar", (0.0, 0.0, 0.0, -1e4), (-0.5, INF, -0.25, 0.0, INF, 0.0, -INF), "a prior that is a point has no width"),
    (
        "logvar",
        (1.0, 0.0, 0.0, 1e4),
        (0.5, 4999.5, -0.25, 0.0, -0.5, 0.0, 0.5),
        "1 / sigma_p is 0; kl is (logvar_p - 1) / 2",
    ),
    ("logstd", (1.0, -1e4), (1.0, 1e4, 0.0, 1.0, -1.0), "sigma is 0 as a number; kl is (mu^2 - 1) / 2 - logstd"),
    ("logstd", (1.0, 1e4), (-INF, INF, -INF, 1.0, INF), "sigma is beyond float32"),
    ("std", (1.0, 1e-45), (1.0, 103.27893, -0.5, 1.0, -INF), "the least subnormal: kl is (mu^2 - 1) / 2 - log std"),
    ("std", (1.0, 0.0), (1.0, INF, -0.5, 1.0, -INF), "the logarithm of 0"),
    ("std", (1.0, 1e30), (-5e29, INF, -0.5, 1.0, 1e30), "std^2 is beyond float32, std - 1 / std is not"),
    ("std", (0.0, 1e-45, 0.0, 1e-45), (0.0, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0), "two of one width"),
    ("softplus", (1.0, -1e4), (1.0, 1e4, 0.0, 1.0, -1.0), "softplus(x) goes to exp(x): log sigma is x, as for logstd"),
    ("softplus", (1.0, 1e4), (-4999.0, 5e7 - 9.2103404, -0.5, 1.0, 1e4), "softplus(x) goes to x"),
    ("softplus", (0.0, -200.0, 0.0, -201.0), (0.0, 2.1945280, 0.0, 0.0, 6.3890561, 0.0, -6.3890561), "as for logstd"),
]


def values(mu, x, prior, param):
    z, kl, dz_mu, *rest = (value for (value,) in results([mu], [x], [[p] for p in prior], param=param))
    assert dz_mu == 1.0
    return z, kl, *rest


def near(limits):
    return pytest.approx(limits, rel=1e-6, abs=2e-38, nan_ok=True)


@pytest.mark.parametrize(("param", "point", "limits", "because"), TABLE)
def test_each_value_is_the_limit_of_its_formula(backend_or_reference, param, point, limits, because):
    assert values(*point[:2], point[2:], param) == near(limits)


def test_the_table_is_written_down(record_property):
    """The C++ kernels give the table; the test above compares every backend with it."""
    names = ("param", "mu", "x", "mu_p", "x_p", *NAMES[:2], *NAMES[3:], "since")
    rows = []
    for param, point, limits, because in TABLE:
        results_at_point = values(*point[:2], point[2:], param)
        assert results_at_point == near(limits)
        numbers = [f"{v:.6g}" for v in (*point, *results_at_point)]
        blank = [""] * (4 - len(point))
        rows.append((param, *numbers[: len(point)], *blank, *numbers[len(point) :], *blank, because))
    record_property("table", "\n".join(table(names, rows)))


# ---- finite inputs

LOGS = (0.0, 1e-45, 1.0, -20.0, 80.0, -80.0, 88.8, -88.8, -104.0, 178.0, -178.0, 1e4, -1e4, 1e38, -1e38)
XS = {"std": (1e-45, 1e-40, 1e-30, 1e-10, 0.5, 1.0, 2.0, 1e10, 1e19, 1e30, 3e38)}  # 1e-45: the smallest subnormal
# Not 2e38 with its opposite: mu - mu_p is then beyond float32. For softplus and std not 1e-45 either: below 1.2e-38,
# where softplus is constant, delta is no more than the sign of mu - mu_p times something large.
MUS = (0.0, 1.0, 2e38)


def scale(x, param, min_std):
    """Return sigma, dsigma/dx and log sigma."""
    if param in ("logvar", "logstd"):
        log_sigma = x / 2 if param == "logvar" else x
        return mpmath.exp(log_sigma), mpmath.exp(log_sigma) / (2 if param == "logvar" else 1), log_sigma
    if param == "std":
        return x, mpmath.mpf(1), mpmath.log(x)
    sigma = mpmath.log1p(mpmath.exp(x)) if x < 50 else x + mpmath.log1p(mpmath.exp(-x))
    return sigma + min_std, 1 / (1 + mpmath.exp(-x)), mpmath.log(sigma + min_std)


def truth(param, min_std, mu, x, prior):
    """Return NAMES to 400 bits, the size of the terms of each sum, which may cancel, and the divisor of the slope of
    softplus, which is at least the smallest normal number."""
    mu, x, *p = (mpmath.mpf(t) for t in (mu, x, *prior))
    sigma, dsigma, log_sigma = scale(x, param, min_std)
    mu_p, (sigma_p, dsigma_p, log_sigma_p) = (p[0], scale(p[1], param, min_std)) if p else (0, (mpmath.mpf(1), 0, 0))
    d, delta = 2 * (log_sigma - log_sigma_p), (mu - mu_p) / sigma_p
    em1, to_x, to_p = mpmath.expm1(d), dsigma / sigma, dsigma_p / sigma_p
    values = [mu + sigma * EPS, (delta**2 + em1 - d) / 2, mpmath.mpf(1), dsigma * EPS]
    values += [delta / sigma_p, em1 * to_x, -delta / sigma_p, -(em1 + delta**2) * to_p]
    sizes = [abs(mu) + abs(sigma), *map(abs, values[1:7]), (abs(em1) + delta**2) * to_p]
    stays = [0, 0, 0, 0, 0, abs(em1) / sigma, 0, (abs(em1) + delta**2) / sigma_p]
    return values, sizes, stays


@functools.cache
def grid(param, min_std, dtype, prior):
    """Return points, exact in dtype, and the truth at each."""
    rounded = [torch.tensor(t, dtype=torch.float64).to(dtype).double() for t in (MUS, XS.get(param, LOGS))]
    mus, xs = (list(dict.fromkeys(t[t.isfinite()].tolist())) for t in rounded)
    if param == "std":
        xs = [x for x in xs if x > 0]
    if dtype == torch.float64:  # expm1(d) - d is computed directly, which loses digits near 0
        xs = [x for x in xs if abs(x) != 1e-45]
    if dtype == torch.bfloat16:  # Triton's interpreter reads subnormal ones as 0
        xs = [x for x in xs if x == 0 or abs(x) >= torch.finfo(dtype).tiny]
    points = list(itertools.product(mus, xs, mus, xs) if prior else itertools.product(mus, xs))
    with mpmath.workprec(400):
        return points, [truth(param, min_std, *point[:2], point[2:]) for point in points]


def wrong(got, value, size, stays, overflowed, rounding, out, wide):
    """Return what is wrong with a result, or None. out is its dtype, wide that of the arithmetic."""
    top, eps, tiny = mpmath.mpf(torch.finfo(out).max), torch.finfo(out).eps, torch.finfo(out).tiny
    if math.isnan(got):
        return "NaN" if abs(value) < top else None
    if math.isinf(got):  # an intermediate sum or square may overflow first
        if size > top:
            return None
        near = abs(value) > top / 8 or size > top / 8 or overflowed
        return None if near and (got > 0) == (value > 0) else "infinite"
    if abs(value) > top * (1 + mpmath.mpf(eps)):
        return None if abs(got) > top / 8 else "finite"
    unit = max(eps, 2e-6 if wide == torch.float32 else 1e-8)  # 1e-8: expm1(d) - d, computed directly
    least = 2 * tiny * eps + mpmath.mpf(torch.finfo(wide).tiny) * (8 + 2 * stays) + rounding
    return None if abs(got - value) <= unit * max(abs(value), size) + least else "inaccurate"


@pytest.mark.parametrize("prior", [False, True], ids=["unit", "prior"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("param", "min_std"), [*((p, 0.0) for p in PARAMS), ("softplus", 1e-4)])
def test_finite_inputs_give_the_value_of_the_formula(backend_or_reference, param, min_std, dtype, prior):
    points, truths = grid(param, min_std, dtype, prior)
    mu, x, *both = map(list, zip(*points, strict=True))
    got = results(mu, x, both or None, param=param, min_std=min_std, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rounding = 1e-15 if min_std and dtype == torch.float64 else 0  # of softplus(x) + min_std
    faults = []
    for point, (values, sizes, stays), *results_at_point in zip(points, truths, *got, strict=True):
        overflowed = values[1] > torch.finfo(wide).max / 8
        for i, g in enumerate(results_at_point):
            out = wide if NAMES[i] == "kl" else dtype
            fault = wrong(g, values[i], sizes[i], stays[i], overflowed and i > 3, rounding, out, wide)
            if fault:
                faults.append((NAMES[i], fault, point, g, mpmath.nstr(values[i], 8)))
    assert not faults, faults[:5]


@pytest.mark.parametrize("prior", [False, True], ids=["unit", "prior"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("param", PARAMS)
def test_infinite_inputs_give_the_same_in_every_backend(monkeypatch, param, dtype, prior):
    """The result is the same NaN, inf or number. Plain torch is compared for logvar and logstd without a prior."""
    wild = (0.0, 1.0, INF, -INF, NAN)
    points = itertools.product(wild, wild, (0.0, INF), wild) if prior else itertools.product(wild, wild)
    mu, x, *both = map(list, zip(*points, strict=True))
    by_backend = {}
    for name in ("cpu", "triton", "reference"):
        if name == "reference" and (prior or param in ("std", "softplus")):
            continue
        use_backend(monkeypatch, name)
        by_backend[name] = torch.tensor(results(mu, x, both or None, param=param, dtype=dtype), dtype=torch.float64)
    forget()
    for other in by_backend.values():
        torch.testing.assert_close(other, by_backend["cpu"], rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("logvar", [12.0, 22.0, -24.0, 6e-8, 65504.0, -65504.0])
def test_float16_at_its_edges(backend_or_reference, logvar):
    """In z, sigma beyond 65504 is inf and sigma below 6e-8 is 0; kl is float32 and stays finite."""
    mu, x = torch.tensor([0.0]).half(), torch.tensor([logvar]).half()
    z, kl = rk.reparameterize_kl(mu, x, eps=torch.tensor([-1.0]).half(), event_ndim=0)
    wide = x.double()
    assert z.double().equal(-(wide / 2).exp().half().double())
    torch.testing.assert_close(kl, ((wide.expm1() - wide) / 2).float(), rtol=1e-6, atol=0.0)


# ---- the log-density of a sample

DENSITY_NAMES = ("log_q", "dlog_q/dmu", "dlog_q/dx")
KINDS = {"plain": {}, "tanh": {"squash": "tanh"}, "path": {"path_derivative": True}}


def densities(mu, x, **options):
    """Return DENSITY_NAMES for lists of numbers, each as a list; eps is -1/2."""
    dtype = options.pop("dtype", torch.float32)
    leaves = [torch.tensor(t, dtype=torch.float64).to(dtype).requires_grad_() for t in (mu, x)]
    eps = torch.full_like(leaves[0], EPS)
    _, log_q = rk.reparameterize_log_prob(*leaves, eps=eps, event_ndim=0, **options)
    return [t.tolist() for t in (log_q, *torch.autograd.grad(log_q.sum(), leaves))]


# param, kind, (mu, x): log_q, then its gradients to mu and x.
DENSITY_TABLE = [
    ("logvar", "plain", (0.0, 0.0), (-1.0439385, 0.0, -0.5), "-eps^2 / 2 - log(2 pi) / 2, eps = -1/2"),
    ("logvar", "plain", (1.0, -200.0), (98.956061, 0.0, -0.5), "sigma is 0 as a number, its logarithm is not"),
    ("logvar", "plain", (1.0, 1e4), (-5001.0439, 0.0, -0.5), "sigma is beyond float32, its logarithm is not"),
    ("std", "plain", (1.0, 1e-45), (102.23499, 0.0, -INF), "the least subnormal; 1 / std is beyond float32"),
    ("softplus", "plain", (1.0, -1e4), (9998.9561, 0.0, -1.0), "softplus(x) goes to exp(x): log sigma is x"),
    ("logvar", "tanh", (20.0, 0.0), (36.569767, 2.0, -1.0), "tanh is 1 as a number; its slope has a logarithm"),
    ("logvar", "tanh", (-1e4, 0.0), (19998.57, -2.0, 0.0), "the same"),
    ("logvar", "tanh", (0.0, -200.0), (98.956061, 0.0, -0.5), "u is 0"),
    ("logvar", "tanh", (0.0, 1e4), (INF, -2.0, INF), "u is beyond float32, and so is the logarithm of tanh's slope"),
    ("logvar", "path", (0.0, 0.0), (-1.0439385, 0.5, -0.125), "-eps / sigma, and -eps^2 / 2"),
    ("logvar", "path", (1.0, -170.0), (83.956061, 4.1115064e36, -0.125), "sigma is 1e-37"),
]


def density_values(param, kind, point):
    return tuple(value for (value,) in densities(*([t] for t in point), param=param, **KINDS[kind]))


@pytest.mark.parametrize(("param", "kind", "point", "limits", "because"), DENSITY_TABLE)
def test_each_density_is_the_limit_of_its_formula(monkeypatch, param, kind, point, limits, because):
    for name in ("cpu", "triton"):
        use_backend(monkeypatch, name)
        assert density_values(param, kind, point) == near(limits)
    forget()


def density_truth(squash, param, min_std, mu, x):
    """Return DENSITY_NAMES to 400 bits, and the size of the terms of each sum."""
    mu, x, eps = mpmath.mpf(mu), mpmath.mpf(x), mpmath.mpf(EPS)
    sigma, dsigma, log_sigma = scale(x, param, min_std)
    u = mu + sigma * eps
    terms, to_mu, to_x = [-(eps**2) / 2 - mpmath.log(2 * mpmath.pi) / 2, -log_sigma], [], [-dsigma / sigma]
    if squash:
        small = abs(u) < 1e4
        tanh = mpmath.tanh(u) if small else mpmath.sign(u)
        terms += [-2 * mpmath.log(2), 2 * abs(u), 2 * mpmath.log1p(mpmath.exp(-2 * abs(u))) if small else mpmath.mpf(0)]
        to_mu, to_x = [2 * tanh], [*to_x, 2 * tanh * dsigma * eps]
    each = terms, to_mu, to_x
    return [sum(t, mpmath.mpf(0)) for t in each], [sum(map(abs, t), mpmath.mpf(0)) for t in each], 1 / sigma


@pytest.mark.parametrize("squash", [None, "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("param", "min_std"), [*((p, 0.0) for p in PARAMS), ("softplus", 1e-4)])
def test_finite_inputs_give_the_density_of_the_formula(monkeypatch, param, min_std, dtype, squash):
    """The kernels alone: rk.reference has NaN where sigma leaves the range of float64."""
    points = [point for point in grid(param, min_std, dtype, False)[0] if param != "std" or point[1] < 1e38]
    rounding = 1e-15 if min_std and dtype == torch.float64 else 0  # of softplus(x) + min_std
    faults = []
    for name in ("cpu", "triton"):
        use_backend(monkeypatch, name)
        options = {"param": param, "min_std": min_std, "dtype": dtype, "squash": squash}
        got = densities(*map(list, zip(*points, strict=True)), **options)
        for point, *results_at_point in zip(points, *got, strict=True):
            with mpmath.workprec(400):
                values, sizes, stays = density_truth(squash, param, min_std, *point)
                if abs(point[0]) > 1e38 and stays < 1e-38:  # mu and sigma eps, each near the limit, may cancel
                    continue
                for what, g, value, size in zip(DENSITY_NAMES, results_at_point, values, sizes, strict=True):
                    fault = wrong(g, value, size, stays if what == "dlog_q/dx" else 0, False, rounding, dtype, dtype)
                    if fault:
                        faults.append((name, what, fault, point, g, mpmath.nstr(value, 8)))
    forget()
    assert not faults, faults[:5]


# ---- a mixture

MIXTURE_NAMES = ("log p", "dz", "dmu", "dx")


def mixtures(param, z, mu, x, of="joint", dtype=torch.float32):
    """Return MIXTURE_NAMES of one point under one component."""
    leaves = [torch.tensor([[t]], dtype=dtype, requires_grad=True) for t in (z, mu, x)]
    value = rk.mixture_log_prob(*leaves, param=param, of=of)
    return tuple(t.item() for t in (value, *torch.autograd.grad(value.sum(), leaves)))


# param, (z, mu, x): log p, then its gradients to z, mu and x.
MIXTURE_TABLE = [
    ("logvar", (0.0, 0.0, 0.0), (-0.91893853, 0.0, 0.0, -0.5), "at the mean"),
    ("logvar", (0.0, 0.0, -170.0), (84.081061, 0.0, 0.0, -0.5), "sigma is 1e-37"),
    ("logvar", (0.0, 0.0, -200.0), (99.081061, 0.0, 0.0, -0.5), "sigma is 0 as a number, its logarithm is not"),
    ("logvar", (1.0, 0.0, 1e4), (-5000.9189, 0.0, 0.0, -0.5), "sigma is beyond float32, its logarithm is not"),
    ("std", (0.0, 0.0, 1e-45), (102.35999, 0.0, 0.0, -INF), "the least subnormal"),
    ("logvar", (1e6, 0.0, 0.0), (-5e11, -1e6, 1e6, 5e11), "a million sigma away"),
    ("logvar", (1e18, 0.0, 0.0), (-5e35, -1e18, 1e18, 5e35), "as far as a square is in float32"),
    ("logvar", (1e19, 0.0, 0.0), (-INF, 0.0, 0.0, 0.0), "farther: the density is 0, and so are its gradients"),
]


@pytest.mark.parametrize("of", ["joint", "dims"])
@pytest.mark.parametrize(("param", "point", "limits", "because"), MIXTURE_TABLE)
def test_each_mixture_is_the_limit_of_its_formula(monkeypatch, param, point, limits, because, of):
    for name in ("cpu", "triton"):
        use_backend(monkeypatch, name)
        assert mixtures(param, *point, of) == near(limits)
        if limits[3] != -INF:
            assert (
                mixtures(param, *point, of, torch.float64)[0] == pytest.approx(limits[0], rel=1e-6) or limits[0] < -1e37
            )
    forget()


@pytest.mark.parametrize("of", ["joint", "dims"])
def test_points_at_any_distance_have_the_density_of_the_nearest_component(monkeypatch, of):
    """From 0 to 1e17 sigma, of 1 to 40 components and up to 70 dims, in float32 and float64."""
    for name in ("cpu", "triton"):
        use_backend(monkeypatch, name)
        for dims, components in ((1, 1), (3, 18), (70, 40)) if name == "cpu" else ((3, 18),):
            g = torch.Generator().manual_seed(dims)
            mu, logvar = torch.randn(2, components, dims, generator=g)
            far = 10.0 ** torch.linspace(0, 17, 37)[:, None] * torch.randn(1, dims, generator=g).sign()
            for dtype in (torch.float32, torch.float64):
                z, m, v = (t.to(dtype).requires_grad_() for t in (far, mu, logvar))
                exact = [t.detach().double().requires_grad_() for t in (z, m, v)]
                got, want = rk.mixture_log_prob(z, m, v, of=of), rk.reference.mixture_log_prob(*exact, of=of)
                torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
                grads = [torch.autograd.grad(out.sum(), t)[0].double() for out, t in ((got, z), (want, exact[0]))]
                torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    forget()


def test_the_tables_of_densities_are_written_down(record_property):
    """The C++ kernels give the tables; the tests above compare every backend with them."""
    rows = []
    for param, kind, point, limits, because in DENSITY_TABLE:
        values_at_point = density_values(param, kind, point)
        assert values_at_point == near(limits)
        rows.append((param, kind, *(f"{v:.6g}" for v in (*point, *values_at_point)), because))
    record_property("table", "\n".join(table(("param", "density", "mu", "x", *DENSITY_NAMES, "since"), rows)))
    rows = []
    for param, point, limits, because in MIXTURE_TABLE:
        values_at_point = mixtures(param, *point)
        assert values_at_point == near(limits)
        rows.append((param, *(f"{v:.6g}" for v in (*point, *values_at_point)), because))
    record_property("table", "\n".join(table(("param", "z", "mu", "x", *MIXTURE_NAMES, "since"), rows)))
