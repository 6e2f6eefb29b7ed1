#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

namespace reparam {

#ifdef REPARAM_X86_LEVELS
extern const Kernels baseline, avx2, avx512;
#else
extern const Kernels REPARAM_ISA;
#endif

namespace {

std::vector<const Kernels*> supported() {
#ifdef REPARAM_X86_LEVELS
  __builtin_cpu_init();
  std::vector<const Kernels*> out;
  if (__builtin_cpu_supports("x86-64-v4")) out.push_back(&avx512);
  if (__builtin_cpu_supports("x86-64-v3")) out.push_back(&avx2);
  out.push_back(&baseline);
  return out;
#else
  return {&REPARAM_ISA};
#endif
}

std::atomic<const Kernels*> chosen{supported().front()};

// A thread earns its start-up only with this many elements to itself.
constexpr int64_t kPerThread = 16384;

#ifdef _OPENMP
// After a fork the child has no worker threads, and OpenMP would wait for them for ever.
std::atomic<bool> forked{false};
const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

int useful_threads(const Problem& p, const Pieces& pieces, int threads) {
#ifdef _OPENMP
  if (forked || omp_in_parallel()) return 1;
  const int64_t work = p.n * std::max<int64_t>(p.samples, 1) / kPerThread;
  return (int)std::max<int64_t>(1, std::min({(int64_t)threads, work, pieces.count}));
#else
  (void)p, (void)pieces, (void)threads;
  return 1;
#endif
}

// A row longer than a piece: its pieces' sums, added in order.
void join_partials(const Problem& p, const Pieces& pieces) {
  for (int64_t row = 0; row < pieces.rows; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < pieces.per_row; ++i) sum += p.partial[row * pieces.per_row + i];
    if (p.wide)
      ((double*)p.kl.data)[row] = sum;
    else
      ((float*)p.kl.data)[row] = (float)sum;
  }
}

}  // namespace

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Kernels* k : supported()) names.push_back(k->isa);
  return names;
}

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

void use(const std::string& isa) {
  std::string names;
  for (const Kernels* k : supported()) {
    if (isa == k->isa) {
      chosen = k;
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw std::invalid_argument("instruction set: must be one that this CPU and build have (" + names + "); got '" + isa +
                              "'. Correct or unset REPARAM_CPU_ISA.");
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void run(Op op, Problem& p, int threads) {
  if (p.n == 0) return;
  const Pieces pieces(p.n, p.cols);
  std::vector<double> partial;
  if (p.kl.data && pieces.per_row > 1) {
    partial.resize(pieces.count);
    p.partial = partial.data();
  }
  const Kernels& k = kernels();
  const auto kernel = op == Op::randn ? k.randn : op == Op::forward ? k.forward : k.backward;
  const int team = useful_threads(p, pieces, threads);
  if (team == 1) {
    kernel(p, pieces, 0, pieces.count);
  } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(team)
    {
      const int64_t t = omp_get_thread_num(), size = omp_get_num_threads();
      kernel(p, pieces, pieces.count / size * t + std::min(t, pieces.count % size),
             pieces.count / size * (t + 1) + std::min(t + 1, pieces.count % size));
    }
#endif
  }
  if (p.partial) join_partials(p, pieces);
}

}  // namespace reparam
