"""The Triton kernel of the noise, and two kernels that let the self-test check its parts."""

import triton
import triton.language as tl

from ...gpu.philox import low_high, philox4x32_10, sqrt_rn
from ...gpu.tiles import contiguous_pointers, make_shape, make_tile, noise, store


@triton.jit(do_not_specialize=["rows", "cols", "total", "chunks"])
def randn_kernel(out_ptr, seed_ptr, window_ptr, rows, cols, total, chunks, counts, TILING: tl.constexpr):
    shape = make_shape(rows, cols, total, chunks, counts, TILING)
    tile = make_tile(shape, window_ptr, TILING)
    eps = noise(seed_ptr, None, window_ptr, tile.first_col * 0, tile, shape, False, TILING)
    store(contiguous_pointers(out_ptr, tile, shape, TILING), eps, tile.mask)


@triton.jit
def words_kernel(out_ptr, at_ptr, count, BLOCK: tl.constexpr):
    """Write the words [count, 4] of consecutive counters. at_ptr points to the seed and the first counter."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = low_high(tl.load(at_ptr + 1) + i)
    x0, x1, x2, x3 = philox4x32_10(tl.load(at_ptr), low, high)
    tl.store(out_ptr + 4 * i, x0.to(tl.int64), mask=i < count)
    tl.store(out_ptr + 4 * i + 1, x1.to(tl.int64), mask=i < count)
    tl.store(out_ptr + 4 * i + 2, x2.to(tl.int64), mask=i < count)
    tl.store(out_ptr + 4 * i + 3, x3.to(tl.int64), mask=i < count)


@triton.jit
def roots_kernel(out_ptr, x_ptr, count, INLINE_PTX: tl.constexpr, BLOCK: tl.constexpr):
    """Write the square roots of x [count], computed as in the noise."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=1.0)
    tl.store(out_ptr + i, sqrt_rn(x, INLINE_PTX), mask=i < count)
