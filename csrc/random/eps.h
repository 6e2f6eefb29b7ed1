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

  // Without a window, the index of an element of a group is its place there. With one, element i of a sample has the
  // index window_start + the offset of element i in `window`, which has sizes and strides and no memory.
  bool windowed = false;
  Operand window;
  int64_t window_start = 0;
  int64_t window_group = 0;  // elements of the whole that share a seed: those between one sample and the next
};

namespace {

static_assert(kSlack >= 4 * kBlock + 4, "fill_eps makes whole blocks of counters");

// Turns the words of counters into normals, four for each.
REPARAM_INLINE void box_muller_pairs(const uint32_t* radius, const uint32_t* angle, int counters, float* normals) {
#pragma omp simd
  for (int i = 0; i < 2 * counters; ++i) {
    const Pair p = box_muller(radius[i], angle[i]);
    normals[2 * i] = p.first;
    normals[2 * i + 1] = p.second;
  }
}

// Returns eps[first, first + n) of one seed, within `buffer`, which holds kChunk + kSlack.
inline const float* fill_eps(int64_t seed, int64_t first, int n, float* buffer) {
  alignas(64) uint32_t radius[kChunk / 2 + kSlack], angle[kChunk / 2 + kSlack];
  const int group_offset = (int)(first & 3), counters = (group_offset + n + 3) / 4;
  philox_words(seed, Consecutive{(uint64_t)first >> 2}, counters, radius, angle);
  box_muller_pairs(radius, angle, counters, buffer);
  return buffer + group_offset;
}

// The counters of short runs of indices, so that one call of philox_words serves many runs.
struct CounterList {
  static constexpr int kMost = kChunk / 4 + 64;
  struct Part {
    int to, from, length;  // elements of the result, and of the normals
  };
  alignas(64) uint64_t counters[kMost + kBlock];
  Part parts[kMost];  // each has a counter of its own
  int count = 0, n_parts = 0;

  // Adds the indices [index, index + n) as far as they fit, and returns how many did.
  inline int add(int64_t index, int n, int to) {
    const uint64_t first = (uint64_t)index >> 2;
    const int group_offset = (int)(index & 3), fits = 4 * (kMost - count) - group_offset;
    const int length = n < fits ? n : fits;
    if (length <= 0) return 0;
    parts[n_parts++] = {to, 4 * count + group_offset, length};
    const int needed = (group_offset + length + 3) / 4;
    for (int i = 0; i < needed; i += 8) {  // in whole vectors, as there is room
      for (int k = 0; k < 8; ++k) counters[count + i + k] = first + (uint64_t)(i + k);
    }
    count += needed;
    return length;
  }
};

// Writes the normals of all indices of a list where they belong in `out`, and empties the list. It writes up to 15
// elements more, so the parts have to be in order.
inline void make_normals(CounterList& list, int64_t seed, float* __restrict out) {
  constexpr int kRoom = CounterList::kMost + kBlock;
  alignas(64) uint32_t radius[2 * kRoom], angle[2 * kRoom];
  alignas(64) float normals[4 * kRoom];
  const int count = list.count;
  if (count < 0 || count > CounterList::kMost)
    __builtin_unreachable();  // else 2 count may wrap, and GCC vectorises less
  const Lanes zero{};
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; i += kLanes)
    std::memcpy(list.counters + count + i, &zero, sizeof zero);  // the last block
  philox_words<kBlock / 4>(seed, Listed{list.counters}, count, radius, angle);
  box_muller_pairs(radius, angle, count, normals);
  for (int k = 0; k < list.n_parts; ++k) {
    const CounterList::Part p = list.parts[k];
    for (int i = 0; i < p.length; i += 16) std::memcpy(out + p.to + i, normals + p.from + i, 16 * sizeof *out);
  }
  list.count = list.n_parts = 0;
}

// Writes eps of elements [first, first + n) of a sample, which share a seed, as the window places them. `out` has room
// for 15 elements more.
inline void fill_window(const EpsSource& s, int64_t sample, int64_t first, int n, float* out) {
  const int64_t seed = s.seed[first / s.group], origin = s.window_start + sample * s.window_group;
  CounterList list;
  for_runs(s.window, first, n, [&](int64_t offset, int64_t stride, int at, int length) {
    for (int i = 0; i < length;) {  // indices that are not neighbours are runs of one
      const int added = list.add(origin + offset + i * stride, stride == 1 ? length - i : 1, at + i);
      if (added == 0) make_normals(list, seed, out);
      i += added;
    }
  });
  make_normals(list, seed, out);
}

// Returns eps of elements [first, first + n) of a sample. The index restarts in the group of each seed.
inline const float* make_eps(const EpsSource& s, int64_t sample, int64_t first, int n, Scratch<float>& out) {
  const int64_t group = first / s.group, start = first - group * s.group;
  if (s.windowed) {
    for (int done = 0; done < n;) {
      const int64_t left = s.group - (first + done) % s.group;
      const int length = left < n - done ? (int)left : n - done;
      fill_window(s, sample, first + done, length, out.data + done);
      done += length;
    }
    return out.data;
  }
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
