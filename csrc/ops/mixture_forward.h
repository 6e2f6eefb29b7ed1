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

// A sum of the terms of one dim outside of these bounds is found again with its maximum.
template <class C>
constexpr C kLeastSum = sizeof(C) == 4 ? C(0x1p-64) : C(0x1p-960);
template <class C>
constexpr C kMostSum = sizeof(C) == 4 ? C(0x1p100) : C(0x1p1000);

// Adds the terms of a block for a pack of points: to the sum of each dim, and to the maximum and the sum of the joint
// density. kWeights: each point has weights of its own.
template <class C, bool kJoint, bool kDims, bool kWeights>
inline void forward_block(const MixtureArguments& a, const Components<C>& components, int64_t block, int64_t first,
                          const C* z, C* sum, C* joint_maximum, C* joint_sum) {
  const C* fields = components.block(block, a.cols);
  constexpr int kLanes = kVectorLanes<C>;
  typedef Pack<C, 4 * kLanes> Quad;  // four components
  alignas(64) C weights[kBlock * kPack];
  if constexpr (kWeights) load_weights(a, block, first, weights);
  TwoWords<C> joint[kBlock];
  if constexpr (!kDims) {
    sum_squares(fields, z, kForwardTile, a.cols, joint);
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < kBlock; ++k) joint[k] = {Pack<C>(C(0)), Pack<C>(C(0))};
    alignas(64) C part[kBlock * kPack];
    for (int64_t d = 0; d < a.cols; ++d, fields += kFields) {
      if (kJoint && d % kPlainDims == 0) {
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; ++k) store_pack(part + k * kPack, Pack<C>(C(0)));
      }
      for (int v = 0; v < kPack; v += kLanes) {
        const Quad at = repeat<4>(load_pack<kLanes>(z + d * kForwardTile + v));
        Quad sums(C(0));
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; k += 4) {
          const Quad e = (at - spread<4>(fields + k)) * spread<4>(fields + kBlock + k);
          if constexpr (kJoint) {  // as in sum_squares, so that backward finds the same sum
            store_rows<4>(part + k * kPack + v, kPack, fma(e, e, load_rows<4>(part + k * kPack + v, kPack)));
          }
          Quad term = spread<4>(fields + 2 * kBlock + k) - e * e;
          if constexpr (kWeights) term = smaller(Quad(C(126)), term + load_rows<4>(weights + k * kPack + v, kPack));
          sums = sums + exp2(term);
        }
        C* const to = sum + d * kForwardTile + v;
        store_pack(to, load_pack<kLanes>(to) + sum_of_vectors(sums));
      }
      if (kJoint && (d % kPlainDims == kPlainDims - 1 || d == a.cols - 1)) {
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; ++k) add_part(joint[k], load_pack(part + k * kPack));
      }
    }
  }
  if constexpr (kJoint) {
    joint_terms(components.joint.data + block * 2 * kBlock, kWeights ? weights : nullptr, joint);
    Pack<C> top[kBlock];
#pragma GCC unroll 16
    for (int k = 0; k < kBlock; ++k) top[k] = joint[k].top;
    add_terms(top, [&](Pack<C> x, int k) { return x + joint[k].rest; }, joint_maximum, joint_sum);
  }
}

// Finds the sum of the terms of dim d again, for the points of a pack whose sum is too small or too large to be held
// without a maximum. Of the other sums it makes a power of two, as the maximum, and a number in [1, 2).
template <class C>
inline void find_maximum(const MixtureArguments& a, const Components<C>& components, int64_t first, int64_t d,
                         const C* z, C* maximum, C* sum) {
  bool held[kPack], all = true;
  for (int i = 0; i < kPack; ++i) all &= held[i] = (sum[i] >= kLeastSum<C>)&(sum[i] <= kMostSum<C>);
  C tops[kPack], sums[kPack];
  if (!all) {
    for (int i = 0; i < kPack; ++i) tops[i] = kLowest<C>, sums[i] = 0;
    const Pack<C> at = load_pack(z);
    for (int64_t block = 0; block < divide_up(a.components, kBlock); ++block) {
      const C* fields = components.block(block, a.cols) + d * kFields;
      alignas(64) C weights[kBlock * kPack];
      if (a.weights_by_item) load_weights(a, block, first, weights);
      Pack<C> terms[kBlock];
#pragma GCC unroll 16
      for (int k = 0; k < kBlock; ++k) {
        const Pack<C> e = (at - Pack<C>(fields[k])) * Pack<C>(fields[kBlock + k]);
        terms[k] = Pack<C>(fields[2 * kBlock + k]) - e * e;
        if (a.weights_by_item) terms[k] = terms[k] + load_pack(weights + k * kPack);
      }
      add_terms(terms, [](Pack<C> x, int) { return x; }, tops, sums);
    }
  }
  for (int i = 0; i < kPack; ++i) {
    const Binary<C> s = binary(sum[i]);
    maximum[i] = held[i] ? s.exponent : tops[i];
    sum[i] = held[i] ? s.mantissa : sums[i];
  }
}

// Writes columns [cols, kForwardTile] as rows.
template <class C>
inline void write_rows(const C* columns, int rows, int64_t cols, C* to) {
  for (int i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < cols; ++d) to[i * cols + d] = columns[d * kForwardTile + i];
  }
}

// Turns the maxima and sums of a tile into values, which take the place of `to`, and stores what backward needs.
// `offset` is to be added to each maximum, or null.
template <class C>
inline void finish(C* maximum, C* sum, const C* offset, C* to, int64_t first, int rows, int64_t items, int64_t cols,
                   const Operand& value, const Operand& saved) {
  for (int64_t d = 0; d < cols; ++d) {
    const double top = offset ? (double)offset[d] : 0;
#pragma omp simd
    for (int i = 0; i < kForwardTile; ++i) {
      const int64_t at = d * kForwardTile + i;
      const C log_sum = log(sum[at]);
      to[at] = (C)(kLn2 * (top + (double)maximum[at]) + (double)log_sum);
      sum[at] = sum[at] == 0 ? C(0) : (C)(kLog2e * (double)log_sum);
    }
  }
  write_rows(to, rows, cols, (C*)value.data + first * cols);
  if (!saved.data) return;
  write_rows(maximum, rows, cols, (C*)saved.data + first * cols);
  write_rows(sum, rows, cols, (C*)saved.data + (items + first) * cols);
}

template <class C, bool kJoint, bool kDims, bool kWeights>
inline void forward_tile(const MixtureArguments& a, const Components<C>& components, int64_t tile,
                         ForwardScratch<C> scratch) {
  const int64_t first = tile * kForwardTile, left = a.items - first;
  const int rows = left < kForwardTile ? (int)left : kForwardTile, packs = (int)divide_up(rows, kPack);
  alignas(64) C joint_maximum[kForwardTile], joint_sum[kForwardTile], joint[kForwardTile];
  for (int p = 0; p < packs; ++p)
    load_columns(a.z, a.items, a.cols, first + p * kPack, C(0), scratch.z + p * kPack, kForwardTile);
  for (int i = 0; i < kForwardTile; ++i) joint_maximum[i] = kLowest<C>, joint_sum[i] = 0;
  if constexpr (kDims) {
    for (int64_t i = 0; i < a.cols * kForwardTile; ++i) scratch.maximum[i] = scratch.sum[i] = 0;
  }
  for (int64_t block = 0; block < divide_up(a.components, kBlock); ++block) {
    for (int p = 0; p < packs; ++p) {
      const int at = p * kPack;
      forward_block<C, kJoint, kDims, kWeights>(a, components, block, first + at, scratch.z + at, scratch.sum + at,
                                                joint_maximum + at, joint_sum + at);
    }
  }
  if constexpr (kJoint) {
    finish(joint_maximum, joint_sum, (const C*)nullptr, joint, first, rows, a.items, 1, a.joint, a.joint_sums);
  }
  if constexpr (kDims) {
    for (int64_t d = 0; d < a.cols; ++d) {
      for (int p = 0; p < packs; ++p) {
        const int64_t at = d * kForwardTile + p * kPack;
        find_maximum(a, components, first + p * kPack, d, scratch.z + at, scratch.maximum + at, scratch.sum + at);
      }
    }
    finish(scratch.maximum, scratch.sum, components.largest.data, scratch.z, first, rows, a.items, a.cols, a.dims,
           a.dims_sums);
  }
}

}  // namespace
}  // namespace reparam
