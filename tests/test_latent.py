"""z and kl match the reference in float64, for every option on both backends."""

import itertools

import pytest
import torch

import reparam_kernels as rk
from reparam_kernels import _C
from tests.cases import DTYPES, EMPTY, PARAMS, SHAPES, assert_near, inputs, noise, truth

pytestmark = pytest.mark.usefixtures("says_where")

OPTIONS = [
    {},
    {"clamp": (-0.5, 0.75)},
    {"clamp": (-float("inf"), 0.1)},
    {"sample_shape": (3,)},
    {"sample_shape": (2, 2), "clamp": (0.25, 2.0)},
    {"sample_shape": (0,)},
    {"event_ndim": 0},
    {"prior": (0.25, 1.5)},
]


def check(shape, dtype, param, seed=11, **options):
    mu, x = inputs(shape, dtype, param)
    samples = options.get("sample_shape", ())
    z, kl = rk.reparameterize_kl(mu, x, seed=seed, param=param, **options)
    eps = noise(z.shape, seed, samples)
    _, _, (z_true, kl_true) = truth(mu, x, eps, param=param, **options)
    assert z.dtype == dtype
    assert z.is_contiguous()
    assert z.shape == torch.Size(samples) + mu.shape
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert kl.shape == kl_true.shape
    size = max(z_true.abs().max().item(), 1.0) if z.numel() else 1.0
    assert_near(z, z_true, units=4, atol=4e-7 * size if dtype != torch.float64 else 1e-15 * size)
    assert_near(kl, kl_true, rtol=1e-6 if dtype != torch.float64 else 1e-13)
    # each alone is the same function
    kl_options = {k: v for k, v in options.items() if k in ("event_ndim", "prior", "clamp", "min_std")}
    z_options = {k: v for k, v in options.items() if k in ("sample_shape", "clamp", "min_std")}
    assert torch.equal(rk.reparameterize(mu, x, seed=seed, param=param, **z_options), z)
    torch.testing.assert_close(rk.kl_divergence(mu, x, param=param, **kl_options), kl, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops_match_the_reference_for_every_shape_and_dtype(backend, shape, dtype):
    check(shape, dtype, "logvar")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("param", PARAMS)
def test_ops_match_the_reference_for_every_option(backend, param, options):
    if param == "std" and options.get("clamp", (0,))[0] < 0:
        options = {**options, "clamp": (0.5, options["clamp"][1] + 0.5)}
    min_std = {"min_std": 0.125} if param == "softplus" else {}
    for shape in [(6, 5), (2, 3, 4)]:
        check(shape, torch.float32, param, **options)
        check(shape, torch.float64, param, **options, **min_std)


@pytest.mark.parametrize("event_ndim", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 700), (3, 40, 60)], ids=str)
def test_kl_sums_over_the_event_dims(backend, shape, event_ndim):
    check(shape, torch.float32, "logvar", event_ndim=event_ndim)


@pytest.mark.parametrize("shape", [(5, 3), (5, 4), (5, 2, 3), (5,), (5, 1, 1)], ids=str)
@pytest.mark.parametrize("samples", [(), (3,), (2, 2)], ids=str)
def test_per_item_seeds(backend, shape, samples):
    seeds = torch.tensor([5, 2**50, 5, 0, 2**63 - 1])
    check(shape, torch.float32, "logvar", seed=seeds, sample_shape=samples)
    mu, x = inputs(shape)
    whole = rk.reparameterize(mu, x, seed=seeds, sample_shape=samples)
    alone = [
        rk.reparameterize(mu[i : i + 1], x[i : i + 1], seed=seeds[i : i + 1], sample_shape=samples) for i in range(5)
    ]
    assert torch.equal(whole, torch.cat(alone, dim=len(samples)))


PRIORS = {
    "whole": lambda shape: shape,
    "one row": lambda shape: shape[-1:],
    "a column": lambda shape: (*shape[:-1], 1),
    "middle": lambda shape: (shape[-2], 1) if len(shape) > 1 else (1,),
    "scalar": lambda shape: (),
}


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("param", PARAMS)
def test_kl_against_a_prior_that_expands(backend, param, kind):
    for shape in [(4, 6), (2, 3, 4)]:
        prior = inputs(PRIORS[kind](shape), torch.float32, param, seed=5)
        check(shape, torch.float32, param, prior=tuple(prior))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_tensors(backend, shape):
    mu, x = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    z, kl = rk.reparameterize_kl(mu, x, seed=1, sample_shape=(2,))
    assert z.shape == (2, *shape)
    assert torch.equal(kl, torch.zeros(kl.shape))
    (z.sum() + kl.sum()).backward()
    assert mu.grad.shape == x.grad.shape == mu.shape
    prior = tuple(torch.zeros(shape[-1:], requires_grad=True) for _ in range(2))
    rk.kl_divergence(mu, x, prior=prior).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros(shape[-1:])) for p in prior)


@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("samples", [(), (3,)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 127), (3, 128), (2, 3, 5)], ids=str)
def test_float32_z_bits_match_on_every_backend(isa, monkeypatch, param, samples, shape):
    """Every instruction set of the CPU, and Triton, agree on z bit for bit."""
    from reparam_kernels.ops.latent import cpu, triton
    from reparam_kernels.ops.latent.arguments import make_arguments

    mu, x = inputs(shape, torch.float32, param, scale=3.0)
    call = make_arguments("test", mu, x, z=True, seed=77, param=param, sample_shape=samples)
    assert torch.equal(cpu.forward(call)[0], triton.forward(call)[0])


def test_kl_and_gradient_bits_match_on_every_instruction_set():
    for param, dtype, prior in itertools.product(PARAMS, DTYPES, (None, (0.5, 1.25))):
        results = []
        for isa in _C.available_isas():
            _C.set_isa(isa)
            mu, x = inputs((9, 1500), dtype, param, requires_grad=True)
            z, kl = rk.reparameterize_kl(mu, x, seed=5, param=param, prior=prior)
            results.append([z, kl, *torch.autograd.grad((z.sum(), kl.sum()), (mu, x))])
        _C.set_isa(_C.available_isas()[0])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), (param, dtype, prior)


@pytest.mark.parametrize("shape", [(100_003,), (5, 60_001), (3000, 33), (70_000, 3)], ids=str)
def test_bits_do_not_depend_on_threads_or_runs(shape):
    results = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        mu, x = inputs(shape, requires_grad=True)
        prior = inputs(shape[-1:], requires_grad=True)[0], torch.tensor(0.5, requires_grad=True)
        z, kl = rk.reparameterize_kl(mu, x, seed=5, prior=prior)
        results.append([z, kl, *torch.autograd.grad((z.sum(), kl.sum()), (mu, x, *prior))])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- accuracy of the KL, as docs/contract.md promises: 1e-6 for each element and each row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prior_dtype", [*DTYPES, torch.int64], ids=str)
def test_a_prior_without_dims_is_a_number(backend, dtype, prior_dtype):
    """It does not promote, as in torch's arithmetic, and its gradient has its own dtype."""
    mu, x = inputs((4, 5), dtype, "std", requires_grad=True)
    prior = [torch.tensor(v).to(prior_dtype) for v in (1.0, 2.0)]
    learned = [p.requires_grad_() for p in prior] if prior_dtype.is_floating_point else []
    kl = rk.kl_divergence(mu, x, prior=tuple(prior), param="std")
    assert torch.equal(kl, rk.kl_divergence(mu, x, prior=(1.0, 2.0), param="std"))
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (mu, x, *prior)]
    true = rk.reference.kl_divergence(*wide[:2], prior=tuple(wide[2:]), param="std")
    got = torch.autograd.grad(kl.sum(), [mu, x, *learned])
    for g, w, t in zip(got, torch.autograd.grad(true.sum(), wide), (mu, x, *learned), strict=False):
        assert (g.dtype, g.shape) == (t.dtype, t.shape)
        assert_near(g, w, rtol=2e-6)


def test_a_prior_without_dims_does_not_promote_inside_autocast():
    mu, x = inputs((4, 5), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, kl = rk.reparameterize_kl(mu, x, prior=(torch.tensor(0.0).double(), torch.tensor(0.0)), seed=7)
    assert (z.dtype, kl.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("bad", [torch.tensor(True), torch.tensor(1j), torch.zeros(2, dtype=torch.int64)], ids=str)
def test_a_prior_that_is_no_number_is_refused(bad):
    mu, x = inputs((4, 2))
    with pytest.raises(TypeError, match="mu_p must be float16, bfloat16, float32 or float64"):
        rk.kl_divergence(mu, x, prior=(bad, 1.0))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.int64), (torch.int64, torch.float16)], ids=str)
def test_a_prior_without_dims_is_a_number_for_mu_without_dims_too(dtypes):
    """The same holds inside vmap, in which a row has no dims."""
    prior = tuple(torch.tensor(v).to(dtype) for v, dtype in zip((0, 1), dtypes, strict=True))
    mu, x = inputs((3,))
    want = rk.kl_divergence(mu, x, prior=(0.0, 1.0), event_ndim=0)
    assert torch.equal(rk.kl_divergence(mu[0], x[0], prior=prior), want[0])
    got = torch.vmap(lambda m, v: rk.kl_divergence(m, v, prior=prior))(mu, x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("against", ["standard", "far", "close"])
def test_kl_is_accurate_to_a_millionth(param, scale, against):
    mu, x = inputs((2000, 33), torch.float32, param, scale)
    prior = None
    if against == "far":
        prior = tuple(inputs((2000, 33), torch.float32, param, scale, seed=1))
    elif against == "close":
        a, b = inputs((2000, 33), torch.float64, param, 1e-4, seed=1)
        b = b - 1 if param == "std" else b
        prior = ((mu.double() + a).float(), (x.double() * (1 + b) if param == "std" else x.double() + b).float())
    for event_ndim in (0, 1):
        kl = rk.kl_divergence(mu, x, param=param, prior=prior, event_ndim=event_ndim).double()
        _, _, (_, true) = truth(mu, x, torch.zeros(mu.shape), param=param, prior=prior, event_ndim=event_ndim)
        sound = (true > 1e-17) & (true < 1.6e38)  # below, float64 itself is at its end; above, 2 kl is beyond float32
        error = ((kl - true).abs() / true)[sound]
        assert sound.double().mean() > 0.9
        assert error.max() <= 1e-6
        assert (kl[true >= 3.5e38] == float("inf")).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("param", PARAMS)
def test_gradients_of_the_kl_are_accurate_too(param, scale):
    """The prior is far away: the rounding of d alone would change exp(d) by 4e-6."""
    leaves = [
        *inputs((2000, 33), torch.float32, param, scale),
        *inputs((2000, 33), torch.float32, param, scale, seed=1),
    ]
    leaves = [t.requires_grad_() for t in leaves]
    kl = rk.kl_divergence(*leaves[:2], param=param, prior=tuple(leaves[2:]), event_ndim=0)
    wide, prior, (_, true) = truth(
        *leaves[:2], torch.zeros(2000, 33), param=param, prior=tuple(leaves[2:]), event_ndim=0
    )
    got = torch.autograd.grad(kl.sum(), leaves[:3])
    want = torch.autograd.grad(true.sum(), (*wide, prior[0]))
    for g, w in zip(got, want, strict=True):
        sound = (w.abs() > 1e-9) & (w.abs() < 1e37) & (true < 1e37)  # below, float64's own exp(d) - 1 is at its end
        assert sound.double().mean() > 0.5
        assert ((g.double() - w).abs() / w.abs())[sound].max() <= 1.5e-6


def test_the_textbook_kl_is_inaccurate_near_zero():
    """The textbook formula in float32 at a scale of 1e-3 shows why the kernels rearrange it."""
    mu, x = inputs((2000, 33), torch.float32, scale=1e-3)
    naive = -0.5 * (1 + x - mu**2 - x.exp()).sum(-1)
    _, _, (_, true) = truth(mu, x, torch.zeros(mu.shape))
    assert ((naive - true).abs() / true).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_kl_does_not_overflow(backend, dtype):
    mu, x = torch.full((2, 4096), 100.0, dtype=dtype), torch.full((2, 4096), 20.0, dtype=dtype)
    kl = rk.kl_divergence(mu, x)
    expected = 0.5 * (100.0**2 + torch.expm1(torch.tensor(20.0, dtype=torch.float64)) - 20.0) * 4096
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected.expand(2), rtol=1e-6, atol=0)


# ---- limits


def test_nan_and_infinity_pass_through_as_in_plain_torch(backend):
    nan, inf = float("nan"), float("inf")
    mu = torch.tensor([nan, 0.0, 0.0, 0.0, inf, 1.0])
    x = torch.tensor([0.0, nan, inf, -inf, 0.0, -500.0])
    z, kl = rk.reparameterize_kl(mu, x, seed=3, event_ndim=0)
    assert z[0].isnan()
    assert z[1].isnan()
    assert z[2].isinf()
    assert z[3] == 0
    assert z[4] == inf
    assert z[5] == 1
    assert kl[0].isnan()
    assert kl[1].isnan()
    assert kl[2].isnan()
    assert kl[3] == inf
    assert kl[4] == inf
    assert kl[5] == 250.0
    prior = (torch.zeros(6), torch.zeros(6))
    _, with_prior = rk.reparameterize_kl(mu, x, seed=3, event_ndim=0, prior=prior)
    assert torch.equal(with_prior.isnan(), kl.isnan())
    assert torch.equal(with_prior.isinf(), kl.isinf())


def test_sigma_of_zero_has_an_infinite_kl(backend):
    z, kl = rk.reparameterize_kl(torch.ones(2), torch.tensor([0.0, -1.0]), seed=3, param="std", event_ndim=0)
    assert z[0] == 1
    assert kl[0] == float("inf")
    assert kl[1].isnan()
