// Philox4x32-10: random words from a key and a counter (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011).
#pragma once
#include <cstdint>
#include <cstring>

#include "core/inline.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace reparam {
namespace {

// Each 32-bit word sits in the low half of a 64-bit lane, so one widening multiply gives both halves of a product. The
// high halves may hold anything, since the multiplication does not read them.
#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#elif defined(__SSE2__) || defined(__ARM_NEON)
constexpr int kLanes = 2;
#else
constexpr int kLanes = 1;
#endif

#if defined(__GNUC__)
typedef uint64_t Lanes __attribute__((vector_size(8 * kLanes)));
#else
typedef uint64_t Lanes;
static_assert(kLanes == 1, "vector lanes need GCC's vector types");
#endif

inline Lanes multiply_low_halves(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // the plain form warns in GCC 12
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
  return (Lanes)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

constexpr uint64_t kLowHalf = 0xffffffffu;

// Takes N vectors of counters at a time, so that the multiplications of one hide the latency of those of another.
template <int N>
REPARAM_INLINE void philox4x32_10(Lanes c[4][N], uint32_t key0, uint32_t key1) {
  const Lanes m0 = Lanes{} + 0xD2511F53u, m1 = Lanes{} + 0xCD9E8D57u;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Lanes p0 = multiply_low_halves(c[0][i], m0), p1 = multiply_low_halves(c[2][i], m1);
      c[0][i] = (p1 >> 32) ^ c[1][i] ^ (uint64_t)key0;
      c[1][i] = p1;
      c[2][i] = (p0 >> 32) ^ c[3][i] ^ (uint64_t)key1;
      c[3][i] = p0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Counters first, first + 1, ...
struct Consecutive {
  uint64_t first;
  REPARAM_INLINE Lanes lanes(int at) const {
    Lanes lane{};
#if defined(__GNUC__)
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
#endif
    return lane + (first + (uint64_t)at);
  }
};

// Any counters, in memory that holds a whole block of them.
struct Listed {
  const uint64_t* counters;
  REPARAM_INLINE Lanes lanes(int at) const {
    Lanes lane;
    std::memcpy(&lane, counters + at, sizeof lane);
    return lane;
  }
};

// Writes the words of a block of counters: (x0, x2) of each to radius, (x1, x3) to angle.
template <int N, class Counters>
REPARAM_INLINE void philox_block(int64_t seed, const Counters& counters, int at, uint32_t* radius, uint32_t* angle) {
  Lanes c[4][N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    c[0][i] = counters.lanes(at + i * kLanes);
    c[1][i] = c[0][i] >> 32;
    c[2][i] = c[3][i] = Lanes{};
  }
  philox4x32_10<N>(c, (uint32_t)seed, (uint32_t)((uint64_t)seed >> 32));
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const Lanes r = (c[0][i] & kLowHalf) | (c[2][i] << 32), a = (c[1][i] & kLowHalf) | (c[3][i] << 32);
    std::memcpy(radius + 2 * i * kLanes, &r, sizeof r);  // little-endian, as every target here is
    std::memcpy(angle + 2 * i * kLanes, &a, sizeof a);
  }
}

constexpr int kBlock = 8 * kLanes;  // counters

// Makes whole blocks, so it writes up to kBlock counters' words more than asked for. More than kFew counters are worth
// a block.
template <int kFew = kBlock / 2, class Counters>
inline void philox_words(int64_t seed, const Counters& counters, int count, uint32_t* radius, uint32_t* angle) {
  int i = 0;
  for (; i + kFew < count; i += kBlock) philox_block<8>(seed, counters, i, radius + 2 * i, angle + 2 * i);
  for (; i < count; i += kLanes) philox_block<1>(seed, counters, i, radius + 2 * i, angle + 2 * i);
}

}  // namespace
}  // namespace reparam
