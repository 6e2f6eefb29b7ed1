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
  C* weight_grads;  // the same for the gradients to log-weights
  C* terms;         // the same for the whole gradient of each term in one dim
  C* item_weights;  // the same for the log-weights, if each point has its own
  C* masses;        // [kBlock, kPack]: the sums of the terms' gradients over a tile's points
  C* dz = nullptr;  // [tiles, D, kBackwardTile]: the sum over the chunk's components
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

// Computes the gradients of a block's terms in one dim, in task.terms: the joint part and that of the dim.
template <class C, bool kJoint, bool kWeights>
inline void gradients_of_terms(const C* fields, const Points<C>& points, int64_t at, int packs, bool item_weights,
                               const Task<C>& task) {
  constexpr int kLanes = kVectorLanes<C>;
  typedef Pack<C, 4 * kLanes> Quad;  // four components
  for (int k = 0; k < kBlock; k += 4) {
    const Quad mu = spread<4>(fields + k), inverse = spread<4>(fields + kBlock + k),
               constant = spread<4>(fields + 2 * kBlock + k);
    for (int lane = 0; lane < packs * kPack; lane += kLanes) {
      const auto of_point = [&](const Buffer<C>& t) { return repeat<4>(load_pack<kLanes>(t.data + at + lane)); };
      const Quad e = (of_point(points.z) - mu) * inverse;
      const int term = k * kBackwardTile + lane;
      Quad log_term = constant - e * e;
      if (item_weights) log_term = log_term + load_rows<4>(task.item_weights + term, kBackwardTile);
      Quad grad =
          exp2((log_term - of_point(points.dims_maximum)) - of_point(points.dims_log)) * of_point(points.dims_grad);
      if constexpr (kWeights) {
        C* const to = task.weight_grads + term;
        store_rows<4>(to, kBackwardTile, load_rows<4>(to, kBackwardTile) + grad);
      }
      if constexpr (kJoint) grad = load_rows<4>(task.joint + term, kBackwardTile) + grad;
      store_rows<4>(task.terms + term, kBackwardTile, grad);
    }
  }
}

// Adds up the gradients of a block's terms over a tile's points.
template <class C>
inline void add_masses(const C* terms, int packs, C* masses) {
  for (int k = 0; k < kBlock; ++k) {
    Pack<C> mass(C(0));
    for (int p = 0; p < packs; ++p) mass = mass + load_pack(terms + k * kBackwardTile + p * kPack);
    store_pack(masses + k * kPack, mass);
  }
}

// Adds the gradients of a block's terms in one dim to the sums: dmu sigma and dlog sigma over the points, dz over the
// components, each times kSquare. One vector of points at a time, so that the sums of four components fit in registers.
// If fresh, the sums over the points start here. The terms' gradients times e^2 are added for a tile alone before their
// sum times kSquare is subtracted, so that the difference of the two is as accurate as the sum of the differences.
template <class C>
inline void add_gradients(const C* fields, const C* z, int packs, const C* terms, const C* masses, bool fresh, C* sums,
                          C* dz) {
  constexpr int kGroup = 4, kLanes = kVectorLanes<C>;
  typedef Pack<C, kLanes> Vector;
  for (int g = 0; g < kBlock; g += kGroup) {
    for (int v = 0; v < kPack; v += kLanes) {
      Vector dmu[kGroup], squares[kGroup];
      C* const group = sums + g * kPack + v;
#pragma GCC unroll 16
      for (int k = 0; k < kGroup; ++k) {
        dmu[k] = fresh ? Vector(C(0)) : load_pack<kLanes>(group + k * kPack);
        squares[k] = Vector(C(0));
      }
      for (int lane = v; lane < packs * kPack; lane += kPack) {
        const Vector at = load_pack<kLanes>(z + lane);
        Vector dz_part;
#pragma GCC unroll 16
        for (int k = 0; k < kGroup; ++k) {
          const Vector inverse(fields[kBlock + g + k]), e = (at - Vector(fields[g + k])) * inverse;
          const Vector grad = load_pack<kLanes>(terms + (g + k) * kBackwardTile + lane), slope = grad * e;
          dmu[k] = dmu[k] + slope;
          squares[k] = fma(slope, e, squares[k]);
          dz_part = k == 0 ? slope * inverse : fma(slope, inverse, dz_part);
        }
        store_pack(dz + lane, load_pack<kLanes>(dz + lane) + dz_part);
      }
#pragma GCC unroll 16
      for (int k = 0; k < kGroup; ++k) {
        C* const dlog_sigma = group + (kBlock + k) * kPack;
        const Vector mass = load_pack<kLanes>(masses + (g + k) * kPack + v);
        store_pack(group + k * kPack, dmu[k]);
        const Vector added = fma(mass, Vector(-kSquare<C>), squares[k]);
        store_pack(dlog_sigma, fresh ? added : load_pack<kLanes>(dlog_sigma) + added);
      }
    }
  }
}

}  // namespace
}  // namespace reparam
