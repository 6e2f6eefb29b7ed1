"""Every output may be changed in place in every mode: backward does not need it, and no input shares its memory."""

import contextlib
import warnings

import pytest
import torch
from torch import distributions as td
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import reparam_kernels as rk
from reparam_kernels.distributions import Normal

OPS = {
    "reparameterize": lambda mu, x: rk.reparameterize(mu, x, seed=7),
    "given eps": lambda mu, x: rk.reparameterize(mu, x, eps=torch.ones_like(mu)),
    "kl_divergence": lambda mu, x: rk.kl_divergence(mu, x),
    "elementwise": lambda mu, x: rk.kl_divergence(mu, x, event_ndim=0),
    "reparameterize_kl": lambda mu, x: rk.reparameterize_kl(mu, x, seed=7),
    "samples": lambda mu, x: rk.reparameterize_kl(mu, x, seed=7, sample_shape=(2,), event_ndim=0),
    "no samples": lambda mu, x: rk.reparameterize_kl(mu, x, seed=7, sample_shape=(0,)),
    "prior": lambda mu, x: rk.reparameterize_kl(mu, x, seed=7, prior=(x, mu)),
    "prior of numbers": lambda mu, x: rk.reparameterize_kl(mu, x, seed=7, prior=(0.0, 1.0)),
    "std": lambda mu, x: rk.reparameterize_kl(mu, x.exp(), seed=7, param="std"),
    "softplus": lambda mu, x: rk.reparameterize_kl(mu, x, seed=7, param="softplus", clamp=(-1.0, 1.0), event_ndim=0),
    "float64": lambda mu, x: rk.reparameterize_kl(mu.double(), x.double(), seed=7, event_ndim=0),
    "reference": lambda mu, x: rk.reference.reparameterize_kl(mu.double(), x.double(), seed=7, event_ndim=0),
    "packed": lambda mu, x: rk.DiagonalGaussian.from_moments(torch.cat([mu, x], 1)).rsample_kl(seed=7),
    "std and kl": lambda mu, x: ((q := rk.DiagonalGaussian(mu, x.exp(), param="std")).kl(), q.std, q.logvar),
    "logvar and kl": lambda mu, x: ((q := rk.DiagonalGaussian(mu, x)).kl(), q.std, q.logvar),
    "std of the input": lambda mu, x: rk.DiagonalGaussian(mu, x, param="std").std,
    "mode and kl": lambda mu, x: ((q := rk.DiagonalGaussian(mu, x)).kl(), q.mode()),
    "mode, packed": lambda mu, x: ((q := rk.DiagonalGaussian.from_moments(torch.cat([mu, x], 1))).kl(), q.mode()),
    "head": lambda mu, x: HEAD.train()(mu, seed=7, sample_shape=(2,)),
    "head in eval": lambda mu, x: HEAD.eval()(mu),
    "head in eval, samples": lambda mu, x: HEAD.eval()(mu, sample_shape=(2,)),
    "Normal": lambda mu, x: (Normal(mu, x.exp(), validate_args=False).rsample((2,)),
                             td.kl_divergence(Normal(mu, x.exp(), validate_args=False), PRIOR)),
    "balanced_kl": lambda mu, x: rk.losses.balanced_kl(mu, x, prior=(x, mu)),
}  # fmt: skip
PRIOR = td.Normal(0.0, 1.0)
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


HEAD = rk.GaussianHead(4, 4, mean_in_eval=True, clamp=(-1.0, 1.0)).requires_grad_(False)


def leaves(requires_grad=True):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=g).requires_grad_(requires_grad) for _ in "ab"]


def tensors(out):
    return out if isinstance(out, tuple) else (out,)


def changed(op):
    """Return the op with each output tripled and shifted, in place and out of place."""

    def out_of_place(mu, x):
        return tuple(3 * y + 1 for y in tensors(op(mu, x)))

    def in_place(mu, x):
        out = tensors(op(mu, x))
        for y in out:
            y.mul_(3).add_(1)
        return out

    return in_place, out_of_place


def backward(f, **options):
    mu, x = leaves()
    out = f(mu, x)
    for y in out:
        y.add_(1)  # after the op too
    grads = torch.autograd.grad([y.square().sum() for y in out], (mu, x), allow_unused=True, **options)
    return (*out, *(g for g in grads if g is not None))


def func(transform):
    def run(f):
        mu, x = leaves(False)
        return transform(f, mu, x)

    return run


def with_tangents(f):
    mu, x = leaves(False)
    with forward_ad.dual_level():
        out = f(forward_ad.make_dual(mu, x), forward_ad.make_dual(x, mu))
        return tuple(t for y in out for t in forward_ad.unpack_dual(y) if t is not None)


def compiled(f):
    torch.compiler.reset()
    return backward(torch.compile(f, backend="aot_eager"))


def traced(f):
    mu, x = leaves(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates jit.trace
        return torch.jit.trace(f, (mu, x), check_trace=False)(mu, x)


def without_gradients(context):
    def run(f):
        with context():
            return f(*leaves(False))

    return run


def summed(f):
    return lambda m, v: sum(y.square().sum() for y in f(m, v))


MODES = {
    "backward": backward,
    "create_graph": lambda f: backward(f, create_graph=True),
    "no_grad": without_gradients(torch.no_grad),
    "inference_mode": without_gradients(torch.inference_mode),
    "no tensor learns": without_gradients(contextlib.nullcontext),
    "vmap": func(lambda f, mu, x: torch.vmap(f, randomness="same")(mu[None].expand(2, 3, 4), x[None].expand(2, 3, 4))),
    "grad": func(lambda f, mu, x: torch.func.grad(summed(f), (0, 1))(mu, x)),
    "vjp": func(lambda f, mu, x: torch.func.vjp(f, mu, x)[0]),
    "jvp": func(lambda f, mu, x: torch.func.jvp(f, (mu, x), (x, mu))[1]),
    "forward mode": with_tangents,
    "checkpoint": lambda f: backward(lambda m, v: checkpoint(f, m, v, use_reentrant=False)),
    "compile": compiled,
    "jit.trace": traced,
}


@ops
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_output_may_be_changed_in_place(op, mode):
    results = []
    for f in changed(op):
        torch.manual_seed(0)
        results.append(mode(f))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@ops
def test_no_output_shares_memory_with_an_input_or_another_output(op):
    mu, x = leaves()
    out = tensors(op(mu, x))
    owners = [t.untyped_storage().data_ptr() for t in (mu, x, *out) if t.numel()]
    assert len(set(owners)) == len(owners)
    before = mu.detach().clone(), x.detach().clone()
    with torch.no_grad():
        for y in out:
            y.fill_(7)
    assert torch.equal(mu, before[0])
    assert torch.equal(x, before[1])


def test_the_head_in_eval_after_an_in_place_change_gives_the_gradient_of_training():
    torch.manual_seed(0)
    module = rk.GaussianHead(4, 2, mean_in_eval=True).eval()
    h = torch.randn(3, 4)
    z, kl = module(h)
    z.add_(1)
    (z.sum() + kl.sum()).backward()
    mu, logvar = module.mu(h), module.logvar(h)
    loss = (mu + 1).sum() + (mu**2 + logvar.exp() - 1 - logvar).sum() / 2
    for p, want in zip(module.parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5)
