"""channels_last tensors are read where they lie and given back in their format, with the bits of contiguous ones."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import reparam_kernels as rk
from reparam_kernels import reference
from reparam_kernels.ops.latent.arguments import Density, make_arguments
from reparam_kernels.ops.latent.op import LATENT
from tests.cases import copies_refused, inputs

pytestmark = pytest.mark.usefixtures("says_where")

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Tiles of whole channels and of parts of them; blocks of channels that are not full; sums of several channels, of one,
# and of parts that start inside one.
SHAPES = [
    (2, 4, 3, 3),
    (3, 5, 2, 4, 4),
    (2, 3, 20, 23),
    (1, 16, 36, 37),
    (2, 18, 33, 9),
    (1, 40, 6, 5, 7),
    (2, 8, 1, 9),
]
LONG = (1, 4, 61, 71)  # several tiles, in which the sums go on


def last(t):
    """Return a leaf with the same numbers in channels_last."""
    made = torch.empty_like(t, memory_format=LAST[t.dim()])
    return made.copy_(t.detach()).requires_grad_(t.requires_grad)


def is_last(t):
    return t.is_contiguous(memory_format=LAST[t.dim()])


def strides_that_count(t):
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


def plain_z(mu, x):
    return mu + torch.exp(0.5 * x) * torch.randn_like(mu)


def packed_like(shape):
    return torch.randn(shape[0], 2 * shape[1], *shape[2:])


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 4, 5), (2, 3, 1, 5), (1, 1, 1, 1), (2, 3, 2, 4, 5)],
)
def test_z_has_the_strides_of_plain_torch(backend, shape):
    a, b = torch.randn(shape), torch.randn(shape)
    moments = last(packed_like(shape))
    for mu, x in [(a, b), (last(a), last(b)), (last(a), b), (a, last(b)), moments.chunk(2, 1)]:
        want = strides_that_count(plain_z(mu, x))
        q, fakes = rk.DiagonalGaussian(mu, x), FakeTensorMode()
        with fakes:
            fake = rk.reparameterize(fakes.from_tensor(mu), fakes.from_tensor(x), seed=1)
        z = rk.reparameterize(mu, x, seed=1)
        assert fake.stride() == z.stride()
        for t in (z, reference.reparameterize(mu, x, seed=1), q.sample(seed=1), q.mode()):
            assert strides_that_count(t) == want
        assert strides_that_count(rk.reparameterize_log_prob(mu, x, seed=1)[0]) == want
    packed = rk.DiagonalGaussian.from_moments(moments).sample(seed=1)
    assert strides_that_count(packed) == strides_that_count(plain_z(*moments.chunk(2, 1)))


def test_samples_and_sums_are_contiguous_and_what_has_the_shape_of_mu_is_not(backend):
    mu, x = map(last, inputs((2, 4, 5, 3)))
    z, kl = rk.reparameterize_kl(mu, x, seed=1, sample_shape=(3,))
    assert z.is_contiguous()
    assert kl.is_contiguous()
    assert rk.kl_divergence(mu, x, event_ndim=1).is_contiguous()
    for function in (rk, reference):
        assert is_last(function.kl_divergence(mu, x, event_ndim=0))
        assert is_last(function.reparameterize_log_prob(mu, x, event_ndim=0, seed=1)[1])


def outputs_and_gradients(op, leaves, grads, **options):
    leaves = [t if t is None else t.detach().requires_grad_() for t in leaves]
    if op == "packed":
        out = rk.DiagonalGaussian.from_moments(leaves[0], event_ndim=options.pop("event_ndim")).rsample_kl(**options)
    else:
        if len(leaves) > 2:
            options["prior"] = tuple(leaves[2:])
        out = getattr(rk, op)(*leaves[:2], **options)
        out = out if isinstance(out, tuple) else (out,)
    grads = grads[2 - len(out) :] if op == "kl_divergence" else grads[: len(out)]
    return out, torch.autograd.grad(out, leaves, grads)


def check_same_bits(
    backend, shape, op="reparameterize_kl", dtype=torch.float32, event_ndim=None, prior=False, **options
):
    event_ndim = len(shape) - 1 if event_ndim is None else event_ndim
    leaves = [*inputs(shape, dtype)] if op != "packed" else [packed_like(shape).to(dtype)]
    leaves += [*inputs(shape, dtype, seed=1)] if prior else []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grads = [torch.randn(shape).to(dtype), torch.randn(shape[: len(shape) - event_ndim], dtype=wide)]
    want, want_grads = outputs_and_gradients(op, leaves, grads, seed=3, event_ndim=event_ndim, **options)
    for of_leaves, of_grads in [(last, last), (last, lambda t: t)]:
        there = [of_grads(g) if g.dim() in LAST and g.shape == shape else g for g in grads]
        got, got_grads = outputs_and_gradients(
            op, [of_leaves(t) for t in leaves], there, seed=3, event_ndim=event_ndim, **options
        )
        for i, (g, w) in enumerate(zip((*got, *got_grads), (*want, *want_grads), strict=True)):
            assert g.shape[: len(shape)] != w.shape or g.numel() < math.prod(shape) or is_last(g)
            if backend == "cpu" or i == 0:
                assert torch.equal(g, w)
            else:  # Triton sums the KL in another order
                torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6 if i == 1 else 0)


@pytest.mark.parametrize("op", ["reparameterize_kl", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_contiguous_tensors(backend, shape, op):
    check_same_bits(backend, shape, op)


@pytest.mark.parametrize("event_ndim", [0, 1, 2, 3, 4])
def test_bits_of_every_sum(backend, event_ndim):
    check_same_bits(backend, (2, 8, 9, 36), event_ndim=event_ndim)
    check_same_bits(backend, (2, 8, 9, 36), "reparameterize_log_prob", event_ndim=event_ndim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 18, 33, 9), LONG], ids=str)
def test_bits_in_every_dtype(backend, shape, dtype):
    check_same_bits(backend, shape, "packed", dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"prior": True},
        {"prior": True, "op": "reparameterize_mc_kl", "path_derivative": True},
        {"op": "reparameterize_log_prob", "squash": "tanh", "clamp": (-1.0, 0.5)},
        {"window": ((2, 4, 100, 80), (0, 0, 5, 6))},
        {"window": ((2, 9, 61, 71), (1, 3, 0, 0))},
        {"sample_shape": (2,)},
        {"sample_shape": (1,)},
    ],
    ids=str,
)
def test_bits_with_every_option(backend, options):
    options = dict(options)
    shape = (2, 4, 20, 33) if backend == "triton" or "sample_shape" in options else LONG
    if "window" in options:
        shape = LONG
    if "sample_shape" in options:
        mu, x = inputs(shape)
        got, want = (rk.reparameterize_kl(f(mu), f(x), seed=1, **options) for f in (last, lambda t: t))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        return
    check_same_bits(backend, shape, **options)


def test_seeds_of_items_given_noise_and_priors_of_other_shapes(backend):
    mu, x = inputs((3, 4, 5, 8))
    eps = torch.randn(3, 4, 5, 8)
    for options in (
        {"seed": torch.arange(3)},
        {"eps": eps},
        {"eps": last(eps)},
        {"seed": 1, "prior": (0.5, -1.0)},
        {"seed": 1, "prior": (torch.randn(4, 1, 1), torch.randn(3, 1, 5, 8))},
    ):
        got, want = (rk.reparameterize_kl(f(mu), f(x), **options) for f in (last, lambda t: t))
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-6 if backend == "triton" else 0, atol=0)


def test_a_gradient_has_the_format_of_its_input(backend):
    shape = (2, 4, 5, 6)
    leaves = [last(torch.randn(shape)), torch.randn(shape), torch.randn(shape), last(torch.randn(1, *shape[1:]))]
    grads = LATENT.gradients(
        make_arguments("test", *leaves[:2], z=True, kl=True, seed=1, prior=tuple(leaves[2:])),
        (last(torch.randn(shape)), torch.randn(2), None),
        [True] * 4,
    )
    assert [g.stride() for g in grads] == [t.stride() for t in leaves]
    mu, x = (t.requires_grad_() for t in leaves[:2])
    for call in (rk.reparameterize, rk.reparameterize_log_prob):
        for first, second in ((mu, x), (x, mu)):
            out = call(first, second, seed=1)
            z = out if isinstance(out, torch.Tensor) else out[0]
            grads = torch.autograd.grad(z, (first, second), torch.randn(shape))
            assert [g.stride() for g in grads] == [first.stride(), second.stride()]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("event_ndim", [2, 3])
def test_bits_do_not_depend_on_threads_or_the_instruction_set(isa, threads, event_ndim):
    torch.set_num_threads(threads)
    shape = (2, 5, 130, 121)  # spans that the threads share, whose sums go on in the next
    mu, x = inputs(shape)
    for op, options in ((rk.reparameterize_kl, {}), (rk.reparameterize_log_prob, {})):
        got, want = (op(f(mu), f(x), seed=1, event_ndim=event_ndim, **options) for f in (last, lambda t: t))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_copied(backend, dtype):
    moments = last(torch.randn(3, 8, 5, 7).to(dtype).requires_grad_())
    with copies_refused(moments.numel() // 2):
        z, kl = rk.DiagonalGaussian.from_moments(moments).rsample_kl(seed=3)
        (gradient,) = torch.autograd.grad((z, kl), moments, (torch.empty_like(z), torch.empty_like(kl)))
    assert is_last(gradient)


def ops_arguments():
    """Arguments of the registered ops that mix the formats."""
    shape = (2, 4, 3, 5)
    mu, x = inputs(shape)
    prior = last(torch.randn(1, *shape[1:])), torch.randn(shape)
    for tensors, options in (
        ((last(mu), last(x)), {}),
        ((last(mu), x), {"prior": prior}),
        ((last(packed_like(shape)), None), {"packed": 1, "event_ndim": 0}),
        ((last(mu), last(x)), {"density": Density(), "event_ndim": 0}),
        ((last(mu), last(x)), {"sample_shape": (2,)}),
    ):
        kl = "density" not in options
        yield make_arguments("test", *tensors, z=True, kl=kl, seed=1, **options)


def test_opcheck():
    for call in ops_arguments():
        args = list(LATENT.flatten(call))
        args[:4] = [t if t is None else t.detach().requires_grad_() for t in args[:4]]
        torch.library.opcheck(torch.ops.reparam_kernels.latent.default, args)
        outputs = LATENT.registered(call)
        grads = [None if t is None else torch.randn_like(t) for t in outputs]
        wanted = [t is not None for t in call[:4]]
        torch.library.opcheck(torch.ops.reparam_kernels.latent_backward.default, (*args, *grads, wanted))


def test_compiled_code_has_the_bits_and_the_strides_of_eager():
    moments = last(packed_like((2, 4, 6, 5)).requires_grad_())

    def step(moments):
        z, kl = rk.DiagonalGaussian.from_moments(moments).rsample_kl(seed=3)
        return torch.nn.functional.silu(z), kl

    def results(f):
        z, kl = f(moments)
        return z, kl, *torch.autograd.grad(z.sum() + kl.sum(), moments)

    for got, want in zip(results(torch.compile(step, fullgraph=True)), results(step), strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want)


def test_transforms_and_higher_derivatives():
    mu, x = (t.double() for t in inputs((2, 3, 2, 2)))

    def f(mu, x):
        z, kl = rk.reparameterize_kl(mu, x, seed=3)
        return (z**2).sum() + (kl**2).sum()

    for transform in (torch.func.grad(f, argnums=(0, 1)), torch.func.hessian(f)):
        torch.testing.assert_close(transform(last(mu), last(x)), transform(mu, x))
    stacked = torch.stack([mu, mu + 1])
    for function in (lambda m: rk.reparameterize(m, x, seed=3), lambda m: rk.reparameterize_log_prob(m, x, seed=3)[0]):
        got = torch.vmap(function)(torch.stack([mu, mu + 1]).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3))
        torch.testing.assert_close(got, torch.vmap(function)(stacked))
    leaves = [last(mu.clone().requires_grad_()), last(x.clone().requires_grad_())]
    assert torch.autograd.gradgradcheck(f, leaves)
    z = torch.utils.checkpoint.checkpoint(lambda m, v: rk.reparameterize(m, v, seed=3), *leaves, use_reentrant=False)
    assert is_last(z)
    want = torch.autograd.grad(rk.reparameterize(*leaves, seed=3).sum(), leaves)
    assert all(torch.equal(g, w) for g, w in zip(torch.autograd.grad(z.sum(), leaves), want, strict=True))
