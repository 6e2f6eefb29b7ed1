// The terms of a mixture, one for each point and component (and dim), are recomputed wherever they are needed and never
// stored. Logarithms of terms are in base 2. Points lie side by side in packs, and each sum over points or components
// has an order that depends on their numbers alone, so results have the same bits for any number of threads and any
// instruction set. docs/numerics.md explains the formulas.
#include "ops/mixture.h"

#include "ops/mixture_backward.h"
#include "ops/mixture_forward.h"

namespace reparam {
namespace {

// The number of terms, for the choice of the number of threads: a term takes an eighth of the time of an element of
// other ops.
inline int64_t work(const MixtureArguments& a) {
  const double terms = (double)a.items * (double)a.components * (double)a.cols / 8;
  return terms < 1e15 ? (int64_t)terms : (int64_t)1e15;
}

// The most threads that work on `count` tasks, and so the number of scratch areas. Each thread takes the next one.
inline int64_t scratch_areas(int64_t count, int threads) { return threads < 1 ? 1 : threads < count ? threads : count; }
inline int64_t next_area(int64_t& taken) { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); }

template <class C>
inline void forward_as(const MixtureArguments& a, int threads) {
  if (a.items == 0) return;
  const Components<C> components(a, threads);
  const int64_t tiles = divide_up(a.items, kForwardTile), areas = scratch_areas(tiles, threads);
  const Buffer<C> z(areas, a.cols, kForwardTile), maximum(areas, a.dims.data ? a.cols : 0, kForwardTile),
      sum(areas, a.dims.data ? a.cols : 0, kForwardTile);
  int64_t taken = 0;
  with_bool(a.joint.data, [&](auto joint) {
    with_bool(a.dims.data, [&](auto dims) {
      with_bool(a.weights_by_item, [&](auto weights) {
        parallel_for(tiles, work(a), threads, [&](int64_t begin, int64_t end) {
          const int64_t at = next_area(taken) * a.cols * kForwardTile;
          for (int64_t tile = begin; tile < end; ++tile)
            forward_tile<C, joint.value, dims.value, weights.value>(a, components, tile,
                                                                    {z.data + at, maximum.data + at, sum.data + at});
        });
      });
    });
  });
}

template <class C>
inline void backward_as(const MixtureArguments& a, int threads) {
  const Constants<C> c(a.options);
  const Components<C> components(a, threads);
  const Partials<C> partials(a);
  const Points<C> points(a, partials.tiles, threads);
  const int64_t tasks = partials.component_chunks * partials.item_chunks, areas = scratch_areas(tasks, threads);
  constexpr int64_t kTerms = kBlock * kBackwardTile, kMasses = kBlock * kPack;
  const Buffer<C> sums(areas, a.cols, kTaskNumbers), terms(areas, 4 * kTerms + kMasses);
  int64_t taken = 0;
  with_bool(a.joint.data, [&](auto joint) {
    with_bool(a.dims.data, [&](auto dims) {
      with_bool(a.dlog_weights.data, [&](auto weights) {
        parallel_for(tasks, work(a), threads, [&](int64_t begin, int64_t end) {
          const int64_t area = next_area(taken);
          C* const at = terms.data + area * (4 * kTerms + kMasses);
          const Task<C> task = {sums.data + area * a.cols * kTaskNumbers,
                                at,
                                at + kTerms,
                                at + 2 * kTerms,
                                at + 3 * kTerms,
                                at + 4 * kTerms};
          for (int64_t index = begin; index < end; ++index)
            backward_task<C, joint.value, dims.value, weights.value>(a, components, points, partials, index, task);
        });
      });
    });
  });
  parallel_for(a.components, a.components * a.cols, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) finish_component(a, c, partials, n);
  });
  if (!a.dz.data) return;
  parallel_for(divide_up(a.items, kPack), a.items * a.cols, threads, [&](int64_t begin, int64_t end) {
    for (int64_t pack = begin; pack < end; ++pack) finish_points(a, partials, pack * kPack);
  });
}

void forward(const MixtureArguments& a, int threads) {
  a.use_f64 ? forward_as<double>(a, threads) : forward_as<float>(a, threads);
}

void backward(const MixtureArguments& a, int threads) {
  a.use_f64 ? backward_as<double>(a, threads) : backward_as<float>(a, threads);
}

}  // namespace

const MixtureOp REPARAM_ISA::mixture = {forward, backward};

}  // namespace reparam
