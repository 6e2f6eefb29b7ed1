// Log-densities of a mixture of diagonal Gaussians: of whole events (joint), of each of their elements (dims), or both.
#pragma once
#include "core/dispatch.h"
#include "core/operand.h"
#include "math/gaussian.h"

namespace reparam {

// One call. Operands that are absent are null.
struct MixtureArguments {
  Options options;
  bool use_f64 = false;    // float64 arithmetic
  int64_t items = 0;       // B, points
  int64_t components = 0;  // N
  int64_t cols = 1;        // D, elements of a point
  Operand z;               // [B, D]
  Operand mu, x;           // [N, D]; x is the second argument, read as options.param says
  Operand log_weights;     // [N] or [B, N]; absent: -log N
  bool weights_by_item = false;
  // [B] and [B, D], contiguous, in the type of the arithmetic: the outputs of forward, and the gradients that backward
  // starts from.
  Operand joint, dims;
  // [2, B] and [2, B, D], contiguous, in the type of the arithmetic: the logarithm of the terms' maximum or, for dims,
  // of another number near their sum, relative to a constant of the dim; and that of the sum of their quotients by it.
  // Both are in base 2. Forward writes them if they are present, backward reads them.
  Operand joint_sums, dims_sums;
  Operand dz, dmu, dx;   // contiguous
  Operand dlog_weights;  // as log_weights, contiguous, in the type of the arithmetic
};

struct MixtureOp {
  void (*forward)(const MixtureArguments&, int threads);
  void (*backward)(const MixtureArguments&, int threads);
};
REPARAM_OP(MixtureOp, mixture)

}  // namespace reparam
