// The gradients that a block of components and a tile of points give to each other.
#pragma once
#include "ops/mixture_components.h"
#include "ops/mixture_terms.h"

namespace reparam {
namespace {

// The points of a tile and their gradients as columns, [tiles, D, kBackwardTile] each, or [tiles, kBackwardTile] for
// the joint ones. Lanes without a point have a maximum beside which every term is 0.
template <class C>
struct Points {
  Buffer<C> z, dims_maximum, dims_log, dims_grad, joint_maximum, joint_log, joint_grad;

  Points(const MixtureArguments& a, int64_t tiles, int threads)
      : z(tiles, a.cols, kBackwardTile),
        dims_maximum(a.dims.data ? tiles : 0, a.cols, kBackwardTile),
        dims_log(a.dims.data ? tiles : 0, a.cols, kBackwardTile),
        dims_grad(a.dims.data ? tiles : 0, a.cols, kBackwardTile),
        joint_maximum(a.joint.data ? tiles : 0, kBackwardTile),
        joint_log(a.joint.data ? tiles : 0, kBackwardTile),
        joint_grad(a.joint.data ? tiles : 0, kBackwardTile) {
    parallel_for(tiles * (kBackwardTile / kPack), a.items * a.cols, threads, [&](int64_t begin, int64_t end) {
      for (int64_t pack = begin; pack < end; ++pack) {
        const int64_t first = pack * kPack, tile = first / kBackwardTile, lane = first % kBackwardTile;
        const int64_t at = tile * a.cols * kBackwardTile + lane;
        load_columns(a.z, a.items, a.cols, first, C(0), z.data + at, kBackwardTile);
        if (a.dims.data) {
          load_sums(a.dims, a.dims_sums, a.items, a.cols, first, dims_maximum.data + at, dims_log.data + at,
                    dims_grad.data + at);
        }
        if (a.joint.data) {
          load_sums(a.joint, a.joint_sums, a.items, 1, first, joint_maximum.data + first, joint_log.data + first,
                    joint_grad.data + first);
        }
      }
    });
  }

 private:
  static void load_sums(const Operand& grad, const Operand& sums, int64_t items, int64_t cols, int64_t first,
                        C* maximum, C* log_sum, C* to) {
    Operand second = sums;
    if (second.data) second.data = (C*)sums.data + items * cols;
    load_columns(sums, items, cols, first, kFar<C>, maximum, kBackwardTile);
    load_columns(second, items, cols, first, C(0), log_sum, kBackwardTile);
    load_columns(grad, items, cols, first, C(0), to, kBackwardTile);
  }
};

// The sums of one task, a chunk of components and a chunk of points. Sums over points are kept in kPack lanes until
// the task's points are done.
template <class C>
struct Task {
  C* sums;          // [D, 2, kBlock, kPack]: of dmu and dlog sigma, over the points
  C* joint;         // [kBlock, kBackwardTile]: the joint part of each term's gradient
  C* weight_grads;  // the same for the gradients to log-weights, or null
  C* dz;            // [tiles, D, kBackwardTile]: the sum over the chunk's components
};

constexpr int kTaskNumbers = 2 * kBlock * kPack;  // of Task::sums, to a dim

// Computes the joint part of the gradients of a block's terms.
template <class C>
inline void joint_gradients(const MixtureArguments& a, const Components<C>& components, const Points<C>& points,
                            int64_t block, int64_t tile, int packs, C* to) {
  for (int p = 0; p < packs; ++p) {
    const int64_t at = tile * kBackwardTile + p * kPack;
    alignas(64) C weights[kBlock * kPack];
    if (a.weights_by_item) load_weights(a, block, at, weights);
    TwoWords<C> terms[kBlock];
    sum_squares(components.block(block, a.cols), points.z.data + tile * a.cols * kBackwardTile + p * kPack,
                (int64_t)kBackwardTile, a.cols, terms);
    joint_terms(components.joint.data + block * 2 * kBlock, a.weights_by_item ? weights : nullptr, terms);
    const Pack<C> maximum = load_pack(points.joint_maximum.data + at), log_sum = load_pack(points.joint_log.data + at),
                  grad = load_pack(points.joint_grad.data + at);
#pragma GCC unroll 16
    for (int k = 0; k < kBlock; ++k) {
      const Pack<C> share = exp2((terms[k].top - maximum) + (terms[k].rest - log_sum));
      store_pack(to + k * kBackwardTile + p * kPack, share * grad);
    }
  }
}

// Adds one dim of a block's gradients to the sums: dmu and dlog sigma over the points, dz over the components.
template <class C, bool kJoint, bool kDims, bool kWeights>
inline void gradients_of_dim(const MixtureArguments& a, const C* fields, const Points<C>& points, int64_t at, int packs,
                             const C* item_weights, const Task<C>& task, C* sums, C* dz) {
  constexpr int kGroup = kVectorBytes == 64 && sizeof(C) == 4 ? 4 : 2;
  for (int g = 0; g < kBlock; g += kGroup) {
    Pack<C> dmu[kGroup], dlog_sigma[kGroup];
    C* const group = sums + g * kPack;
#pragma GCC unroll 16
    for (int k = 0; k < kGroup; ++k) {
      dmu[k] = load_pack(group + k * kPack);
      dlog_sigma[k] = load_pack(group + (kBlock + k) * kPack);
    }
    for (int p = 0; p < packs; ++p) {
      const int64_t lane = at + p * kPack;
      const Pack<C> z = load_pack(points.z.data + lane);
      Pack<C> dz_part(C(0)), maximum(C(0)), log_sum(C(0)), grad(C(0));
      if constexpr (kDims) {
        maximum = load_pack(points.dims_maximum.data + lane);
        log_sum = load_pack(points.dims_log.data + lane);
        grad = load_pack(points.dims_grad.data + lane);
      }
#pragma GCC unroll 16
      for (int k = 0; k < kGroup; ++k) {
        const Pack<C> inverse(fields[kBlock + g + k]), e = (z - Pack<C>(fields[g + k])) * inverse;
        const int term = (g + k) * kBackwardTile + p * kPack;
        Pack<C> total(C(0)), excess;
        if constexpr (kJoint) total = load_pack(task.joint + term);
        if constexpr (kDims) {
          const Pack<C> square = e * e;
          Pack<C> log_term = fma(square, Pack<C>(kHalf<C>), Pack<C>(fields[2 * kBlock + g + k]));
          if (item_weights) log_term = log_term + load_pack(item_weights + term);
          const Pack<C> own = exp2((log_term - maximum) - log_sum) * grad;
          if constexpr (kWeights) store_pack(task.weight_grads + term, load_pack(task.weight_grads + term) + own);
          total = kJoint ? total + own : own;
          excess = square - Pack<C>(C(1));
        } else {
          excess = fma(e, e, Pack<C>(C(-1)));
        }
        const Pack<C> slope = total * e;
        dmu[k] = dmu[k] + slope;
        dlog_sigma[k] = fma(total, excess, dlog_sigma[k]);
        dz_part = fma(slope, inverse, dz_part);
      }
      store_pack(dz + p * kPack, load_pack(dz + p * kPack) + dz_part);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kGroup; ++k) {
      store_pack(group + k * kPack, dmu[k]);
      store_pack(group + (kBlock + k) * kPack, dlog_sigma[k]);
    }
  }
}

}  // namespace
}  // namespace reparam
