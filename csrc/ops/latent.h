// The latent layer: z = mu + sigma eps, its KL and its log-density, and the gradients of all.
#pragma once
#include "core/dispatch.h"
#include "math/gaussian.h"
#include "random/eps.h"

namespace reparam {

// One call. Operands that are absent are null.
struct LatentArguments {
  Options options;
  bool use_f64 = false;  // float64 arithmetic
  int64_t n = 0;         // elements of mu
  int64_t samples = 1;   // z holds samples * n elements
  int64_t rows = 0;      // elements of kl, and of each sample of log_q
  int64_t cols = 1;      // consecutive elements of mu that one of them sums over
  EpsSource eps;
  Operand mu, x, mu_p, x_p;  // x is the second argument, read as options.param says
  Operand z, kl, log_q;      // the outputs of forward
  Operand dz, dkl, dlog_q;   // the gradients that backward starts from
  Operand dmu, dx, dmu_p, dx_p;
};

struct LatentOp {
  void (*forward)(const LatentArguments&, int threads);
  void (*backward)(const LatentArguments&, int threads);
};
REPARAM_OP(LatentOp, latent)

}  // namespace reparam
