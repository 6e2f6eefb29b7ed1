"""One element of the latent layer: sigma, the KL and their derivatives. The C++ kernels use the same names.

The posterior is N(mu, sigma^2), and PARAM selects the function that gives sigma from x. The prior is
N(mu_p, sigma_p^2) with sigma_p the same function of x_p. If PRIOR is false, it is N(0, 1), and mu_p and x_p are unused.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .elementary import (
    EXP_UNDERFLOW,
    EXP_UNDERFLOW_64,
    Softplus,
    div,
    exp_half,
    expm1,
    expm1_minus,
    expm1_twice,
    fma,
    log,
    log_ratio,
    minus_log1p,
    softplus,
    softplus_difference,
)

LOGVAR, LOGSTD, STD, SOFTPLUS = (tl.constexpr(i) for i in range(4))  # PARAM, in the order of ops/latent/arguments.py


class Options(NamedTuple):
    """The options of a call, as compile-time constants."""

    FLOAT64: bool  # whether the arithmetic is in float64 or float32
    PARAM: int
    MIN_STD: float
    UNIT_HI: float  # softplus(unit) + MIN_STD = 1: unit in two parts of the arithmetic's dtype, and the slope there
    UNIT_LO: float
    UNIT_SLOPE: float
    CLAMP: bool
    LOW: float
    HIGH: float
    SCALAR_PRIOR: bool  # mu_p and x_p are one number each
    ELEMENTWISE_KL: bool  # or log_q: not summed
    MINUS_LOG_P: bool  # log_q is log q(z) - log p(z)
    TANH: bool  # z = tanh(mu + sigma eps)
    PATH: bool  # log_q has gradients by way of z alone


class Latent(NamedTuple):
    """The inputs of an element. x is clamped, raw_x is not."""

    mu: Any
    raw_x: Any
    x: Any
    mu_p: Any
    x_p: Any


class Element(NamedTuple):
    """sigma, twice the KL, and the derivatives of both."""

    sigma: Any
    kl2: Any
    dsigma: Any  # dsigma/dx
    dkl_x: Any  # dkl/dx, and so on
    dkl_mu: Any  # and -dkl/dmu_p
    dkl_xp: Any


class Ratio(NamedTuple):
    """sigma / sigma_p, that less 1, and its logarithm, each to full relative accuracy."""

    f: Any  # quotient - 1
    quotient: Any
    log_quotient: Any


@triton.jit
def slope_at(g, slope):
    """Return the slope by which to multiply the gradient g.

    If g is 0, only the sign of the slope is kept: then g * slope is 0 even if the slope is infinite or NaN, and a
    finite product keeps its bits.
    """
    if slope.dtype == tl.float64:
        zero = (slope.to(tl.int64, bitcast=True) & -0x8000000000000000).to(tl.float64, bitcast=True)
    else:
        zero = (slope.to(tl.int32, bitcast=True) & -0x80000000).to(tl.float32, bitcast=True)
    return tl.where(g == 0.0, zero, slope)


@triton.jit
def in_bounds(x, OPTIONS: tl.constexpr):
    return (x >= tl.full((), OPTIONS.LOW, x.dtype)) & (x <= tl.full((), OPTIONS.HIGH, x.dtype))


@triton.jit
def clamp(x, OPTIONS: tl.constexpr):
    low, high = tl.full((), OPTIONS.LOW, x.dtype), tl.full((), OPTIONS.HIGH, x.dtype)
    return tl.where(x < low, low, tl.where(x > high, high, x))  # keeps NaN


@triton.jit
def from_log(scale: tl.constexpr, mu, lv, mu_p, lvp, PRIOR: tl.constexpr):
    """Make the element from lv = 2 log sigma and lvp = 2 log sigma_p. `scale` is dlog_sigma/dx."""
    FLOAT64: tl.constexpr = lv.dtype == tl.float64
    posterior = exp_half(lv)
    if PRIOR:
        d = lv - lvp
        e = exp_half(d)
    else:
        d = lv
        e = posterior
    em1 = expm1_twice(e)
    k = expm1_minus(e, d)
    if PRIOR and not FLOAT64:
        back = d - lv
        rest = (lv - (d - back)) - (lvp + back)  # d + rest is lv - lvp exactly
        finite = tl.abs(d) < 88.72  # beyond, em1 is infinite or -1, and rest may be NaN
        k = tl.where(finite, tl.fma(em1, rest, k), k)
        em1 = tl.where(finite, tl.fma(em1, rest, em1 + rest), em1)
    if PRIOR:
        LOW: tl.constexpr = -1400.0 if FLOAT64 else -170.0
        HIGH: tl.constexpr = 1400.0 if FLOAT64 else 175.0
        quarter = -0.5 * lvp
        root = exp_half(tl.where(quarter < LOW, LOW, tl.where(quarter > HIGH, HIGH, quarter))).sigma
        delta = (mu - mu_p) * root * root  # root^2 is 1 / sigma_p, which as a number may be 0 or infinite
        dkl_mu = delta * root * root
    else:
        delta, dkl_mu = mu, mu
    kl2 = fma(delta, delta, k)
    dkl_xp = scale * fma(-delta, delta, -em1)
    return Element(posterior.sigma, kl2, scale * posterior.sigma, scale * em1, dkl_mu, dkl_xp)


@triton.jit
def from_std(mu, s, mu_p, p, r, PRIOR: tl.constexpr):
    """Make the element from s and p, which are sigma and sigma_p with their slopes, and from their ratio r.

    A slope is divided by its sigma last, in case both are tiny.
    """
    HUGE: tl.constexpr = 3.273390607896142e150 if mu.dtype == tl.float64 else 4.611686018427388e18
    g = minus_log1p(r.f)
    above = fma(r.f, r.f, g + g)
    below = fma(r.log_quotient, -2.0, fma(r.quotient, r.quotient, -1.0))
    # Below -0.6, and if sigma_p is infinite and f therefore NaN, the terms do not cancel. Every branch keeps NaN.
    k = tl.where(r.f >= -0.6, tl.where(r.f < HUGE, above, r.f * r.f), below)
    if PRIOR:
        delta = div(mu - mu_p, p.value)
        dkl_mu = div(delta, p.value)
        dkl_xp = fma(-delta, div(p.slope * delta, p.value), -(div(p.slope * r.f, p.value) * (r.f + 2.0)))
    else:
        delta, dkl_mu, dkl_xp = mu, mu, mu
    dkl_x = div(s.slope * r.f, s.value) * (r.f + 2.0)
    return Element(s.value, fma(delta, delta, k), s.slope, dkl_x, dkl_mu, dkl_xp)


@triton.jit
def from_plain_std(mu, x, mu_p, x_p, PRIOR: tl.constexpr):
    one = tl.zeros_like(x) + 1.0
    s = Softplus(x, one)
    LARGEST: tl.constexpr = 1.7976931348623157e308 if x.dtype == tl.float64 else 3.4028234663852886e38
    if PRIOR:
        quotient = div(x, x_p)
        p = tl.where(x_p > LARGEST, LARGEST, x_p)  # so that f is -1 for an infinite sigma_p
        r = Ratio(div(x - p, p), quotient, log_ratio(x, x_p, quotient))
        return from_std(mu, s, mu_p, Softplus(x_p, one), r, True)
    else:
        return from_std(mu, s, mu, s, Ratio(x - 1.0, x, log(x)), False)


@triton.jit
def from_softplus(mu, x, mu_p, x_p, OPTIONS: tl.constexpr, PRIOR: tl.constexpr):
    FLOAT64: tl.constexpr = x.dtype == tl.float64
    LAST: tl.constexpr = EXP_UNDERFLOW_64 if FLOAT64 else EXP_UNDERFLOW
    IS_EXP: tl.constexpr = -37.0 if FLOAT64 else -17.0  # below, softplus is exp
    s = softplus(x)
    sigma = s.value + OPTIONS.MIN_STD
    if PRIOR:
        p = softplus(x_p)
        sigma_p = p.value + OPTIONS.MIN_STD
        f = div(softplus_difference(x, s, x_p, 0.0, p), sigma_p)
        quotient = div(sigma, sigma_p)
        log_quotient = log_ratio(sigma, sigma_p, quotient)
    else:
        p = Softplus(tl.full((), 1.0 - OPTIONS.MIN_STD, x.dtype), tl.full((), OPTIONS.UNIT_SLOPE, x.dtype))
        sigma_p = sigma
        f = softplus_difference(x, s, OPTIONS.UNIT_HI, OPTIONS.UNIT_LO, p)
        quotient = sigma
        log_quotient = log(sigma)
    if OPTIONS.MIN_STD == 0.0:
        # below -LAST sigma stays the same, but its logarithm is still x
        log_quotient += tl.where(x < -LAST, x + LAST, 0.0)
        if PRIOR:
            is_exp = tl.maximum(x, x_p) < IS_EXP
            f = tl.where(is_exp, expm1(x - x_p), f)
            quotient = tl.where(is_exp, f + 1.0, quotient)
            log_quotient = tl.where(is_exp, x - x_p, log_quotient)
    return from_std(
        mu, Softplus(sigma, s.slope), mu_p, Softplus(sigma_p, p.slope), Ratio(f, quotient, log_quotient), PRIOR
    )


@triton.jit
def element(latent, OPTIONS: tl.constexpr, PRIOR: tl.constexpr):
    mu, x, mu_p, x_p = latent.mu, latent.x, latent.mu_p, latent.x_p
    if OPTIONS.PARAM == STD:
        return from_plain_std(mu, x, mu_p, x_p, PRIOR)
    elif OPTIONS.PARAM == SOFTPLUS:
        return from_softplus(mu, x, mu_p, x_p, OPTIONS, PRIOR)
    elif OPTIONS.PARAM == LOGVAR:
        return from_log(0.5, mu, x, mu_p, x_p, PRIOR)
    else:
        return from_log(1.0, mu, x + x, mu_p, x_p + x_p, PRIOR)
