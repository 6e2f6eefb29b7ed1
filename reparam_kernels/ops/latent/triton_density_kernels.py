"""The Triton kernels of the latent op if log_q is asked for, or z is squashed: forward and backward.

The noise enters the density of each sample, so backward visits the samples one by one. The arguments are those of
triton_kernels.py, with log_q in the place of kl: [samples, rows, cols] if elementwise, else a sum for each sample, row
and chunk, or for each sample and packed row.
"""

import triton
import triton.language as tl

from ...gpu.density import densities, log_density, log_ratio_of_densities, squash
from ...gpu.elementary import fma
from ...gpu.gaussian import in_bounds, slope_at
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
from .triton_kernels import load_latent, sample_pointers


@triton.jit
def store_log_q(ptr, sample, terms, tile, shape, OPTIONS: tl.constexpr, TILING: tl.constexpr):
    """Store the terms of one sample, or their sums."""
    if OPTIONS.ELEMENTWISE_KL:
        sample_ptr = sample_pointer(ptr, sample, shape.total, TILING)
        store(contiguous_pointers(sample_ptr, tile, shape, TILING), terms, tile.mask)
    elif TILING.ROW_LEN:
        sums = sum_packed_rows(terms, TILING)
        i = tl.arange(0, sums.shape[0])
        first = sample * (shape.total // TILING.ROW_LEN) + tile.first_row * TILING.PACKED_ROWS
        tl.store(ptr + first + i, sums, mask=i < elements_left(tile, shape) // TILING.ROW_LEN)
    else:
        if not TILING.EVEN:
            terms = tl.where(tile.mask, terms, 0.0)
        part = tl.sum(terms, axis=1)[:, None]
        first = (sample * shape.rows + tile.first_row) * shape.chunks + tile.chunk
        tl.store(ptr + first + tile.row * shape.chunks, part, mask=tile.row_mask)


@triton.jit
def load_dlog_q(ptr, sample, tile, shape, OPTIONS: tl.constexpr, TILING: tl.constexpr):
    """Load the gradient that reaches each element of one sample."""
    if OPTIONS.ELEMENTWISE_KL:
        sample_ptr = sample_pointer(ptr, sample, shape.total, TILING)
        return load(contiguous_pointers(sample_ptr, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
    elif TILING.ROW_LEN:
        first = sample * (shape.total // TILING.ROW_LEN) + tile.first_row * TILING.PACKED_ROWS
        return broadcast_packed_rows(ptr + first, elements_left(tile, shape), TILING)
    else:
        row, _ = divmod_rows(tile.first_row + tile.row, shape.rows_per_kl, TILING)
        rows = shape.rows // shape.rows_per_kl
        if TILING.ONE_KL:
            row, rows = row * 0, 1
        return tl.load(ptr + sample * rows + row, mask=tile.row_mask)


@triton.jit(do_not_specialize=["rows", "cols", "total", "chunks"])
def density_forward_kernel(
    mu_ptr,
    x_ptr,
    mu_p_ptr,
    x_p_ptr,
    seed_ptr,
    eps_ptr,
    window_ptr,
    z_ptr,
    log_q_ptr,
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
    e = densities(latent, OPTIONS, mu_p_ptr is not None)
    z_strides = strides.z  # triton 3.6 loses constants of nested records at a loop
    for i in range(shape.samples):
        sample = tile.first_col * 0 + i  # 64-bit
        eps = noise(seed_ptr, eps_ptr, window_ptr, sample, tile, shape, OPTIONS.FLOAT64, TILING)
        z = fma(e.sigma, eps, latent.mu)
        if OPTIONS.MINUS_LOG_P:
            terms = log_ratio_of_densities(e, eps)
        else:
            terms = log_density(e, eps)
        if OPTIONS.TANH:
            t = squash(z)
            z = t.value
            terms = terms - t.log_slope
        store(sample_pointers(z_ptr, z_strides, sample, tile, shape, TILING), z, tile.mask)
        if log_q_ptr is not None:
            store_log_q(log_q_ptr, sample, terms, tile, shape, OPTIONS, TILING)


@triton.jit(do_not_specialize=["dz_sample_stride", "rows", "cols", "total", "chunks"])
def density_backward_kernel(
    mu_ptr,
    x_ptr,
    mu_p_ptr,
    x_p_ptr,
    seed_ptr,
    eps_ptr,
    window_ptr,
    dz_ptr,
    dlog_q_ptr,
    dmu_ptr,
    dx_ptr,
    dmu_p_ptr,
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
    e = densities(latent, OPTIONS, mu_p_ptr is not None)
    # Sums over the samples: the gradients to u, to sigma by way of u, to log sigma in log q itself, and to
    # mu_p / sigma_p and log sigma_p.
    zero = tl.full(latent.mu.shape, 0.0, latent.mu.dtype)
    to_u, to_sigma, to_log_sigma, to_mu_p, to_log_sigma_p = zero, zero, zero, zero, zero
    dz_strides, grad_strides = strides.dz, strides.grad  # triton 3.6 loses constants of nested records at a loop
    for i in range(shape.samples):
        sample = tile.first_col * 0 + i  # 64-bit
        eps = noise(seed_ptr, eps_ptr, window_ptr, sample, tile, shape, OPTIONS.FLOAT64, TILING)
        du, g = zero, zero
        if dz_ptr is not None:
            sample_ptr = sample_pointer(dz_ptr, sample, dz_sample_stride, TILING)
            du = load(pointers(sample_ptr, dz_strides, tile, shape, TILING), tile.mask, OPTIONS.FLOAT64)
        if dlog_q_ptr is not None:
            g = tl.broadcast_to(load_dlog_q(dlog_q_ptr, sample, tile, shape, OPTIONS, TILING), zero.shape)
        if OPTIONS.TANH:
            t = squash(fma(e.sigma, eps, latent.mu))
            du = fma(du, slope_at(du, t.slope), g * slope_at(g, t.value + t.value))
        if OPTIONS.MINUS_LOG_P:
            q = e.f + 1.0
            v = fma(q, eps, e.delta)  # (z - mu_p) / sigma_p
            if OPTIONS.PATH:
                slope = fma(e.f, q * eps + eps, e.delta * q) * e.inverse  # v / sigma_p - eps / sigma
            else:
                slope = v * e.inverse_p
            du = fma(g, slope_at(g, slope), du)
            to_mu_p = fma(-g, slope_at(g, v), to_mu_p)
            to_log_sigma_p = fma(g, slope_at(g, fma(-v, v, tl.full(v.shape, 1.0, v.dtype))), to_log_sigma_p)
        elif OPTIONS.PATH:
            du = fma(-g, slope_at(g, eps * e.inverse), du)
        to_u += du
        to_sigma = fma(du, slope_at(du, eps), to_sigma)
        if not OPTIONS.PATH:
            to_log_sigma -= g
    dx = fma(to_sigma, slope_at(to_sigma, e.dsigma), to_log_sigma * slope_at(to_log_sigma, e.slope))
    if OPTIONS.CLAMP:
        dx = tl.where(in_bounds(latent.raw_x, OPTIONS), dx, 0.0)
    if dmu_ptr is not None:
        store(pointers(dmu_ptr, grad_strides, tile, shape, TILING), to_u, tile.mask)
    if dx_ptr is not None:
        store(pointers(dx_ptr, grad_strides, tile, shape, TILING), dx, tile.mask)
    if dmu_p_ptr is not None:
        dmu_p = to_mu_p * slope_at(to_mu_p, e.inverse_p)
        store(contiguous_pointers(dmu_p_ptr, tile, shape, TILING), dmu_p, tile.mask)
    if dx_p_ptr is not None:
        dx_p = to_log_sigma_p * slope_at(to_log_sigma_p, e.slope_p)
        store(contiguous_pointers(dx_p_ptr, tile, shape, TILING), dx_p, tile.mask)
