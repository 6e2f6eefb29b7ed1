"""exp, log and softplus of a block. In float32 they have the bits of the C++ kernels, which use the same names.

They use IEEE add, mul, fma and div in one fixed order, because other orders round differently. Unless it says
otherwise, a function also takes float64, for which it is accurate without a promise of bits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def fma(a, b, c):
    """Compute a * b + c, rounded once in float32 and twice in float64."""
    if a.dtype == tl.float64:
        return a * b + c
    else:
        return tl.fma(a, b, c)


@triton.jit
def div(a, b):
    """Compute a / b, correctly rounded. One of them is a tensor; the dtype of b decides."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def horner(x, COEFFICIENTS: tl.constexpr):
    """Evaluate the polynomial with these coefficients, the leading one first."""
    y = fma(x, COEFFICIENTS[0], COEFFICIENTS[1])
    for i in tl.static_range(2, len(COEFFICIENTS)):
        y = fma(y, x, COEFFICIENTS[i])
    return y


class Exp(NamedTuple):
    """exp(lv / 2) and what expm1 needs. If n == 0, lv is near 0 and q2 = expm1(lv / 2) - lv / 2."""

    sigma: Any
    d: Any  # expm1(lv / 2)
    q2: Any
    n: Any


@triton.jit
def exp_half(lv):
    """Compute exp(lv / 2) and expm1(lv / 2), each to full relative accuracy."""
    if lv.dtype == tl.float64:
        half = lv * 0.5
        sigma = tl.exp(half)
        s = half * (1.0 / 17) + 1.0
        for i in tl.static_range(13):
            s = s * half * (1.0 / (16 - i)) + 1.0
        q2 = s * half * half * (1.0 / 6) * half + 0.5 * half * half
        n = tl.where(tl.abs(half) < 0.5, 0.0, 1.0)
        return Exp(sigma, tl.where(n == 0.0, q2 + half, sigma - 1.0), q2, n)
    else:
        bound = tl.where(lv < -176.0, -176.0, lv)  # keeps NaN
        t = tl.fma(bound, 0.721347520, 12583039.0)
        t = tl.where(t < 12583166.0, t, 12583166.0)
        n = t - 12583039.0
        r = tl.fma(n, -1.38629436, bound)
        scale = (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        q2 = horner(r, (2.172787572e-5, 2.613425895e-4, 2.604172565e-3, 2.083322406e-2, 0.125)) * (r * r)
        q = tl.fma(r, 0.5, q2)
        return Exp(tl.fma(q, scale, scale), tl.fma(q, scale, scale - 1.0), q2, n)


@triton.jit
def expm1(x):
    return exp_half(2.0 * x).d


@triton.jit
def expm1_twice(e):
    """Compute expm1(lv) from e = exp_half(lv)."""
    return fma(e.d, e.sigma, e.d)


@triton.jit
def expm1_minus(e, lv):
    """Compute expm1(lv) - lv without the cancellation near 0, from e = exp_half(lv)."""
    return fma(e.d, e.d, tl.where(e.n == 0.0, e.q2 + e.q2, fma(e.d, 2.0, -lv)))


class Split(NamedTuple):
    """u = 2^e (1 + h) with 1 + h in [sqrt(1/2), sqrt(2))."""

    e: Any
    h: Any


@triton.jit
def split(u, w):
    """Split u. Since w = u - 1 is given, h does not suffer from the rounding of u. float32 only."""
    e = (u.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23
    scale = ((127 - e) << 23).to(tl.float32, bitcast=True)
    return Split(e.to(tl.float32), tl.fma(w, scale, scale - 1.0))


@triton.jit
def log1p_poly(h):
    """Evaluate the polynomial p with h - log1p(h) = h * h * p(h). float32 only."""
    return horner(
        h,
        (7.656288147e-2, -0.1275399923, 0.1315043867, -0.1420175880, 0.1662365347,
         -0.2000127435, 0.2500089109, -0.3333333135, 0.4999999702),
    )  # fmt: skip


LN2_HI, LN2_LO = tl.constexpr(0.693145752), tl.constexpr(1.42860677e-6)  # e * LN2_HI is exact


@triton.jit
def log_split(e, h):
    """Compute log(2^e (1 + h)). float32 only."""
    return tl.fma(e, LN2_HI, tl.fma(e, LN2_LO, tl.fma(-(h * h), log1p_poly(h), h)))


@triton.jit
def minus_log1p(f):
    """Compute f - log1p(f) without the cancellation near 0."""
    if f.dtype == tl.float64:
        s = f / (2.0 + f)  # log1p(f) = 2 (s + s^3 / 3 + s^5 / 5 + ...)
        w = s * s
        t = tl.zeros_like(w) + 1.0 / 25
        for i in tl.static_range(11):
            t = t * w + 1.0 / (23 - 2 * i)
        return tl.where(tl.abs(f) < 0.3, f * s - 2.0 * s * w * t, f - tl.log(1.0 + f))
    else:
        u = split(1.0 + f, f)
        return tl.fma(-u.e, LN2_HI, f - u.h) + tl.fma(-u.e, LN2_LO, u.h * u.h * log1p_poly(u.h))


@triton.jit
def log1p(w):
    """Compute log1p of a finite w >= 0."""
    if w.dtype == tl.float64:
        return w - minus_log1p(w)
    else:
        u = split(1.0 + w, w)
        return log_split(u.e, u.h)


@triton.jit
def log(u):
    if u.dtype == tl.float64:
        return tl.log(u)
    else:
        subnormal = u < 1.1754943508222875e-38
        bits = tl.where(subnormal, u * 16777216.0, u).to(tl.int32, bitcast=True)
        e = (bits - 0x3F3504F3) >> 23
        h = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
        y = log_split(e.to(tl.float32) - tl.where(subnormal, 24.0, 0.0), h)
        y = tl.where(u < float("inf"), y, u)
        return tl.where(u > 0.0, y, tl.where(u == 0.0, float("-inf"), float("nan")))


@triton.jit
def log_ratio(a, b, q):
    """Compute log q for q = a / b, even if q is so small that it has lost digits."""
    if q.dtype == tl.float64:
        tiny = q < 1.1830521861667747e-271
        return tl.log(tl.where(tiny, a, q)) - tl.log(tl.where(tiny, b, 1.0))
    else:
        tiny = q < 7.888609052210118e-31
        scaled = tl.div_rn(a * 6.338253001141147e29, b * 4.440892098500626e-16)  # q * 2^150
        return log(tl.where(tiny, scaled, q)) - tl.where(tiny, 103.972077, 0.0)


class Softplus(NamedTuple):
    value: Any
    slope: Any


# Beyond this |x|, exp(-|x|) is subnormal; softplus and its slope keep their value there.
EXP_UNDERFLOW, EXP_UNDERFLOW_64 = tl.constexpr(87.336), tl.constexpr(708.0)


@triton.jit
def softplus(x):
    """Compute log(1 + exp(x)) and its slope."""
    LAST: tl.constexpr = EXP_UNDERFLOW_64 if x.dtype == tl.float64 else EXP_UNDERFLOW
    size = tl.abs(x)
    t = exp_half(-2.0 * tl.where(size > LAST, LAST, size)).sigma
    s = div(1.0, 1.0 + t)
    return Softplus(tl.where(x < 0.0, 0.0, x) + log1p(t), tl.where(x < 0.0, t * s, s))


@triton.jit
def softplus_difference(x, sx, hi, lo, sy):
    """Compute softplus(x) - softplus(y) for y = hi + lo, in float32 without the cancellation if they are close."""
    if x.dtype == tl.float64:
        return sx.value - sy.value
    else:
        v = (x - hi) - lo
        size = tl.abs(v)
        near = log1p(tl.where(v < 0.0, sx.slope, sy.slope) * expm1(tl.where(size < 16.0, size, 16.0)))
        close = (size < 16.0) & (sx.value < 2.5 * sy.value) & (sy.value < 2.5 * sx.value)
        return tl.where(close, tl.where(v < 0.0, -near, near), sx.value - sy.value)
