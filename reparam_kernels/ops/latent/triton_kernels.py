"""The Triton kernels of the latent op: forward, backward, and the sum of a row's parts.

A pointer that is None is absent, or not wanted. `strides` and `counts` are records of gpu/tiles.py.
"""

import triton
import triton.language as tl

from ...gpu.elementary import fma
from ...gpu.gaussian import Latent, clamp, element, in_bounds, slope_at
from ...gpu.tiles import (
    broadcast_packed_rows,
    contiguous_pointers,
    divmod_rows,
    elements_left,
    load,
    make_shape,
    make_tile,
    noise,
    pointers,
    sample_pointer,
    store,
    sum_packed_rows,
)


@triton.jit
def load_latent(mu_ptr, x_ptr, mu_p_ptr, x_p_ptr, strides, tile, shape, OPTIONS: tl.constexpr, TILING: tl.constexpr):
    """Load the inputs of a tile and clamp them if asked. Without a prior, mu_p and x_p are placeholders."""
    mu = load(pointers(mu_ptr, strides.mu, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
    raw_x = load(pointers(x_ptr, strides.x, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
    x = raw_x
    if OPTIONS.CLAMP:
        x = clamp(raw_x, OPTIONS)
    if mu_p_ptr is None:
        return Latent(mu, raw_x, x, mu, x)
    elif OPTIONS.SCALAR_PRIOR:
        mu_p = load(mu_p_ptr, None, OPTIONS.FLOAT64)
        return Latent(mu, raw_x, x, mu_p, load(x_p_ptr, None, OPTIONS.FLOAT64))
    else:
        mu_p = load(pointers(mu_p_ptr, strides.mu_p, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
        x_p = load(pointers(x_p_ptr, strides.x_p, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
        return Latent(mu, raw_x, x, mu_p, x_p)


@triton.jit
def store_kl(ptr, terms, scale: tl.constexpr, tile, shape, OPTIONS: tl.constexpr, TILING: tl.constexpr):
    """Store the terms of the KL, or of one sample of log_q, times `scale`; or their sums."""
    if OPTIONS.ELEMENTWISE_KL:
        store(contiguous_pointers(ptr, tile, shape, TILING), scale * terms, tile.mask)
    elif TILING.ROW_LEN:
        sums = scale * sum_packed_rows(terms, TILING)
        i = tl.arange(0, sums.shape[0])
        packed_rows = elements_left(tile, shape) // TILING.ROW_LEN
        tl.store(ptr + tile.first_row * TILING.PACKED_ROWS + i, sums, mask=i < packed_rows)
    else:
        if not TILING.EVEN:
            terms = tl.where(tile.mask, terms, 0.0)
        part = scale * tl.sum(terms, axis=1)[:, None]
        tl.store(ptr + (tile.first_row + tile.row) * shape.chunks + tile.chunk, part, mask=tile.row_mask)


@triton.jit
def load_dkl(ptr, tile, shape, OPTIONS: tl.constexpr, TILING: tl.constexpr):
    """Load the gradient of the KL, or of one sample of log_q, that reaches each element."""
    if OPTIONS.ELEMENTWISE_KL:
        return load(contiguous_pointers(ptr, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
    elif TILING.ROW_LEN:
        first = ptr + tile.first_row * TILING.PACKED_ROWS
        return broadcast_packed_rows(first, elements_left(tile, shape), TILING)
    else:
        row, _ = divmod_rows(tile.first_row + tile.row, shape.rows_per_kl, TILING)
        if TILING.ONE_KL:
            row = row * 0
        return tl.load(ptr + row, mask=tile.row_mask)


@triton.jit
def sample_pointers(z_ptr, strides, sample, tile, shape, TILING: tl.constexpr):
    """Return pointers to a tile's elements of one sample. If rows are channels, there is one."""
    if TILING.CHANNELS:
        return pointers(z_ptr, strides, tile, shape, TILING)
    else:
        return contiguous_pointers(sample_pointer(z_ptr, sample, shape.total, TILING), tile, shape, TILING)


@triton.jit(do_not_specialize=["rows", "cols", "total", "chunks"])
def forward_kernel(
    mu_ptr,  # operands, read through their strides
    x_ptr,
    mu_p_ptr,
    x_p_ptr,
    seed_ptr,  # int64 [rows / rows_per_seed]
    eps_ptr,  # the caller's noise, [samples, rows, cols]
    window_ptr,  # int64, as window_numbers of gpu/plan.py makes them
    z_ptr,  # [samples, rows, cols], or an operand if rows are channels
    kl_ptr,  # [rows, cols] if elementwise, else a sum for each row and chunk [rows, chunks], or for each packed row
    rows,
    cols,
    total,
    chunks,
    counts,
    strides,
    OPTIONS: tl.constexpr,
    TILING: tl.constexpr,
):
    shape = make_shape(rows, cols, total, chunks, counts, TILING)
    tile = make_tile(shape, window_ptr, TILING)
    latent = load_latent(mu_ptr, x_ptr, mu_p_ptr, x_p_ptr, strides, tile, shape, OPTIONS, TILING)
    e = element(latent, OPTIONS, mu_p_ptr is not None)
    if kl_ptr is not None:
        store_kl(kl_ptr, e.kl2, 0.5, tile, shape, OPTIONS, TILING)
    z_strides = strides.z  # triton 3.6 loses constants of nested records at a loop
    if z_ptr is not None:
        for i in range(shape.samples):
            sample = tile.first_col * 0 + i  # 64-bit
            eps = noise(seed_ptr, eps_ptr, window_ptr, sample, tile, shape, OPTIONS.FLOAT64, TILING)
            z = fma(e.sigma, eps, latent.mu)
            store(sample_pointers(z_ptr, z_strides, sample, tile, shape, TILING), z, tile.mask)


@triton.jit(do_not_specialize=["dz_sample_stride", "rows", "cols", "total", "chunks"])
def backward_kernel(
    mu_ptr,  # operands and noise as in forward
    x_ptr,
    mu_p_ptr,
    x_p_ptr,
    seed_ptr,
    eps_ptr,
    window_ptr,
    dz_ptr,  # operand, one for each sample
    dkl_ptr,  # [rows, cols] if elementwise, else one for every rows_per_kl rows, or for each packed row
    dmu_ptr,  # operands with the same strides, so that their addresses are computed once
    dx_ptr,
    dmu_p_ptr,  # [rows, cols]
    dx_p_ptr,
    dz_sample_stride,
    rows,
    cols,
    total,
    chunks,
    counts,
    strides,
    OPTIONS: tl.constexpr,
    TILING: tl.constexpr,
):
    shape = make_shape(rows, cols, total, chunks, counts, TILING)
    tile = make_tile(shape, window_ptr, TILING)
    latent = load_latent(mu_ptr, x_ptr, mu_p_ptr, x_p_ptr, strides, tile, shape, OPTIONS, TILING)
    e = element(latent, OPTIONS, mu_p_ptr is not None)
    # dmu and dsigma: the sums over the samples of dz and of dz * eps. They start at -0, which changes no bit of a sum.
    dmu = tl.full(latent.mu.shape, 0.0, latent.mu.dtype) * -1.0  # before triton 3.9 a constant of -0 is 0
    dsigma = dmu
    dz_strides, grad_strides = strides.dz, strides.grad  # triton 3.6 loses constants of nested records at a loop
    if dz_ptr is not None:
        for i in range(shape.samples):
            sample = tile.first_col * 0 + i  # 64-bit
            sample_ptr = sample_pointer(dz_ptr, sample, dz_sample_stride, TILING)
            dz = load(pointers(sample_ptr, dz_strides, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
            eps = noise(seed_ptr, eps_ptr, window_ptr, sample, tile, shape, OPTIONS.FLOAT64, TILING)
            if eps_ptr is not None:
                eps = slope_at(dz, eps)
            dmu += dz
            dsigma = fma(dz, eps, dsigma)
    dsigma_slope = slope_at(dsigma, e.dsigma)
    dx = dsigma * dsigma_slope
    if dkl_ptr is not None:
        dkl = load_dkl(dkl_ptr, tile, shape, OPTIONS, TILING)
        dkl_mu = slope_at(dkl, e.dkl_mu)
        if dmu_p_ptr is not None:
            store(contiguous_pointers(dmu_p_ptr, tile, shape, TILING), -(dkl * dkl_mu), tile.mask)
        if dx_p_ptr is not None:
            store(contiguous_pointers(dx_p_ptr, tile, shape, TILING), dkl * slope_at(dkl, e.dkl_xp), tile.mask)
        dmu = fma(tl.broadcast_to(dkl, dmu.shape), dkl_mu, dmu)
        dx = dkl * slope_at(dkl, e.dkl_x)
        if dz_ptr is not None:
            dx = fma(dsigma, dsigma_slope, dx)
    if OPTIONS.CLAMP:
        dx = tl.where(in_bounds(latent.raw_x, OPTIONS), dx, 0.0)
    if dmu_ptr is not None:
        store(pointers(dmu_ptr, grad_strides, tile, shape, TILING), dmu, tile.mask)
    if dx_ptr is not None:
        store(pointers(dx_ptr, grad_strides, tile, shape, TILING), dx, tile.mask)


@triton.jit(do_not_specialize=["parts"])
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
