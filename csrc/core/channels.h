// Tensors whose channels lie next to each other in memory, as those of channels_last tensors do, and the two orders of
// a tile of them: the logical one, in which the positions of a channel are contiguous, and that of memory.
#pragma once
#include <cstring>
#include <type_traits>

#include "core/operand.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace reparam {
namespace {

// The logical order is [items, channels, positions]; in memory, the channels are innermost.
struct ChannelLayout {
  int64_t items = 0, channels = 0, positions = 0;  // no items: another layout

  REPARAM_INLINE ChannelLayout() = default;
  REPARAM_INLINE explicit ChannelLayout(const Operand& t) {
    const int inner = t.ndim - 1;
    if (!t.data || t.ndim < 2 || t.ndim > 3 || t.stride[inner - 1] != 1 || t.stride[inner] <= 1) return;
    items = t.ndim == 3 ? t.size[0] : 1;
    channels = t.size[inner - 1];
    positions = t.size[inner];
  }
  REPARAM_INLINE bool operator==(const ChannelLayout& other) const {
    return items == other.items && channels == other.channels && positions == other.positions;
  }
};

// Some positions of some channels of some items. In the order of memory it is [items, positions, channels], in the
// logical one [items, channels, positions].
struct ChannelTile {
  int64_t item, channel, position;  // the first
  int items, channels, positions;

  REPARAM_INLINE int per_item() const { return channels * positions; }
  REPARAM_INLINE int elements() const { return items * per_item(); }
};

// ---- four channels of some positions

typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t QuadBits __attribute__((vector_size(16)));
typedef uint16_t HalfQuad __attribute__((vector_size(8)));

// Sections of 16 bytes side by side, so that one shuffle works on several quads.
#if defined(__AVX__)
constexpr int kSections = 2;
#else
constexpr int kSections = 1;
#endif
typedef float Sections __attribute__((vector_size(16 * kSections)));
constexpr int kStep = 4 * kSections;  // positions that are transposed at once

// Section s holds the quad at from + 4 * s * stride.
REPARAM_INLINE Sections load_sections(const float* from, int stride) {
#if defined(__AVX__)
  return (Sections)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + 4 * stride), 1);
#else
  (void)stride;
  Quad q;
  std::memcpy(&q, from, sizeof q);
  return q;
#endif
}
REPARAM_INLINE void store_section(Sections v, int section, float* to) {
#if defined(__AVX__)
  _mm_storeu_ps(to, section == 0 ? _mm256_castps256_ps128((__m256)v) : _mm256_extractf128_ps((__m256)v, 1));
#else
  (void)section;
  std::memcpy(to, &v, sizeof v);
#endif
}

// Interleaves the low or high halves of each section: number by number, or pair by pair.
#if defined(__clang__)
#define REPARAM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t SectionIndex __attribute__((vector_size(16 * kSections)));
#define REPARAM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, SectionIndex{__VA_ARGS__})
#endif
#if defined(__AVX__)
REPARAM_INLINE Sections low(Sections a, Sections b) { return REPARAM_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
REPARAM_INLINE Sections high(Sections a, Sections b) { return REPARAM_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
REPARAM_INLINE Sections low_pairs(Sections a, Sections b) { return REPARAM_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
REPARAM_INLINE Sections high_pairs(Sections a, Sections b) { return REPARAM_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
#else
REPARAM_INLINE Sections low(Sections a, Sections b) { return REPARAM_SHUFFLE(a, b, 0, 4, 1, 5); }
REPARAM_INLINE Sections high(Sections a, Sections b) { return REPARAM_SHUFFLE(a, b, 2, 6, 3, 7); }
REPARAM_INLINE Sections low_pairs(Sections a, Sections b) { return REPARAM_SHUFFLE(a, b, 0, 1, 4, 5); }
REPARAM_INLINE Sections high_pairs(Sections a, Sections b) { return REPARAM_SHUFFLE(a, b, 2, 3, 6, 7); }
#endif
#undef REPARAM_SHUFFLE

// Transposes the four by four numbers of each section.
REPARAM_INLINE void transpose(Sections v[4]) {
  const Sections a = low(v[0], v[1]), b = high(v[0], v[1]), c = low(v[2], v[3]), d = high(v[2], v[3]);
  v[0] = low_pairs(a, c);
  v[1] = high_pairs(a, c);
  v[2] = low_pairs(b, d);
  v[3] = high_pairs(b, d);
}

// Calls body(c, p) for each block of four channels and kStep positions, and returns how many positions these cover. If
// the channels are not a multiple of four, the last blocks overlap. Positions come in order.
template <class Body>
REPARAM_INLINE int for_blocks(int channels, int positions, Body body) {
  const int covered = positions / kStep * kStep;
  for (int next = 0; next < channels; next += 4) {
    const int c = next + 4 <= channels || channels < 4 ? next : channels - 4;
    for (int p = 0; p < covered; p += kStep) body(c, p);
  }
  return covered;
}

// Brings one item of a tile from the logical order to that of memory.
template <class C>
inline void to_memory_order(const C* from, int channels, int positions, C* __restrict to) {
  int p = 0;
  if constexpr (sizeof(C) == 4) {
    if (channels >= 4) {
      p = for_blocks(channels, positions, [&](int c, int at) {
        Sections v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) std::memcpy(&v[i], from + (c + i) * positions + at, sizeof v[i]);
        transpose(v);
#pragma GCC unroll 2
        for (int s = 0; s < kSections; ++s) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) store_section(v[i], s, to + (at + 4 * s + i) * channels + c);
        }
      });
    }
  }
  for (; p < positions; ++p) {
    for (int c = 0; c < channels; ++c) to[p * channels + c] = from[c * positions + p];
  }
}

// The inverse.
template <class C>
inline void to_logical_order(const C* from, int channels, int positions, C* __restrict to) {
  int p = 0;
  if constexpr (sizeof(C) == 4) {
    if (channels >= 4) {
      p = for_blocks(channels, positions, [&](int c, int at) {
        Sections v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) v[i] = load_sections(from + (at + i) * channels + c, channels);
        transpose(v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) std::memcpy(to + (c + i) * positions + at, &v[i], sizeof v[i]);
      });
    }
  }
  for (; p < positions; ++p) {
    for (int c = 0; c < channels; ++c) to[c * positions + p] = from[p * channels + c];
  }
}

// ---- tiles of a tensor, in the order of memory

// Calls body(offset, at, n, stride, count) for what a tile has of each item, or for all if the items are contiguous:
// `count` runs of n elements, the first at `offset` in the tensor and at `at` in the tile, `stride` apart in the
// tensor.
template <class Body>
REPARAM_INLINE void for_runs_of_tile(const Operand& t, const ChannelTile& tile, Body body) {
  const int64_t item_stride = t.ndim == 3 ? t.stride[0] : 0, stride = t.stride[t.ndim - 1];
  const int64_t first = tile.item * item_stride + tile.position * stride + tile.channel;
  const bool dense = stride == tile.channels;
  if (dense && (tile.items == 1 || item_stride == tile.per_item())) return body(first, 0, tile.elements(), stride, 1);
  for (int i = 0; i < tile.items; ++i) {
    const int64_t offset = first + i * item_stride;
    if (dense)
      body(offset, i * tile.per_item(), tile.per_item(), stride, 1);
    else
      body(offset, i * tile.per_item(), tile.channels, stride, tile.positions);
  }
}

// Returns the tile's elements in the tensor if they are there as the kernels read and write them, else null.
template <class C>
inline C* tile_in_place(const Operand& t, const ChannelTile& tile) {
  C* found = nullptr;
  if (t.dtype == kDtype<C>) {
    for_runs_of_tile(t, tile, [&](int64_t offset, int, int n, int64_t, int count) {
      if (count == 1 && n == tile.elements()) found = (C*)t.data + offset;
    });
  }
  return found;
}

// Calls body with the tensor's elements, in their type.
template <class C, class Body>
REPARAM_INLINE void with_storage(const Operand& t, Body body) {
  if constexpr (sizeof(C) == 8) {
    body((double*)t.data);
  } else {
    switch (t.dtype) {
      case Dtype::f32: return body((float*)t.data);
      case Dtype::f64: return body((double*)t.data);
      case Dtype::bf16: return body((Bf16*)t.data);
      case Dtype::f16: return body((F16*)t.data);
    }
  }
}

// Four numbers between a tensor and a tile. The compiler does not vectorise so short a loop.
template <class C, class Stored>
REPARAM_INLINE void read_quad(const Stored* from, C* to) {
  for (int i = 0; i < 4; ++i) to[i] = from_storage(from[i], C());
}
template <class C, class Stored>
REPARAM_INLINE void write_quad(const C* from, Stored* to) {
  for (int i = 0; i < 4; ++i) to_storage(from[i], to[i]);
}
REPARAM_INLINE void read_quad(const float* from, float* to) { std::memcpy(to, from, 4 * sizeof *to); }
REPARAM_INLINE void write_quad(const float* from, float* to) { std::memcpy(to, from, 4 * sizeof *to); }
REPARAM_INLINE void read_quad(const Bf16* from, float* to) {
  HalfQuad h;
  std::memcpy(&h, from, sizeof h);
  const QuadBits b = __builtin_convertvector(h, QuadBits) << 16;
  std::memcpy(to, &b, sizeof b);
}
REPARAM_INLINE void write_quad(const float* from, Bf16* to) {  // as to_bf16
  Quad q;
  std::memcpy(&q, from, sizeof q);
  const QuadBits b = (QuadBits)q, number = (QuadBits)(q == q);
  const QuadBits rounded = (b + 0x7fffu + (b >> 16 & 1u)) >> 16, nan = b >> 16 | 0x40u;
  const HalfQuad h = __builtin_convertvector((rounded & number) | (nan & ~number), HalfQuad);
  std::memcpy(to, &h, sizeof h);
}
#if defined(__F16C__)
REPARAM_INLINE void read_quad(const F16* from, float* to) {
  _mm_storeu_ps(to, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from)));
}
REPARAM_INLINE void write_quad(const float* from, F16* to) {
  _mm_storel_epi64((__m128i*)to, _mm_cvtps_ph(_mm_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Copies `count` runs of n elements, which are `stride` apart in the tensor and adjacent in the tile. If n is not a
// multiple of four, the last quads of a run overlap. A constant kRun lets the compiler unroll a run.
template <int kRun, class C, class Stored>
inline void read_runs(const Stored* from, int64_t stride, int run, int count, C* __restrict to) {
  const int n = kRun ? kRun : run;
  int p = 0;
#if defined(__AVX__)
  if constexpr (kRun == 4 && sizeof(C) == 4 && std::is_same_v<C, Stored>) {
    for (; p + 2 <= count; p += 2, from += 2 * stride, to += 8) {  // two runs by one store
      const __m128 first = _mm_loadu_ps(from), second = _mm_loadu_ps(from + stride);
      _mm256_storeu_ps(to, _mm256_insertf128_ps(_mm256_castps128_ps256(first), second, 1));
    }
  }
#endif
  for (; p < count; ++p, from += stride, to += n) {
    for (int i = 0; i + 4 <= n; i += 4) read_quad(from + i, to + i);
    if (n % 4 && n > 4) read_quad(from + n - 4, to + n - 4);
    for (int i = 0; n < 4 && i < n; ++i) to[i] = from_storage(from[i], C());
  }
}
template <int kRun, class C, class Stored>
inline void write_runs(const C* __restrict from, int run, int count, Stored* to, int64_t stride) {
  const int n = kRun ? kRun : run;
  for (int p = 0; p < count; ++p, from += n, to += stride) {
    for (int i = 0; i + 4 <= n; i += 4) write_quad(from + i, to + i);
    if (n % 4 && n > 4) write_quad(from + n - 4, to + n - 4);
    for (int i = 0; n < 4 && i < n; ++i) to_storage(from[i], to[i]);
  }
}

template <class C>
inline void read_tile(const Operand& t, const ChannelTile& tile, C* to) {
  with_storage<C>(t, [&](const auto* data) {
    for_runs_of_tile(t, tile, [&](int64_t offset, int at, int n, int64_t stride, int count) {
      const auto* const from = data + offset;
      if (count == 1) return load_run(from, 1, n, to + at);
      switch (n) {
        case 4: return read_runs<4>(from, stride, n, count, to + at);
        case 8: return read_runs<8>(from, stride, n, count, to + at);
        case 16: return read_runs<16>(from, stride, n, count, to + at);
        default: return read_runs<0>(from, stride, n, count, to + at);
      }
    });
  });
}

template <class C>
inline void write_tile(const C* from, const Operand& t, const ChannelTile& tile) {
  with_storage<C>(t, [&](auto* data) {
    for_runs_of_tile(t, tile, [&](int64_t offset, int at, int n, int64_t stride, int count) {
      auto* const to = data + offset;
      if (count == 1) return store_run(from + at, 1, n, to);
      switch (n) {
        case 4: return write_runs<4>(from + at, n, count, to, stride);
        case 8: return write_runs<8>(from + at, n, count, to, stride);
        case 16: return write_runs<16>(from + at, n, count, to, stride);
        default: return write_runs<0>(from + at, n, count, to, stride);
      }
    });
  });
}

}  // namespace
}  // namespace reparam
