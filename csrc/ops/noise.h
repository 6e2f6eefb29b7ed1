// The noise alone: fills a tensor, and exposes the intermediate steps to the tests.
#pragma once
#include "core/dispatch.h"
#include "random/eps.h"

namespace reparam {

struct NoiseArguments {
  EpsSource eps;
  bool use_f64 = false;  // the tensor is float64
  Operand out;           // eps.n elements
};

struct NoiseOp {
  void (*fill)(const NoiseArguments&, int threads);
  void (*test_philox)(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]);
  void (*test_box_muller)(const uint32_t* radius, const uint32_t* angle, int pairs, float* eps);
  void (*test_eps)(int64_t seed, int64_t first, int n, float* eps);  // n <= kChunk
};
REPARAM_OP(NoiseOp, noise)

}  // namespace reparam
