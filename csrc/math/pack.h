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

// The numbers of type C that a vector holds.
template <class C>
constexpr int kVectorLanes = kVectorBytes / (int)sizeof(C);

// All sixteen, or fewer whole vectors of them.
template <class C, int kLanes = kPack>
struct Pack {
  typedef C Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorLanes<C>, kVectors = kLanes / kWidth;
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
template <int kLanes = kPack, class C>
REPARAM_INLINE Pack<C, kLanes> load_pack(const C* from) {
  typedef C Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(C)), may_alias));
  Pack<C, kLanes> p;
#pragma GCC unroll 8
  for (int i = 0; i < p.kVectors; ++i) p.v[i] = *(const Unaligned*)(from + i * p.kWidth);
  return p;
}
template <class C, int kLanes>
REPARAM_INLINE void store_pack(C* to, Pack<C, kLanes> p) {
  typedef C Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(C)), may_alias));
#pragma GCC unroll 8
  for (int i = 0; i < p.kVectors; ++i) *(Unaligned*)(to + i * p.kWidth) = p.v[i];
}

template <class C, int kLanes>
REPARAM_INLINE Pack<C, kLanes> operator+(Pack<C, kLanes> a, Pack<C, kLanes> b) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] += b.v[i];
  return a;
}
template <class C, int kLanes>
REPARAM_INLINE Pack<C, kLanes> operator-(Pack<C, kLanes> a, Pack<C, kLanes> b) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] -= b.v[i];
  return a;
}
template <class C, int kLanes>
REPARAM_INLINE Pack<C, kLanes> operator*(Pack<C, kLanes> a, Pack<C, kLanes> b) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] *= b.v[i];
  return a;
}

template <class C, int kLanes>
REPARAM_INLINE Pack<C, kLanes> operator-(Pack<C, kLanes> a) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] = -a.v[i];
  return a;
}

// kCount vectors, one of each row.
template <int kCount, class C>
REPARAM_INLINE Pack<C, kCount * kVectorLanes<C>> load_rows(const C* from, int64_t stride) {
  Pack<C, kCount * kVectorLanes<C>> p;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) p.v[i] = load_pack<kVectorLanes<C>>(from + i * stride).v[0];
  return p;
}
template <int kCount, class C>
REPARAM_INLINE void store_rows(C* to, int64_t stride, Pack<C, kCount * kVectorLanes<C>> p) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    Pack<C, kVectorLanes<C>> one;
    one.v[0] = p.v[i];
    store_pack(to + i * stride, one);
  }
}

// kCount vectors: one number each, or the same numbers in all.
template <int kCount, class C>
REPARAM_INLINE Pack<C, kCount * kVectorLanes<C>> spread(const C* numbers) {
  Pack<C, kCount * kVectorLanes<C>> p;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) p.v[i] = Pack<C, kVectorLanes<C>>(numbers[i]).v[0];
  return p;
}
template <int kCount, class C>
REPARAM_INLINE Pack<C, kCount * kVectorLanes<C>> repeat(Pack<C, kVectorLanes<C>> vector) {
  Pack<C, kCount * kVectorLanes<C>> p;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) p.v[i] = vector.v[0];
  return p;
}

// a > b ? a : b, which is b if one of them is NaN. GCC makes two instructions of that.
template <class Vector>
REPARAM_INLINE Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)
REPARAM_INLINE __m512 larger(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
REPARAM_INLINE __m256 larger(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
#elif defined(__SSE2__)
REPARAM_INLINE __m128 larger(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
#endif
template <class C, int kLanes>
REPARAM_INLINE Pack<C, kLanes> larger(Pack<C, kLanes> a, Pack<C, kLanes> b) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] = larger(a.v[i], b.v[i]);
  return a;
}

// a < b ? a : b, likewise.
template <class C, int kLanes>
REPARAM_INLINE Pack<C, kLanes> smaller(Pack<C, kLanes> a, Pack<C, kLanes> b) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}

// a > limit ? yes : no.
template <class C, int kLanes>
REPARAM_INLINE Pack<C, kLanes> where_above(Pack<C, kLanes> a, C limit, Pack<C, kLanes> yes, Pack<C, kLanes> no) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] = a.v[i] > limit ? yes.v[i] : no.v[i];
  return a;
}

#if defined(__AVX512F__)
template <int kLanes>
REPARAM_INLINE Pack<float, kLanes> fma(Pack<float, kLanes> a, Pack<float, kLanes> b, Pack<float, kLanes> c) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] = _mm512_fmadd_ps(a.v[i], b.v[i], c.v[i]);
  return a;
}
#elif defined(__AVX2__) && defined(__FMA__)
template <int kLanes>
REPARAM_INLINE Pack<float, kLanes> fma(Pack<float, kLanes> a, Pack<float, kLanes> b, Pack<float, kLanes> c) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]);
  return a;
}
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA)
template <int kLanes>
REPARAM_INLINE Pack<float, kLanes> fma(Pack<float, kLanes> a, Pack<float, kLanes> b, Pack<float, kLanes> c) {
#pragma GCC unroll 8
  for (int i = 0; i < a.kVectors; ++i) a.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return a;
}
#else
// Not inlined: it is so long that a kernel with it takes minutes to compile.
template <int kLanes>
__attribute__((noinline)) Pack<float, kLanes> fma(Pack<float, kLanes> a, Pack<float, kLanes> b, Pack<float, kLanes> c) {
  float x[kLanes], y[kLanes], to[kLanes];
  store_pack(x, a), store_pack(y, b), store_pack(to, c);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) to[i] = fma(x[i], y[i], to[i]);
  return load_pack<kLanes>(to);
}
#endif
template <int kLanes>
REPARAM_INLINE Pack<double, kLanes> fma(Pack<double, kLanes> a, Pack<double, kLanes> b, Pack<double, kLanes> c) {
  return a * b + c;
}

// 2^x for x < 128, and 0 for x < -126.5: 2^n times a polynomial in the rest, whose relative error is 1e-7.
template <int kLanes>
REPARAM_INLINE Pack<float, kLanes> exp2(Pack<float, kLanes> x) {
  typedef Pack<float, kLanes> P;
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  x = larger(P(-127.f), x);       // keeps NaN
  const P t = x + P(12583039.f);  // its low bits are the exponent of 2^n
  const P r = x - (t - P(12583039.f));
  P scale, q(.0013269521f);
#pragma GCC unroll 8
  for (int i = 0; i < P::kVectors; ++i) scale.v[i] = (typename P::Vector)((Bits)t.v[i] << 23);
  for (float coefficient : {.009671291f, .05550711f, .24022247f, .693147f}) q = fma(q, r, P(coefficient));
  return fma(q * r, scale, scale);
}
template <int kLanes>
REPARAM_INLINE Pack<double, kLanes> exp2(Pack<double, kLanes> x) {
  double each[kLanes];
  store_pack(each, x);
  for (double& number : each) number = __builtin_exp2(number);
  return load_pack<kLanes>(each);
}

// The sum of four vectors.
template <class C>
REPARAM_INLINE Pack<C, kVectorLanes<C>> sum_of_vectors(Pack<C, 4 * kVectorLanes<C>> p) {
  Pack<C, kVectorLanes<C>> total;
  total.v[0] = (p.v[0] + p.v[1]) + (p.v[2] + p.v[3]);
  return total;
}

// Writes four rows of four numbers as columns: to[i * stride + row].
template <class C>
REPARAM_INLINE void transpose(const C* const* rows, int64_t at, C* to, int64_t stride) {
  for (int i = 0; i < 4; ++i) {
    for (int row = 0; row < 4; ++row) to[i * stride + row] = rows[row][at + i];
  }
}
#if defined(__SSE2__)
REPARAM_INLINE void transpose(const float* const* rows, int64_t at, float* to, int64_t stride) {
  __m128 a = _mm_loadu_ps(rows[0] + at), b = _mm_loadu_ps(rows[1] + at), c = _mm_loadu_ps(rows[2] + at),
         d = _mm_loadu_ps(rows[3] + at);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + stride, b), _mm_storeu_ps(to + 2 * stride, c);
  _mm_storeu_ps(to + 3 * stride, d);
}
#endif

// The sums of the numbers of each of four packs, in one order.
template <class C>
REPARAM_INLINE void sums_of_four(const C* packs, C* to) {
  typedef C Four __attribute__((vector_size(4 * sizeof(C))));
  C fours[4][4], columns[4][4];
  const C* const rows[4] = {fours[0], fours[1], fours[2], fours[3]};
  for (int k = 0; k < 4; ++k) {
    Four part[4];
    std::memcpy(part, packs + k * kPack, sizeof part);
    part[0] = (part[0] + part[2]) + (part[1] + part[3]);
    std::memcpy(fours[k], part, sizeof fours[k]);
  }
  transpose(rows, 0, columns[0], 4);
  for (int k = 0; k < 4; ++k) to[k] = (columns[0][k] + columns[2][k]) + (columns[1][k] + columns[3][k]);
}

}  // namespace
}  // namespace reparam
