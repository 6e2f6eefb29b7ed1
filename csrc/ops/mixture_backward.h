// The backward kernel of a chunk of components and a chunk of points, and the sums over the chunks.
#pragma once
#include "ops/mixture_gradients.h"

namespace reparam {
namespace {

constexpr int kComponentChunks = 8, kItemChunks = 4;  // the most independent sums over components and over points

// The sums over the chunks of points, [chunks, N, D] or [chunks, N], and over those of components.
template <class C>
struct Partials {
  int64_t tiles, blocks, tiles_per_chunk, blocks_per_chunk, item_chunks, component_chunks;
  Buffer<C> dmu, dlog_sigma, dlog_weights, dz;

  explicit Partials(const MixtureArguments& a)
      : tiles(divide_up(a.items, kBackwardTile)),
        blocks(divide_up(a.components, kBlock)),
        tiles_per_chunk(tiles > 0 ? divide_up(tiles, kItemChunks) : 1),
        blocks_per_chunk(divide_up(blocks, kComponentChunks)),
        item_chunks(divide_up(tiles, tiles_per_chunk)),
        component_chunks(divide_up(blocks, blocks_per_chunk)),
        dmu(item_chunks, a.components, a.cols),
        dlog_sigma(item_chunks, a.components, a.cols),
        dlog_weights(item_chunks, a.components),
        dz(component_chunks, tiles, a.cols, kBackwardTile) {}
};

// Adds up the lanes of one dim's sums.
template <class C>
inline void write_sums(const MixtureArguments& a, const Partials<C>& partials, const C* sums, const C* fields,
                       int64_t row, int count, int64_t d) {
  C totals[2 * kBlock];
  for (int k = 0; k < 2 * kBlock; k += 4) sums_of_four(sums + k * kPack, totals + k);
  for (int k = 0; k < count; ++k) {
    partials.dmu.data[(row + k) * a.cols + d] = totals[k] * fields[kBlock + k];
    partials.dlog_sigma.data[(row + k) * a.cols + d] = totals[kBlock + k];
  }
}

template <class C, bool kJoint, bool kDims, bool kWeights>
inline void backward_task(const MixtureArguments& a, const Components<C>& components, const Points<C>& points,
                          const Partials<C>& partials, int64_t index, Task<C> task) {
  const int64_t chunk = index / partials.item_chunks, item_chunk = index % partials.item_chunks;
  const int64_t first_tile = item_chunk * partials.tiles_per_chunk, first_block = chunk * partials.blocks_per_chunk;
  const int64_t last_tile =
      first_tile + partials.tiles_per_chunk < partials.tiles ? first_tile + partials.tiles_per_chunk : partials.tiles;
  const int64_t last_block = first_block + partials.blocks_per_chunk < partials.blocks
                                 ? first_block + partials.blocks_per_chunk
                                 : partials.blocks;
  const int64_t tile_numbers = a.cols * kBackwardTile;
  const bool one_tile =
      last_tile - first_tile == 1;  // then one dim's sums are enough, and stay in the first-level cache
  task.dz = partials.dz.data + chunk * partials.tiles * tile_numbers;
  for (int64_t i = first_tile * tile_numbers; i < last_tile * tile_numbers; ++i) task.dz[i] = 0;
  for (int64_t block = first_block; block < last_block; ++block) {
    const C* fields = components.block(block, a.cols);
    const int64_t n = block * kBlock;
    const int count = a.components - n < kBlock ? (int)(a.components - n) : kBlock;
    alignas(64) C weight_sums[kBlock * kPack] = {};
    const int64_t row = item_chunk * a.components + n;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t first = tile * kBackwardTile, left = a.items - first;
      const int rows = left < kBackwardTile ? (int)left : kBackwardTile, packs = (int)divide_up(rows, kPack);
      if constexpr (kJoint) joint_gradients(a, components, points, block, tile, packs, task.joint);
      if constexpr (!kDims) add_masses(task.joint, packs, task.masses);
      if constexpr (kWeights) {
        for (int i = 0; i < kBlock * kBackwardTile; ++i) task.weight_grads[i] = kJoint ? task.joint[i] : C(0);
      }
      if (kDims && a.weights_by_item) {
        for (int p = 0; p < packs; ++p) {
          alignas(64) C weights[kBlock * kPack];
          load_weights(a, block, first + p * kPack, weights);
#pragma GCC unroll 16
          for (int k = 0; k < kBlock; ++k)
            store_pack(task.item_weights + k * kBackwardTile + p * kPack, load_pack(weights + k * kPack));
        }
      }
      for (int64_t d = 0; d < a.cols; ++d) {
        const int64_t at = tile * tile_numbers + d * kBackwardTile;
        if constexpr (kDims) {
          gradients_of_terms<C, kJoint, kWeights>(fields + d * kFields, points, at, packs, a.weights_by_item, task);
          add_masses(task.terms, packs, task.masses);
        }
        C* const sums = task.sums + (one_tile ? 0 : d * kTaskNumbers);
        add_gradients(fields + d * kFields, points.z.data + at, packs, kDims ? task.terms : task.joint, task.masses,
                      tile == first_tile, sums, task.dz + at);
        if (tile == last_tile - 1) write_sums(a, partials, sums, fields + d * kFields, row, count, d);
      }
      if constexpr (kWeights) {
        if (a.weights_by_item) {
          for (int i = 0; i < rows; ++i) {
            C* row = (C*)a.dlog_weights.data + (first + i) * a.components + n;
            for (int k = 0; k < count; ++k) row[k] = task.weight_grads[k * kBackwardTile + i];
          }
        } else {
          add_masses(task.weight_grads, packs, task.masses);
          for (int k = 0; k < kBlock * kPack; ++k) weight_sums[k] += task.masses[k];
        }
      }
    }
    if constexpr (kWeights) {
      C totals[kBlock];
      for (int k = 0; k < kBlock; k += 4) sums_of_four(weight_sums + k * kPack, totals + k);
      for (int k = 0; k < count; ++k) partials.dlog_weights.data[row + k] = totals[k];
    }
  }
}

// Adds up the sums of a component's chunks of points.
template <class C>
inline void finish_component(const MixtureArguments& a, const Constants<C> c, const Partials<C>& partials, int64_t n) {
  constexpr C kInverseSquare = C(1) / kSquare<C>;
  C dmu_s[kPiece], dx_s[kPiece], x_s[kPiece];
  for (int64_t at = 0; at < a.cols; at += kPiece) {
    const int count = a.cols - at < kPiece ? (int)(a.cols - at) : kPiece;
    const int64_t first = n * a.cols + at;
    const C* x = load(a.x, first, count, x_s);
    for (int i = 0; i < count; ++i) dmu_s[i] = dx_s[i] = 0;
    for (int64_t chunk = 0; chunk < partials.item_chunks; ++chunk) {
      const C* dmu = partials.dmu.data + chunk * a.components * a.cols + first;
      const C* dlog_sigma = partials.dlog_sigma.data + chunk * a.components * a.cols + first;
#pragma omp simd
      for (int i = 0; i < count; ++i) dmu_s[i] += dmu[i], dx_s[i] += dlog_sigma[i];
    }
    dispatch_param(a.options.param, [&](auto param) {
#pragma omp simd
      for (int i = 0; i < count; ++i) {
        const C slope = scale_of<param.value>(c, x[i]).slope;
        dmu_s[i] *= kInverseSquare;
        dx_s[i] = slope == 0 ? C(0) : dx_s[i] * kInverseSquare * slope;
      }
    });
    if (a.dmu.data) write(a.dmu, first, count, dmu_s);
    if (a.dx.data) write(a.dx, first, count, dx_s);
  }
  if (a.dlog_weights.data && !a.weights_by_item) {
    C total = 0;
    for (int64_t chunk = 0; chunk < partials.item_chunks; ++chunk)
      total += partials.dlog_weights.data[chunk * a.components + n];
    ((C*)a.dlog_weights.data)[n] = total;
  }
}

// Adds up the sums of a pack of points over the chunks of components.
template <class C>
inline void finish_points(const MixtureArguments& a, const Partials<C>& partials, int64_t first) {
  alignas(64) C columns[kPiece * kPack], row[kPiece];
  const int64_t tile_numbers = a.cols * kBackwardTile, tile = first / kBackwardTile, lane = first % kBackwardTile;
  for (int64_t at = 0; at < a.cols; at += kPiece) {
    const int count = a.cols - at < kPiece ? (int)(a.cols - at) : kPiece;
    for (int i = 0; i < count; ++i) {
      Pack<C> total(C(0));
      for (int64_t chunk = 0; chunk < partials.component_chunks; ++chunk) {
        const int64_t begin = (chunk * partials.tiles + tile) * tile_numbers + (at + i) * kBackwardTile + lane;
        total = total + load_pack(partials.dz.data + begin);
      }
      store_pack(columns + i * kPack, total * Pack<C>(C(-1) / kSquare<C>));
    }
    for (int64_t b = first; b < first + kPack && b < a.items; ++b) {
      for (int i = 0; i < count; ++i) row[i] = columns[i * kPack + b - first];
      write(a.dz, b * a.cols + at, count, row);
    }
  }
}

}  // namespace
}  // namespace reparam
