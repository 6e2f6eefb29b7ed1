"""`python -m bench.host` measures what a launch costs on the host before the GPU runs it. It needs no GPU.

bench/cuda_stub.c takes the place of the CUDA driver, and CPU tensors that of CUDA tensors. Triton's launcher and ours
run as they would, and a launch ends in a function that does nothing. So the figures leave out the driver's own part of
a launch, and the cost of CUDA memory and random numbers, for which the whole call adds OUTPUTS_AND_SEED.
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
from reparam_kernels.ops.latent import triton as latent
from reparam_kernels.ops.latent.arguments import make_arguments
from reparam_kernels.ops.noise import triton as noise

OUTPUTS_AND_SEED = 20.0  # us on a GPU: four outputs from the caching allocator, and the launch that draws a seed
REPEATS, CALLS = 1000, 20  # short repeats, some of which nothing interrupts
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
def three_arguments(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


def best(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the microseconds of each call: the least of many repeats, which take turns."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(REPEATS):
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
    z, kl = latent.forward(arguments)
    assert z is not None
    assert kl is not None
    grads, wanted = (torch.zeros_like(z), torch.zeros_like(kl)), (True, True, False, False)

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
        "backward": lambda: latent.backward(arguments, grads, wanted),
        "randn": lambda: noise.fill_eps(z, seed),
        "empty autograd.Function": empty,
        "whole call": whole,
    }


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    x, y = torch.zeros(1024), torch.zeros(1024)

    def usual() -> None:
        three_arguments[(1,)](x, y, 1000, BLOCK=1024)

    results: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "shapes": {}}
    with stub_driver():
        for shape in SHAPES:
            calls = {"three arguments": usual, **calls_of(shape)}
            for call in calls.values():
                call()
            us = best(calls)
            of_usual = {name: us[name] / us["three arguments"] for name in ("forward", "backward", "randn")}
            us["whole call on a GPU"] = us["whole call"] + OUTPUTS_AND_SEED
            results["shapes"][str(list(shape))] = {"us": us, "of three arguments": of_usual}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description="The host's time of a launch.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    results = measure()
    if as_json:
        print(json.dumps(results, indent=1))
        return
    print(f"torch {results['torch']}, triton {results['triton']}; us, the least of {REPEATS} repeats")
    for shape, figures in results["shapes"].items():
        print(shape)
        for name, us in figures["us"].items():
            ratio = figures["of three arguments"].get(name)
            print(f"  {name:<24} {us:7.2f}" + (f"  {ratio:5.2f} x three arguments" if ratio else ""))


if __name__ == "__main__":
    main()
