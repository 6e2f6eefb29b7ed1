"""The ops inside training programs: random state, mixed precision, modules, processes and threads."""

import os
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import reparam_kernels as rk
from reparam_kernels.core import torch_modes

# ---- random state


def draw(**options):
    return rk.reparameterize(torch.zeros(4, 6), torch.zeros(4, 6), **options)


def test_manual_seed_and_fork_rng():
    torch.manual_seed(1)
    a, b = draw(), draw()
    assert not torch.equal(a, b)
    torch.manual_seed(1)
    with torch.random.fork_rng():
        draw()
        torch.manual_seed(5)
    assert torch.equal(draw(), a)
    state = torch.get_rng_state()
    c = draw()
    torch.set_rng_state(state)
    assert torch.equal(draw(), c)


def test_a_given_generator_is_the_only_one_used():
    before = torch.get_rng_state()
    first = draw(generator=torch.Generator().manual_seed(3))
    again = draw(generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("op", [rk.reparameterize, rk.reparameterize_kl, lambda m, v: rk.randn(4, 6)])
def test_a_sampling_call_draws_once(op):
    mu = torch.zeros(4, 6)
    torch.manual_seed(1)
    op(mu, mu)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.randint(2**63 - 1, (1,))
    assert torch.equal(torch.get_rng_state(), after)


def test_draw_seed_draws_what_a_call_would_draw():
    mu = torch.zeros(4, 6)
    for generator in (None, torch.Generator()):
        (generator or torch.default_generator).manual_seed(1)
        seed = rk.draw_seed(mu.device, generator)
        (generator or torch.default_generator).manual_seed(1)
        assert torch.equal(rk.reparameterize(mu, mu, generator=generator), rk.reparameterize(mu, mu, seed=seed))
        assert (seed.dtype, tuple(seed.shape)) == (torch.int64, (1,))
    assert rk.draw_seed("meta").device.type == "meta"
    assert rk.draw_seed(generator=torch.Generator()).device.type == "cpu"


def test_kl_and_eps_draw_nothing():
    mu = torch.zeros(4, 6)
    before = torch.get_rng_state()
    rk.kl_divergence(mu, mu)
    rk.reparameterize(mu, mu, eps=mu)
    rk.reparameterize(mu, mu, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def gradients(f):
    mu, x = (torch.linspace(-1, 1, 24).reshape(4, 6).requires_grad_() for _ in "ab")
    torch.manual_seed(2)
    f(mu, x).sum().backward()
    return mu.grad, x.grad


def two_draws(mu, x):
    z, kl = rk.reparameterize_kl(mu, x)
    return (rk.reparameterize(z, x) ** 2).sum(1) + kl


@pytest.mark.parametrize(
    ("reentrant", "nested", "compiled"),
    [(False, False, False), (True, False, False), (False, True, False), (True, True, False), (False, False, True)],
)
def test_a_checkpoint_recomputes_the_same_noise(reentrant, nested, compiled):
    def once(mu, x):
        return checkpoint(two_draws, mu, x, use_reentrant=reentrant)

    def twice(mu, x):
        return checkpoint(once, mu, x, use_reentrant=reentrant)

    run = twice if nested else once
    if compiled:
        torch.compiler.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(run), gradients(two_draws), strict=True):
        assert torch.equal(got, want)


# ---- mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_z_in_half_and_kl_in_float32(dtype):
    head, h = rk.GaussianHead(5, 3), torch.randn(4, 5)
    with torch.autocast("cpu", dtype):
        z, kl = head(h, seed=7)
    assert (z.dtype, kl.dtype) == (dtype, torch.float32)
    (z.float().sum() + kl.sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in head.parameters())


def test_mixed_floats_promote_inside_autocast_and_are_refused_outside():
    mu, x = torch.randn(4, 6).bfloat16().requires_grad_(), torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        z, kl = rk.reparameterize_kl(mu, x, seed=7)
    want = rk.reparameterize_kl(mu.float(), x, seed=7)
    assert torch.equal(z, want[0])
    assert torch.equal(kl, want[1])
    (z.sum() + kl.sum()).backward()
    assert (mu.grad.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(TypeError, match="must have the dtype of mu"):
        rk.reparameterize_kl(mu, x)


def test_a_scaled_float16_step_does_not_overflow():
    """GradScaler multiplies by 65536, at a logvar whose KL overflows in plain float16."""
    mu = torch.full((4, 6), 0.5, dtype=torch.float16, requires_grad=True)
    x = torch.full((4, 6), 20.0, dtype=torch.float16, requires_grad=True)
    plain = (-0.5 * (1 + x - mu**2 - x.exp())).sum(1)
    assert plain.isinf().all()
    kl = rk.kl_divergence(mu, x)
    torch.testing.assert_close(kl.double(), (0.25 + torch.expm1(x.double()) - x.double()).sum(1) / 2, rtol=1e-6, atol=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    parameter = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([parameter], 1.0)
    small = rk.kl_divergence(mu * 0 + parameter.half(), torch.zeros_like(x)).sum()
    scaler.scale(small + parameter).backward()
    scaler.step(optimizer)
    assert parameter.item() == -1.0


# ---- modules


def test_a_parametrized_head():
    class Half(torch.nn.Module):
        def forward(self, w):
            return w / 2

    head, h = rk.GaussianHead(5, 3), torch.randn(4, 5)
    want = rk.reparameterize_kl(torch.nn.functional.linear(h, head.mu.weight / 2, head.mu.bias), head.logvar(h), seed=7)
    parametrize.register_parametrization(head.mu, "weight", Half())
    for got, w in zip(head(h, seed=7), want, strict=True):
        assert torch.equal(got, w)


def test_jit_trace_of_a_head():
    head, h = rk.GaussianHead(5, 3), torch.randn(4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates jit.trace
        traced = torch.jit.trace(head, (h,), check_trace=False)
    torch.manual_seed(3)
    got = traced(h)
    torch.manual_seed(3)
    for g, w in zip(got, head(h), strict=True):
        assert torch.equal(g, w)


# ---- processes


def processes(body):
    """Run body in two processes joined by gloo and return what each printed."""
    code = (
        """
import os, sys, torch, torch.distributed as dist, reparam_kernels as rk
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
"""
        + textwrap.dedent(body)
        + "dist.barrier(); dist.destroy_process_group()"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        command = [sys.executable, "-W", "ignore", "-c", code]
        runs = [subprocess.Popen([*command, str(r), path], stdout=subprocess.PIPE, text=True) for r in range(2)]
        outputs = [run.communicate(timeout=120)[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    # gloo of torch 2.10 prints when it connects
    return [" ".join(line for line in lines if not line.startswith("[Gloo]")).split() for lines in outputs]


def test_two_processes_have_equal_noise_for_equal_seeds_only():
    a, b = processes("""
        torch.manual_seed(1)
        z = rk.randn(100)
        torch.manual_seed(1 + rank)
        own = rk.randn(100)
        print(z.double().sum().item().hex(), own.double().sum().item().hex())
    """)
    assert a[0] == b[0]
    assert a[1] != b[1]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_data_parallel_heads_learn_as_one(wrap):
    """Two ranks, each with half of the batch and per-item seeds, give the gradient of the whole batch."""
    a, b = processes(f"""
        wrap = {wrap!r}
        torch.manual_seed(0)
        head = rk.GaussianHead(5, 4)
        h, seeds = torch.randn(8, 5), torch.arange(8)

        def loss(module, rows):
            z, kl = module(h[rows], seed=seeds[rows])
            return (z.square().sum(1) + kl).mean()

        loss(head, slice(None)).backward()
        want = [p.grad.clone() for p in head.parameters()]
        head.zero_grad()
        if wrap == "ddp":
            module = torch.nn.parallel.DistributedDataParallel(head)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            module = fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
        loss(module, slice(4 * rank, 4 * rank + 4)).backward()
        grads = [p.grad.full_tensor() if wrap == "fsdp2" else p.grad for p in module.parameters()]
        print(all(torch.allclose(g, w, atol=1e-6) for g, w in zip(grads, want)))
    """)
    assert a == b == ["True"]


# ---- threads


def test_eight_threads_give_what_one_gives():
    def work(seed):
        mu, x = (torch.full((64, 33), v, requires_grad=True) for v in (0.5, -0.25))
        z, kl = rk.reparameterize_kl(mu, x, seed=seed)
        (z.square().sum() + kl.sum()).backward()
        return z.detach(), kl.detach(), mu.grad, x.grad

    want = [work(seed) for seed in range(8)]
    for _ in range(5):
        got = [None] * 8

        def one(seed, got=got):
            got[seed] = work(seed)

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for g, w in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(g, w, strict=True))


# ---- private names of torch


@pytest.mark.parametrize("name", ["_functorch_level", "_dispatch_modes", "_tracing_state", "_is_legacy_batched"])
def test_private_torch_names_behave_as_before(name):
    """If this fails, torch has changed: read reparam_kernels/core/torch_modes.py against the new release."""
    assert callable(getattr(torch_modes, name))


def test_constant_marker_matches_torch():
    """If this fails, torch has changed: see constant_to_the_compiler in reparam_kernels/core/torch_modes.py."""
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(marked) == vars(torch_modes.constant_to_the_compiler(lambda: True)) != {}


def test_modes_are_distinguished():
    """If this fails, torch has changed: see reparam_kernels/core/torch_modes.py and execute.py."""
    from torch.utils.flop_counter import FlopCounterMode

    assert not torch_modes.in_dispatch_mode()
    assert not torch_modes.in_transform()
    seen = {}

    def look(name, t):
        seen[name] = (torch_modes.in_dispatch_mode(), torch_modes.in_transform())
        return t

    torch.func.vmap(lambda t: look("vmap", t))(torch.zeros(2))
    torch.func.jvp(lambda t: look("jvp", t), (torch.zeros(2),), (torch.zeros(2),))
    with torch.autograd.forward_ad.dual_level():
        look("dual", torch.zeros(2))
    with FlopCounterMode(display=False):
        look("mode", torch.zeros(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda t: look("trace", t + 1), (torch.zeros(2),), check_trace=False)
    assert seen == {
        "vmap": (False, True),
        "jvp": (False, True),
        "dual": (False, True),
        "mode": (True, False),
        "trace": (True, False),
    }
