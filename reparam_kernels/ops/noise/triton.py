"""The GPU launch of the noise."""

from torch import Tensor

from ...gpu.launch import compiler, launch
from ...gpu.plan import LaunchKey, plan_launch, run_time_numbers, views_of
from . import triton_kernels as kernels


def fill_eps(out: Tensor, seed: Tensor) -> None:
    """Fill `out`, which is contiguous, with the noise of `seed`."""
    if out.numel() == 0:
        return
    key = LaunchKey(
        kernel="randn",
        compiler=compiler(),
        dtype=out.dtype,
        numel=out.numel(),
        samples=1,
        seeds=seed.numel(),
        kl_numel=None,
        noise_source="seed",
        param="",
        has_prior=False,
        operands=(),
        other_tensors=views_of([out]),
        sample_stride=0,
    )
    plan = plan_launch(key)
    grid, rows, total, shape = run_time_numbers(key, plan)
    constants = plan.compile_options()
    launch(kernels.randn_kernel, grid, out.device, out, seed, rows, total, shape, TILING=plan.tiling, **constants)
