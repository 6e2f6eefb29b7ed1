"""`python -m bench.host` measures what a call costs on the host besides its kernels. It needs no GPU.

For a launch on a GPU, bench/cuda_stub.c takes the place of the CUDA driver, and CPU tensors that of CUDA tensors.
Triton's launcher and ours run as they would, and a launch ends in a function that does nothing. So the figures leave
out the driver's own part of a launch, and the cost of CUDA memory and random numbers, for which the whole call adds
OUTPUTS_AND_SEED.

On a CPU, a sample alone is measured beside parts of it, and beside eager's lines. Inside torch.compile, a call is
measured beside a registered op that computes nothing.
"""

import argparse
import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import reparam_kernels as rk
from reparam_kernels.core import backends
from reparam_kernels.gpu.launch import PLANS
from reparam_kernels.ops.latent import cpu
from reparam_kernels.ops.latent import triton as latent
from reparam_kernels.ops.latent.arguments import Arguments, make_arguments
from reparam_kernels.ops.noise import triton as noise
from reparam_kernels.profiling import options
from reparam_kernels.profiling.providers import compiled

OUTPUTS_AND_SEED = 20.0  # us on a GPU: four outputs from the caching allocator, and the launch that draws a seed
REPEATS, CALLS = 1000, 20  # short repeats, some of which nothing interrupts
SAMPLE_SHAPES = [(8, 30), (128, 20)]
COMPILED_SHAPES = [(128, 20), (512, 128)]
SHAPES = [(128, 20), (16, 4, 64, 64)]


def build_stub(folder: Path) -> ctypes.CDLL:
    """Build the stub and load it, so that it is what the process finds as libcuda.so.1."""
    import triton.backends.nvidia as nvidia

    include = Path(nvidia.__path__[0]) / "include"
    library, source = folder / "libcuda.so.1", Path(__file__).with_name("cuda_stub.c")
    command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", library, source], check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def stub_driver() -> Iterator[Any]:
    """Launch the package's kernels on CPU tensors through the stub. Gives the stub; `driver.active` has its device."""
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set: the interpreter does not launch"
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(backends, "backend_name", return_value="triton"),
        mock.patch.object(latent, "compiler", return_value="cuda"),
        mock.patch.object(noise, "compiler", return_value="cuda"),
    ):
        stub = build_stub(Path(folder))
        triton.knobs.nvidia.libcuda_path = folder
        from triton.backends.nvidia.driver import CudaDriver

        active: Any = CudaDriver()
        active.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        active.get_current_device, active.get_current_stream = lambda: 0, lambda device: 0
        driver.set_active(active)
        backends.kernels.cache_clear()
        PLANS.clear()
        yield stub
    backends.kernels.cache_clear()
    PLANS.clear()


@triton.jit
def three_arguments(x_ptr, y_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # triton reads annotations
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


def best(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the microseconds of each call: the least of many repeats, which take turns."""
    for call in calls.values():
        call()
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.perf_counter() - start) / CALLS * 1e6)
    return least


def calls_of(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    mu, logvar = (torch.randn(shape, requires_grad=True) for _ in range(2))
    seed = torch.zeros(1, dtype=torch.int64)
    arguments = make_arguments("bench", mu.detach(), logvar.detach(), z=True, kl=True, seed=seed)
    z, kl = torch.zeros(shape), torch.zeros(shape[0])
    grads, wanted = (z, kl), (True, True, False, False)

    class Empty(torch.autograd.Function):
        """The tensors of a call without its checks and launches."""

        @staticmethod
        def forward(ctx: Any, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(mu, logvar, seed)
            return mu.new_empty(z.shape), mu.new_empty(kl.shape)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            mu, logvar, _ = ctx.saved_tensors
            return mu.new_empty(mu.shape), logvar.new_empty(logvar.shape)

    def empty() -> None:
        torch.autograd.grad(Empty.apply(mu, logvar), (mu, logvar), grads)

    def whole() -> None:
        out = rk.reparameterize_kl(mu, logvar, seed=seed)
        torch.autograd.grad(out, (mu, logvar), grads)

    return {
        "forward": lambda: latent.forward(arguments),
        "backward": lambda: latent.backward(arguments, (*grads, None), wanted),
        "randn": lambda: noise.fill_eps(z, seed),
        "empty autograd.Function": empty,
        "whole call": whole,
    }


def sample_calls(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Return forward and backward of a sample alone on a CPU: eager's, its parts one after the other, and ours."""
    mu, logvar = (torch.randn(shape, requires_grad=True) for _ in range(2))
    dz, given_seed = torch.randn(shape), torch.zeros(1, dtype=torch.int64)
    given = make_arguments("bench", mu.detach(), logvar.detach(), z=True, seed=given_seed)

    def part(draws: bool, computes: bool) -> Callable[[], Any]:
        """Return a call of an autograd.Function that checks nothing, with the draw of a seed, and with the kernels."""

        class Part(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, mu: Tensor, logvar: Tensor) -> Tensor:
                seed = torch.randint(2**63 - 1, (1,)) if draws else given_seed
                ctx.save_for_backward(logvar, seed)
                if not computes:
                    return torch.empty_like(mu)
                z, _, _ = cpu.forward(Arguments(mu, logvar, None, None, seed, None, given.config))
                assert z is not None
                return z

            @staticmethod
            def backward(ctx: Any, dz: Tensor) -> Any:
                logvar, seed = ctx.saved_tensors
                if not computes:
                    return torch.empty_like(logvar), torch.empty_like(logvar)
                arguments = Arguments(logvar, logvar, None, None, seed, None, given.config)
                return cpu.backward(arguments, (dz, None, None), (True, True, False, False))[:2]

        return lambda: Part.apply(mu, logvar)

    def plain() -> Tensor:
        std = torch.exp(0.5 * logvar)
        return mu + std * torch.randn_like(std)

    def step(sample: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(sample(), (mu, logvar), dz)

    return {
        "plain lines": step(plain),
        "an autograd.Function of the same tensors": step(part(False, False)),
        "and the draw of a seed": step(part(True, False)),
        "and the kernels": step(part(True, True)),
        "whole call": step(lambda: rk.reparameterize(mu, logvar)),
    }


def define_empty_op() -> Any:
    """Register an op with the tensors of reparameterize_kl and its gradient, which allocates and computes nothing."""
    library = torch.library.Library("reparam_kernels_bench", "FRAGMENT")
    library.define("empty(Tensor mu, Tensor logvar, Tensor seed) -> (Tensor, Tensor)")
    library.define("empty_backward(Tensor mu, Tensor logvar, Tensor seed, Tensor dz, Tensor dkl) -> (Tensor, Tensor)")

    def forward(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        return mu.new_empty(mu.shape), mu.new_empty(mu.shape[0])

    def backward(mu: Tensor, logvar: Tensor, seed: Tensor, dz: Tensor, dkl: Tensor) -> tuple[Tensor, Tensor]:
        return mu.new_empty(mu.shape), logvar.new_empty(logvar.shape)

    def gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *torch.ops.reparam_kernels_bench.empty_backward(*ctx.saved_tensors, *grads), None

    for name, run in (("empty", forward), ("empty_backward", backward)):
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"reparam_kernels_bench::{name}", run, lib=library)
    torch.library.register_autograd(
        "reparam_kernels_bench::empty",
        gradient,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        lib=library,
    )
    return library  # what is registered lives as long as this


def compiled_calls(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Return forward and backward of reparameterize_kl in and outside torch.compile, beside an op that does nothing."""
    mu, logvar = (torch.randn(shape, requires_grad=True) for _ in range(2))
    grads = torch.randn(shape), torch.randn(shape[0])
    arguments = make_arguments("bench", mu.detach(), logvar.detach(), z=True, kl=True)

    def empty(mu: Tensor, logvar: Tensor) -> Any:
        return torch.ops.reparam_kernels_bench.empty(mu, logvar, rk.draw_seed(mu.device))

    def plain(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        std = torch.exp(0.5 * logvar)
        return mu + std * torch.randn_like(std), -0.5 * (1 + logvar - mu**2 - std**2).sum(1)

    def step(f: Callable[[Tensor, Tensor], Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(f(mu, logvar), (mu, logvar), grads)

    def run_kernels() -> None:
        cpu.forward(arguments)
        cpu.backward(arguments, (*grads, None), (True, True, False, False))

    options: dict[str, Any] = {"fallback_random": True, "guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}
    unguarded = torch.compile(rk.reparameterize_kl, fullgraph=True, dynamic=False, options=options)
    return {
        "kernels and their outputs": run_kernels,
        "whole call": step(rk.reparameterize_kl),
        "whole call, compiled": step(compiled(rk.reparameterize_kl, True)),
        "the same without guards on globals": step(unguarded),
        "empty registered op, compiled": step(compiled(empty, True)),
        "plain lines, compiled": step(compiled(plain, True)),
    }


def measure(repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    x, y = torch.zeros(1024), torch.zeros(1024)

    def usual() -> None:
        three_arguments[(1,)](x, y, 1000, BLOCK=1024)

    results: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    results |= {"launch": {}, "sample": {}, "compiled": {}}
    with stub_driver():
        for shape in SHAPES:
            us = best({"three arguments": usual, **calls_of(shape)}, repeats)
            of_usual = {name: us[name] / us["three arguments"] for name in ("forward", "backward", "randn")}
            us["whole call on a GPU"] = us["whole call"] + OUTPUTS_AND_SEED
            results["launch"][str(list(shape))] = {"us": us, "of three arguments": of_usual}
    for shape in SAMPLE_SHAPES:
        results["sample"][str(list(shape))] = {"us": best(sample_calls(shape), repeats)}
    library = define_empty_op()
    for shape in COMPILED_SHAPES:
        torch.compiler.reset()
        results["compiled"][str(list(shape))] = {"us": best(compiled_calls(shape), repeats)}
    del library
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description="What a call costs on the host.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeats", type=options.positive, default=REPEATS, metavar="N", help=f"of each ({REPEATS})")
    args = parser.parse_args()
    results = measure(args.repeats)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print(f"torch {results['torch']}, triton {results['triton']}; us, the least of {args.repeats} repeats")
    parts = {"launch": "launch on a GPU", "sample": "a sample alone on a CPU", "compiled": "z and KL on a CPU"}
    for part, title in parts.items():
        for shape, figures in results[part].items():
            print(f"{title}, {shape}")
            for name, us in figures["us"].items():
                ratio = figures.get("of three arguments", {}).get(name)
                print(f"  {name:<40} {us:7.2f}" + (f"  {ratio:5.2f} x three arguments" if ratio else ""))


if __name__ == "__main__":
    main()
