// How the kernels of a mixture hold numbers in memory: points side by side in packs, components in blocks.
#pragma once
#include "core/chunks.h"
#include "math/pack.h"
#include "ops/mixture.h"

namespace reparam {
namespace {

constexpr int kBlock = 16;  // components of a block
// The numbers of one dim of a block: mu, kRoot / sigma and the constant term, each of 16 components.
constexpr int kFields = 3 * kBlock;
constexpr int kForwardTile = 64, kBackwardTile = 128;  // points
constexpr int kPiece = 64;                             // dims that are copied at a time

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453, kHalfLog2Pi = 0.9189385332046727;

// The kernels have e = (z - mu) kRoot / sigma. kRoot + kRootRest is sqrt(log2(e) / 2), so that the logarithm of a term
// is its constant less e^2. kSquare is the square of kRoot.
constexpr double kExactRoot = 0.84932180028801904;
template <class C>
constexpr C kRoot = (C)kExactRoot;
template <class C>
constexpr C kRootRest = (C)(kExactRoot - (double)kRoot<C>);
template <class C>
constexpr C kSquare = (C)(.5 * kLog2e);

// Stand-ins for infinity, so that differences are never NaN. Terms below kLowest count as 0. A sum of squares beyond
// kFar becomes 2 kFar, whose term is below kLowest, as are the terms of components with kExcluded.
template <class C>
constexpr C kFar = sizeof(C) == 4 ? C(2e37) : C(2e306);
template <class C>
constexpr C kLowest = -kFar<C>;
template <class C>
constexpr C kExcluded = 5 * kLowest<C>;

constexpr int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// An array of sizes[0] * sizes[1] * ... numbers that starts at a cache line.
template <class C>
class Buffer {
 public:
  template <class... Sizes>
  explicit Buffer(Sizes... sizes) : memory_(doubles({(int64_t)sizes...})) {
    const uintptr_t address = (uintptr_t)memory_.data;
    data = (C*)(address + (64 - address % 64) % 64);
  }
  C* data;

 private:
  template <size_t N>
  static int64_t doubles(const int64_t (&sizes)[N]) {
    int64_t n = 1;
    for (int64_t size : sizes) {
      if (__builtin_mul_overflow(n, size, &n)) return INT64_MAX / 8;  // as much as cannot be allocated
    }
    return n / (int64_t)(8 / sizeof(C)) + 9;
  }
  const HeapArray memory_;
};

// Writes rows [first, first + kPack) of a [items, cols] operand as columns: to[d * stride + lane]. Lanes beyond the
// last row get `fill`.
template <class C>
inline void load_columns(const Operand& t, int64_t items, int64_t cols, int64_t first, C fill, C* to, int64_t stride) {
  alignas(64) C buffer[kPack][kPiece];
  const C* rows[kPack];
  const int count = items - first < kPack ? (int)(items - first) : kPack;
  for (int64_t at = 0; at < cols; at += kPiece) {
    const int n = cols - at < kPiece ? (int)(cols - at) : kPiece;
    for (int lane = 0; lane < kPack; ++lane) {
      rows[lane] = buffer[lane];
      if (lane < count) {
        rows[lane] = load(t, (first + lane) * cols + at, n, buffer[lane]);
      } else {
        for (int i = 0; i < n; ++i) buffer[lane][i] = fill;
      }
    }
    int done = 0;
    for (; done + 4 <= n; done += 4) {
      for (int lane = 0; lane < kPack; lane += 4)
        transpose(rows + lane, done, to + (at + done) * stride + lane, stride);
    }
    for (; done < n; ++done) {
      for (int lane = 0; lane < kPack; ++lane) to[(at + done) * stride + lane] = rows[lane][done];
    }
  }
}

// Writes elements [first, first + n) of a contiguous operand.
template <class C>
inline void write(const Operand& t, int64_t first, int n, C* from) {
  C* to = target(t, first, from);
  for (int i = 0; i < n; ++i) to[i] = from[i];
  store(t, first, n, from);
}

}  // namespace
}  // namespace reparam
