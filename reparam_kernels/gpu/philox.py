"""Standard normals from a seed and an element index: Philox4x32-10, then Box-Muller, with the bits of the C++ kernels.

One Philox counter makes four words, hence four normals: element i takes counter i // 4.
"""

import triton
import triton.language as tl

from .elementary import horner


@triton.jit
def low_high(x):
    """Return the two 32-bit halves of a 64-bit integer."""
    x = x.to(tl.uint64)
    return (x & 0xFFFFFFFF).to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def philox4x32_10(seed, c0, c1):
    """Compute four 32-bit words (Salmon et al., SC 2011). One widening multiply gives both halves of a product."""
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = low_high(seed)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p1 & 0xFFFFFFFF).to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, (p0 & 0xFFFFFFFF).to(tl.uint32)
        k0 = ((k0.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
        k1 = ((k1.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def sqrt_rn(x, INLINE_PTX: tl.constexpr):
    """Compute the correctly rounded square root.

    INLINE_PTX selects the code that ptxas makes of sqrt.rn, without its branch for tiny and infinite x.
    """
    if INLINE_PTX:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 y, s, h, e;
            rsqrt.approx.ftz.f32 y, $1;
            mul.rn.f32 s, $1, y;
            mul.rn.f32 h, y, 0f3F000000;
            neg.f32 e, s;
            fma.rn.f32 e, e, s, $1;
            fma.rn.f32 $0, e, h, s; }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.sqrt_rn(x)


@triton.jit
def box_muller(x, y, INLINE_PTX: tl.constexpr = False):
    """Turn two words into two normals, r(x) cos t(y) and r(x) sin t(y)."""
    xi = x.to(tl.int32, bitcast=True)
    upper = xi < 0
    v = tl.fma(xi.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    b = v.to(tl.int32, bitcast=True)
    m = (b & 0x7FFFFF) | 0x3F000000
    f = tl.where(upper, v, m.to(tl.float32, bitcast=True) - 1.0)
    e = tl.where(upper, 0, b - m)
    q = horner(
        f,
        (2.321223736, 2.072345257, 1.503254056, -0.1016341075, 0.5393293500, -0.6642580628, 1.000049233, -2.0),
    )
    r = sqrt_rn(tl.fma(f, q, e.to(tl.float32) * -1.6525917e-7), INLINE_PTX)  # of a number in [2^-32, 46]
    y2 = y << 1
    sr = (r.to(tl.uint32, bitcast=True) ^ ((y ^ y2) & 0x80000000)).to(tl.float32, bitcast=True)
    t = tl.fma(y2.to(tl.int32, bitcast=True).to(tl.float32), 4.656612873077393e-10, 4.656612873077393e-10)
    w = t * t
    sn = t * horner(w, (1.492839947e-4, -4.668947775e-3, 7.968617976e-2, -0.6459627748, 1.570796251))
    cs = horner(w, (8.594021783e-4, -2.081347443e-2, 0.2536529601, -1.233698845, 1.0))
    return sr * cs, sr * sn


@triton.jit
def normals(
    seed,
    first_counter,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTER_32BIT: tl.constexpr = False,
    INLINE_PTX: tl.constexpr = False,
):
    """Draw the normals [ROWS, BLOCK] of consecutive counters; seed and first_counter are scalars or [ROWS, 1]."""
    i = tl.arange(0, BLOCK // 4)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    if COUNTER_32BIT:
        low = first_counter.to(tl.uint32) + i.to(tl.uint32)
        high = tl.zeros_like(low)
    else:
        low, high = low_high(first_counter + i)
    x0, x1, x2, x3 = philox4x32_10(seed, low, high)
    n0, n1 = box_muller(x0, x1, INLINE_PTX)
    n2, n3 = box_muller(x2, x3, INLINE_PTX)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [ROWS, BLOCK])


@triton.jit
def normal_at(seed, index, INLINE_PTX: tl.constexpr):
    """Draw the normal of each index. Each evaluates its own counter, so this costs four times as much as `normals`."""
    word = index % 4
    low, high = low_high(index // 4)
    x0, x1, x2, x3 = philox4x32_10(seed, low, high)
    cosine, sine = box_muller(tl.where(word < 2, x0, x2), tl.where(word < 2, x1, x3), INLINE_PTX)
    return tl.where(word % 2 == 0, cosine, sine)
