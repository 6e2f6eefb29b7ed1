"""The GPU launch of the noise."""

from torch import Tensor

from ...gpu.launch import PLANS, Launch, compiler, signatures
from ...gpu.plan import LaunchSpec, plan_launch, views_of
from . import triton_kernels as kernels


def fill_eps(out: Tensor, seed: Tensor) -> None:
    """Fill `out`, which is contiguous, with the noise of `seed`."""
    if out.numel() == 0:
        return
    key = "randn", out.device, signatures(out, seed)
    launch = PLANS.get(key) or PLANS.add(key, plan_randn(out, seed))
    launch(out, seed)


def plan_randn(out: Tensor, seed: Tensor) -> Launch:
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
    )
    plan = plan_launch(spec)
    return Launch(kernels.randn_kernel, out.device, plan.grid, (*plan.numbers(), plan.tiling), plan.compile_options())
