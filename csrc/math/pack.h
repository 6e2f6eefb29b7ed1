// Sixteen numbers side by side, in as many vectors as the CPU needs for them. Every operation works on each of the
// sixteen alone, so its bits do not depend on the width of the vectors.
#pragma once
#include <cstring>

#include "math/elementary.h"

#if defined(__AVX__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace reparam {
namespace {

constexpr int kPack = 16;
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class C>
struct Pack {
  typedef C Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / sizeof(C), kVectors = kPack / kWidth;
  Vector v[kVectors];

  // Copies go vector by vector too: GCC moves a whole Pack in smaller pieces through memory, which is slow.
  Pack() = default;
  REPARAM_INLINE Pack(const Pack& other) { *this = other; }
  REPARAM_INLINE Pack& operator=(const Pack& other) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) v[i] = other.v[i];
    return *this;
  }
  REPARAM_INLINE Pack(C x) {
#pragma GCC unroll 8
    for (Vector& part : v) part = x - Vector{};  // no operation at all
  }
};

// At any address.
template <class C>
REPARAM_INLINE Pack<C> load_pack(const C* from) {
  typedef C Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(C)), may_alias));
  Pack<C> p;
#pragma GCC unroll 8
  for (int i = 0; i < Pack<C>::kVectors; ++i) p.v[i] = *(const Unaligned*)(from + i * Pack<C>::kWidth);
  return p;
}
template <class C>
REPARAM_INLINE void store_pack(C* to, Pack<C> p) {
  typedef C Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(C)), may_alias));
#pragma GCC unroll 8
  for (int i = 0; i < Pack<C>::kVectors; ++i) *(Unaligned*)(to + i * Pack<C>::kWidth) = p.v[i];
}

template <class C>
REPARAM_INLINE Pack<C> operator+(Pack<C> a, Pack<C> b) {
#pragma GCC unroll 8
  for (int i = 0; i < Pack<C>::kVectors; ++i) a.v[i] += b.v[i];
  return a;
}
template <class C>
REPARAM_INLINE Pack<C> operator-(Pack<C> a, Pack<C> b) {
#pragma GCC unroll 8
  for (int i = 0; i < Pack<C>::kVectors; ++i) a.v[i] -= b.v[i];
  return a;
}
template <class C>
REPARAM_INLINE Pack<C> operator*(Pack<C> a, Pack<C> b) {
#pragma GCC unroll 8
  for (int i = 0; i < Pack<C>::kVectors; ++i) a.v[i] *= b.v[i];
  return a;
}

template <class C>
REPARAM_INLINE Pack<C> operator-(Pack<C> a) {
#pragma GCC unroll 8
  for (int i = 0; i < Pack<C>::kVectors; ++i) a.v[i] = -a.v[i];
  return a;
}

// a > b ? a : b, which is b if one of them is NaN.
template <class C>
REPARAM_INLINE Pack<C> larger(Pack<C> a, Pack<C> b) {
#pragma GCC unroll 8
  for (int i = 0; i < Pack<C>::kVectors; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

// a > limit ? yes : no.
template <class C>
REPARAM_INLINE Pack<C> where_above(Pack<C> a, C limit, Pack<C> yes, Pack<C> no) {
#pragma GCC unroll 8
  for (int i = 0; i < Pack<C>::kVectors; ++i) a.v[i] = a.v[i] > limit ? yes.v[i] : no.v[i];
  return a;
}

#if defined(__AVX512F__)
REPARAM_INLINE Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  a.v[0] = _mm512_fmadd_ps(a.v[0], b.v[0], c.v[0]);
  return a;
}
#elif defined(__AVX2__) && defined(__FMA__)
REPARAM_INLINE Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  for (int i = 0; i < Pack<float>::kVectors; ++i) a.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]);
  return a;
}
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA)
REPARAM_INLINE Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  for (int i = 0; i < Pack<float>::kVectors; ++i) a.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return a;
}
#else
// Not inlined: it is so long that a kernel with it takes minutes to compile.
__attribute__((noinline)) Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  float x[kPack], y[kPack], to[kPack];
  store_pack(x, a), store_pack(y, b), store_pack(to, c);
#pragma omp simd
  for (int i = 0; i < kPack; ++i) to[i] = fma(x[i], y[i], to[i]);
  return load_pack(to);
}
#endif
REPARAM_INLINE Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) { return a * b + c; }

// 2^x for x < 128, and 0 for x < -126.5: 2^n times a polynomial in the rest, whose relative error is 1e-7.
REPARAM_INLINE Pack<float> exp2(Pack<float> x) {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  x = larger(Pack<float>(-127.f), x);                 // keeps NaN
  const Pack<float> t = x + Pack<float>(12583039.f);  // its low bits are the exponent of 2^n
  const Pack<float> r = x - (t - Pack<float>(12583039.f));
  Pack<float> scale, q(.0013269521f);
#pragma GCC unroll 8
  for (int i = 0; i < Pack<float>::kVectors; ++i) scale.v[i] = (Pack<float>::Vector)((Bits)t.v[i] << 23);
  for (float coefficient : {.009671291f, .05550711f, .24022247f, .693147f}) q = fma(q, r, Pack<float>(coefficient));
  return fma(q * r, scale, scale);
}
REPARAM_INLINE Pack<double> exp2(Pack<double> x) {
  double each[kPack];
  store_pack(each, x);
  for (double& number : each) number = __builtin_exp2(number);
  return load_pack(each);
}

// The sum of the sixteen, in one order.
template <class C>
REPARAM_INLINE C sum(Pack<C> p) {
  typedef C Four __attribute__((vector_size(4 * sizeof(C))));
  Four part[4];
  std::memcpy(part, &p, sizeof part);
  const Four four = (part[0] + part[2]) + (part[1] + part[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace
}  // namespace reparam
