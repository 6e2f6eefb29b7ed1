"""Launches the Triton kernels: sees every tensor as rows x cols, chooses the tile, allocates the outputs."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..checks import PARAMS
from ..spec import Call, Spec, accumulate_dtype, expanded_prior, prior_gradient, unpacked
from . import kernels
from .kernels import ALIGNED, GIVEN, LANEWISE, LED, NONE

TILE = 2048  # lanes a program: fixed, so that results and first-call time are
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # rounding is part of the contract


class Rows(NamedTuple):
    """An operand by rows: row r starts at r // nest * outer + r % nest * step, its elements `col` apart."""

    tensor: Tensor | None
    outer: int
    step: int
    col: int


ABSENT = Rows(None, 0, 0, 0)


class Run(NamedTuple):
    """A tensor in row-major order: runs of `size` elements `col` apart, one run every `stride`."""

    tensor: Tensor
    size: int
    stride: int
    col: int


def runs(t: Tensor) -> Run:
    """The runs of a tensor; one with more than two levels of stride is copied."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return runs(t.contiguous())
    if len(levels) == 2:
        return Run(t, levels[1][0], levels[0][1], levels[1][1])
    return Run(t, t.numel(), 0, levels[0][1] if levels else 0)


class Layout:
    """Rows short enough that each lies in one run of every operand, under one seed, and in one KL."""

    def __init__(self, n: int, tensors: Sequence[Tensor | None], group: int, kl_cols: int | None) -> None:
        seen = [None if t is None else runs(t) for t in tensors]
        inner = [run.size for run in seen if run is not None and run.size != n]
        # every length here is a product of trailing dims, so the shortest divides the others
        self.cols = min([n, group, *inner, *([] if kl_cols is None else [kl_cols])])
        self.rows = n // self.cols
        wide = [size for size in inner if size != self.cols]
        self.nest = max(wide) // self.cols if wide else 1
        self.operands = [ABSENT if run is None else self._rows(run, n) for run in seen]

    def _rows(self, run: Run, n: int) -> Rows:
        step = self.cols * run.col
        if run.size == n:
            return Rows(run.tensor, self.nest * step, step, run.col)
        if run.size == self.cols:
            return Rows(run.tensor, self.nest * run.stride, run.stride, run.col)
        if run.size == self.nest * self.cols:
            return Rows(run.tensor, run.stride, step, run.col)
        whole = run.tensor.contiguous()
        return Rows(whole, self.nest * self.cols, self.cols, 1)


def noise_mode(layout: Layout, per_seed: int, samples: int, call: Call, noisy: bool) -> int:
    if not noisy:
        return int(NONE.value)
    if call.eps is not None:
        return int(GIVEN.value)
    within = per_seed == 1 or layout.cols % 4 == 0
    across = samples == 1 or per_seed * layout.cols % 4 == 0
    return int((ALIGNED if within and across else LED if across else LANEWISE).value)


def tile_of(layout: Layout, noise: int) -> tuple[int, int, int]:
    """ROWS and BLOCK of a program, and how many programs share a row."""
    lanes = layout.cols + (3 if noise == LED.value else 0)
    block = min(max(triton.next_power_of_2(lanes), 4), TILE)
    rows = max(min(TILE // block, triton.next_power_of_2(layout.rows)), 1)
    return rows, block, triton.cdiv(lanes, block)


def constants(spec: Spec, dtype: torch.dtype) -> dict[str, Any]:
    """The options as compile-time constants; softplus(unit) + min_std = 1, unit in two parts of the dtype."""
    unit = math.log(math.expm1(1 - spec.min_std)) if spec.min_std < 1 else -math.inf
    high = torch.tensor(unit, dtype=accumulate_dtype(dtype)).item()
    low, top = spec.clamp or (0.0, 0.0)
    return {
        "PARAM": PARAMS.index(spec.param),
        "MIN_STD": spec.min_std,
        "UNIT_HI": high,
        "UNIT_LO": unit - high if spec.min_std < 1 else 0.0,
        "UNIT_SLOPE": -math.expm1(spec.min_std - 1) if spec.min_std < 1 else 0.0,
        "CLAMP": spec.clamp is not None,
        "LOW": low,
        "HIGH": top,
        "WIDE": dtype == torch.float64,
    }


def on(device: torch.device) -> Any:
    """The tensor's device made current, as a launch needs."""
    return torch.get_device_module(device).device(device) if device.type != "cpu" else contextlib.nullcontext()


def flat(operands: Sequence[Rows]) -> list[int]:
    return [stride for o in operands for stride in (o.outer, o.step, o.col)]


def randn(out: Tensor, seed: Tensor) -> None:
    """Fills `out`, contiguous, with the noise of `seed`."""
    if out.numel() == 0:
        return
    rows = seed.numel()
    layout = Layout(out.numel(), [], out.numel() // rows, None)
    block_rows, block, chunks = tile_of(layout, ALIGNED.value)
    with on(out.device):
        kernels.randn_kernel[(triton.cdiv(layout.rows, block_rows) * chunks,)](
            out, seed, layout.rows, layout.cols, chunks, NOISE=ALIGNED.value, ROWS=block_rows, BLOCK=block, **OPTIONS
        )


def forward(call: Call) -> tuple[Tensor | None, Tensor | None]:
    mu, x = unpacked(call)
    spec, shape, n = call.spec, mu.shape, mu.numel()
    z = mu.new_empty(spec.sample_shape + shape) if spec.z else None
    kl = None
    if spec.kl:
        kl = mu.new_empty(shape[: len(shape) - spec.event_ndim], dtype=accumulate_dtype(mu.dtype))
    if n == 0:
        return z, kl if kl is None else kl.zero_()
    samples = math.prod(spec.sample_shape)
    summed = kl is not None and spec.event_ndim > 0
    seeds = call.seed.numel() if call.seed is not None else 1
    kl_cols = n // kl.numel() if kl is not None and summed else None
    layout = Layout(n, [mu, x, *expanded_prior(call, shape)], n // seeds, kl_cols)
    per_seed = n // seeds // layout.cols
    noise = noise_mode(layout, per_seed, samples, call, z is not None and samples > 0)
    block_rows, block, chunks = tile_of(layout, noise)
    parts = layout.rows * chunks // kl.numel() if kl is not None and summed else 1
    target = kl if kl is None or parts == 1 else kl.new_empty(layout.rows * chunks)
    eps = None if call.eps is None else call.eps.contiguous()
    mu_r, x_r, mu_p_r, x_p_r = layout.operands
    with on(mu.device):
        kernels.forward_kernel[(triton.cdiv(layout.rows, block_rows) * chunks,)](
            mu_r.tensor,
            x_r.tensor,
            mu_p_r.tensor,
            x_p_r.tensor,
            call.seed,
            eps,
            z,
            target,
            layout.rows,
            layout.cols,
            chunks,
            samples,
            per_seed,
            layout.nest,
            *flat(layout.operands),
            **constants(spec, mu.dtype),
            ELEMENTWISE=not summed,
            NOISE=noise,
            NEST=layout.nest > 1,
            ROWS=block_rows,
            BLOCK=block,
            **OPTIONS,
        )
        if target is not kl and kl is not None:
            size = min(triton.next_power_of_2(parts), 1024)
            kernels.row_sum_kernel[(kl.numel(),)](target, kl, parts, BLOCK=size, **OPTIONS)
    return z, kl


def backward(
    call: Call, dz: Tensor | None, dkl: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients to mu, x, mu_p and x_p, the prior's in the shape of mu; packed: to the moments, None, mu_p, x_p."""
    mu, x = unpacked(call)
    spec, n = call.spec, mu.numel()
    want_mu, want_x, *want_prior = wanted
    packed = dmu = dx = None
    if call.x is None and want_mu:
        packed = call.mu.new_empty(call.mu.shape)
        dmu, dx = packed.chunk(2, spec.packed or 0)
    else:
        dmu = mu.new_empty(mu.shape) if want_mu else None
        dx = mu.new_empty(mu.shape) if want_x else None
    priors = zip((call.mu_p, call.x_p), want_prior, strict=True)
    dmu_p, dx_p = (prior_gradient(p, mu) if want and dkl is not None else None for p, want in priors)
    if n > 0:
        launch_backward(call, mu, x, dz, dkl, dmu, dx, dmu_p, dx_p)
    return (packed, None, dmu_p, dx_p) if call.x is None else (dmu, dx, dmu_p, dx_p)


def launch_backward(
    call: Call,
    mu: Tensor,
    x: Tensor,
    dz: Tensor | None,
    dkl: Tensor | None,
    dmu: Tensor | None,
    dx: Tensor | None,
    dmu_p: Tensor | None,
    dx_p: Tensor | None,
) -> None:
    spec, n = call.spec, mu.numel()
    samples = math.prod(spec.sample_shape)
    summed = dkl is not None and spec.event_ndim > 0
    seeds = call.seed.numel() if call.seed is not None else 1
    kl_cols = n // dkl.numel() if dkl is not None and summed else None
    whole = dz  # [samples, *mu.shape]
    if dz is not None:
        whole = dz.reshape(samples, *mu.shape)
    first = whole[0] if whole is not None and samples > 0 else None
    layout = Layout(
        n, [mu, x, *expanded_prior(call, mu.shape), first, dmu if dmu is not None else dx], n // seeds, kl_cols
    )
    per_seed = n // seeds // layout.cols
    noisy = first is not None
    noise = noise_mode(layout, per_seed, samples, call, noisy)
    block_rows, block, chunks = tile_of(layout, noise)
    per_kl = layout.rows // dkl.numel() if dkl is not None and summed else 1
    *inputs, dz_r, out_r = layout.operands
    if whole is not None and first is not None and dz_r.tensor is not first:
        whole = whole.contiguous()  # the layout copied one sample; all of them lie like that now
    with on(mu.device):
        kernels.backward_kernel[(triton.cdiv(layout.rows, block_rows) * chunks,)](
            *(o.tensor for o in inputs),
            call.seed,
            None if call.eps is None else call.eps.contiguous(),
            whole if noisy else None,
            None if dkl is None else dkl.contiguous(),
            dmu,
            dx,
            dmu_p,
            dx_p,
            layout.rows,
            layout.cols,
            chunks,
            samples,
            per_seed,
            per_kl,
            layout.nest,
            *flat(inputs),
            whole.stride(0) if whole is not None else 0,
            *flat([dz_r]),
            out_r.outer,
            out_r.step,
            **constants(spec, mu.dtype),
            ELEMENTWISE=not summed,
            NOISE=noise,
            NEST=layout.nest > 1,
            ROWS=block_rows,
            BLOCK=block,
            **OPTIONS,
        )
