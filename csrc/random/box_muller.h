// Box-Muller: two random words to two normals, in the fixed order of operations of math/elementary.h.
#pragma once
#include "math/elementary.h"

namespace reparam {
namespace {

struct Pair {
  float first, second;
};

// r(x) cos t(y) and r(x) sin t(y), with r = sqrt(-2 ln u), u = (x + 1/2) / 2^32 and t = 2 pi (y + 1/2) / 2^32.
REPARAM_INLINE Pair box_muller(uint32_t x, uint32_t y) {
  const int32_t xi = (int32_t)x;
  const float v = fma((float)xi, 0x1p-32f, 0x1p-33f);  // u, or u - 1 in the upper half: u never rounds to 1
  const int32_t b = bit_cast<int32_t>(v), m = (b & 0x7fffff) | 0x3f000000;
  const float f = xi < 0 ? v : bit_cast<float>(m) - 1.f;  // mantissa in [1/2, 1): both terms of the log are >= 0
  const int32_t e = xi < 0 ? 0 : b - m;                   // exponent * 2^23
  const float q = horner(f, 2.321223736f, 2.072345257f, 1.503254056f, -.1016341075f, .5393293500f, -.6642580628f,
                         1.000049233f, -2.f);
  const float r = sqrt_rn(fma(f, q, (float)e * -1.6525917e-7f));
  const uint32_t y2 = y << 1;  // a half turn less: cos and sin both change their sign
  const float sr = bit_cast<float>(bit_cast<uint32_t>(r) ^ ((y ^ y2) & 0x80000000u));
  const float t = fma((float)(int32_t)y2, 0x1p-31f, 0x1p-31f), w = t * t;
  const float sn = t * horner(w, 1.492839947e-4f, -4.668947775e-3f, 7.968617976e-2f, -.6459627748f, 1.570796251f);
  const float cs = horner(w, 8.594021783e-4f, -2.081347443e-2f, .2536529601f, -1.233698845f, 1.f);
  return {sr * cs, sr * sn};
}

}  // namespace
}  // namespace reparam
