// Elementary functions in IEEE add, mul, fma, div and sqrt, in one fixed order, so that every instruction set and the
// Triton kernels, which use the same names, give the same bits. The float64 versions call the C library.
#pragma once
#include <cstdint>

#include "core/inline.h"

namespace reparam {
namespace {

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
REPARAM_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// For CPUs without an fma instruction. a * b is exact in float64. The sum is rounded to odd there, so that rounding it
// once more, to float32, is as good as rounding once.
REPARAM_INLINE float fma(float a, float b, float c) {
  const double p = (double)a * b, s = p + c;
  const double t = s - p, error = (p - (s - t)) + (c - t);
  const uint64_t i = bit_cast<uint64_t>(s);
  const uint64_t down = (bit_cast<uint64_t>(error) ^ i) >> 63;  // s is past the exact sum: step back towards zero
  const double odd = bit_cast<double>((i - down) | 1);
  return (float)(__builtin_fabs(error) > 0 ? odd : s);  // NaN if s is not finite
}
#endif
REPARAM_INLINE double fma(double a, double b, double c) { return a * b + c; }

// Horner's rule, leading coefficient first.
template <class... Rest>
REPARAM_INLINE float horner(float x, float lead, Rest... rest) {
  ((lead = fma(lead, x, rest)), ...);
  return lead;
}

REPARAM_INLINE float sqrt_rn(float x) { return __builtin_sqrtf(x); }

constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

struct Exp {
  float sigma, d, q2, n;
};

// sigma = exp(lv / 2) and d = expm1(lv / 2), each to full relative accuracy: 2^n times a polynomial in the rest.
REPARAM_INLINE Exp exp_half(float lv) {
  const float l = lv < -176.f ? -176.f : lv;  // keeps NaN
  const int32_t top = bit_cast<int32_t>(12583166.f), i = bit_cast<int32_t>(fma(l, .721347520f, 12583039.f));
  const float t = bit_cast<float>(i < top ? i : top);  // positive floats compare as integers, in one instruction
  const float n = t - 12583039.f, r = fma(n, -1.38629436f, l), r2 = r * r;
  const float scale = bit_cast<float>(bit_cast<uint32_t>(t) << 23);
  const float q2 = horner(r, 2.172787572e-5f, 2.613425895e-4f, 2.604172565e-3f, 2.083322406e-2f, .125f) * r2;
  const float q = fma(.5f, r, q2);
  return {fma(q, scale, scale), fma(q, scale, scale - 1.f), q2, n};
}

REPARAM_INLINE float expm1_twice(const Exp& e) { return fma(e.d, e.sigma, e.d); }  // expm1(lv)

// expm1(lv) - lv, without the cancellation near 0.
REPARAM_INLINE float expm1_minus(const Exp& e, float lv) {
  return fma(e.d, e.d, e.n == 0.f ? e.q2 + e.q2 : fma(2.f, e.d, -lv));
}

// u = 2^e (1 + h), 1 + h in [sqrt(1/2), sqrt(2)). The caller gives w = u - 1, so h does not suffer from the rounding of
// u.
struct Split {
  float e, h;
};
REPARAM_INLINE Split split(float u, float w) {
  const int32_t e = (int32_t)(bit_cast<uint32_t>(u) - 0x3f3504f3u) >> 23;
  const float scale = bit_cast<float>((uint32_t)(127 - e) << 23);
  return {(float)e, fma(w, scale, scale - 1.f)};
}

// h - log1p(h) = h * h * log1p_poly(h) on the range of Split.
REPARAM_INLINE float log1p_poly(float h) {
  return horner(h, 7.656288147e-2f, -.1275399923f, .1315043867f, -.1420175880f, .1662365347f, -.2000127435f,
                .2500089109f, -.3333333135f, .4999999702f);
}

constexpr float kLn2Hi = .693145752f, kLn2Lo = 1.42860677e-6f;  // e * kLn2Hi is exact

REPARAM_INLINE float log1p(Split s) {
  return fma(s.e, kLn2Hi, fma(s.e, kLn2Lo, fma(-(s.h * s.h), log1p_poly(s.h), s.h)));
}
REPARAM_INLINE float log1p(float w) { return log1p(split(1.f + w, w)); }  // w >= 0, finite

REPARAM_INLINE float log(float u) {
  const bool tiny = u < 0x1p-126f;
  const float v = tiny ? u * 0x1p24f : u;
  const uint32_t bits = bit_cast<uint32_t>(v);
  const int32_t e = (int32_t)(bits - 0x3f3504f3u) >> 23;
  const Split s = {(float)e - (tiny ? 24.f : 0.f), bit_cast<float>(bits - ((uint32_t)e << 23)) - 1.f};
  return u > 0.f ? (u < kInf ? log1p(s) : u) : (u == 0.f ? -kInf : kNan);
}

// A positive number as 2^exponent mantissa, the mantissa in [1, 2).
template <class C>
struct Binary {
  C exponent, mantissa;
};
REPARAM_INLINE Binary<float> binary(float x) {
  const int32_t e = (bit_cast<int32_t>(x) >> 23) - 127;
  return {(float)e, bit_cast<float>(bit_cast<uint32_t>(x) - ((uint32_t)e << 23))};
}
REPARAM_INLINE Binary<double> binary(double x) {
  const int64_t e = (bit_cast<int64_t>(x) >> 52) - 1023;
  return {(double)e, bit_cast<double>(bit_cast<uint64_t>(x) - ((uint64_t)e << 52))};
}

REPARAM_INLINE float expm1(float x) { return exp_half(2.f * x).d; }

// f - log1p(f), without the cancellation near 0.
REPARAM_INLINE float minus_log1p(float f) {
  const Split s = split(1.f + f, f);
  return fma(-s.e, kLn2Hi, f - s.h) + fma(-s.e, kLn2Lo, s.h * s.h * log1p_poly(s.h));
}

// log q for q = a / b, even if q is so small that it has lost digits.
REPARAM_INLINE float log_ratio(float a, float b, float q) {
  const bool tiny = q < 0x1p-100f;
  return log(tiny ? a * 0x1p99f / (b * 0x1p-51f) : q) - (tiny ? 103.972077f : 0.f);  // 150 log 2
}

REPARAM_INLINE double log(double x) { return __builtin_log(x); }
REPARAM_INLINE double expm1(double x) { return __builtin_expm1(x); }
REPARAM_INLINE double minus_log1p(double f) { return f - __builtin_log1p(f); }
REPARAM_INLINE double log_ratio(double a, double b, double q) {
  return q < 0x1p-900 ? __builtin_log(a) - __builtin_log(b) : __builtin_log(q);
}

template <class C>
struct Softplus {
  C value, slope;
};

// Beyond this |x|, exp(-|x|) is subnormal; softplus and its slope keep their value there.
template <class C>
constexpr C kExpUnderflow = sizeof(C) == 4 ? C(87.336) : C(708);

REPARAM_INLINE Softplus<float> softplus(float x) {
  const float size = __builtin_fabsf(x),
              t = exp_half(-2.f * (size > kExpUnderflow<float> ? kExpUnderflow<float> : size)).sigma;
  const float s = 1.f / (1.f + t);
  return {(x < 0.f ? 0.f : x) + log1p(t), x < 0.f ? t * s : s};
}

REPARAM_INLINE Softplus<double> softplus(double x) {
  const double size = __builtin_fabs(x),
               t = __builtin_exp(size > kExpUnderflow<double> ? -kExpUnderflow<double> : -size);
  return {(x < 0 ? 0 : x) + __builtin_log1p(t), (x < 0 ? t : 1) / (1 + t)};
}

// softplus(x) - softplus(y), without the cancellation if they are close. y = hi + lo; the slopes are the sigmoids.
REPARAM_INLINE float softplus_difference(float x, Softplus<float> sx, float hi, float lo, Softplus<float> sy) {
  const float v = (x - hi) - lo, size = __builtin_fabsf(v);
  const float near = log1p((v < 0.f ? sx.slope : sy.slope) * expm1(size < 16.f ? size : 16.f));
  const bool close = (size < 16.f) & (sx.value < 2.5f * sy.value) & (sy.value < 2.5f * sx.value);
  return close ? (v < 0.f ? -near : near) : sx.value - sy.value;
}

REPARAM_INLINE double softplus_difference(double, Softplus<double> sx, double, double, Softplus<double> sy) {
  return sx.value - sy.value;
}

}  // namespace
}  // namespace reparam
