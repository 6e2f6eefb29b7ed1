"""The Triton kernels of the latent op: forward, backward, and the sum of a row's parts.

A pointer or operand that is None is absent, or not wanted.
"""

import triton
import triton.language as tl

from ...gpu.elementary import fma
from ...gpu.gaussian import Latent, clamp, element, in_bounds, slope_at
from ...gpu.tiles import (
    Operand,
    broadcast_packed_rows,
    contiguous_pointers,
    divmod_rows,
    elements_left,
    load,
    make_tile,
    noise,
    pointers,
    sample_pointer,
    store,
    sum_packed_rows,
)


@triton.jit
def load_latent(mu, x, mu_p, x_p, tile, shape, OPTIONS: tl.constexpr, TILING: tl.constexpr):
    """Load the inputs of a tile and clamp them if asked. Without a prior, mu_p and x_p are placeholders."""
    mu_ptr, x_ptr = pointers(mu, tile, shape, TILING), pointers(x, tile, shape, TILING)
    mu_value = load(mu_ptr, tile.mask, OPTIONS.FLOAT64)
    raw_x = load(x_ptr, tile.mask, OPTIONS.FLOAT64)
    x_value = raw_x
    if OPTIONS.CLAMP:
        x_value = clamp(raw_x, OPTIONS)
    if mu_p is None:
        return Latent(mu_value, raw_x, x_value, mu_value, x_value)
    elif OPTIONS.SCALAR_PRIOR:
        mu_p_value = load(mu_p.ptr, None, OPTIONS.FLOAT64)
        return Latent(mu_value, raw_x, x_value, mu_p_value, load(x_p.ptr, None, OPTIONS.FLOAT64))
    else:
        mu_p_ptr, x_p_ptr = pointers(mu_p, tile, shape, TILING), pointers(x_p, tile, shape, TILING)
        mu_p_value = load(mu_p_ptr, tile.mask, OPTIONS.FLOAT64)
        x_p_value = load(x_p_ptr, tile.mask, OPTIONS.FLOAT64)
        return Latent(mu_value, raw_x, x_value, mu_p_value, x_p_value)


@triton.jit(do_not_specialize=["rows", "total"])
def forward_kernel(
    mu,  # operands
    x,
    mu_p,
    x_p,
    seed_ptr,  # int64 [rows / rows_per_seed]
    eps_ptr,  # the caller's noise, [samples, rows, cols]
    z_ptr,  # [samples, rows, cols]
    kl_ptr,  # [rows, cols] if elementwise, else a sum for each row and chunk [rows, chunks], or for each packed row
    rows,
    total,
    shape,
    OPTIONS: tl.constexpr,
    TILING: tl.constexpr,
):
    tile = make_tile(rows, total, shape, TILING)
    latent = load_latent(mu, x, mu_p, x_p, tile, shape, OPTIONS, TILING)
    e = element(latent, OPTIONS, mu_p is not None)
    if kl_ptr is not None:
        if OPTIONS.ELEMENTWISE_KL:
            store(contiguous_pointers(kl_ptr, tile, shape, TILING), 0.5 * e.kl2, tile.mask)
        elif TILING.ROW_LEN:
            sums = 0.5 * sum_packed_rows(e.kl2, TILING)
            i = tl.arange(0, sums.shape[0])
            packed_rows = elements_left(tile, total, shape) // TILING.ROW_LEN
            tl.store(kl_ptr + tile.first_row * TILING.PACKED_ROWS + i, sums, mask=i < packed_rows)
        else:
            kl2 = e.kl2
            if not TILING.EVEN:
                kl2 = tl.where(tile.mask, kl2, 0.0)
            part = 0.5 * tl.sum(kl2, axis=1)[:, None]
            tl.store(kl_ptr + (tile.first_row + tile.row) * shape.chunks + tile.chunk, part, mask=tile.row_mask)
    if z_ptr is not None:
        for i in range(shape.samples):
            sample = tile.first_col * 0 + i  # 64-bit
            eps = noise(seed_ptr, eps_ptr, sample, tile, total, shape, OPTIONS.FLOAT64, TILING)
            z = fma(e.sigma, eps, latent.mu)
            sample_ptr = sample_pointer(z_ptr, sample, total, TILING)
            store(contiguous_pointers(sample_ptr, tile, shape, TILING), z, tile.mask)


@triton.jit(do_not_specialize=["rows", "total"])
def backward_kernel(
    mu,  # operands and noise as in forward
    x,
    mu_p,
    x_p,
    seed_ptr,
    eps_ptr,
    dz,  # operand, one for each sample
    dz_sample_stride,
    dkl_ptr,  # [rows, cols] if elementwise, else one for every rows_per_kl rows, or for each packed row
    dmu_ptr,
    dx_ptr,
    grad_strides,  # of dmu and dx alike, so that their addresses are computed once
    dmu_p_ptr,  # [rows, cols]
    dx_p_ptr,
    rows,
    total,
    shape,
    OPTIONS: tl.constexpr,
    TILING: tl.constexpr,
):
    tile = make_tile(rows, total, shape, TILING)
    latent = load_latent(mu, x, mu_p, x_p, tile, shape, OPTIONS, TILING)
    e = element(latent, OPTIONS, mu_p is not None)
    # dmu and dsigma: the sums over the samples of dz and of dz * eps. They start at -0, which changes no bit of a sum.
    dmu = tl.full(latent.mu.shape, -0.0, latent.mu.dtype)
    dsigma = dmu
    if dz is not None:
        for i in range(shape.samples):
            sample = tile.first_col * 0 + i  # 64-bit
            sample_ptr = sample_pointer(dz.ptr, sample, dz_sample_stride, TILING)
            sample_dz = Operand(sample_ptr, dz.outer_stride, dz.row_stride, dz.col_stride)
            dz_value = load(pointers(sample_dz, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
            eps = noise(seed_ptr, eps_ptr, sample, tile, total, shape, OPTIONS.FLOAT64, TILING)
            if eps_ptr is not None:
                eps = slope_at(dz_value, eps)
            dmu += dz_value
            dsigma = fma(dz_value, eps, dsigma)
    dsigma_slope = slope_at(dsigma, e.dsigma)
    dx = dsigma * dsigma_slope
    if dkl_ptr is not None:
        if OPTIONS.ELEMENTWISE_KL:
            dkl = load(contiguous_pointers(dkl_ptr, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
        elif TILING.ROW_LEN:
            first = dkl_ptr + tile.first_row * TILING.PACKED_ROWS
            dkl = broadcast_packed_rows(first, elements_left(tile, total, shape), TILING)
        else:
            kl_row, _ = divmod_rows(tile.first_row + tile.row, shape.rows_per_kl, TILING)
            dkl = tl.load(dkl_ptr + kl_row, mask=tile.row_mask)
        dkl_mu = slope_at(dkl, e.dkl_mu)
        if dmu_p_ptr is not None:
            store(contiguous_pointers(dmu_p_ptr, tile, shape, TILING), -(dkl * dkl_mu), tile.mask)
        if dx_p_ptr is not None:
            store(contiguous_pointers(dx_p_ptr, tile, shape, TILING), dkl * slope_at(dkl, e.dkl_xp), tile.mask)
        dmu = fma(tl.broadcast_to(dkl, dmu.shape), dkl_mu, dmu)
        dx = dkl * slope_at(dkl, e.dkl_x)
        if dz is not None:
            dx = fma(dsigma, dsigma_slope, dx)
    if OPTIONS.CLAMP:
        dx = tl.where(in_bounds(latent.raw_x, OPTIONS), dx, 0.0)
    if dmu_ptr is not None:
        to = Operand(dmu_ptr, grad_strides.outer_stride, grad_strides.row_stride, 1)
        store(pointers(to, tile, shape, TILING), dmu, tile.mask)
    if dx_ptr is not None:
        to = Operand(dx_ptr, grad_strides.outer_stride, grad_strides.row_stride, 1)
        store(pointers(to, tile, shape, TILING), dx, tile.mask)


@triton.jit
def row_sum_kernel(part_ptr, kl_ptr, parts, FLOAT64: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the parts of a row's kl in an order that depends only on their number.

    On a device without float64, `lost` holds what the rounding of the total took from it.
    """
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64 if FLOAT64 else tl.float32)
    lost = tl.zeros_like(total)
    for first in range(0, parts, BLOCK):
        i = first + tl.arange(0, BLOCK)
        part = tl.load(part_ptr + row * parts + i, mask=i < parts, other=0.0).to(total.dtype)
        if FLOAT64:
            total += part
        else:
            term = part - lost
            summed = total + term
            lost = (summed - total) - term
            total = summed
    tl.store(kl_ptr + row, tl.sum(total).to(kl_ptr.dtype.element_ty))
