"""The GPU launch of the noise."""

from torch import Tensor

from ...core.window import NONE, Window
from ...gpu.launch import PLANS, Launch, compiler, signatures, window_tensor
from ...gpu.plan import LaunchSpec, Levels, WindowClass, classify_window, plan_launch, views_of, window_numbers
from . import triton_kernels as kernels


def fill_eps(out: Tensor, seed: Tensor, window: Window = NONE) -> None:
    """Fill `out`, which is contiguous, with the noise of `seed`."""
    if out.numel() == 0:
        return
    shape, seeds = tuple(out.shape), seed.numel()
    window_class = classify_window(window, shape, seeds, 1)
    key = "randn", out.device, signatures(out, seed), window_class
    launch, levels = PLANS.get(key) or PLANS.add(key, plan_randn(out, seed, window_class))
    numbers = None
    if window_class is not None:
        numbers = window_tensor(window_numbers(window, shape, seeds, levels), out.device)
    launch(out, seed, numbers)


def plan_randn(out: Tensor, seed: Tensor, window: WindowClass | None) -> tuple[Launch, Levels]:
    spec = LaunchSpec(
        kernel="randn",
        compiler=compiler(),
        dtype=out.dtype,
        shape=tuple(out.shape),
        samples=1,
        seeds=seed.numel(),
        kl_ndim=None,
        noise_source="seed",
        param="",
        has_prior=False,
        operands=(),
        other_tensors=views_of([out]),
        sample_stride=0,
        window=window,
    )
    plan = plan_launch(spec)
    arguments = (*plan.numbers(), plan.tiling)
    return Launch(kernels.randn_kernel, out.device, plan.grid, arguments, plan.compile_options()), plan.window_levels
