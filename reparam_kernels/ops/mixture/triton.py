"""The GPU launch of the mixture op: prepares points and components as columns and launches triton_kernels.py."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.dtypes import compute_dtype
from ...gpu.launch import launch
from ...gpu.plan import cdiv, next_power_of_2
from ..latent.arguments import PARAMS
from . import triton_kernels as kernels
from .arguments import Arguments, batch_of, empty_outputs, weights_by_component

BLOCK = 32  # points and components of a program
DIMS_ALONE = 8  # dims of a program of backward that has no joint part, which would be computed once for each


class Call(NamedTuple):
    """What the kernels of forward and backward share."""

    z: Tensor  # [D, B]
    fields: Tensor  # [3, D, N]
    joint: Tensor  # [2, N]
    item_weights: Tensor | None  # [B, N]
    sizes: kernels.Sizes
    options: kernels.Options

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        options = {"OPTIONS": self.options, "num_warps": 4, "enable_fp_fusion": False, **constants}
        launch(kernel, (programs,), self.z.device, *arguments, **options)


def columns(t: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return t.reshape(rows, cols).t().to(dtype).contiguous()


def prepare(arguments: Arguments, joint: bool, dims: bool) -> Call:
    z, mu, config = arguments.z, arguments.mu, arguments.config
    items, components, cols = math.prod(batch_of(arguments)), mu.shape[0], math.prod(mu.shape[1:])
    dtype = compute_dtype(z.dtype)
    given = weights_by_component(arguments)
    item_weights = given.reshape(items, components) if given is not None and given.dim() != 1 else None
    if given is None:
        given = mu.new_full((components,), -math.log(components), dtype=torch.float64)
    low, high = config.clamp or (0.0, 0.0)
    options = kernels.Options(
        FLOAT64=dtype == torch.float64,
        PARAM=PARAMS.index(config.param),
        MIN_STD=config.min_std,
        CLAMP=config.clamp is not None,
        LOW=low,
        HIGH=high,
        JOINT=joint,
        DIMS=dims,
        ITEM_WEIGHTS=item_weights is not None,
        BLOCK_B=BLOCK,
        BLOCK_N=BLOCK,
    )
    call = Call(
        columns(z, items, cols, dtype),
        mu.new_empty((3, cols, components), dtype=dtype),
        mu.new_empty((2, components), dtype=dtype),
        None if item_weights is None else item_weights.contiguous(),
        kernels.Sizes(items, components, cols),
        options,
    )
    call.launch(
        kernels.components_kernel,
        components,
        mu.contiguous(),
        arguments.x.contiguous(),
        given.contiguous() if item_weights is None else None,
        call.fields,
        call.joint,
        call.sizes,
        BLOCK=min(next_power_of_2(max(cols, 1)), 256),
    )
    return call


def forward(arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    return _forward(arguments, saving=False)[:2]


def forward_saving(
    arguments: Arguments,
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]:
    joint, dims, joint_sums, dims_sums = _forward(arguments, saving=True)
    return (joint, dims), (joint_sums, dims_sums)


def _forward(arguments: Arguments, saving: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    joint, dims, joint_sums, dims_sums = empty_outputs(arguments, saving)
    call = prepare(arguments, joint is not None, dims is not None)
    z, fields, sizes = call.z, call.fields, call.sizes
    blocks = cdiv(sizes.items, BLOCK)
    if joint is not None and blocks > 0:
        call.launch(kernels.joint_kernel, blocks, z, fields, call.joint, call.item_weights, joint, joint_sums, sizes)
    if dims is not None and dims.numel() > 0:
        programs = blocks * sizes.cols
        call.launch(kernels.dims_kernel, programs, z, fields, call.item_weights, dims, dims_sums, sizes)
    return joint, dims, joint_sums, dims_sums


def backward(
    arguments: Arguments, grads: tuple[Tensor | None, ...], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients to z, mu, x and log_weights; that of one weight for all comes in the shape of the components."""
    djoint, ddims = grads
    if djoint is None and ddims is None:
        return None, None, None, None
    z, mu, log_weights = arguments.z, arguments.mu, weights_by_component(arguments)
    call = prepare(arguments, djoint is not None, ddims is not None)
    (items, components, cols), dtype = call.sizes, call.z.dtype
    dims_sums = None
    if ddims is not None and arguments.dims_sums is not None:
        dims_sums = arguments.dims_sums.reshape(2, items, cols).transpose(1, 2).contiguous()
    pointers = kernels.Pointers(
        call.z,
        call.fields,
        call.joint,
        call.item_weights,
        None if djoint is None else arguments.joint_sums,
        None if djoint is None else djoint.reshape(-1).to(dtype).contiguous(),
        dims_sums,
        None if ddims is None else columns(ddims, items, cols, dtype),
    )
    dz = dmu = dx = dlog_weights = None
    dims_per_program = max(cols, 1) if djoint is not None else DIMS_ALONE
    if wanted[0]:
        sums = call.z.new_zeros(call.z.shape)
        programs = cdiv(items, BLOCK) * cdiv(cols, dims_per_program)
        if programs > 0:
            call.launch(kernels.points_backward_kernel, programs, pointers, sums, call.sizes, dims_per_program)
        dz = sums.t().neg().to(z.dtype).contiguous().view(z.shape)
    if wanted[3] and log_weights is not None:
        dlog_weights = log_weights.new_zeros(log_weights.shape, dtype=dtype)
        dims_per_program = max(cols, 1)
    if wanted[1] or wanted[2] or dlog_weights is not None:
        dmu_sum, dlog_sigma = call.z.new_zeros((cols, components)), call.z.new_zeros((cols, components))
        programs = cdiv(components, BLOCK) * max(cdiv(cols, dims_per_program), 1)
        call.launch(
            kernels.components_backward_kernel,
            programs,
            pointers,
            dmu_sum,
            dlog_sigma,
            dlog_weights,
            call.sizes,
            dims_per_program,
        )
        dmu = mu.new_empty(mu.shape) if wanted[1] else None
        dx = mu.new_empty(mu.shape) if wanted[2] else None
        x, block = arguments.x.contiguous(), min(next_power_of_2(max(cols, 1)), 256)
        finish = (x, call.fields, dmu_sum, dlog_sigma, dmu, dx, call.sizes)
        call.launch(kernels.finish_kernel, components, *finish, BLOCK=block)
    if dlog_weights is not None and log_weights is not None:
        dlog_weights = dlog_weights.to(log_weights.dtype)
    return dz, dmu, dx, dlog_weights
