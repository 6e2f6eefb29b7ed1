"""One element of log q(z), or of log q(z) - log p(z), and tanh. csrc/math/density.h uses the same names."""

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
    fma,
    log,
    log1p,
    log_ratio,
    minus_log1p,
    softplus,
    softplus_difference,
)
from .gaussian import LOGVAR, SOFTPLUS, STD

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)
LN_2 = tl.constexpr(0.69314718055994530942)


class Densities(NamedTuple):
    """What the terms of every sample need of q and p, with d = log(sigma / sigma_p) and f = expm1(d)."""

    sigma: Any
    log_sigma: Any
    inverse: Any  # 1 / sigma
    dsigma: Any  # dsigma/dx
    slope: Any  # dlog_sigma/dx
    d: Any
    f: Any
    delta: Any  # (mu - mu_p) / sigma_p
    inverse_p: Any  # 1 / sigma_p
    slope_p: Any  # dlog_sigma_p/dx_p


class Tanh(NamedTuple):
    """tanh(u), its derivative, and the logarithm of that."""

    value: Any
    slope: Any
    log_slope: Any


@triton.jit
def densities_from_log(scale: tl.constexpr, mu, lv, mu_p, lvp, PRIOR: tl.constexpr):
    """Make the densities from lv = 2 log sigma and lvp = 2 log sigma_p. `scale` is dlog_sigma/dx."""
    sigma = exp_half(lv).sigma
    one = tl.full(lv.shape, 1.0, lv.dtype)
    slope = one * scale
    if PRIOR:
        LOW: tl.constexpr = -1400.0 if lv.dtype == tl.float64 else -170.0
        HIGH: tl.constexpr = 1400.0 if lv.dtype == tl.float64 else 175.0
        quarter = -0.5 * lvp
        root = exp_half(tl.where(quarter < LOW, LOW, tl.where(quarter > HIGH, HIGH, quarter))).sigma
        d2 = lv - lvp
        delta = (mu - mu_p) * root * root  # root^2 is 1 / sigma_p
        inverse_p = root * root * one
    else:
        d2, delta, inverse_p = lv, mu, one
    f = exp_half(d2).d
    return Densities(sigma, 0.5 * lv, exp_half(-lv).sigma, scale * sigma, slope, 0.5 * d2, f, delta, inverse_p, slope)


@triton.jit
def densities_from_std(mu, x, mu_p, x_p, PRIOR: tl.constexpr):
    one = tl.full(x.shape, 1.0, x.dtype)
    inverse = div(one, x)
    if PRIOR:
        f = div(x - x_p, x_p)
        d = log_ratio(x, x_p, div(x, x_p))
        delta, inverse_p = div(mu - mu_p, x_p), div(one, x_p)
        return Densities(x, log(x), inverse, one, inverse, d, f, delta, inverse_p, inverse_p)
    else:
        return Densities(x, log(x), inverse, one, inverse, log(x), x - 1.0, mu, one, one)


@triton.jit
def densities_from_softplus(mu, x, mu_p, x_p, OPTIONS: tl.constexpr, PRIOR: tl.constexpr):
    LAST: tl.constexpr = EXP_UNDERFLOW_64 if x.dtype == tl.float64 else EXP_UNDERFLOW
    one = tl.full(x.shape, 1.0, x.dtype)
    s = softplus(x)
    sigma = s.value + OPTIONS.MIN_STD
    log_sigma = log(sigma)
    if OPTIONS.MIN_STD == 0.0:
        # below -LAST sigma stays the same, but its logarithm is still x
        log_sigma += tl.where(x < -LAST, x + LAST, 0.0)
    if PRIOR:
        p = softplus(x_p)
        sigma_p = p.value + OPTIONS.MIN_STD
        log_sigma_p = log(sigma_p)
        f = div(softplus_difference(x, s, x_p, 0.0, p), sigma_p)
        if OPTIONS.MIN_STD == 0.0:
            log_sigma_p += tl.where(x_p < -LAST, x_p + LAST, 0.0)
            f = tl.where(tl.maximum(x, x_p) < -LAST, expm1(x - x_p), f)
        difference = log_sigma - log_sigma_p
        delta, inverse_p, slope_p = div(mu - mu_p, sigma_p), div(one, sigma_p), div(p.slope, sigma_p) * one
    else:
        p = Softplus(tl.full((), 1.0 - OPTIONS.MIN_STD, x.dtype), tl.full((), OPTIONS.UNIT_SLOPE, x.dtype))
        f = softplus_difference(x, s, OPTIONS.UNIT_HI, OPTIONS.UNIT_LO, p)
        difference = log_sigma
        delta, inverse_p, slope_p = mu, one, one
    # near 0, f is exact to the last digits, and the difference of two logarithms is not
    d = tl.where((f > -0.5) & (f < 1.0), f - minus_log1p(f), difference)
    return Densities(sigma, log_sigma, div(one, sigma), s.slope, div(s.slope, sigma), d, f, delta, inverse_p, slope_p)


@triton.jit
def densities(latent, OPTIONS: tl.constexpr, PRIOR: tl.constexpr):
    mu, x, mu_p, x_p = latent.mu, latent.x, latent.mu_p, latent.x_p
    if OPTIONS.PARAM == STD:
        return densities_from_std(mu, x, mu_p, x_p, PRIOR)
    elif OPTIONS.PARAM == SOFTPLUS:
        return densities_from_softplus(mu, x, mu_p, x_p, OPTIONS, PRIOR)
    elif OPTIONS.PARAM == LOGVAR:
        return densities_from_log(0.5, mu, x, mu_p, x_p, PRIOR)
    else:
        return densities_from_log(1.0, mu, x + x, mu_p, x_p + x_p, PRIOR)


@triton.jit
def log_density(e, eps):
    return -fma(0.5 * eps, eps, e.log_sigma + HALF_LOG_2PI)


@triton.jit
def log_ratio_of_densities(e, eps):
    """log q(z) - log p(z), without cancellation."""
    w = fma(e.f, eps, e.delta)  # (z - mu_p) / sigma_p - eps
    return fma(w, fma(w, 0.5, eps), -e.d)


@triton.jit
def squash(u):
    """Compute tanh(u), its derivative and the logarithm of that, each to full relative accuracy."""
    size = tl.abs(u)
    e = exp_half(-4.0 * size)  # sigma = exp(-2 |u|), d = expm1(-2 |u|)
    inverse = div(tl.full(u.shape, 1.0, u.dtype), 1.0 + e.sigma)
    value = -e.d * inverse
    log_slope = 2.0 * ((LN_2 - size) - log1p(e.sigma))
    return Tanh(tl.where(u < 0.0, -value, value), 4.0 * e.sigma * inverse * inverse, log_slope)
