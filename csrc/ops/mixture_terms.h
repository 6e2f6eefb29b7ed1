// The logarithms, in base 2, of the terms of a joint density. They are held in two words.
#pragma once
#include "ops/mixture_layout.h"

namespace reparam {
namespace {

constexpr int kPlainDims = 8;  // dims whose squares are added without compensation

// Below -kPrecise a term is held in one word: the second would be too large for exp2.
template <class C>
constexpr C kPrecise = sizeof(C) == 4 ? C(1LL << 30) : C(1LL << 59);

// A sum in two words. `rest` is small beside `top`.
template <class C>
struct TwoWords {
  Pack<C> top, rest;
};

// Adds a number at least as large to another without an error, or nearly so if it is the smaller one.
template <class C>
REPARAM_INLINE void add_part(TwoWords<C>& sum, Pack<C> part) {
  const Pack<C> top = sum.top + part;
  sum.rest = sum.rest + (part - (top - sum.top));
  sum.top = top;
}

// Adds any number without an error.
template <class C>
REPARAM_INLINE TwoWords<C> two_sum(TwoWords<C> sum, Pack<C> x) {
  const Pack<C> top = sum.top + x, added = top - sum.top;
  return {top, sum.rest + ((sum.top - (top - added)) + (x - added))};
}

// Makes `rest` as small as it can be, and 0 where it would be too large for exp2.
template <class C>
REPARAM_INLINE TwoWords<C> normalized(TwoWords<C> sum) {
  const Pack<C> top = sum.top + sum.rest, rest = sum.rest - (top - sum.top);
  return {top, where_above(-top, kPrecise<C>, Pack<C>(C(0)), rest)};
}

// The sums over the dims of e^2, for a pack of points and each component of a block.
template <class C>
inline void sum_squares(const C* block, const C* z, int64_t stride, int64_t cols, TwoWords<C>* squares) {
  constexpr int kGroup = kVectorBytes == 64 && sizeof(C) == 4 ? kBlock : kBlock / 4;  // as many as registers hold
  for (int g = 0; g < kBlock; g += kGroup) {
#pragma GCC unroll 16
    for (int k = 0; k < kGroup; ++k) squares[g + k] = {Pack<C>(C(0)), Pack<C>(C(0))};
    for (int64_t first = 0; first < cols; first += kPlainDims) {
      const int64_t last = first + kPlainDims < cols ? first + kPlainDims : cols;
      Pack<C> part[kGroup];
#pragma GCC unroll 16
      for (int k = 0; k < kGroup; ++k) part[k] = Pack<C>(C(0));
      for (int64_t d = first; d < last; ++d) {
        const C* fields = block + d * kFields + g;
        const Pack<C> at = load_pack(z + d * stride);
#pragma GCC unroll 16
        for (int k = 0; k < kGroup; ++k) {
          const Pack<C> e = (at - Pack<C>(fields[k])) * Pack<C>(fields[kBlock + k]);
          part[k] = fma(e, e, part[k]);
        }
      }
#pragma GCC unroll 16
      for (int k = 0; k < kGroup; ++k) add_part(squares[g + k], part[k]);
    }
  }
}

// Turns sums of squares into the logarithms of a block's terms. `weights` is null unless each point has its own.
template <class C>
inline void joint_terms(const C* constants, const C* weights, TwoWords<C>* terms) {
#pragma GCC unroll 16
  for (int k = 0; k < kBlock; ++k) {
    Pack<C> squares = terms[k].top, rest = where_above(squares, kFar<C>, Pack<C>(C(0)), terms[k].rest);
    squares = where_above(squares, kFar<C>, Pack<C>(2 * kFar<C>), squares);
    TwoWords<C> sum = {Pack<C>(constants[k]), Pack<C>(constants[kBlock + k]) - rest};
    if (weights) sum = two_sum(sum, load_pack(weights + k * kPack));
    terms[k] = normalized(two_sum(sum, -squares));
  }
}

}  // namespace
}  // namespace reparam
