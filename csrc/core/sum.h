// Sums whose order depends only on the shape.
#pragma once
#include <cstring>

#include "core/chunks.h"

namespace reparam {
namespace {

typedef double Four __attribute__((vector_size(32)));

// Adds eight numbers to four pair sums, in float64.
template <class C>
REPARAM_INLINE Four pair_sums(const C* k) {
  typedef C Quad __attribute__((vector_size(4 * sizeof(C))));
  Quad a, b;
  std::memcpy(&a, k, sizeof a);
  std::memcpy(&b, k + 4, sizeof b);
  return __builtin_convertvector(a + b, Four);
}

// Adds n numbers in an order that depends only on n: pairs, then eight interleaved float64 sums, then a tree over them,
// then the rest one by one.
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

// The same sum of numbers that come in parts.
template <class C>
struct OrderedSum {
  Four a{}, b{};
  C rest[16];  // of the last sixteen
  int n_rest = 0;

  inline void add(const C* k, int n) {
    int i = 0;
    if (n_rest > 0) {
      for (; i < n && n_rest < 16; ++i) rest[n_rest++] = k[i];
      if (n_rest < 16) return;
      add_sixteen(rest);
    }
    for (; i + 16 <= n; i += 16) add_sixteen(k + i);
    for (n_rest = 0; i < n; ++i) rest[n_rest++] = k[i];
  }
  inline double finish() const {
    Four all = a;
    int i = 0;
    if (n_rest >= 8) {
      all += pair_sums(rest);
      i = 8;
    }
    all += b;
    double tail = 0;
    for (; i < n_rest; ++i) tail += rest[i];
    return ((all[0] + all[2]) + (all[1] + all[3])) + tail;
  }

 private:
  REPARAM_INLINE void add_sixteen(const C* k) {
    a += pair_sums(k);
    b += pair_sums(k + 8);
  }
};

// Sums rows that are longer than a chunk, by adding the sums of their chunks in order.
template <class C>
inline void sum_partials(const double* partials, const Chunks& chunks, C* sums) {
  for (int64_t row = 0; row < chunks.rows; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < chunks.per_row; ++i) sum += partials[row * chunks.per_row + i];
    sums[row] = (C)sum;
  }
}

}  // namespace
}  // namespace reparam
