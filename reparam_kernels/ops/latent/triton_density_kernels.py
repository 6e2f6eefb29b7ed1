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
from ...gpu.tiles import contiguous_pointers, load, make_shape, make_tile, noise, pointers, sample_pointer, store
from .triton_kernels import load_dkl, load_latent, sample_pointers, store_kl


@triton.jit
def log_q_pointer(ptr, sample, first_sum, shape, OPTIONS: tl.constexpr, TILING: tl.constexpr):
    """Return a pointer to one sample of log_q, or of its gradient. first_sum: its place if each row has its sums."""
    if OPTIONS.ELEMENTWISE_KL:
        return sample_pointer(ptr, sample, shape.total, TILING)
    elif TILING.ROW_LEN:
        return ptr + sample * (shape.total // TILING.ROW_LEN)
    else:
        return ptr + first_sum


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
            sums = sample * shape.rows * shape.chunks
            ptr = log_q_pointer(log_q_ptr, sample, sums, shape, OPTIONS, TILING)
            store_kl(ptr, terms, 1.0, tile, shape, OPTIONS, TILING)


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
            sums = sample
            if not TILING.ONE_KL:
                sums = sample * (shape.rows // shape.rows_per_kl)
            ptr = log_q_pointer(dlog_q_ptr, sample, sums, shape, OPTIONS, TILING)
            g = tl.broadcast_to(load_dkl(ptr, tile, shape, OPTIONS, TILING), zero.shape)
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
