// The forward kernel of a tile of points: it goes through all components once.
#pragma once
#include "ops/mixture_components.h"
#include "ops/mixture_terms.h"

namespace reparam {
namespace {

// Adds terms, given by their logarithms, to a sum that is held as its maximum so far and the sum of the quotients.
template <class C, class Rest>
REPARAM_INLINE void add_terms(const Pack<C>* terms, Rest rest, C* maximum, C* sum) {
  const Pack<C> before = load_pack(maximum);
  Pack<C> top = before;
#pragma GCC unroll 16
  for (int k = 0; k < kBlock; ++k) top = larger(terms[k], top);  // NaN comes back through the sum
  Pack<C> part[4] = {load_pack(sum) * exp2(before - top), Pack<C>(C(0)), Pack<C>(C(0)), Pack<C>(C(0))};
#pragma GCC unroll 16
  for (int k = 0; k < kBlock; ++k) part[k % 4] = part[k % 4] + exp2(rest(terms[k] - top, k));
  store_pack(maximum, top);
  store_pack(sum, (part[0] + part[1]) + (part[2] + part[3]));
}

// ---- forward

template <class C>
struct ForwardScratch {
  C *z, *maximum, *sum;  // [D, kForwardTile]
};

template <class C, bool kJoint, bool kDims>
inline void forward_block(const MixtureArguments& a, const Components<C>& components, int64_t block, int64_t first,
                          const C* z, C* maximum, C* sum, C* joint_maximum, C* joint_sum) {
  const C* fields = components.block(block, a.cols);
  alignas(64) C weights[kBlock * kPack];
  if (a.weights_by_item) load_weights(a, block, first, weights);
  TwoWords<C> joint[kBlock];
  if constexpr (!kDims) {
    sum_squares(fields, z, kForwardTile, a.cols, joint);
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < kBlock; ++k) joint[k] = {Pack<C>(C(0)), Pack<C>(C(0))};
    Pack<C> part[kBlock] = {};
    for (int64_t d = 0; d < a.cols; ++d, fields += kFields) {
      const Pack<C> at = load_pack(z + d * kForwardTile);
      Pack<C> terms[kBlock];
      if (kJoint && d % kPlainDims == 0) {
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; ++k) part[k] = Pack<C>(C(0));
      }
#pragma GCC unroll 16
      for (int k = 0; k < kBlock; ++k) {
        const Pack<C> e = (at - Pack<C>(fields[k])) * Pack<C>(fields[kBlock + k]);
        if constexpr (kJoint) part[k] = fma(e, e, part[k]);  // as in sum_squares, so that backward finds the same sum
        terms[k] = fma(e * e, Pack<C>(kHalf<C>), Pack<C>(fields[2 * kBlock + k]));
      }
      if (a.weights_by_item) {
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; ++k) terms[k] = terms[k] + load_pack(weights + k * kPack);
      }
      add_terms(terms, [](Pack<C> x, int) { return x; }, maximum + d * kForwardTile, sum + d * kForwardTile);
      if (kJoint && (d % kPlainDims == kPlainDims - 1 || d == a.cols - 1)) {
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; ++k) add_part(joint[k], part[k]);
      }
    }
  }
  if constexpr (kJoint) {
    joint_terms(components.joint.data + block * 2 * kBlock, a.weights_by_item ? weights : nullptr, joint);
    Pack<C> top[kBlock];
#pragma GCC unroll 16
    for (int k = 0; k < kBlock; ++k) top[k] = joint[k].top;
    add_terms(top, [&](Pack<C> x, int k) { return x + joint[k].rest; }, joint_maximum, joint_sum);
  }
}

// Turns a maximum and a sum into the value, and stores what backward needs.
template <class C>
inline void finish(C maximum, C sum, int64_t index, int64_t count, const Operand& value, const Operand& saved) {
  const C log_sum = log(sum);
  ((C*)value.data)[index] = (C)(kLn2 * (double)maximum + (double)log_sum);
  if (!saved.data) return;
  ((C*)saved.data)[index] = maximum;
  ((C*)saved.data)[count + index] = sum == 0 ? C(0) : (C)(kLog2e * (double)log_sum);
}

template <class C, bool kJoint, bool kDims>
inline void forward_tile(const MixtureArguments& a, const Components<C>& components, int64_t tile,
                         ForwardScratch<C> scratch) {
  const int64_t first = tile * kForwardTile, left = a.items - first;
  const int rows = left < kForwardTile ? (int)left : kForwardTile, packs = (int)divide_up(rows, kPack);
  alignas(64) C joint_maximum[kForwardTile], joint_sum[kForwardTile];
  for (int p = 0; p < packs; ++p)
    load_columns(a.z, a.items, a.cols, first + p * kPack, C(0), scratch.z + p * kPack, kForwardTile);
  for (int i = 0; i < kForwardTile; ++i) joint_maximum[i] = kLowest<C>, joint_sum[i] = 0;
  if constexpr (kDims) {
    for (int64_t i = 0; i < a.cols * kForwardTile; ++i) scratch.maximum[i] = kLowest<C>, scratch.sum[i] = 0;
  }
  for (int64_t block = 0; block < divide_up(a.components, kBlock); ++block) {
    for (int p = 0; p < packs; ++p) {
      const int at = p * kPack;
      forward_block<C, kJoint, kDims>(a, components, block, first + at, scratch.z + at, scratch.maximum + at,
                                      scratch.sum + at, joint_maximum + at, joint_sum + at);
    }
  }
  for (int i = 0; i < rows; ++i) {
    if constexpr (kJoint) finish(joint_maximum[i], joint_sum[i], first + i, a.items, a.joint, a.joint_sums);
    if constexpr (kDims) {
      for (int64_t d = 0; d < a.cols; ++d)
        finish(scratch.maximum[d * kForwardTile + i], scratch.sum[d * kForwardTile + i], (first + i) * a.cols + d,
               a.items * a.cols, a.dims, a.dims_sums);
    }
  }
}

}  // namespace
}  // namespace reparam
