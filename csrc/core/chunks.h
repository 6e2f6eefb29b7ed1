// Cuts a call into chunks, the units of work and of summation.
#pragma once
#include <cstdint>

#include "core/inline.h"

namespace reparam {

constexpr int kChunk = 1024;  // the most elements of a chunk, so that its buffers stay in the first-level cache

namespace {

// A chunk is a number of whole short rows, or an equal part of a long row. Its bounds follow from the shape alone, so
// no sum depends on the number of threads or on the instruction set.
struct Chunks {
  int64_t cols, rows, length, per_row, count;

  REPARAM_INLINE Chunks(int64_t n, int64_t row_cols) : cols(row_cols), rows(n / row_cols) {
    per_row = (cols + kChunk - 1) / kChunk;
    if (per_row == 1) {
      length = kChunk / cols * cols;
      count = (n + length - 1) / length;
    } else {
      length = ((cols + per_row - 1) / per_row + 15) / 16 * 16;
      per_row = (cols + length - 1) / length;
      count = rows * per_row;
    }
  }
  REPARAM_INLINE int64_t begin(int64_t chunk) const {
    return per_row == 1 ? chunk * length : chunk / per_row * cols + chunk % per_row * length;
  }
  REPARAM_INLINE int64_t end(int64_t chunk) const {
    const int64_t stop = per_row == 1 ? rows * cols : (chunk / per_row + 1) * cols;
    return begin(chunk) + length < stop ? begin(chunk) + length : stop;
  }
};

constexpr int kSlack = 260;  // fill_eps writes up to this many elements more than a chunk

// A buffer on the stack for one chunk.
template <class C>
struct Scratch {
  alignas(64) C data[kChunk + kSlack];
};

}  // namespace
}  // namespace reparam
