"""What only a GPU can show: graphs, streams, compiled code, memory. `TEST_DEVICE=cuda python -m pytest -m cuda`.

TEST_DEVICE=cpu rehearses the tests that need no CUDA function, in Triton's interpreter.
"""

from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import reparam_kernels as rk
from reparam_kernels.core import backends
from tests.cases import PARAMS, inputs
from tests.conftest import DEVICE, forget

pytestmark = pytest.mark.cuda


@pytest.fixture
def device(monkeypatch):
    """The device, whose kernels are Triton's."""
    if DEVICE is None:
        pytest.skip("TEST_DEVICE names no device")
    if DEVICE == "cpu":
        monkeypatch.setattr(backends, "FORCED", "triton")
    forget()
    yield torch.device(DEVICE)
    forget()


@pytest.fixture
def gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


def on(device, tensors, **options):
    return [t.detach().to(device, **options).requires_grad_() for t in tensors]


SMALL = [(1,), (7,), (4, 5), (130, 20), (3, 129), (2, 2053), (2, 3, 5), (2, 4, 3, 3)]


def small_calls(device, shapes=SMALL, params=PARAMS):
    """Run every op forward and backward at small odd sizes, for compute-sanitizer."""
    for shape in shapes:
        for param in params:
            mu, x = on(device, inputs(shape, param=param))
            prior = tuple(on(device, inputs(shape[-1:], param=param, seed=1)))
            calls = [
                rk.reparameterize_kl(mu, x, param=param, prior=prior, seed=3),
                (rk.reparameterize(mu, x, param=param, sample_shape=(3,), seed=3),),
                (rk.kl_divergence(mu, x, param=param, event_ndim=0),),
                rk.reparameterize_log_prob(mu, x, param=param, squash="tanh", sample_shape=(2,), seed=3),
                rk.reparameterize_mc_kl(mu, x, param=param, prior=prior, seed=3),
            ]
            for out in calls:
                sum(t.sum() for t in out).backward()
        seeds = torch.arange(shape[0], device=device)
        z = rk.randn(*shape, seed=seeds, device=device)
        moments = torch.cat([z.new_zeros(2, *shape), z.new_ones(2, *shape)], 1).requires_grad_()
        rk.DiagonalGaussian.from_moments(moments, dim=1).rsample_kl(seed=2)[0].sum().backward()
    z, mu, x = (t.detach().to(device).requires_grad_() for t in (*inputs((37, 11)), inputs((37, 11), seed=1).x))
    for out in ((rk.mixture_log_prob(z, mu, x),), rk.mixture_log_prob(z, mu, x, of="both")):
        sum(t.sum() for t in out).backward()


def test_small_calls(device):
    if device.type == "cuda":
        small_calls(device)
        torch.cuda.synchronize()
    else:
        small_calls(device, [(4, 5)], ["logvar"])


@pytest.mark.parametrize("param", PARAMS)
def test_first_and_second_derivatives_pass_gradcheck(device, param):
    mu, x = on(device, inputs((3, 5), torch.float64, param, scale=0.5))
    mu_p, x_p = on(device, inputs((5,), torch.float64, param, scale=0.5, seed=1))

    def latent(mu, x, mu_p, x_p):
        return rk.reparameterize_kl(mu, x, prior=(mu_p, x_p), param=param, seed=7)

    def density(mu, x):
        return rk.reparameterize_log_prob(mu, x, squash="tanh", param=param, sample_shape=(2,), seed=7)

    for f, leaves in ((latent, (mu, x, mu_p, x_p)), (density, (mu, x))):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


def test_a_mixture_passes_gradcheck(device):
    (z, mu), x = on(device, inputs((4, 3), torch.float64)), on(device, inputs((4, 3), torch.float64, seed=1))[1]

    def f(z, mu, x):
        return rk.mixture_log_prob(z, mu, x, of="both")

    assert torch.autograd.gradcheck(f, (z, mu, x))
    assert torch.autograd.gradgradcheck(f, (z, mu, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 20), (5, 128), (3, 2053)])
def test_a_half_dtype_is_rounded_to_nearest(device, dtype, shape):
    """The interpreter cuts bfloat16 off."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off")
    mu, x = inputs(shape, dtype)
    got = rk.reparameterize(mu.to(device), x.to(device), seed=11).cpu().double()
    eps = rk.randn(shape, seed=11, device=device).cpu().double()
    want = rk.reference.reparameterize(mu.double(), x.double(), eps=eps)
    half_ulp = torch.finfo(dtype).eps / 2 * want.abs()
    assert ((got - want).abs() <= half_ulp * (1 + 1e-3) + 1e-6).all()


def test_a_checkpoint_and_autocast_give_the_numbers_of_a_plain_call(device):
    mu, x = on(device, inputs((64, 20)))

    def f(mu, x):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            z, kl = rk.reparameterize_kl(mu, x)
            return z.square().sum() + kl.sum()

    torch.manual_seed(5)
    plain = torch.autograd.grad(f(mu, x), (mu, x))
    torch.manual_seed(5)
    again = torch.autograd.grad(checkpoint(f, mu, x, use_reentrant=False), (mu, x))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


class Video(torch.nn.Module):
    """A convolution with a learned prior, of which z alone reaches the loss."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.prior = torch.nn.Parameter(torch.zeros(2, 4, 1, 1))

    def forward(self, images):
        mu, logvar = self.encoder(images).chunk(2, 1)
        z, _ = rk.reparameterize_kl(mu, logvar, prior=(self.prior[0], self.prior[1]))
        return z.square().mean()


def gradients_of(module, *args):
    module.zero_grad()
    module(*args).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_a_compiled_channels_last_model_has_the_gradients_of_eager(device):
    torch.manual_seed(0)
    module = Video().to(device).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 8, 8).to(device).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    want = gradients_of(module, images)
    compiled = torch.compile(module, backend="inductor" if device.type == "cuda" else "aot_eager")
    torch.manual_seed(1)
    got = gradients_of(compiled, images)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_nothing_waits_for_the_gpu(gpu):
    mu, x = on(gpu, inputs((64, 20)))
    z, mu_c, x_c = (t.detach().requires_grad_() for t in (mu, mu, x))

    def step():
        out = rk.reparameterize_kl(mu, x)
        density = rk.reparameterize_log_prob(mu, x)
        mixture = rk.mixture_log_prob(z, mu_c, x_c)
        torch.autograd.grad([t.sum() for t in (*out, *density, mixture)], (mu, x, z, mu_c, x_c))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_of_every_batch_size_after_one_warm_up(gpu):
    """A capture may load no kernel: those of the warm-up serve every batch."""
    rows = 128
    whole = on(gpu, inputs((rows, 20)))

    def step(mu, x):
        z, kl = rk.reparameterize_kl(mu, x)
        return z, kl, *torch.autograd.grad((z, kl), (mu, x), (torch.ones_like(z), torch.ones_like(kl)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*whole)
    torch.cuda.current_stream().wait_stream(side)
    for batch in (1, 2, 3, 4, 8, 17, 32, 64, 96, 128):
        mu, x = (t.detach()[:batch].clone().requires_grad_() for t in whole)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z, kl, dmu, dx = step(mu, x)
        seen = []
        for _ in range(3):
            graph.replay()
            seen.append(z.detach().clone())
        assert all(not torch.equal(a, b) for a, b in pairwise(seen))  # fresh noise at each replay
        eps = ((seen[-1] - mu) / (x / 2).exp()).detach()
        want = rk.reference.reparameterize_kl(mu, x, eps=eps)
        grads = torch.autograd.grad(want, (mu, x), (torch.ones_like(z), torch.ones_like(kl)))
        for got, true in zip((kl, dmu, dx), (want[1], *grads), strict=True):
            torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-4)


def test_make_graphed_callables_trains(gpu):
    torch.manual_seed(0)
    head = rk.GaussianHead(32, 8).to(gpu)
    features = torch.randn(64, 32, device=gpu, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(head, (features,))
    (z, kl), (again, _) = graphed(features), graphed(features)
    (z.square().mean() + kl.mean()).backward()
    assert not torch.equal(z, again)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_reduce_overhead_draws_fresh_noise_and_the_right_gradients(gpu):
    mu, x = on(gpu, inputs((64, 20)))

    @torch.compile(mode="reduce-overhead")
    def f(mu, x):
        return rk.reparameterize_kl(mu, x)

    seen = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        z, kl = f(mu, x)
        dmu, _ = torch.autograd.grad((z.sum() + kl.sum()), (mu, x))
        seen.append(z.detach().clone())
        torch.testing.assert_close(dmu, 1 + mu.detach())
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_compiled_code_draws_what_eager_draws(gpu):
    mu, x = on(gpu, inputs((64, 20)))
    torch.manual_seed(3)
    want = rk.reparameterize(mu, x)
    torch.manual_seed(3)
    got = torch.compile(rk.reparameterize)(mu, x)
    assert torch.equal(got, want)


def test_backward_runs_in_the_stream_of_forward(gpu):
    mu, x = on(gpu, inputs((512, 512)))
    want = torch.autograd.grad(rk.reparameterize(mu, x, seed=1).square().sum(), (mu, x))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.zeros_like(mu)
        torch.cuda._sleep(20_000_000)
        late.copy_(mu.detach())
        late.requires_grad_()
        got = torch.autograd.grad(rk.reparameterize(late, x, seed=1).square().sum(), (late, x))
    torch.cuda.synchronize()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_a_second_device_while_the_first_is_current(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    torch.cuda.set_device(0)
    results = []
    for index in (0, 1):
        mu, x = on(f"cuda:{index}", inputs((64, 20)))
        out = rk.reparameterize_kl(mu, x, seed=3)
        results.append([t.detach().cpu() for t in (*out, *torch.autograd.grad([t.sum() for t in out], (mu, x)))])
    assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_only_the_inputs_and_the_seed_are_kept_for_backward(gpu):
    mu, x = on(gpu, inputs((4096, 1024)))
    rk.reparameterize_kl(mu, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    z, kl = rk.reparameterize_kl(mu, x)
    assert torch.cuda.memory_allocated() - before <= z.nbytes + kl.nbytes + 4096
    peak = torch.cuda.max_memory_allocated
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ones = torch.ones_like(z), torch.ones_like(kl)
    torch.autograd.grad((z, kl), (mu, x), ones)
    assert peak() - before <= 3 * z.nbytes + kl.nbytes + 2**16  # the gradient to z and those to mu and x


def test_a_step_is_two_kernels_and_the_draw_of_a_seed(gpu):
    mu, x = on(gpu, inputs((512, 128)))
    grads = torch.ones(512, 128, device=gpu), torch.ones(512, device=gpu)

    def step():
        torch.autograd.grad(rk.reparameterize_kl(mu, x), (mu, x), grads)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in launched if "forward_kernel" in name or "backward_kernel" in name]
    assert len(ours) == 2, launched
    assert len(launched) <= 3, launched
