// The stages that the kernels are made of, each over one piece held in the first-level cache:
// load -> clamp -> element (posterior against prior) -> noise -> z, kl or gradients -> store.
#pragma once
#include "math.h"
#include "philox.h"
#include "problem.h"

namespace reparam {
namespace {

// ---- half precision, converted by integer arithmetic that vectorises

REPARAM_INLINE float from_bf16(uint16_t h) { return bits<float>((uint32_t)h << 16); }

REPARAM_INLINE uint16_t to_bf16(float x) {
  const uint32_t b = bits<uint32_t>(x);
  return x == x ? (uint16_t)((b + 0x7fffu + (b >> 16 & 1u)) >> 16) : (uint16_t)(b >> 16 | 0x40u);
}

REPARAM_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, m = h & 0x7fffu;
  const float subnormal = (float)(int32_t)m * 0x1p-24f;
  const float normal = bits<float>((m << 13) + (m < 0x7c00u ? 0x38000000u : 0x70000000u));
  return bits<float>(bits<uint32_t>(m < 0x0400u ? subnormal : normal) | sign);
}

REPARAM_INLINE uint16_t to_f16(float x) {
  const uint32_t b = bits<uint32_t>(x), sign = b >> 16 & 0x8000u, a = b & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000u;  // the addition rounds
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (uint16_t)(sign | (a < 0x38800000u ? subnormal : a < 0x477ff000u ? normal : special));
}

// ---- load and store

REPARAM_INLINE float decode(float x, float) { return x; }
REPARAM_INLINE double decode(double x, double) { return x; }
REPARAM_INLINE float decode(double x, float) { return (float)x; }
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
REPARAM_INLINE float decode(Bf16 x, float) { return from_bf16(x.bits); }
REPARAM_INLINE float decode(F16 x, float) { return from_f16(x.bits); }
REPARAM_INLINE void encode(float x, float& to) { to = x; }
REPARAM_INLINE void encode(double x, double& to) { to = x; }
REPARAM_INLINE void encode(float x, double& to) { to = x; }
REPARAM_INLINE void encode(float x, Bf16& to) { to.bits = to_bf16(x); }
REPARAM_INLINE void encode(float x, F16& to) { to.bits = to_f16(x); }

#if defined(__F16C__)
// float16 eight at a time by the instructions for it; the rest, and other CPUs, by the functions above.
inline int convert_eights(const F16* from, int n, float* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  return i;
}
inline int convert_eights(const float* from, int n, F16* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}
#endif
template <class From, class To>
inline int convert_eights(const From*, int, To*) {
  return 0;
}

template <class C, class Stored>
inline void load_run(const Stored* from, int64_t stride, int n, C* to) {
  if (stride == 1) {
    const int done = convert_eights(from, n, to);
#pragma omp simd
    for (int i = done; i < n; ++i) to[i] = decode(from[i], C());
  } else {
    for (int i = 0; i < n; ++i) to[i] = decode(from[i * stride], C());
  }
}

template <class C, class Stored>
inline void store_run(const C* from, int64_t stride, int n, Stored* to) {
  if (stride == 1) {
    const int done = convert_eights(from, n, to);
#pragma omp simd
    for (int i = done; i < n; ++i) encode(from[i], to[i]);
  } else {
    for (int i = 0; i < n; ++i) encode(from[i], to[i * stride]);
  }
}

// Calls body(offset, stride, at, length) for each run of memory that elements [first, first + n), in row-major order,
// lie in.
template <class Body>
inline void for_runs(const Operand& t, int64_t first, int n, Body body) {
  if (t.ndim == 0) return body((int64_t)0, (int64_t)0, 0, n);
  int64_t index[kMaxDims], offset = 0, rest = first;
  for (int k = t.ndim - 1; k >= 0; --k) {
    index[k] = k > 0 ? rest % t.size[k] : rest;
    rest = k > 0 ? rest / t.size[k] : 0;
    offset += index[k] * t.stride[k];
  }
  const int inner = t.ndim - 1;
  for (int done = 0; done < n;) {
    const int64_t left = t.size[inner] - index[inner];
    const int run = left < n - done ? (int)left : n - done;
    body(offset, t.stride[inner], done, run);
    done += run;
    index[inner] += run;
    offset += run * t.stride[inner];
    for (int k = inner; k > 0 && index[k] == t.size[k]; --k) {
      offset += t.stride[k - 1] - index[k] * t.stride[k];
      index[k] = 0;
      ++index[k - 1];
    }
  }
}

template <class C>
constexpr Dtype kDtype = sizeof(C) == 4 ? Dtype::f32 : Dtype::f64;

// True where elements lie one behind the other in the arithmetic's own type: they are used in place.
template <class C>
inline bool in_place(const Operand& t) {
  return t.dtype == kDtype<C> && t.ndim == 1 && t.stride[0] == 1;
}

// Elements [first, first + n), in place or copied to `buffer`.
template <class C>
inline const C* load(const Operand& t, int64_t first, int n, C* buffer) {
  if (in_place<C>(t)) return (const C*)t.data + first;
  for_runs(t, first, n, [&](int64_t offset, int64_t stride, int at, int length) {
    C* to = buffer + at;
    if constexpr (sizeof(C) == 8) {
      load_run((const double*)t.data + offset, stride, length, to);
    } else {
      switch (t.dtype) {
        case Dtype::f32: return load_run((const float*)t.data + offset, stride, length, to);
        case Dtype::f64: return load_run((const double*)t.data + offset, stride, length, to);
        case Dtype::bf16: return load_run((const Bf16*)t.data + offset, stride, length, to);
        case Dtype::f16: return load_run((const F16*)t.data + offset, stride, length, to);
      }
    }
  });
  return buffer;
}

// Where to write elements [first, ...): in place, or in `buffer` for store() to take from there.
template <class C>
inline C* target(const Operand& t, int64_t first, C* buffer) {
  return in_place<C>(t) ? (C*)t.data + first : buffer;
}

template <class C>
inline void store(const Operand& t, int64_t first, int n, const C* from) {
  if (in_place<C>(t)) return;
  for_runs(t, first, n, [&](int64_t offset, int64_t stride, int at, int length) {
    if constexpr (sizeof(C) == 8) {
      store_run(from + at, stride, length, (double*)t.data + offset);
    } else {
      switch (t.dtype) {
        case Dtype::f32: return store_run(from + at, stride, length, (float*)t.data + offset);
        case Dtype::f64: return store_run(from + at, stride, length, (double*)t.data + offset);
        case Dtype::bf16: return store_run(from + at, stride, length, (Bf16*)t.data + offset);
        case Dtype::f16: return store_run(from + at, stride, length, (F16*)t.data + offset);
      }
    }
  });
}

// ---- noise

constexpr int kSlack = 4 * kBlock + 4;  // noise is made in whole blocks of counters

// eps[first, first + n) of one seed; `buffer` holds kPiece + kSlack.
inline const float* noise_run(int64_t seed, int64_t first, int n, float* buffer) {
  alignas(64) uint32_t radius[kPiece / 2 + kSlack], angle[kPiece / 2 + kSlack];
  const int lead = (int)(first & 3), counters = (lead + n + 3) / 4;
  philox_words(seed, (uint64_t)first >> 2, counters, radius, angle);
#pragma omp simd
  for (int i = 0; i < 2 * counters; ++i) {
    const Pair p = box_muller(radius[i], angle[i]);
    buffer[2 * i] = p.first;
    buffer[2 * i + 1] = p.second;
  }
  return buffer + lead;
}

template <class C>
struct Scratch {
  alignas(64) C data[kPiece + kSlack];
};

// eps of elements [first, first + n) of mu in the given sample. The element index restarts with each seed's group.
inline const float* noise(const Problem& p, int64_t sample, int64_t first, int n, Scratch<float>& out) {
  const int64_t group = first / p.group, start = first - group * p.group;
  if (start + n <= p.group) return noise_run(p.seed[group], sample * p.group + start, n, out.data);
  Scratch<float> run;
  for (int done = 0; done < n;) {
    const int64_t g = (first + done) / p.group, within = first + done - g * p.group;
    const int64_t left = p.group - within;
    const int length = left < n - done ? (int)left : n - done;
    const float* eps = noise_run(p.seed[g], sample * p.group + within, length, run.data);
    for (int i = 0; i < length; ++i) out.data[done + i] = eps[i];
    done += length;
  }
  return out.data;
}

// The noise of the call in the arithmetic's type: made here, or given by the user.
inline const float* eps_of(const Problem& p, int64_t sample, int64_t first, int n, Scratch<float>& out) {
  if (p.eps.data) return load(p.eps, sample * p.n + first, n, out.data);
  return noise(p, sample, first, n, out);
}
inline const double* eps_of(const Problem& p, int64_t sample, int64_t first, int n, Scratch<double>& out) {
  if (p.eps.data) return load(p.eps, sample * p.n + first, n, out.data);
  Scratch<float> narrow;
  const float* eps = noise(p, sample, first, n, narrow);
  for (int i = 0; i < n; ++i) out.data[i] = eps[i];
  return out.data;
}

// ---- inputs

template <class C>
struct Inputs {
  const C *mu, *raw, *x, *mu_p = nullptr, *x_p = nullptr;  // x: raw, clamped
  Scratch<C> mu_s, raw_s, x_s, mu_p_s, x_p_s;

  inline Inputs(const Problem& p, const Constants<C>& c, int64_t first, int n) {
    mu = load(p.mu, first, n, mu_s.data);
    x = raw = load(p.x, first, n, raw_s.data);
    if (c.clamped) {
      const C low = c.low, high = c.high;
#pragma omp simd
      for (int i = 0; i < n; ++i) x_s.data[i] = raw[i] < low ? low : raw[i] > high ? high : raw[i];  // keeps NaN
      x = x_s.data;
    }
    if (p.mu_p.data) {
      mu_p = load(p.mu_p, first, n, mu_p_s.data);
      x_p = load(p.x_p, first, n, x_p_s.data);
    }
  }
};

// The gradient stays at a bound, and is 0 outside and for NaN, as torch.clamp's.
template <class C>
inline void clamp_slope(const Constants<C>& c, int n, const C* x, C* __restrict dx) {
  const C low = c.low, high = c.high;
#pragma omp simd
  for (int i = 0; i < n; ++i) dx[i] = (x[i] >= low) & (x[i] <= high) ? dx[i] : C(0);
}

// ---- sums

typedef double Four __attribute__((vector_size(32)));

// Eight numbers as four pair sums, in float64.
template <class C>
REPARAM_INLINE Four pair_sums(const C* k) {
  typedef C Quad __attribute__((vector_size(4 * sizeof(C))));
  Quad a, b;
  std::memcpy(&a, k, sizeof a);
  std::memcpy(&b, k + 4, sizeof b);
  return __builtin_convertvector(a + b, Four);
}

// The sum of n numbers in an order that n alone fixes: pairs, eight interleaved float64 sums, a tree, the rest one by
// one.
template <class C>
REPARAM_INLINE double ordered_sum(const C* k, int n) {
  double sum = 0;
  int i = 0;
  if (n >= 8) {
    Four a{}, b{};
    for (; i + 16 <= n; i += 16) {
      a += pair_sums(k + i);
      b += pair_sums(k + i + 8);
    }
    if (i + 8 <= n) {
      a += pair_sums(k + i);
      i += 8;
    }
    a += b;
    sum = (a[0] + a[2]) + (a[1] + a[3]);
  }
  double tail = 0;
  for (; i < n; ++i) tail += k[i];
  return sum + tail;
}

}  // namespace
}  // namespace reparam
