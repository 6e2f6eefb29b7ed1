// The log-density of one sample of one element, log N(z; mu, sigma^2), alone or less that of a prior, and tanh.
#pragma once
#include "math/gaussian.h"

namespace reparam {
namespace {

template <class C>
constexpr C kHalfLog2Pi = C(.91893853320467274178);

// Both Gaussians, as the terms of every sample need them.
template <class C>
struct Densities {
  C sigma, log_sigma, inverse;  // inverse = 1 / sigma
  C dsigma, slope;              // dsigma/dx and dlog_sigma/dx
  C d, f, delta;                // d = log(sigma / sigma_p), f = expm1(d), delta = (mu - mu_p) / sigma_p
  C inverse_p, slope_p;         // 1 / sigma_p and dlog_sigma_p/dx_p
};

REPARAM_INLINE float exp_of_half(float x) { return exp_half(x).sigma; }
REPARAM_INLINE double exp_of_half(double x) { return __builtin_exp(.5 * x); }
REPARAM_INLINE float expm1_of_half(float x) { return exp_half(x).d; }
REPARAM_INLINE double expm1_of_half(double x) { return __builtin_expm1(.5 * x); }

// From lv = 2 log sigma and lvp = 2 log sigma_p; scale is the derivative of log sigma.
template <class C>
REPARAM_INLINE Densities<C> densities_from_log(C scale, C mu, C lv, C mu_p, C lvp) {
  constexpr C kLow = sizeof(C) == 4 ? C(-170) : C(-1400), kHigh = sizeof(C) == 4 ? C(175) : C(1400);
  const C quarter = C(-.5) * lvp;
  const C root = exp_of_half(quarter < kLow ? kLow : quarter > kHigh ? kHigh : quarter);  // 1 / sigma_p is its square
  const C d2 = lv - lvp, sigma = exp_of_half(lv);
  return {sigma,      C(.5) * lv,        exp_of_half(-lv),          scale * sigma, scale,
          C(.5) * d2, expm1_of_half(d2), (mu - mu_p) * root * root, root * root,   scale};
}

template <Param kParam, bool kPrior, class C>
REPARAM_INLINE Densities<C> densities(const Constants<C>& c, C mu, C x, C mu_p, C x_p) {
  if constexpr (kParam == Param::logvar) {
    return densities_from_log(C(.5), mu, x, mu_p, kPrior ? x_p : C(0));
  } else if constexpr (kParam == Param::logstd) {
    return densities_from_log(C(1), mu, x + x, mu_p, kPrior ? x_p + x_p : C(0));
  } else if constexpr (kParam == Param::std) {
    const C p = kPrior ? x_p : C(1), q = x / p, log_x = log(x);
    const C d = kPrior ? log_ratio(x, p, q) : log_x;
    return {x, log_x, 1 / x, 1, 1 / x, d, (x - p) / p, (mu - mu_p) / p, 1 / p, 1 / p};
  } else {
    const Softplus<C> s = softplus(x), p = kPrior ? softplus(x_p) : Softplus<C>{1 - c.min_std, c.unit_slope};
    const C sigma = s.value + c.min_std, sigma_p = p.value + c.min_std;
    const C difference = softplus_difference(x, s, kPrior ? x_p : c.unit_hi, kPrior ? C(0) : c.unit_lo, p);
    // softplus(x) is exp(x) below, so that log sigma falls further although sigma stays
    const bool bare = c.min_std == 0;
    const C beyond = bare & (x < -kExpUnderflow<C>) ? x + kExpUnderflow<C> : C(0);
    const C beyond_p = kPrior && (bare & (x_p < -kExpUnderflow<C>)) ? x_p + kExpUnderflow<C> : C(0);
    const C log_sigma = log(sigma) + beyond, log_sigma_p = kPrior ? log(sigma_p) + beyond_p : C(0);
    const bool both = kPrior && (bare & (x < -kExpUnderflow<C>)&(x_p < -kExpUnderflow<C>));
    const C f = both ? expm1(x - x_p) : difference / sigma_p;
    // near 0, f is exact to the last digits, and the difference of two logarithms is not
    const C near = f - minus_log1p(f);
    const C d = (f > C(-.5)) & (f < C(1)) ? near : log_sigma - log_sigma_p;
    return {sigma,       log_sigma,        1 / sigma, s.slope, s.slope / sigma, d, f, (mu - mu_p) / sigma_p,
            1 / sigma_p, p.slope / sigma_p};
  }
}

// The log-density of a sample, and that less the log-density of the prior. Their sums are without cancellation.
template <class C>
REPARAM_INLINE C log_density(const Densities<C>& e, C eps) {
  return -fma(C(.5) * eps, eps, e.log_sigma + kHalfLog2Pi<C>);
}
template <class C>
REPARAM_INLINE C log_ratio_of_densities(const Densities<C>& e, C eps) {
  const C w = fma(e.f, eps, e.delta);  // (z - mu_p) / sigma_p - eps
  return fma(w, fma(C(.5), w, eps), -e.d);
}

// log1p(t) for t in [0, 1], within 1e-7.
REPARAM_INLINE float log1p_of_unit(float t) {
  return t * horner(t, .004169714167f, -.02495385891f, .07019211778f, -.129097181f, .1870281134f, -.2472038386f,
                    .3329930891f, -.4999806492f, .9999996801f);
}

// z = tanh(u) and its derivative, to full relative accuracy, and the logarithm of that within 2e-7.
template <class C>
struct Tanh {
  C value, slope, log_slope;
};
REPARAM_INLINE Tanh<float> squash(float u) {
  const float size = __builtin_fabsf(u);
  const Exp e = exp_half(-4.f * size);  // sigma = exp(-2 |u|), d = expm1(-2 |u|)
  const float inverse = 1.f / (1.f + e.sigma), value = -e.d * inverse;
  return {__builtin_copysignf(value, u), 4.f * e.sigma * inverse * inverse,
          2.f * ((.693147181f - size) - log1p_of_unit(e.sigma))};
}
REPARAM_INLINE Tanh<double> squash(double u) {
  const double size = __builtin_fabs(u), t = __builtin_exp(-2 * size), inverse = 1 / (1 + t);
  return {__builtin_tanh(u), 4 * t * inverse * inverse, 2 * ((.69314718055994530942 - size) - __builtin_log1p(t))};
}

}  // namespace
}  // namespace reparam
