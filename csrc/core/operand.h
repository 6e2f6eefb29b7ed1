// A tensor that the kernels read and write in logical row-major order, whatever its strides.
#pragma once
#include "core/half.h"

namespace reparam {

enum class Dtype { f16, bf16, f32, f64 };

constexpr int kMaxDims = 64;

// Plain data. Neighbouring dims that can be merged are merged. A null pointer means absent, or not wanted.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int ndim = 0;
  int64_t size[kMaxDims], stride[kMaxDims];  // in elements
};

namespace {

template <class C, class Stored>
inline void load_run(const Stored* from, int64_t stride, int n, C* to) {
  if (stride == 1) {
    const int done = convert_f16x8(from, n, to);
#pragma omp simd
    for (int i = done; i < n; ++i) to[i] = from_storage(from[i], C());
  } else {
    for (int i = 0; i < n; ++i) to[i] = from_storage(from[i * stride], C());
  }
}

template <class C, class Stored>
inline void store_run(const C* from, int64_t stride, int n, Stored* to) {
  if (stride == 1) {
    const int done = convert_f16x8(from, n, to);
#pragma omp simd
    for (int i = done; i < n; ++i) to_storage(from[i], to[i]);
  } else {
    for (int i = 0; i < n; ++i) to_storage(from[i], to[i * stride]);
  }
}

// Calls body(offset, stride, at, length) for each run of memory with one stride that holds some of elements
// [first, first + n).
template <class Body>
inline void for_runs(const Operand& t, int64_t first, int n, Body body) {
  if (t.ndim == 0) return body((int64_t)0, (int64_t)0, 0, n);
  int64_t index[kMaxDims], offset = 0, rest = first;
  for (int k = t.ndim - 1; k >= 0; --k) {
    index[k] = k > 0 ? rest % t.size[k] : rest;
    rest = k > 0 ? rest / t.size[k] : 0;
    offset += index[k] * t.stride[k];
  }
  const int inner = t.ndim - 1;
  for (int done = 0; done < n;) {
    const int64_t left = t.size[inner] - index[inner];
    const int run = left < n - done ? (int)left : n - done;
    body(offset, t.stride[inner], done, run);
    done += run;
    index[inner] += run;
    offset += run * t.stride[inner];
    for (int k = inner; k > 0 && index[k] == t.size[k]; --k) {
      offset += t.stride[k - 1] - index[k] * t.stride[k];
      index[k] = 0;
      ++index[k - 1];
    }
  }
}

template <class C>
constexpr Dtype kDtype = sizeof(C) == 4 ? Dtype::f32 : Dtype::f64;

// Contiguous and already in the compute type: the elements are used in place.
template <class C>
inline bool in_place(const Operand& t) {
  return t.dtype == kDtype<C> && t.ndim == 1 && t.stride[0] == 1;
}

// Returns elements [first, first + n), in place or converted into `buffer`.
template <class C>
inline const C* load(const Operand& t, int64_t first, int n, C* buffer) {
  if (in_place<C>(t)) return (const C*)t.data + first;
  for_runs(t, first, n, [&](int64_t offset, int64_t stride, int at, int length) {
    C* to = buffer + at;
    if constexpr (sizeof(C) == 8) {
      load_run((const double*)t.data + offset, stride, length, to);
    } else {
      switch (t.dtype) {
        case Dtype::f32: return load_run((const float*)t.data + offset, stride, length, to);
        case Dtype::f64: return load_run((const double*)t.data + offset, stride, length, to);
        case Dtype::bf16: return load_run((const Bf16*)t.data + offset, stride, length, to);
        case Dtype::f16: return load_run((const F16*)t.data + offset, stride, length, to);
      }
    }
  });
  return buffer;
}

// Returns where to write the elements from `first` on: in place, or in `buffer`, from which store() converts them.
template <class C>
inline C* target(const Operand& t, int64_t first, C* buffer) {
  return in_place<C>(t) ? (C*)t.data + first : buffer;
}

// Completes what was written to target().
template <class C>
inline void store(const Operand& t, int64_t first, int n, const C* from) {
  if (in_place<C>(t)) return;
  for_runs(t, first, n, [&](int64_t offset, int64_t stride, int at, int length) {
    if constexpr (sizeof(C) == 8) {
      store_run(from + at, stride, length, (double*)t.data + offset);
    } else {
      switch (t.dtype) {
        case Dtype::f32: return store_run(from + at, stride, length, (float*)t.data + offset);
        case Dtype::f64: return store_run(from + at, stride, length, (double*)t.data + offset);
        case Dtype::bf16: return store_run(from + at, stride, length, (Bf16*)t.data + offset);
        case Dtype::f16: return store_run(from + at, stride, length, (F16*)t.data + offset);
      }
    }
  });
}

// Writes elements that were not written to target().
template <class C>
inline void put(const Operand& t, int64_t first, int n, const C* from) {
  if (!in_place<C>(t)) return store(t, first, n, from);
  C* to = target<C>(t, first, nullptr);
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = from[i];
}

}  // namespace
}  // namespace reparam
