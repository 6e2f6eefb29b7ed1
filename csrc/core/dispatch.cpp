#include "core/dispatch.h"

#include <algorithm>
#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

namespace reparam {
namespace {

#ifdef REPARAM_X86_LEVELS
const char* const kNames[] = {"baseline", "avx2", "avx512"};  // each includes those before it
int best_level() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") ? 2 : __builtin_cpu_supports("x86-64-v3") ? 1 : 0;
}
#else
#define REPARAM_TEXT(x) #x
#define REPARAM_NAME(x) REPARAM_TEXT(x)
const char* const kNames[] = {REPARAM_NAME(REPARAM_ISA)};
int best_level() { return 0; }
#endif

std::atomic<int> level{best_level()};

// Minimum elements per thread that are worth its start-up cost.
constexpr int64_t kMinPerThread = 16384;

#ifdef _OPENMP
// After a fork the child has no worker threads, and OpenMP would wait for them forever.
std::atomic<bool> forked{false};
const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int useful_threads(int64_t count, int64_t elements, int threads) {
  if (forked || omp_in_parallel()) return 1;
  return (int)std::max<int64_t>(1, std::min({(int64_t)threads, elements / kMinPerThread, count}));
}
#endif

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = best_level(); i >= 0; --i) names.push_back(kNames[i]);
  return names;
}

int isa_level() { return level.load(std::memory_order_relaxed); }

std::string isa() { return kNames[isa_level()]; }

bool set_isa(const std::string& name) {
  for (int i = best_level(); i >= 0; --i) {
    if (name == kNames[i]) {
      level = i;
      return true;
    }
  }
  return false;
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void parallel_ranges(int64_t count, int64_t elements, int threads, void (*body)(const void* context, int64_t, int64_t),
                     const void* context) {
#ifdef _OPENMP
  if (const int team = useful_threads(count, elements, threads); team > 1) {
#pragma omp parallel num_threads(team)
    {
      const int64_t t = omp_get_thread_num(), size = omp_get_num_threads();
      body(context, count / size * t + std::min(t, count % size),
           count / size * (t + 1) + std::min(t + 1, count % size));
    }
    return;
  }
#endif
  (void)elements, (void)threads;
  body(context, 0, count);
}

HeapArray::HeapArray(int64_t count) : data(count ? new double[count] : nullptr) {}
HeapArray::~HeapArray() { delete[] data; }

}  // namespace reparam
