// One element of the latent layer: sigma, the KL of a Gaussian against its prior, and their derivatives.
#pragma once
#include "math/elementary.h"

namespace reparam {

enum class Param { logvar, logstd, std, softplus };  // how the second argument x gives sigma

// How a call reads the parameters of its Gaussians.
struct Options {
  Param param = Param::logvar;
  double min_std = 0;
  bool clamped = false;
  double low = 0, high = 0;
  int event_ndim = 0;            // trailing dims of mu that log_q sums over
  bool minus_log_p = false;      // log_q is log q(z) - log p(z)
  bool tanh = false;             // z = tanh(mu + sigma eps)
  bool path_derivative = false;  // log_q has gradients by way of z alone
};

namespace {

// sigma, kl and derivatives: dsigma = dsigma/dx, dkl_x = dkl/dx, dkl_mu = dkl/dmu = -dkl/dmu_p, dkl_xp = dkl/dx_p.
template <class C>
struct Element {
  C sigma, kl, dsigma, dkl_x, dkl_mu, dkl_xp;
};

// The slope by which to multiply the gradient g. If g is 0, only the sign of the slope is kept: then g * slope is 0
// even if the slope is infinite or NaN, and a finite product keeps its bits.
REPARAM_INLINE float slope_at(float g, float slope) { return g == 0 ? __builtin_copysignf(0, slope) : slope; }
REPARAM_INLINE double slope_at(double g, double slope) { return g == 0 ? __builtin_copysign(0, slope) : slope; }

// The factor of the gradient g in a product: the slope, or if kZeros slope_at, which is needed only where a g may be 0.
template <bool kZeros, class C>
REPARAM_INLINE C factor(C g, C slope) {
  return kZeros ? slope_at(g, slope) : slope;
}

// Options in the type of the arithmetic, and constants derived from them.
template <class C>
struct Constants {
  C min_std, low, high;
  bool clamped;
  C unit_hi, unit_lo, unit_slope;  // softplus(unit) + min_std = 1, and sigmoid(unit)

  explicit Constants(const Options& o) : min_std((C)o.min_std), low((C)o.low), high((C)o.high), clamped(o.clamped) {
    const double unit = o.min_std < 1 ? __builtin_log(__builtin_expm1(1 - o.min_std)) : -__builtin_inf();
    unit_hi = (C)unit;
    unit_lo = o.min_std < 1 ? (C)(unit - unit_hi) : C(0);
    unit_slope = o.min_std < 1 ? (C)-__builtin_expm1(o.min_std - 1) : C(0);
  }
};

// From log sigma, as lv = 2 log sigma and lvp = 2 log sigma_p; d is their difference.
template <bool kPrior>
REPARAM_INLINE Element<float> from_log(float scale, float mu, float lv, float mu_p, float lvp) {
  const Exp e = exp_half(lv);
  Element<float> out;
  out.sigma = e.sigma;
  out.dsigma = scale * e.sigma;
  float delta = mu, em1 = expm1_twice(e), k = expm1_minus(e, lv);
  out.dkl_mu = mu;
  if constexpr (kPrior) {
    const float d = lv - lvp, back = d - lv;
    const float rest = (lv - (d - back)) - (lvp + back);  // d + rest is lv - lvp exactly
    const Exp r = exp_half(d);
    const float quarter = -.5f * lvp;
    const float root = exp_half(quarter < -170.f ? -170.f : quarter > 175.f ? 175.f : quarter).sigma;
    em1 = expm1_twice(r);
    k = expm1_minus(r, d);
    const bool finite = __builtin_fabsf(d) < 88.72f;  // else em1 is infinite or -1, and rest may be NaN
    k = finite ? fma(em1, rest, k) : k;
    em1 = finite ? fma(em1, rest, em1 + rest) : em1;
    delta = (mu - mu_p) * root * root;  // root^2 is 1 / sigma_p, which may itself underflow or overflow
    out.dkl_mu = delta * root * root;
  }
  out.kl = .5f * fma(delta, delta, k);
  out.dkl_x = scale * em1;
  out.dkl_xp = scale * fma(-delta, delta, -em1);  // not -fma, which GCC gives another zero if the CPU has an fma
  return out;
}

// sigma / sigma_p, that less 1 (f), and its logarithm, each to full relative accuracy.
template <class C>
struct Ratio {
  C f, quotient, log_quotient;
};

// From the standard deviations, s and p, and their ratio. A slope is divided by its sigma last, since both may be tiny.
template <bool kPrior, class C>
REPARAM_INLINE Element<C> from_std(C mu, Softplus<C> s, C mu_p, Softplus<C> p, Ratio<C> r) {
  constexpr C kHuge = sizeof(C) == 4 ? C(0x1p62) : C(0x1p500);
  const C g = minus_log1p(r.f);
  const C above = fma(r.f, r.f, g + g);
  const C below = fma(C(-2), r.log_quotient, fma(r.quotient, r.quotient, C(-1)));
  // Below -.6, and if sigma_p is infinite and f therefore NaN, the terms do not cancel. Every branch keeps NaN.
  const C k = r.f >= C(-.6) ? (r.f < kHuge ? above : r.f * r.f) : below;
  const C delta = kPrior ? (mu - mu_p) / p.value : mu;
  Element<C> out;
  out.sigma = s.value;
  out.kl = C(.5) * fma(delta, delta, k);
  out.dsigma = s.slope;
  out.dkl_x = s.slope * r.f / s.value * (r.f + C(2));
  out.dkl_mu = kPrior ? delta / p.value : mu;
  out.dkl_xp = fma(-delta, p.slope * delta / p.value, -(p.slope * r.f / p.value * (r.f + C(2))));
  return out;
}

template <bool kPrior, class C>
REPARAM_INLINE Element<C> from_softplus(const Constants<C>& c, C mu, C x, C mu_p, C x_p) {
  constexpr C kExp = sizeof(C) == 4 ? C(-17) : C(-37);  // below this, softplus(x) is exp(x)
  const bool bare = c.min_std == 0;
  const Softplus<C> s = softplus(x), p = kPrior ? softplus(x_p) : Softplus<C>{1 - c.min_std, c.unit_slope};
  const C sigma = s.value + c.min_std, sigma_p = p.value + c.min_std;
  const C difference = softplus_difference(x, s, kPrior ? x_p : c.unit_hi, kPrior ? C(0) : c.unit_lo, p);
  // below -kExpUnderflow sigma stays the same, but its logarithm is still x
  const C beyond = bare & (x < -kExpUnderflow<C>) ? x + kExpUnderflow<C> : C(0);
  Ratio<C> r{difference, sigma, log(sigma) + beyond};
  if constexpr (kPrior) {
    const C v = x - x_p;
    const bool exps = bare & (x < kExp) & (x_p < kExp);
    r.f = exps ? expm1(v) : difference / sigma_p;
    r.quotient = exps ? r.f + 1 : sigma / sigma_p;
    r.log_quotient = exps ? v : log_ratio(sigma, sigma_p, r.quotient) + beyond;
  }
  return from_std<kPrior>(mu, {sigma, s.slope}, mu_p, {sigma_p, p.slope}, r);
}

template <bool kPrior, class C>
REPARAM_INLINE Element<C> from_plain_std(C mu, C x, C mu_p, C x_p) {
  if constexpr (kPrior) {
    constexpr C kLargest = sizeof(C) == 4 ? C(__FLT_MAX__) : C(__DBL_MAX__);
    const C quotient = x / x_p, p = x_p > kLargest ? kLargest : x_p;  // so that f is -1 for an infinite sigma_p
    return from_std<true>(mu, {x, 1}, mu_p, {x_p, 1}, Ratio<C>{(x - p) / p, quotient, log_ratio(x, x_p, quotient)});
  } else {
    return from_std<false>(mu, {x, 1}, C(0), {1, 1}, Ratio<C>{x - 1, x, log(x)});
  }
}

// From log sigma in float64: the formulas of docs/numerics.md as they stand.
template <bool kPrior>
REPARAM_INLINE Element<double> from_log(double dl, double mu, double x, double mu_p, double x_p) {
  const double sigma = __builtin_exp(dl * x), d = 2 * dl * (kPrior ? x - x_p : x), em1 = __builtin_expm1(d);
  double delta = mu, dkl_mu = mu;
  if constexpr (kPrior) {
    const double half = -.5 * dl * x_p;
    const double root = __builtin_exp(half < -700 ? -700 : half > 700 ? 700 : half);
    delta = (mu - mu_p) * root * root;
    dkl_mu = delta * root * root;
  }
  return {sigma, .5 * (delta * delta + (em1 - d)), dl * sigma, dl * em1, dkl_mu, -dl * (em1 + delta * delta)};
}

template <Param kParam, bool kPrior, class C>
REPARAM_INLINE Element<C> element(const Constants<C>& c, C mu, C x, C mu_p, C x_p) {
  if constexpr (kParam == Param::std) {
    return from_plain_std<kPrior>(mu, x, mu_p, x_p);
  } else if constexpr (kParam == Param::softplus) {
    return from_softplus<kPrior>(c, mu, x, mu_p, x_p);
  } else if constexpr (sizeof(C) == 8) {
    return from_log<kPrior>(kParam == Param::logvar ? .5 : 1., mu, x, mu_p, x_p);
  } else if constexpr (kParam == Param::logvar) {
    return from_log<kPrior>(.5f, mu, x, mu_p, x_p);
  } else {
    return from_log<kPrior>(1.f, mu, x + x, mu_p, x_p + x_p);
  }
}

}  // namespace
}  // namespace reparam
