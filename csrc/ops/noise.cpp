#include "ops/noise.h"

namespace reparam {
namespace {

template <class C>
inline void fill_chunk(const NoiseArguments& a, int64_t first, int n) {
  Scratch<C> eps_s, out_s;
  const C* eps = load_or_make_eps(a.eps, 0, first, n, eps_s);
  C* out = target(a.out, first, out_s.data);
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = eps[i];
  store(a.out, first, n, out);
}

void fill(const NoiseArguments& a, int threads) {
  if (a.eps.n == 0) return;
  const Chunks chunks(a.eps.n, 1);
  parallel_for(chunks.count, a.eps.n, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int n = (int)(chunks.end(i) - chunks.begin(i));
      a.use_f64 ? fill_chunk<double>(a, chunks.begin(i), n) : fill_chunk<float>(a, chunks.begin(i), n);
    }
  });
}

void test_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]) {
  Lanes c[4][1];
  for (int i = 0; i < 4; ++i) c[i][0] = Lanes{} + (uint64_t)counter[i];
  philox4x32_10<1>(c, key[0], key[1]);
  for (int i = 0; i < 4; ++i) {
    uint64_t lane;
    std::memcpy(&lane, &c[i], sizeof lane);
    words[i] = (uint32_t)lane;
  }
}

void test_box_muller(const uint32_t* radius, const uint32_t* angle, int pairs, float* eps) {
#pragma omp simd
  for (int i = 0; i < pairs; ++i) {
    const Pair p = box_muller(radius[i], angle[i]);
    eps[2 * i] = p.first;
    eps[2 * i + 1] = p.second;
  }
}

void test_eps(int64_t seed, int64_t first, int n, float* eps) {
  Scratch<float> scratch;
  std::memcpy(eps, fill_eps(seed, first, n, scratch.data), n * sizeof *eps);
}

}  // namespace

const NoiseOp REPARAM_ISA::noise = {fill, test_philox, test_box_muller, test_eps};

}  // namespace reparam
