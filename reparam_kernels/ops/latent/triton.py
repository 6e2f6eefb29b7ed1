"""The GPU launch of the latent op: allocates the outputs, plans what is new, and launches the kernels."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.dtypes import compute_dtype, has_float64
from ...gpu.gaussian import Options
from ...gpu.launch import PLANS, Launch, compiler, signatures, window_tensor
from ...gpu.plan import (
    GRID_LIMIT,
    HIP_GRID_LIMIT,
    LaunchSpec,
    Levels,
    Plan,
    WindowClass,
    channels_can_be_rows,
    classify_window,
    coalesce,
    plan_launch,
    view_of,
    views_of,
    window_numbers,
)
from ...gpu.tiles import Strides, Tiling
from . import triton_density_kernels as density_kernels
from . import triton_kernels as kernels
from .arguments import PARAMS, Arguments, Config, expanded_prior, unpacked
from .outputs import empty_gradients, empty_outputs

SUM_BLOCK = 1024  # parts that row_sum_kernel adds up at a time


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
        MINUS_LOG_P=config.minus_log_p,
        TANH=config.tanh,
        PATH=config.path_derivative,
    )


class OperandStrides(NamedTuple):
    """The strides of the operands of a kernel, None for those that it does not have."""

    mu: Strides | None
    x: Strides | None
    mu_p: Strides | None
    x_p: Strides | None
    dz: Strides | None = None
    grad: Strides | None = None  # of dmu and dx alike
    z: Strides | None = None  # only if rows are channels; else it is contiguous


class Planned(NamedTuple):
    """What a call launches, and what it has to do before."""

    launch: Launch
    copied: tuple[bool, ...]  # the operands that have to be made contiguous first
    staged: tuple[bool, ...]  # the outputs that the kernel writes to a contiguous tensor, from which they are copied
    parts: int  # of the KL sums, which `sums` adds up; 0: the kernel writes the KL itself
    sums: tuple[Launch, ...]  # each adds up the parts of as many KLs as a grid holds
    window_levels: Levels


def window_class(arguments: Arguments, mu: Tensor) -> WindowClass | None:
    config = arguments.config
    if arguments.seed is None or not config.whole:
        return None
    return classify_window(config.window, tuple(mu.shape), arguments.seed.numel(), math.prod(config.sample_shape))


def window_of(arguments: Arguments, mu: Tensor, levels: Levels) -> Tensor | None:
    """Return the numbers of the window, as the kernels take them."""
    if arguments.seed is None or not arguments.config.whole:
        return None
    numbers = window_numbers(arguments.config.window, tuple(mu.shape), arguments.seed.numel(), levels)
    return window_tensor(numbers, mu.device)


def make_spec(
    kernel: str,
    arguments: Arguments,
    mu: Tensor,
    operands: Sequence[Tensor | None],
    other_tensors: Sequence[Tensor | None],
    kl: Tensor | None,
    needs_noise: bool,
    sample_stride: int = 0,
) -> LaunchSpec:
    """Describe a launch of the forward or the backward kernel. kl: the KL or log_q, or its gradient."""
    config = arguments.config
    sums_kl = kl is not None and config.event_ndim > 0
    return LaunchSpec(
        kernel=kernel,
        compiler=compiler(),
        dtype=mu.dtype,
        shape=tuple(mu.shape),
        samples=math.prod(config.sample_shape),
        seeds=arguments.seed.numel() if arguments.seed is not None and needs_noise else 1,
        kl_ndim=mu.dim() - config.event_ndim if sums_kl else None,
        noise_source="none" if not needs_noise else "seed" if arguments.eps is None else "tensor",
        param=config.param,
        has_prior=arguments.mu_p is not None,
        operands=views_of(operands),
        other_tensors=views_of([*other_tensors, None if sums_kl else kl]),
        sample_stride=sample_stride,
        window=window_class(arguments, mu) if needs_noise else None,
    )


def compile_time(arguments: Arguments, spec: LaunchSpec, planned: Plan) -> tuple[OperandStrides, Options, Tiling]:
    """Return the last arguments of both kernels, which Triton compiles in."""
    scalar_prior = all(p is not None and p.numel() == 1 for p in (arguments.mu_p, arguments.x_p))
    options = make_options(arguments.config.without_window(), spec.dtype, scalar_prior, spec.kl_ndim is None)
    strides = OperandStrides(*planned.layout.strides)
    if spec.kernel == "forward" and spec.by_channels:
        strides = strides._replace(dz=None, z=strides.dz)
    return strides, options, planned.tiling


def plan_forward(
    arguments: Arguments, mu: Tensor, x: Tensor, z: Tensor | None, kl: Tensor | None, samples_of_kl: int
) -> Planned:
    """kl: the KL, or log_q, which has samples."""
    operands = [mu, x, *expanded_prior(arguments, mu.shape)]
    needs_noise = z is not None and z.numel() > 0
    spec = make_spec("forward", arguments, mu, [*operands, z], [arguments.eps], kl, needs_noise)
    by_channels = channels_can_be_rows(spec)
    staged = not (by_channels or is_contiguous(z)), not is_contiguous(kl)
    z, kl = stage((z, kl), staged)
    if not by_channels:
        spec = make_spec("forward", arguments, mu, operands, [arguments.eps, z], kl, needs_noise)
    spec = spec._replace(by_channels=by_channels)
    planned = plan_launch(spec)
    fixed = (*planned.numbers(), *compile_time(arguments, spec, planned))
    kernel = density_kernels.density_forward_kernel if uses_densities(arguments.config) else kernels.forward_kernel
    launch = Launch(kernel, mu.device, planned.grid, fixed, planned.compile_options())
    parts = planned.rows * planned.chunks * samples_of_kl
    if kl is None or spec.kl_ndim is None or planned.layout.row_len or parts == kl.numel():
        return Planned(launch, planned.layout.copied, staged, 0, (), planned.window_levels)
    most = min(kl.numel(), HIP_GRID_LIMIT if spec.compiler == "hip" else GRID_LIMIT)
    fixed = parts // kl.numel(), has_float64(mu.device), SUM_BLOCK
    options = {"num_warps": 4, "enable_fp_fusion": False}
    sums = [
        Launch(kernels.row_sum_kernel, mu.device, (min(most, kl.numel() - first),), fixed, options)
        for first in range(0, kl.numel(), most)
    ]
    return Planned(launch, planned.layout.copied, staged, parts, tuple(sums), planned.window_levels)


def plan_backward(
    arguments: Arguments, mu: Tensor, x: Tensor, dz: Tensor | None, dkl: Tensor | None, grads: tuple[Tensor | None, ...]
) -> Planned:
    """dkl: the gradient of the KL, or of log_q."""
    config, (dmu, dx, dmu_p, dx_p) = arguments.config, grads
    first_dz, sample_stride = dz, 0
    if dz is not None and config.sample_shape:
        first_dz, sample_stride = dz[0], dz.stride(0)
    operands = [mu, x, *expanded_prior(arguments, mu.shape), first_dz]
    by_densities = uses_densities(config)
    needs_noise = dz is not None or by_densities

    def spec_of(dmu: Tensor | None, dx: Tensor | None, dmu_p: Tensor | None, dx_p: Tensor | None) -> LaunchSpec:
        written, others = dx if dmu is None else dmu, [arguments.eps, dx, dmu_p, dx_p]
        return make_spec("backward", arguments, mu, [*operands, written], others, dkl, needs_noise, sample_stride)

    alike = dmu is None or dx is None or dmu.stride() == dx.stride()
    by_channels = alike and channels_can_be_rows(spec_of(*grads))
    staged = (
        *(not (by_channels or is_contiguous(t) or (alike and has_runs(t))) for t in (dmu, dx)),
        *(not is_contiguous(t) for t in (dmu_p, dx_p)),
    )
    spec = spec_of(*stage(grads, staged))._replace(by_channels=by_channels)
    planned = plan_launch(spec)
    stride = mu.numel() if planned.layout.copied[4] else sample_stride  # a copy of dz is contiguous
    fixed = (stride, *planned.numbers(), *compile_time(arguments, spec, planned))
    kernel = density_kernels.density_backward_kernel if by_densities else kernels.backward_kernel
    launch = Launch(kernel, mu.device, planned.grid, fixed, planned.compile_options())
    return Planned(launch, planned.layout.copied, staged, 0, (), planned.window_levels)


def is_contiguous(t: Tensor | None) -> bool:
    return t is None or t.is_contiguous()


def has_runs(t: Tensor | None) -> bool:
    """Return True if a kernel can write a gradient through its strides, as the halves of packed ones."""
    return t is None or not coalesce(view_of(t)).copied


def stage(outputs: Sequence[Tensor | None], staged: Sequence[bool]) -> list[Tensor | None]:
    """Return the outputs as the kernel writes them."""
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if stages and t is not None else t
        for t, stages in zip(outputs, staged, strict=True)
    ]


def finish(outputs: Sequence[Tensor | None], written: Sequence[Tensor | None]) -> None:
    """Copy what was staged to the outputs."""
    for t, staged in zip(outputs, written, strict=True):
        if t is not None and staged is not None and staged is not t:
            t.copy_(staged)


def uses_densities(config: Config) -> bool:
    return config.log_q or config.tanh


def contiguous(operands: Sequence[Tensor | None], copied: tuple[bool, ...]) -> list[Tensor | None]:
    """Copy the operands that a plan cannot read as they are."""
    return [t.contiguous() if copy and t is not None else t for t, copy in zip(operands, copied, strict=True)]


def forward(arguments: Arguments) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    mu, x = unpacked(arguments)
    z, kl, log_q = empty_outputs(arguments, mu)
    if mu.numel() > 0:
        launch_forward(arguments, mu, x, z, log_q if kl is None else kl)
    else:
        kl, log_q = (None if t is None else t.zero_() for t in (kl, log_q))
    return z, kl, log_q


def launch_forward(arguments: Arguments, mu: Tensor, x: Tensor, z: Tensor | None, kl: Tensor | None) -> None:
    """kl: the KL, or log_q."""
    _, _, mu_p, x_p, seed, eps, config = arguments
    eps = None if eps is None else eps.contiguous()
    key = (
        "forward",
        config.without_window(),
        window_class(arguments, mu),
        mu.device,
        signatures(mu, x, mu_p, x_p, seed, eps, z, kl),
    )
    planned = PLANS.get(key)
    if planned is None:
        samples = math.prod(config.sample_shape) if config.log_q else 1
        planned = PLANS.add(key, plan_forward(arguments, mu, x, z, kl, samples))
    operands: Sequence[Tensor | None] = mu, x, mu_p, x_p
    if True in planned.copied:
        operands = contiguous([mu, x, *expanded_prior(arguments, mu.shape)], planned.copied)
    window = window_of(arguments, mu, planned.window_levels)
    outputs = stage((z, kl), planned.staged) if True in planned.staged else (z, kl)
    if planned.parts and kl is not None:
        parts = kl.new_empty(planned.parts)
        planned.launch(*operands, seed, eps, window, outputs[0], parts)
        sum_parts(planned.sums, parts, kl)
    else:
        planned.launch(*operands, seed, eps, window, *outputs)
    finish((z, kl), outputs)


def sum_parts(sums: tuple[Launch, ...], parts: Tensor, kl: Tensor) -> None:
    """Add up the parts of each KL."""
    if len(sums) == 1:  # as a rule; each view would cost as much as a launch
        sums[0](parts, kl)
        return
    most, count = sums[0].grid[0], parts.numel() // kl.numel()
    some = torch.split(parts, most * count), torch.split(kl.view(-1), most)
    for add, some_parts, some_kl in zip(sums, *some, strict=True):
        add(some_parts, some_kl)


def backward(
    arguments: Arguments, grads: tuple[Tensor | None, ...], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients to mu, x, mu_p and x_p, the prior's in the shape of mu; packed: to the moments, None, mu_p, x_p."""
    mu, x = unpacked(arguments)
    dz, dkl, dlog_q = grads
    dkl = dkl if dlog_q is None else dlog_q
    packed, results = empty_gradients(arguments, mu, x, wanted, arguments.mu_p is not None and dkl is not None)
    if mu.numel() > 0:
        launch_backward(arguments, mu, x, dz, dkl, results)
    return results if packed is None else (packed, None, *results[2:])


def launch_backward(
    arguments: Arguments, mu: Tensor, x: Tensor, dz: Tensor | None, dkl: Tensor | None, grads: tuple[Tensor | None, ...]
) -> None:
    _, _, mu_p, x_p, seed, eps, config = arguments
    dmu, dx, dmu_p, dx_p = grads
    eps = None if eps is None else eps.contiguous()
    dkl = None if dkl is None else dkl.contiguous()
    if dz is not None and config.sample_shape:
        samples = math.prod(config.sample_shape)
        dz = dz.reshape(samples, *mu.shape) if samples else None
    key = (
        "backward",
        config.without_window(),
        window_class(arguments, mu),
        mu.device,
        signatures(mu, x, mu_p, x_p, seed, eps, dz, dkl, dmu, dx, dmu_p, dx_p),
    )
    planned = PLANS.get(key) or PLANS.add(key, plan_backward(arguments, mu, x, dz, dkl, grads))
    operands: Sequence[Tensor | None] = mu, x, mu_p, x_p
    if True in planned.copied:
        *operands, dz = contiguous([mu, x, *expanded_prior(arguments, mu.shape), dz], planned.copied[:-1])
    window = window_of(arguments, mu, planned.window_levels)
    written = stage(grads, planned.staged) if True in planned.staged else grads
    planned.launch(*operands, seed, eps, window, dz, dkl, *written)
    finish(grads, written)
