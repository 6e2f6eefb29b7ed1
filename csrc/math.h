// The mathematics of one element, in IEEE add, mul, fma, div and sqrt in one fixed order, so that every instruction set
// and Triton (backends/kernels.py, the same names) give the same bits. float64 uses the C library.
#pragma once
#include <cstdint>

#include "problem.h"

namespace reparam {
namespace {

template <class To, class From>
REPARAM_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
REPARAM_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// Without the instruction: a * b is exact in float64; the sum is rounded to odd there, so that rounding it once more,
// to float32, is as good as rounding once.
REPARAM_INLINE float fma(float a, float b, float c) {
  const double p = (double)a * b, s = p + c;
  const double t = s - p, error = (p - (s - t)) + (c - t);
  const uint64_t i = bits<uint64_t>(s);
  const uint64_t down = (bits<uint64_t>(error) ^ i) >> 63;  // s went past the exact sum: step back towards zero
  const double odd = bits<double>((i - down) | 1);
  return (float)(__builtin_fabs(error) > 0 ? odd : s);  // NaN where s is not finite
}
#endif
REPARAM_INLINE double fma(double a, double b, double c) { return a * b + c; }

// Horner's rule, leading coefficient first.
template <class... Rest>
REPARAM_INLINE float horner(float x, float lead, Rest... rest) {
  ((lead = fma(lead, x, rest)), ...);
  return lead;
}

constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// ---- noise

struct Pair {
  float first, second;
};

// Two words to two normals: r(x) cos t(y), r(x) sin t(y), with r = sqrt(-2 ln u), u = (x + 1/2) / 2^32 and
// t = 2 pi (y + 1/2) / 2^32.
REPARAM_INLINE Pair box_muller(uint32_t x, uint32_t y) {
  const int32_t xi = (int32_t)x;
  const float v = fma((float)xi, 0x1p-32f, 0x1p-33f);  // u, or u - 1 in the upper half: u never rounds to 1
  const int32_t b = bits<int32_t>(v), m = (b & 0x7fffff) | 0x3f000000;
  const float f = xi < 0 ? v : bits<float>(m) - 1.f;  // mantissa in [1/2, 1): both terms of the log are >= 0
  const int32_t e = xi < 0 ? 0 : b - m;               // exponent * 2^23
  const float q = horner(f, 2.321223736f, 2.072345257f, 1.503254056f, -.1016341075f, .5393293500f, -.6642580628f,
                         1.000049233f, -2.f);
  const float r = __builtin_sqrtf(fma(f, q, (float)e * -1.6525917e-7f));
  const uint32_t y2 = y << 1;  // a half turn less: cos and sin both change their sign
  const float sr = bits<float>(bits<uint32_t>(r) ^ ((y ^ y2) & 0x80000000u));
  const float t = fma((float)(int32_t)y2, 0x1p-31f, 0x1p-31f), w = t * t;
  const float sn = t * horner(w, 1.492839947e-4f, -4.668947775e-3f, 7.968617976e-2f, -.6459627748f, 1.570796251f);
  const float cs = horner(w, 8.594021783e-4f, -2.081347443e-2f, .2536529601f, -1.233698845f, 1.f);
  return {sr * cs, sr * sn};
}

// ---- exp, log

struct Exp {
  float sigma, d, q2, n;
};

// sigma = exp(lv / 2) and d = expm1(lv / 2), each to full relative accuracy: 2^n times a polynomial in the rest.
REPARAM_INLINE Exp exp_half(float lv) {
  const float l = lv < -176.f ? -176.f : lv;  // keeps NaN
  const int32_t top = bits<int32_t>(12583166.f), i = bits<int32_t>(fma(l, .721347520f, 12583039.f));
  const float t = bits<float>(i < top ? i : top);  // as integers: a positive float's order, in one instruction
  const float n = t - 12583039.f, r = fma(n, -1.38629436f, l), r2 = r * r;
  const float scale = bits<float>(bits<uint32_t>(t) << 23);
  const float q2 = horner(r, 2.172787572e-5f, 2.613425895e-4f, 2.604172565e-3f, 2.083322406e-2f, .125f) * r2;
  const float q = fma(.5f, r, q2);
  return {fma(q, scale, scale), fma(q, scale, scale - 1.f), q2, n};
}

REPARAM_INLINE float expm1_twice(const Exp& e) { return fma(e.d, e.sigma, e.d); }  // expm1(lv)

// expm1(lv) - lv, without the cancellation near 0.
REPARAM_INLINE float expm1_minus(const Exp& e, float lv) {
  return fma(e.d, e.d, e.n == 0.f ? e.q2 + e.q2 : fma(2.f, e.d, -lv));
}

// u = 2^e (1 + h), 1 + h in [sqrt(1/2), sqrt(2)); with w = u - 1 given, h loses nothing to the rounding of u.
struct Split {
  float e, h;
};
REPARAM_INLINE Split split(float u, float w) {
  const int32_t e = (int32_t)(bits<uint32_t>(u) - 0x3f3504f3u) >> 23;
  const float scale = bits<float>((uint32_t)(127 - e) << 23);
  return {(float)e, fma(w, scale, scale - 1.f)};
}

// h - log1p(h) = h * h * series(h) on the range of Split.
REPARAM_INLINE float series(float h) {
  return horner(h, 7.656288147e-2f, -.1275399923f, .1315043867f, -.1420175880f, .1662365347f, -.2000127435f,
                .2500089109f, -.3333333135f, .4999999702f);
}

constexpr float kLn2Hi = .693145752f, kLn2Lo = 1.42860677e-6f;  // e * kLn2Hi is exact

REPARAM_INLINE float log1p(Split s) { return fma(s.e, kLn2Hi, fma(s.e, kLn2Lo, fma(-(s.h * s.h), series(s.h), s.h))); }
REPARAM_INLINE float log1p(float w) { return log1p(split(1.f + w, w)); }  // w >= 0, finite

REPARAM_INLINE float log(float u) {
  const bool tiny = u < 0x1p-126f;
  const float v = tiny ? u * 0x1p24f : u;
  Split s = split(v, v - 1.f);
  s.h = fma(v, bits<float>((uint32_t)(127 - (int32_t)s.e) << 23), -1.f);
  s.e -= tiny ? 24.f : 0.f;
  return u > 0.f ? (u < kInf ? log1p(s) : u) : (u == 0.f ? -kInf : kNan);
}

REPARAM_INLINE float expm1(float x) { return exp_half(2.f * x).d; }

// f - log1p(f), without the cancellation near 0.
REPARAM_INLINE float minus_log1p(float f) {
  const Split s = split(1.f + f, f);
  return fma(-s.e, kLn2Hi, f - s.h) + fma(-s.e, kLn2Lo, s.h * s.h * series(s.h));
}

// log q, q = a / b, also where q has too few digits left.
REPARAM_INLINE float log_ratio(float a, float b, float q) {
  const bool tiny = q < 0x1p-100f;
  return log(tiny ? a * 0x1p99f / (b * 0x1p-51f) : q) - (tiny ? 103.972077f : 0.f);  // 150 log 2
}

// float64: the C library's.
REPARAM_INLINE double log(double x) { return __builtin_log(x); }
REPARAM_INLINE double expm1(double x) { return __builtin_expm1(x); }
REPARAM_INLINE double minus_log1p(double f) { return f - __builtin_log1p(f); }
REPARAM_INLINE double log_ratio(double a, double b, double q) {
  return q < 0x1p-900 ? __builtin_log(a) - __builtin_log(b) : __builtin_log(q);
}

// ---- softplus

template <class C>
struct Softplus {
  C value, slope;
};

// Where exp(-|x|) would stop to be a normal number, it and with it softplus and its slope stay as they are.
template <class C>
constexpr C kLast = sizeof(C) == 4 ? C(87.336) : C(708);

REPARAM_INLINE Softplus<float> softplus(float x) {
  const float size = __builtin_fabsf(x), t = exp_half(-2.f * (size > kLast<float> ? kLast<float> : size)).sigma;
  const float s = 1.f / (1.f + t);
  return {(x < 0.f ? 0.f : x) + log1p(t), x < 0.f ? t * s : s};
}

REPARAM_INLINE Softplus<double> softplus(double x) {
  const double size = __builtin_fabs(x), t = __builtin_exp(size > kLast<double> ? -kLast<double> : -size);
  return {(x < 0 ? 0 : x) + __builtin_log1p(t), (x < 0 ? t : 1) / (1 + t)};
}

// softplus(x) - softplus(y), without the cancellation where they are close; y = hi + lo; slopes are the sigmoids.
REPARAM_INLINE float softplus_difference(float x, Softplus<float> sx, float hi, float lo, Softplus<float> sy) {
  const float v = (x - hi) - lo, size = __builtin_fabsf(v);
  const float near = log1p((v < 0.f ? sx.slope : sy.slope) * expm1(size < 16.f ? size : 16.f));
  const bool close = (size < 16.f) & (sx.value < 2.5f * sy.value) & (sy.value < 2.5f * sx.value);
  return close ? (v < 0.f ? -near : near) : sx.value - sy.value;
}

REPARAM_INLINE double softplus_difference(double, Softplus<double> sx, double, double, Softplus<double> sy) {
  return sx.value - sy.value;
}

// ---- one element of the latent layer

// sigma and kl, the only two functions of the posterior, and their slopes:
// z = mu + sigma eps; dsigma = dsigma/dx, dkl_x = dkl/dx, dkl_mu = dkl/dmu = -dkl/dmu_p, dkl_xp = dkl/dx_p.
template <class C>
struct Element {
  C sigma, kl, dsigma, dkl_x, dkl_mu, dkl_xp;
};

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

// From the logarithms: d = 2 (log sigma - log sigma_p).
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
    const bool finite = __builtin_fabsf(d) < 88.72f;  // beyond, em1 is infinite or -1, and rest may be NaN
    k = finite ? fma(em1, rest, k) : k;
    em1 = finite ? fma(em1, rest, em1 + rest) : em1;
    delta = (mu - mu_p) * root * root;  // root^2 is 1 / sigma_p, which as a number may be 0 or infinite
    out.dkl_mu = delta * root * root;
  }
  out.kl = .5f * fma(delta, delta, k);
  out.dkl_x = scale * em1;
  out.dkl_xp = scale * fma(-delta, delta, -em1);  // GCC makes -fma another zero where the CPU has an fma
  return out;
}

// f = sigma / sigma_p - 1, q = f + 1 and log q, each to full relative accuracy.
template <class C>
struct Ratio {
  C f, q, log_q;
};

// From the standard deviations, s and p, and their ratio; a slope is divided by its sigma last, where both are tiny.
template <bool kPrior, class C>
REPARAM_INLINE Element<C> from_std(C mu, Softplus<C> s, C mu_p, Softplus<C> p, Ratio<C> r) {
  constexpr C kHuge = sizeof(C) == 4 ? C(0x1p62) : C(0x1p500);
  const C g = minus_log1p(r.f);
  const C above = fma(r.f, r.f, g + g);
  const C below = fma(C(-2), r.log_q, fma(r.q, r.q, C(-1)));
  const C k = r.f < C(-.6) ? below : r.f < kHuge ? above : r.f * r.f;  // keeps NaN
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
  constexpr C kExp = sizeof(C) == 4 ? C(-17) : C(-37);  // below, softplus is exp
  const bool bare = c.min_std == 0;
  const Softplus<C> s = softplus(x), p = kPrior ? softplus(x_p) : Softplus<C>{1 - c.min_std, c.unit_slope};
  const C sigma = s.value + c.min_std, sigma_p = p.value + c.min_std;
  const C difference = softplus_difference(x, s, kPrior ? x_p : c.unit_hi, kPrior ? C(0) : c.unit_lo, p);
  const C beyond = bare & (x < -kLast<C>) ? x + kLast<C> : C(0);  // log sigma goes on where sigma stays
  Ratio<C> r{difference, sigma, log(sigma) + beyond};
  if constexpr (kPrior) {
    const C v = x - x_p;
    const bool exps = bare & (x < kExp) & (x_p < kExp);
    r.f = exps ? expm1(v) : difference / sigma_p;
    r.q = exps ? r.f + 1 : sigma / sigma_p;
    r.log_q = exps ? v : log_ratio(sigma, sigma_p, r.q) + beyond;
  }
  return from_std<kPrior>(mu, {sigma, s.slope}, mu_p, {sigma_p, p.slope}, r);
}

template <bool kPrior, class C>
REPARAM_INLINE Element<C> from_plain_std(C mu, C x, C mu_p, C x_p) {
  if constexpr (kPrior) {
    const C q = x / x_p;
    return from_std<true>(mu, {x, 1}, mu_p, {x_p, 1}, Ratio<C>{(x - x_p) / x_p, q, log_ratio(x, x_p, q)});
  } else {
    return from_std<false>(mu, {x, 1}, C(0), {1, 1}, Ratio<C>{x - 1, x, log(x)});
  }
}

// From the logarithms in float64: the contract's formulas as they stand.
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
