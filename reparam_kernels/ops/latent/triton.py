"""The GPU launch of the latent op: allocates the outputs, plans, launches the kernels of triton_kernels.py."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...core.dtypes import compute_dtype, has_float64
from ...gpu.gaussian import Options
from ...gpu.launch import compiler, launch, operand
from ...gpu.plan import (
    GRID_LIMIT,
    HIP_GRID_LIMIT,
    LaunchKey,
    Plan,
    next_power_of_2,
    plan_launch,
    run_time_numbers,
    views_of,
)
from ...gpu.tiles import GradStrides, Operand
from . import triton_kernels as kernels
from .arguments import PARAMS, Arguments, Config, empty_prior_gradient, expanded_prior, unpacked


@lru_cache(maxsize=256)
def make_options(config: Config, dtype: torch.dtype, scalar_prior: bool, elementwise_kl: bool) -> Options:
    # softplus(unit) + min_std = 1
    unit = math.log(math.expm1(1 - config.min_std)) if config.min_std < 1 else -math.inf
    unit_hi = torch.tensor(unit, dtype=compute_dtype(dtype), device="cpu").item()
    low, high = config.clamp or (0.0, 0.0)
    return Options(
        FLOAT64=dtype == torch.float64,
        PARAM=PARAMS.index(config.param),
        MIN_STD=config.min_std,
        UNIT_HI=unit_hi,
        UNIT_LO=unit - unit_hi if config.min_std < 1 else 0.0,
        UNIT_SLOPE=-math.expm1(config.min_std - 1) if config.min_std < 1 else 0.0,
        CLAMP=config.clamp is not None,
        LOW=low,
        HIGH=high,
        SCALAR_PRIOR=scalar_prior,
        ELEMENTWISE_KL=elementwise_kl,
    )


def launch_key(
    kernel: str,
    arguments: Arguments,
    mu: Tensor,
    operands: Sequence[Tensor | None],
    other_tensors: Sequence[Tensor | None],
    kl_numel: int | None,
    needs_noise: bool,
    sample_stride: int = 0,
) -> LaunchKey:
    noise_source = "none" if not needs_noise else "seed" if arguments.eps is None else "tensor"
    return LaunchKey(
        kernel=kernel,
        compiler=compiler(),
        dtype=mu.dtype,
        numel=mu.numel(),
        samples=math.prod(arguments.config.sample_shape),
        seeds=arguments.seed.numel() if arguments.seed is not None and needs_noise else 1,
        kl_numel=kl_numel,
        noise_source=noise_source,
        param=arguments.config.param,
        has_prior=arguments.mu_p is not None,
        operands=views_of(operands),
        other_tensors=views_of(other_tensors),
        sample_stride=sample_stride,
    )


def compile_time(arguments: Arguments, kl_numel: int | None, plan: Plan) -> dict[str, Any]:
    scalar_prior = all(p is not None and p.numel() == 1 for p in (arguments.mu_p, arguments.x_p))
    options = make_options(arguments.config, arguments.mu.dtype, scalar_prior, kl_numel is None)
    return {"OPTIONS": options, "TILING": plan.tiling, **plan.compile_options()}


def sum_parts(parts: Tensor, kl: Tensor) -> None:
    """Add up the parts of each KL."""
    count = parts.numel() // kl.numel()
    constants = {"BLOCK": min(next_power_of_2(count), 1024), "num_warps": 4, "enable_fp_fusion": False}
    constants["FLOAT64"] = has_float64(kl.device)
    most = min(kl.numel(), HIP_GRID_LIMIT if compiler() == "hip" else GRID_LIMIT)
    for some_parts, some_kl in zip(torch.split(parts, most * count), torch.split(kl.view(-1), most), strict=True):
        launch(kernels.row_sum_kernel, (some_kl.numel(),), kl.device, some_parts, some_kl, count, **constants)


def forward(arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    mu, x = unpacked(arguments)
    config, shape = arguments.config, mu.shape
    z = mu.new_empty(config.sample_shape + shape) if config.z else None
    kl = None
    if config.kl:
        kl = mu.new_empty(shape[: len(shape) - config.event_ndim], dtype=compute_dtype(mu.dtype))
    if mu.numel() == 0:
        return z, kl if kl is None else kl.zero_()
    launch_forward(arguments, mu, x, z, kl)
    return z, kl


def launch_forward(arguments: Arguments, mu: Tensor, x: Tensor, z: Tensor | None, kl: Tensor | None) -> None:
    kl_numel = kl.numel() if kl is not None and arguments.config.event_ndim > 0 else None
    eps = None if arguments.eps is None else arguments.eps.contiguous()
    operands = [mu, x, *expanded_prior(arguments, mu.shape)]
    others = [eps, z, kl if kl_numel is None else None]
    needs_noise = z is not None and z.numel() > 0
    key = launch_key("forward", arguments, mu, operands, others, kl_numel, needs_noise)
    plan = plan_launch(key)
    grid, rows, total, shape = run_time_numbers(key, plan)
    parts = kl
    if kl is not None and kl_numel is not None and not plan.layout.row_len and rows * plan.chunks > kl_numel:
        parts = kl.new_empty(rows * plan.chunks)
    launch(
        kernels.forward_kernel,
        grid,
        mu.device,
        *map(operand, operands, plan.layout.strides),
        arguments.seed,
        eps,
        z,
        parts,
        rows,
        total,
        shape,
        **compile_time(arguments, kl_numel, plan),
    )
    if parts is not None and kl is not None and parts is not kl:
        sum_parts(parts, kl)


def backward(
    arguments: Arguments, grads: tuple[Tensor | None, ...], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients to mu, x, mu_p and x_p, the prior's in the shape of mu; packed: to the moments, None, mu_p, x_p."""
    mu, x = unpacked(arguments)
    dz, dkl = grads
    want_mu, want_x, *want_prior = wanted
    packed = dmu = dx = None
    if arguments.x is None and want_mu:
        packed = arguments.mu.new_empty(arguments.mu.shape)
        dmu, dx = packed.chunk(2, arguments.config.packed or 0)
    else:
        dmu = mu.new_empty(mu.shape) if want_mu else None
        dx = mu.new_empty(mu.shape) if want_x else None
    priors = zip((arguments.mu_p, arguments.x_p), want_prior, strict=True)
    dmu_p, dx_p = (empty_prior_gradient(p, mu) if want and dkl is not None else None for p, want in priors)
    if mu.numel() > 0:
        launch_backward(arguments, mu, x, dz, dkl, (dmu, dx, dmu_p, dx_p))
    return (packed, None, dmu_p, dx_p) if arguments.x is None else (dmu, dx, dmu_p, dx_p)


def launch_backward(
    arguments: Arguments, mu: Tensor, x: Tensor, dz: Tensor | None, dkl: Tensor | None, grads: tuple[Tensor | None, ...]
) -> None:
    dmu, dx, dmu_p, dx_p = grads
    samples = math.prod(arguments.config.sample_shape)
    kl_numel = dkl.numel() if dkl is not None and arguments.config.event_ndim > 0 else None
    dz = None if dz is None or samples == 0 else dz.reshape(samples, *mu.shape)
    first_dz = None if dz is None else dz[0]
    eps = None if arguments.eps is None else arguments.eps.contiguous()
    dkl = None if dkl is None else dkl.contiguous()
    operands = [mu, x, *expanded_prior(arguments, mu.shape), first_dz, dmu if dmu is not None else dx]
    others = [eps, dx, dmu_p, dx_p, dkl if kl_numel is None else None]
    sample_stride = 0 if dz is None else dz.stride(0)
    key = launch_key("backward", arguments, mu, operands, others, kl_numel, dz is not None, sample_stride)
    plan = plan_launch(key)
    grid, rows, total, shape = run_time_numbers(key, plan)
    *input_strides, dz_strides, grad_strides = plan.layout.strides
    if dz is not None and dz_strides is not None and dz_strides.copied:
        dz = dz.contiguous()  # all samples; their strides are those of the first
    launch(
        kernels.backward_kernel,
        grid,
        mu.device,
        *map(operand, operands, input_strides),
        arguments.seed,
        eps,
        None if dz is None or dz_strides is None else Operand(dz, dz_strides.outer, dz_strides.row, dz_strides.col),
        0 if dz is None else dz.stride(0),
        dkl,
        dmu,
        dx,
        GradStrides(0, 0) if grad_strides is None else GradStrides(grad_strides.outer, grad_strides.row),
        dmu_p,
        dx_p,
        rows,
        total,
        shape,
        **compile_time(arguments, kl_numel, plan),
    )
