// The noise of a call, made from Philox words by Box-Muller, or given by the user.
#pragma once
#include "core/chunks.h"
#include "core/operand.h"
#include "random/box_muller.h"
#include "random/philox.h"

namespace reparam {

// Where eps comes from. An element's index within the stream of its seed decides its eps.
struct EpsSource {
  Operand given;                  // the user's eps; absent if eps is made from seeds
  const int64_t* seed = nullptr;  // one for each group of elements
  int64_t n = 0;                  // elements of one sample
  int64_t group = 1;              // consecutive elements that share a seed
};

namespace {

static_assert(kSlack >= 4 * kBlock + 4, "fill_eps makes whole blocks of counters");

// Returns eps[first, first + n) of one seed, within `buffer`, which holds kChunk + kSlack.
inline const float* fill_eps(int64_t seed, int64_t first, int n, float* buffer) {
  alignas(64) uint32_t radius[kChunk / 2 + kSlack], angle[kChunk / 2 + kSlack];
  const int group_offset = (int)(first & 3), counters = (group_offset + n + 3) / 4;
  philox_words(seed, (uint64_t)first >> 2, counters, radius, angle);
#pragma omp simd
  for (int i = 0; i < 2 * counters; ++i) {
    const Pair p = box_muller(radius[i], angle[i]);
    buffer[2 * i] = p.first;
    buffer[2 * i + 1] = p.second;
  }
  return buffer + group_offset;
}

// Returns eps of elements [first, first + n) of a sample. The index restarts in the group of each seed.
inline const float* make_eps(const EpsSource& s, int64_t sample, int64_t first, int n, Scratch<float>& out) {
  const int64_t group = first / s.group, start = first - group * s.group;
  if (start + n <= s.group) return fill_eps(s.seed[group], sample * s.group + start, n, out.data);
  Scratch<float> part;
  for (int done = 0; done < n;) {
    const int64_t g = (first + done) / s.group, within = first + done - g * s.group;
    const int64_t left = s.group - within;
    const int length = left < n - done ? (int)left : n - done;
    const float* eps = fill_eps(s.seed[g], sample * s.group + within, length, part.data);
    for (int i = 0; i < length; ++i) out.data[done + i] = eps[i];
    done += length;
  }
  return out.data;
}

// Returns the same, given or made, in the type of the arithmetic.
inline const float* load_or_make_eps(const EpsSource& s, int64_t sample, int64_t first, int n, Scratch<float>& out) {
  if (s.given.data) return load(s.given, sample * s.n + first, n, out.data);
  return make_eps(s, sample, first, n, out);
}
inline const double* load_or_make_eps(const EpsSource& s, int64_t sample, int64_t first, int n, Scratch<double>& out) {
  if (s.given.data) return load(s.given, sample * s.n + first, n, out.data);
  Scratch<float> narrow;
  const float* eps = make_eps(s, sample, first, n, narrow);
  for (int i = 0; i < n; ++i) out.data[i] = eps[i];
  return out.data;
}

}  // namespace
}  // namespace reparam
