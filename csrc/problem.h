// What one call asks for, as plain data: bindings.cpp fills it, the kernels of each instruction set read it.
#pragma once
#include <cstdint>

// Shared by files compiled for different instruction sets: nothing inline may be left for the linker to choose from.
#if defined(__GNUC__)
#define REPARAM_INLINE inline __attribute__((always_inline))
#else
#define REPARAM_INLINE inline
#endif

namespace reparam {

enum class Dtype { f16, bf16, f32, f64 };
enum class Param { logvar, logstd, std, softplus };

constexpr int kMaxDims = 64;

// A tensor read in logical row-major order, its mergeable dims merged. A null pointer: absent, or not wanted.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int ndim = 0;
  int64_t size[kMaxDims], stride[kMaxDims];  // in elements
};

struct Options {
  Param param = Param::logvar;
  double min_std = 0;
  bool clamped = false;
  double low = 0, high = 0;
};

struct Problem {
  Options options;
  bool wide = false;    // float64 arithmetic
  int64_t n = 0;        // elements of mu
  int64_t samples = 1;  // z holds samples * n elements
  int64_t cols = 1;     // consecutive elements of mu that one KL sums over
  int64_t group = 1;    // consecutive elements of mu that share a seed
  const int64_t* seed = nullptr;
  Operand mu, x, mu_p, x_p, eps;  // x: the second argument, read as options.param says
  Operand z, kl;                  // forward
  Operand dz, dkl;                // backward
  Operand dmu, dx, dmu_p, dx_p;
  double* partial = nullptr;  // one sum for each piece, where a row is longer than a piece
};

// The unit of work and of summation: whole short rows, or an equal part of a long one. Its bounds follow from the shape
// alone, so no sum depends on threads or instruction set.
constexpr int kPiece = 1024;

struct Pieces {
  int64_t cols, rows, length, per_row, count;

  REPARAM_INLINE Pieces(int64_t n, int64_t row_cols) : cols(row_cols), rows(n / row_cols) {
    per_row = (cols + kPiece - 1) / kPiece;
    if (per_row == 1) {
      length = kPiece / cols * cols;
      count = (n + length - 1) / length;
    } else {
      length = ((cols + per_row - 1) / per_row + 15) / 16 * 16;
      per_row = (cols + length - 1) / length;
      count = rows * per_row;
    }
  }
  REPARAM_INLINE int64_t begin(int64_t piece) const {
    return per_row == 1 ? piece * length : piece / per_row * cols + piece % per_row * length;
  }
  REPARAM_INLINE int64_t end(int64_t piece) const {
    const int64_t stop = per_row == 1 ? rows * cols : (piece / per_row + 1) * cols;
    return begin(piece) + length < stop ? begin(piece) + length : stop;
  }
};

// The three kernels, each for pieces [first, last), and three windows on the noise for tests.
struct Kernels {
  const char* isa;
  void (*randn)(const Problem&, const Pieces&, int64_t first, int64_t last);
  void (*forward)(const Problem&, const Pieces&, int64_t first, int64_t last);
  void (*backward)(const Problem&, const Pieces&, int64_t first, int64_t last);
  void (*philox)(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]);
  void (*box_muller)(const uint32_t* radius, const uint32_t* angle, int pairs, float* eps);
  void (*noise)(int64_t seed, int64_t first, int n, float* eps);  // n <= kPiece
};

}  // namespace reparam
