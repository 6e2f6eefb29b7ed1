// bfloat16 and float16, converted by integer arithmetic that the compiler vectorises, and the conversions between a
// tensor's element type and the type that a kernel computes in.
#pragma once
#include <cstdint>

#include "core/inline.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace reparam {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

REPARAM_INLINE float from_bf16(uint16_t h) { return bit_cast<float>((uint32_t)h << 16); }

REPARAM_INLINE uint16_t to_bf16(float x) {
  const uint32_t b = bit_cast<uint32_t>(x);
  return x == x ? (uint16_t)((b + 0x7fffu + (b >> 16 & 1u)) >> 16) : (uint16_t)(b >> 16 | 0x40u);
}

REPARAM_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, m = h & 0x7fffu;
  const float subnormal = (float)(int32_t)m * 0x1p-24f;
  const float normal = bit_cast<float>((m << 13) + (m < 0x7c00u ? 0x38000000u : 0x70000000u));
  return bit_cast<float>(bit_cast<uint32_t>(m < 0x0400u ? subnormal : normal) | sign);
}

REPARAM_INLINE uint16_t to_f16(float x) {
  const uint32_t b = bit_cast<uint32_t>(x), sign = b >> 16 & 0x8000u, a = b & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3f000000u;  // the addition rounds
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (uint16_t)(sign | (a < 0x38800000u ? subnormal : a < 0x477ff000u ? normal : special));
}

// The second argument of from_storage only selects the type of the result.
REPARAM_INLINE float from_storage(float x, float) { return x; }
REPARAM_INLINE double from_storage(double x, double) { return x; }
REPARAM_INLINE float from_storage(double x, float) { return (float)x; }
REPARAM_INLINE float from_storage(Bf16 x, float) { return from_bf16(x.bits); }
REPARAM_INLINE float from_storage(F16 x, float) { return from_f16(x.bits); }
REPARAM_INLINE void to_storage(float x, float& to) { to = x; }
REPARAM_INLINE void to_storage(double x, double& to) { to = x; }
REPARAM_INLINE void to_storage(float x, double& to) { to = x; }
REPARAM_INLINE void to_storage(float x, Bf16& to) { to.bits = to_bf16(x); }
REPARAM_INLINE void to_storage(float x, F16& to) { to.bits = to_f16(x); }

// Converts float16 eight at a time by the CPU's own instructions and returns how many it converted. Other types and
// other CPUs convert none here; the caller converts the rest by the functions above.
#if defined(__F16C__)
inline int convert_f16x8(const F16* from, int n, float* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  return i;
}
inline int convert_f16x8(const float* from, int n, F16* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}
#endif
template <class From, class To>
inline int convert_f16x8(const From*, int, To*) {
  return 0;
}

}  // namespace
}  // namespace reparam
