"""Outputs, seeds and numbers are on the device of the inputs, not on the CPU or on torch's default device."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributions as td
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import reparam_kernels as rk
from reparam_kernels import selftest
from reparam_kernels.distributions import Normal, TanhNormal
from reparam_kernels.integrations import diffusers, ldm
from reparam_kernels.ops.latent.arguments import make_arguments
from reparam_kernels.ops.latent.op import LATENT
from tests.conftest import RequiresDevice, forget, use_backend

GENERATOR = torch.Generator()
PRIOR = td.Normal(0.0, 1.0)


def head(mu, **options):
    """Make a head on the device of mu with weights of one, since a CPU build of torch cannot draw on a fake GPU."""
    with mock.patch.object(torch.nn.Linear, "reset_parameters", return_value=None):
        module = rk.GaussianHead(6, 3, device=mu.device, **options)
    for p in module.parameters():
        torch.nn.init.ones_(p)
    return module


# Every public function, on tensors like mu; a function that makes its tensors gets the device.
CALLS = {
    "randn": lambda mu, x: rk.randn(4, 6, device=mu.device),
    "randn, seed": lambda mu, x: rk.randn(4, 6, device=mu.device, seed=7),
    "randn, generator": lambda mu, x: rk.randn(4, 6, device=mu.device, generator=GENERATOR),
    "draw_seed": lambda mu, x: rk.draw_seed(mu.device),
    "draw_seed, generator": lambda mu, x: rk.draw_seed(mu.device, GENERATOR),
    "reparameterize": lambda mu, x: rk.reparameterize(mu, x),
    "reparameterize, seed": lambda mu, x: rk.reparameterize(mu, x, seed=7),
    "reparameterize, seeds": lambda mu, x: rk.reparameterize(mu, x, seed=torch.arange(4, device=mu.device)),
    "reparameterize, generator": lambda mu, x: rk.reparameterize(mu, x, generator=GENERATOR),
    "reparameterize, eps": lambda mu, x: rk.reparameterize(mu, x, eps=x),
    "reparameterize, samples": lambda mu, x: rk.reparameterize(mu, x, sample_shape=(3,)),
    "kl_divergence": lambda mu, x: rk.kl_divergence(mu, x),
    "kl_divergence, elementwise": lambda mu, x: rk.kl_divergence(mu, x, event_ndim=0),
    "kl_divergence, numbers": lambda mu, x: rk.kl_divergence(mu, x, prior=(0.0, 1)),
    "kl_divergence, 0-dim": lambda mu, x: rk.kl_divergence(mu, x, prior=(torch.tensor(0.0, device="cpu"), 1.0)),
    "reparameterize_kl": lambda mu, x: rk.reparameterize_kl(mu, x),
    "reparameterize_kl, prior": lambda mu, x: rk.reparameterize_kl(mu, x, prior=(x.select(0, 0), mu.narrow(1, 0, 1))),
    "softplus": lambda mu, x: rk.reparameterize_kl(mu, x, param="softplus", min_std=0.1, prior=(0.5, 1.0)),
    "DiagonalGaussian": lambda mu, x: (q := rk.DiagonalGaussian(mu, x), q.rsample(), q.sample((2,)), q.kl(), q.kl(q),
                                       *q.rsample_kl(q), q.log_prob(mu), q.mode(), q.mean, q.std, q.logvar,
                                       q.entropy(), q.kl(PRIOR))[1:],
    "from_moments": lambda mu, x: rk.DiagonalGaussian.from_moments(torch.cat([mu, x], 1)).rsample_kl(),
    "GaussianHead": lambda mu, x: head(mu)(mu, prior=(0.0, 0.0)),
    "GaussianHead, eval": lambda mu, x: head(mu, mean_in_eval=True).eval()(mu, sample_shape=(2,)),
    "Normal": lambda mu, x: ((q := Normal(mu, x.exp(), validate_args=False)).rsample(), q.sample((2,)), q.log_prob(mu),
                             td.kl_divergence(q, PRIOR), td.kl_divergence(PRIOR, q)),
    "Normal, numbers": lambda mu, x: Normal(mu, 1.0, validate_args=False).rsample((2,)),
    "balanced_kl": lambda mu, x: rk.losses.balanced_kl(mu, x, prior=(x, mu)),
    "losses": lambda mu, x: (kl := rk.kl_divergence(mu, x, event_ndim=0),
                             rk.losses.free_bits_per_dimension(kl, 0.5), rk.losses.free_bits_per_sample(kl, 0.5),
                             rk.losses.free_bits_after_mean(kl, 0.5), rk.losses.capacity_loss(kl, 2.0, gamma=1.0),
                             rk.losses.masked_mean(kl, torch.ones_like(kl))),
    "log-density": lambda mu, x: (*rk.reparameterize_log_prob(mu, x, squash="tanh", sample_shape=(2,)),
                                  *rk.reparameterize_mc_kl(mu, x, prior=(x, 0.5)),
                                  *rk.DiagonalGaussian(mu, x).rsample_and_log_prob(), rk.randn_like(mu)),
    "TanhNormal": lambda mu, x: TanhNormal(mu, 1.0, validate_args=False).rsample_and_log_prob((2,)),
    "bounds": lambda mu, x: ((draw := rk.reparameterize_log_prob(mu, x, sample_shape=(2,))),
                             rk.losses.iwae(draw[1]), rk.losses.dreg(draw[1], *draw),
                             rk.losses.vimco(draw[1], draw[1]))[1:],
    "mixture": lambda mu, x: (*rk.mixture_log_prob(mu, mu, x, of="both"),
                              rk.mixture_log_prob(mu, mu, x, log_weights=rk.losses.minibatch_log_weights(4, 9)),
                              *rk.losses.total_correlation(mu.select(1, 0), mu.select(1, 1), mu, mu.select(1, 2))),
    "reference": lambda mu, x: (*rk.reference.reparameterize_kl(mu, x, prior=(0.0, 1.0), seed=7),
                                rk.reference.randn(4, 6, device=mu.device), rk.reference.kl_divergence(mu, x),
                                rk.reference.reparameterize(mu, x)),
    "diffusers": lambda mu, x: ((q := diffusers.DiagonalGaussianDistribution(torch.cat([mu, x], 1).view(4, 12, 1, 1)))
                                .sample(), q.mode(), q.kl(), q.kl(q), q.nll(q.mean), q.std, q.var),
    "diffusers, philox": lambda mu, x: diffusers.OobleckDiagonalGaussianDistribution(
        torch.cat([mu, x], 1).view(4, 12, 1), noise="philox").sample(),
    "ldm": lambda mu, x: (ldm.DiagonalGaussianDistribution(torch.cat([mu, x], 1).view(4, 12, 1, 1)).sample(),
                          ldm.normal_kl(mu, x, 0.0, torch.tensor(1.0, device="cpu"))),
}  # fmt: skip
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def pair():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, generator=g).requires_grad_() for _ in "ab"]


def tensors(out):
    return out if isinstance(out, tuple) else (out,)


def test_every_public_function_is_among_the_calls():
    schedules = {"linear_beta", "cyclical_beta", "capacity", "stratified_log_weights"}  # numbers in, numbers out
    functions = {n for n in rk.__all__ if callable(getattr(rk, n))} - {"backend_for"}
    used = " ".join(repr(c.__code__.co_names) for c in (*CALLS.values(), head))
    assert not {name for name in {*functions, *rk.losses.__all__} - schedules if repr(name) not in used}


@calls
@torch.no_grad()  # autograd wants a device's guard, which torch's build for CPUs lacks
def test_outputs_are_on_the_device_of_fake_cuda_inputs_and_no_number_is_read(call):
    """Fake tensors raise at any read of a value; fake CUDA tensors need no GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        mu, x = (torch.empty(4, 6, device="cuda:0") for _ in "ab")
        assert {str(t.device) for t in tensors(call(mu, x))} == {"cuda:0"}


@torch.no_grad()
def test_gradients_are_on_the_device_of_fake_cuda_inputs():
    with FakeTensorMode(allow_non_fake_inputs=True):
        mu, x, mu_p, x_p, dz = (torch.empty(4, 6, device="cuda:0") for _ in range(5))
        call = make_arguments("test", mu, x, z=True, kl=True, seed=7, prior=(mu_p.select(0, 0), x_p))
        grads = LATENT.registered_gradients(call, (dz, dz.select(1, 0), None), [True] * 4)
        assert [str(g.device) for g in grads] == ["cuda:0"] * 4


@calls
@pytest.mark.parametrize("default", ["meta", "cuda"])
def test_the_default_device_does_not_leak_in(call, default):
    """CPU tensors give CPU results; without a GPU, a tensor on the default device "cuda" raises."""

    def run():
        torch.manual_seed(3)
        GENERATOR.manual_seed(3)
        return tensors(call(*leaves))

    leaves = pair()
    want = run()
    with torch.device(default):
        got = run()
    assert {str(t.device) for t in got} == {"cpu"}
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_gradients_under_a_default_device():
    mu, x = pair()

    def gradients(**options):
        z, kl = rk.reparameterize_kl(mu, x, prior=(x[:1], 0.5), seed=7)
        return torch.autograd.grad(z.square().sum() + kl.sum(), (mu, x), **options)

    want = gradients()
    with torch.device("meta"):
        for got in (gradients(), gradients(create_graph=True)):
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w)


def test_randn_follows_the_default_device_as_in_torch():
    with torch.device("meta"):
        assert rk.randn(2, seed=7).device.type == torch.randn(2).device.type == "meta"
        assert rk.reference.randn(2, seed=7).device.type == "meta"


def test_the_self_test_under_a_default_device():
    with torch.device("meta"):
        results = selftest.run(torch.device("cpu"))
    assert {r.verdict for r in results} == {"passed", "skipped"}


def test_the_mode_finds_a_tensor_made_without_a_device(monkeypatch):
    """The mode that guards the other modules must be able to fail."""
    source = compile("import torch\ndef leak(**where): return torch.zeros(2, **where)", "made.py", "exec")
    scope = {"__name__": "reparam_kernels.made"}
    exec(source, scope)
    with RequiresDevice():
        scope["leak"](device="cpu")
        torch.zeros(2)  # made by the test
        with pytest.raises(AssertionError, match=r"reparam_kernels\.made:2: zeros must say on which device"):
            scope["leak"]()


def test_a_device_without_float64_sums_and_runs_the_formula_in_float32(monkeypatch):
    """The CPU stands for the device: in the interpreter for the kernels, and for the formula."""
    from reparam_kernels.core import dtypes
    from reparam_kernels.ops.latent import formula
    from reparam_kernels.ops.latent import triton as launcher

    for module in (dtypes, formula, launcher):
        monkeypatch.setattr(module, "has_float64", lambda device: False)
    mu = torch.full((2, 70_000), 0.1)
    x = torch.linspace(-1, 1, 70_000).expand(2, -1)
    want = ((mu.double() ** 2 + x.double().expm1() - x.double()) / 2).sum(-1)
    for backend, rtol in (("triton", 2e-7), ("reference", 1e-5)):
        use_backend(monkeypatch, backend)
        with NoFloat64() if backend == "reference" else nullcontext():
            kl = rk.kl_divergence(mu, x)
        torch.testing.assert_close(kl.double(), want, rtol=rtol, atol=0.0)
    forget()


class NoFloat64(TorchDispatchMode):
    """Refuses to make a float64 tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, torch.Tensor) or out.dtype != torch.float64, func
        return out
