"""`python -m reparam_kernels selftest` checks the kernels of a device, in less than a minute on a GPU.

Each check yields its failures as text, or raises Skip if it cannot run here. Bits are compared with those of the C++
kernels, which another compiler made for another instruction set; everything else with plain torch in float64.
"""

import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reparam_kernels as rk

from .core import backends
from .ops.latent.arguments import PARAMS, make_arguments
from .ops.noise.formula import philox4x32_10

# The known-answer vectors of philox4x32-10 that have no high counter words (Random123, kat_vectors).
KNOWN = [((0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))]


class Skip(Exception):
    """Raised with the reason if a check cannot run here."""


class Result(NamedTuple):
    name: str
    verdict: str  # passed, FAILED, skipped
    detail: str
    seconds: float


def quick(device: torch.device) -> bool:
    """Return True if a million elements are fast, which they are not in Triton's interpreter."""
    return not (backends.interpreting() and rk.backend_for(torch.empty(0, device=device)) == "triton")


def on_cpu(*args: object, **options: object) -> Tensor:
    """Draw rk.randn by the C++ kernels, whatever backend is forced."""
    try:
        from .ops.noise.cpu import fill_eps
    except ImportError as error:
        raise Skip(f"no C++ kernels to compare with: {error}") from error
    seed = options["seed"]
    seeds = torch.full((1,), seed, device="cpu") if isinstance(seed, int) else seed
    out: Tensor = torch.empty(*args, device="cpu")  # type: ignore[call-overload]
    fill_eps(out, seeds)  # type: ignore[arg-type]
    return out


def latent_on_cpu(mu: Tensor, x: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Compute z and kl by the C++ kernels."""
    on_cpu(1, seed=0)
    from .ops.latent import cpu

    return cpu.forward(make_arguments("selftest", mu, x, z=True, kl=True, **options))  # type: ignore[arg-type,return-value]


def same_bits(name: str, got: Tensor, want: Tensor) -> Iterator[str]:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    unequal = (got.cpu().view(whole) != want.cpu().view(whole)).sum().item()
    if unequal:
        yield f"{name}: {unequal} of {got.numel()} elements have other bits"


def near(name: str, got: Tensor, want: Tensor, tolerance: float) -> Iterator[str]:
    error = ((got.double().cpu() - want.double().cpu()).abs() / (want.double().cpu().abs() + 1)).max().item()
    if not error <= tolerance:
        yield f"{name}: off by {error:.1e}, more than {tolerance:.1e}"


def inputs(shape: tuple[int, ...], param: str = "logvar", seed: int = 0) -> list[Tensor]:
    """Return mu and a second argument that is valid for param, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    mu, x = (torch.randn(shape, generator=g, device="cpu") for _ in range(2))
    return [mu, (0.3 * x).exp() if param == "std" else x]


# ---- the checks


def words(device: torch.device) -> Iterator[str]:
    """Philox's words are the published ones."""
    if rk.backend_for(torch.empty(0, device=device)) == "triton":
        from .gpu.launch import launch
        from .ops.noise import triton_kernels as kernels

        def made(seed: int, first: int, count: int) -> Tensor:
            out = torch.empty(count, 4, dtype=torch.int64, device=device)
            at = torch.tensor([seed, first], device=device)
            grid = ((count + 255) // 256,)
            launch(kernels.words_kernel, grid, out.device, out, at, count, BLOCK=256, enable_fp_fusion=False)
            return out.cpu()
    else:
        from . import _C

        def made(seed: int, first: int, count: int) -> Tensor:
            key = seed & 0xFFFFFFFF, seed >> 32
            each = range(first, first + count)
            return torch.tensor([_C.test_philox((c & 0xFFFFFFFF, c >> 32, 0, 0), key) for c in each], device="cpu")

    for (low, high), seed, expected in KNOWN:
        got = made(seed, low + (high << 32), 1)[0].tolist()
        if tuple(got) != expected:
            yield f"counter {low, high}, seed {seed}: {got}, published {list(expected)}"
    for seed, first in ((2**63 - 1, 2**32 - 100), (7, 0)):
        c = torch.arange(first, first + 1000, device="cpu")
        zero = torch.zeros_like(c)
        key = [torch.tensor(word, device="cpu") for word in (seed & 0xFFFFFFFF, seed >> 32)]
        want = torch.stack(philox4x32_10([c & 0xFFFFFFFF, c >> 32, zero, zero], key), -1)
        yield from same_bits(f"seed {seed}", made(seed, first, 1000), want)


def sqrt_of(x: Tensor) -> Tensor:
    """Compute square roots as the Triton kernels do."""
    from .gpu.launch import compiler, launch
    from .ops.noise import triton_kernels as kernels

    out = torch.empty_like(x)
    grid, constants = ((x.numel() + 255) // 256,), {"INLINE_PTX": compiler() == "cuda", "BLOCK": 256}
    launch(kernels.roots_kernel, grid, x.device, out, x, x.numel(), **constants, enable_fp_fusion=False)
    return out


def roots(device: torch.device) -> Iterator[str]:
    """The square roots of the noise are rounded correctly, those of the two hardest numbers of each exponent too."""
    if rk.backend_for(torch.empty(0, device=device)) != "triton":
        raise Skip("the C++ kernels take the processor's own square root")
    # Of all floats in [1, 4), only these two round wrongly if the device's rsqrt errs by one ulp more than it states.
    hardest = torch.tensor([0x3FFC114A, 0x406E9372], dtype=torch.int32, device="cpu").view(torch.float32)
    scaled = torch.cat([hardest * 4.0**k for k in range(-16, 3)])
    g = torch.Generator().manual_seed(0)
    others = torch.rand(2**20 if quick(device) else 2**10, generator=g, device="cpu") * 46 + 2.0**-32
    x = torch.cat([scaled[scaled <= 46], others])
    yield from same_bits("sqrt", sqrt_of(x.to(device)), x.double().sqrt().float())


def eps(device: torch.device) -> Iterator[str]:
    """eps has the bits of the C++ kernels."""
    n = 2**24 if quick(device) else 2**14
    for seed, count in ((0, n), (2**40 + 7, n // 4 + 3), (2**63 - 1, 1)):
        yield from same_bits(f"seed {seed}", rk.randn(count, seed=seed, device=device), on_cpu(count, seed=seed))
    seeds = torch.arange(5, device="cpu") * 2**33
    got = rk.randn(5, 7, 3, seed=seeds.to(device), device=device)
    yield from same_bits("items", got, on_cpu(5, 7, 3, seed=seeds))


def z(device: torch.device) -> Iterator[str]:
    """z in float32 has the bits of the C++ kernels; kl is within 1e-6 of theirs."""
    rows = 4096 if quick(device) else 8
    for param in PARAMS:
        for width in (1, 5, 20, 127, 128, 2049):
            for samples in ((), (3,)):
                mu, x = inputs((rows if width < 1000 else 4, width), param)
                options = {"seed": 11, "param": param, "sample_shape": samples}
                for prior in (None, (mu.flip(0), x.flip(0))):
                    moved = None if prior is None else (prior[0].to(device), prior[1].to(device))
                    want = latent_on_cpu(mu, x, prior=prior, **options)
                    got = rk.reparameterize_kl(mu.to(device), x.to(device), prior=moved, **options)  # type: ignore[arg-type]
                    what = f"{param}, width {width}, samples {samples}, {'prior' if prior else 'no prior'}"
                    yield from same_bits(f"z: {what}", got[0], want[0])
                    yield from near(f"kl: {what}", got[1], want[1], 1e-6)


def gradients(device: torch.device) -> Iterator[str]:
    """Gradients of z and kl, also to the prior, agree with plain torch in float64."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        for param in PARAMS:
            leaves = [
                t.to(device, dtype).requires_grad_() for t in (*inputs((16, 20), param), *inputs((20,), param, 1))
            ]
            exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
            noise = rk.randn(16, 20, seed=5, device=device, dtype=torch.float32).cpu().double()
            out = rk.reparameterize_kl(*leaves[:2], prior=(leaves[2], leaves[3]), seed=5, param=param)
            true = rk.reference.reparameterize_kl(*exact[:2], prior=(exact[2], exact[3]), eps=noise, param=param)
            got = torch.autograd.grad([t.sum() for t in out], leaves)
            want = torch.autograd.grad([t.sum() for t in true], exact)
            for name, g, w in zip(("dmu", "dx", "dmu_p", "dx_p"), got, want, strict=True):
                yield from near(f"{name}, {param}, {dtype}", g, w, tolerance * max(1.0, w.abs().max().item()))


def sample_with_density(ops: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Return z and log q(z), or z and log q(z) - log p(z) if a prior follows mu and x in the tensors."""
    if len(tensors) > 2:
        return list(ops.reparameterize_mc_kl(*tensors[:2], prior=(tensors[2], tensors[3]), **options))
    return list(ops.reparameterize_log_prob(*tensors, **options))


def log_densities(device: torch.device) -> Iterator[str]:
    """A sample with its log-density or Monte Carlo KL has the bits of z; values and gradients agree with float64."""
    for param in PARAMS:
        pair, pair_p = inputs((5, 40), param), inputs((40,), param, seed=1)
        for kind in ("plain", "path", "tanh", "prior") if param == "logvar" else ("tanh", "prior"):
            leaves = [t.to(device).requires_grad_() for t in (*pair, *(pair_p if kind == "prior" else ()))]
            exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
            options: dict[str, Any] = {"param": param, "sample_shape": (2,), "path_derivative": kind == "path"}
            if kind == "tanh":
                options["squash"] = kind
            eps = rk.randn(2, 5, 40, seed=5, device=device, dtype=torch.float32).cpu().double()
            got = sample_with_density(rk, leaves, seed=5, **options)
            want = sample_with_density(rk.reference, exact, eps=eps, **options)
            what = f"{kind}, {param}"
            if kind != "tanh":
                drawn = rk.reparameterize(*leaves[:2], seed=5, param=param, sample_shape=(2,))
                yield from same_bits(f"z, {what}", got[0].detach(), drawn.detach())
            for name, g, w in zip(("z", "log_q"), got, want, strict=True):
                yield from near(f"{name}, {what}", g, w, 1e-5)
            grads, true_grads = (
                torch.autograd.grad([t.sum() for t in out], x) for out, x in ((got, leaves), (want, exact))
            )
            for name, g, w in zip(("dmu", "dx", "dmu_p", "dx_p"), grads, true_grads, strict=False):
                yield from near(f"{name}, {what}", g, w, 1e-5 * max(1.0, w.abs().max().item()))


def mixture(device: torch.device) -> Iterator[str]:
    """The log-density under a mixture and its gradients agree with plain torch in float64."""
    points, components, dims = (300, 200, 40) if quick(device) else (20, 35, 3)
    mu, x = inputs((components, dims))
    leaves = [t.to(device).requires_grad_() for t in (inputs((points, dims), seed=1)[0], mu, 0.5 * x, 0.1 * mu[:, 0])]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    got = rk.mixture_log_prob(*leaves[:3], log_weights=leaves[3], of="both")
    want = rk.reference.mixture_log_prob(*exact[:3], log_weights=exact[3], of="both")
    for name, g, w in zip(("joint", "dims"), got, want, strict=True):
        yield from near(name, g, w, 1e-5)
    grads = torch.autograd.grad([t.sum() for t in got], leaves)
    true_grads = torch.autograd.grad([t.sum() for t in want], exact)
    for name, g, w in zip(("dz", "dmu", "dx", "dlog_weights"), grads, true_grads, strict=True):
        yield from near(name, g, w, 1e-4 * max(1.0, w.abs().max().item()))


def repeats(device: torch.device) -> Iterator[str]:
    """Every run gives the same bits, gradients and sums included."""
    mu, x = (t.to(device).requires_grad_() for t in inputs((64, 5000) if quick(device) else (8, 2100)))

    def run() -> list[Tensor]:
        z, kl = rk.reparameterize_kl(mu, x, seed=3)
        drawn, log_q = rk.reparameterize_log_prob(mu, x, seed=3)
        log_p = rk.mixture_log_prob(drawn[:, :40], mu[:, :40], x[:, :40])
        assert isinstance(log_p, Tensor)
        return [z, kl, log_q, log_p, *torch.autograd.grad((z * (kl + log_q - log_p)[:, None]).sum(), (mu, x))]

    first = run()
    for _ in range(3):
        for name, a, b in zip(("z", "kl", "log_q", "log_p", "dmu", "dx"), run(), first, strict=True):
            yield from same_bits(name, a.detach(), b.detach())


def needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("needs a CUDA device")


def large(device: torch.device) -> Iterator[str]:
    """More than 2^31 elements have 64-bit offsets, at both ends."""
    needs_cuda(device)
    free, _ = torch.cuda.mem_get_info(device)
    if free < 12e9:
        raise Skip(f"needs 12 GB of memory; {free / 1e9:.0f} GB are free")
    from . import _C

    n = 2**31 + 5
    mu = torch.zeros(1, dtype=torch.bfloat16, device=device).expand(n)
    drawn = rk.reparameterize(mu, mu, seed=3)
    for first in (0, 2**31 - 32, n - 64):
        want = torch.frombuffer(bytearray(_C.test_eps(3, first, 64)), dtype=torch.float32).bfloat16()
        yield from same_bits(f"from {first}", drawn[first : first + 64], want)


def graph(device: torch.device) -> Iterator[str]:
    """A CUDA graph draws fresh noise at each replay, and the right z for it."""
    needs_cuda(device)
    mu, x = (t.to(device) for t in inputs((64, 20)))
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        rk.reparameterize_kl(mu, x)  # compiles outside of the capture
    torch.cuda.current_stream(device).wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        z, kl = rk.reparameterize_kl(mu, x)
    seen = []
    for _ in range(3):
        captured.replay()
        seen.append(z.clone())
    if any(torch.equal(a, b) for a, b in pairwise(seen)):
        yield "two replays drew the same noise"
    yield from near("kl", kl, rk.kl_divergence(mu, x), 1e-6)
    noise = torch.stack([(s - mu) / (x / 2).exp() for s in seen]).double()
    if not (abs(noise.mean().item()) < 0.1 and abs(noise.std().item() - 1) < 0.1):
        yield f"the noise has mean {noise.mean().item():.2f} and deviation {noise.std().item():.2f}"


def streams(device: torch.device) -> Iterator[str]:
    """A launch goes to the current stream, after what was queued there."""
    needs_cuda(device)
    mu, x = (t.to(device) for t in inputs((1024, 512)))
    want = rk.reparameterize(mu, x, seed=9)
    torch.cuda.synchronize(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        late = torch.zeros_like(mu)
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        late.copy_(mu)
        got = rk.reparameterize(late, x, seed=9)
    side.synchronize()
    yield from same_bits("z behind a copy in a side stream", got, want)


def second_device(device: torch.device) -> Iterator[str]:
    """A tensor on another device than the current one runs in a stream of that device."""
    needs_cuda(device)
    if torch.cuda.device_count() < 2:
        raise Skip("there is one device")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    before = torch.cuda.current_device()
    side = torch.cuda.Stream(other)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        torch.cuda.set_device(before)
        got = rk.randn(100_003, seed=4, device=other)
    torch.cuda.synchronize(other)
    if torch.cuda.current_device() != before:
        yield "the current device has changed"
    yield from same_bits("eps", got, on_cpu(100_003, seed=4))


def launches(device: torch.device) -> Iterator[str]:
    """One kernel forward and one backward, two forward where rows are huge, and one more for a seed that is drawn."""
    needs_cuda(device)
    from torch.profiler import ProfilerActivity, profile

    def count(run: Callable[[], object]) -> int:
        run()
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize(device)
        return sum(e.count for e in seen.key_averages() if str(e.device_type).endswith("CUDA"))

    seed = torch.tensor([7], device=device)
    for shape, expected in (((128, 20), 1), ((512, 1024), 1), ((8, 100_000), 2)):
        mu, x = (t.to(device).requires_grad_() for t in inputs(shape))
        with torch.no_grad():
            got = count(lambda mu=mu, x=x: rk.reparameterize_kl(mu, x, seed=seed))  # type: ignore[misc]
            drawn = count(lambda mu=mu, x=x: rk.reparameterize_kl(mu, x))  # type: ignore[misc]
        z, kl = rk.reparameterize_kl(mu, x, seed=seed)
        dz, dkl = torch.ones_like(z), torch.ones_like(kl)
        back = count(lambda: torch.autograd.grad((z, kl), (mu, x), (dz, dkl), retain_graph=True))  # noqa: B023
        if (got, drawn, back) != (expected, expected + 1, 1):
            yield f"{shape}: {got} forward, {drawn} with a drawn seed, {back} backward; documented {expected}, +1, 1"


CHECKS: list[Callable[[torch.device], Iterator[str]]] = [
    words, roots, eps, z, gradients, log_densities, mixture, repeats, large, graph, streams, second_device, launches,
]  # fmt: skip


def run(device: torch.device) -> list[Result]:
    results = []
    for check in CHECKS:
        start = time.perf_counter()
        try:
            wrong = list(check(device))
            verdict, detail = ("FAILED", "; ".join(wrong[:3])) if wrong else ("passed", (check.__doc__ or "").strip())
        except Skip as why:
            verdict, detail = "skipped", str(why)
        except Exception as error:  # a broken check is a finding, not the end of the others
            verdict, detail = "FAILED", f"{type(error).__name__}: {error}"
        results.append(Result(check.__name__, verdict, detail, time.perf_counter() - start))
    return results


def main(device: str) -> int:
    """Print a table and return 1 if a check failed."""
    where = torch.device(device)
    backend = rk.backend_for(torch.empty(0, device=where))
    if backend == "reference":
        print(f"no kernels on {where}: plain torch runs there, and there is nothing to test")
        return 1
    name = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else "in the interpreter"
        if backend == "triton"
        else ""
    )
    print(f"selftest of the {backend} backend on {where} {name}".rstrip() + "\n")
    results = run(where)
    for r in results:
        line = f"{r.name:14} {r.verdict:8} {r.seconds:6.1f} s  {r.detail}"
        print(textwrap.fill(line, 80, subsequent_indent=" " * 34))
    failed = [r.name for r in results if r.verdict == "FAILED"]
    print(f"\n{sum(r.verdict == 'passed' for r in results)} passed, {len(failed)} failed", end="")
    print(f", {sum(r.verdict == 'skipped' for r in results)} skipped")
    if failed:
        print(f"please report this table, with what `python -m reparam_kernels` prints; failed: {', '.join(failed)}")
    return bool(failed)
