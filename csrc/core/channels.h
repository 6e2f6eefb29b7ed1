// Tensors whose channels lie next to each other in memory, as those of channels_last tensors do. A tile of them is
// brought into logical order in the first-level cache, where the kernels read and write it as if it were contiguous.
#pragma once
#include "core/operand.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace reparam {
namespace {

// The logical order is [items, channels, positions].
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

// Some positions of some channels. In the tile, the positions of a channel are contiguous.
struct ChannelTile {
  int64_t channel, position;  // the first; channels are counted over all items
  int channels, positions;
  int pitch;  // elements from one channel to the next in the tile
};

// ---- four channels of some positions

typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t QuadBits __attribute__((vector_size(16)));
typedef uint16_t HalfQuad __attribute__((vector_size(8)));

REPARAM_INLINE Quad load_quad(const float* from) {
  Quad q;
  std::memcpy(&q, from, sizeof q);
  return q;
}
REPARAM_INLINE Quad load_quad(const Bf16* from) {
  HalfQuad h;
  std::memcpy(&h, from, sizeof h);
  return (Quad)(__builtin_convertvector(h, QuadBits) << 16);
}
REPARAM_INLINE Quad load_quad(const F16* from) {
#if defined(__F16C__)
  return (Quad)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from));
#else
  return Quad{from_f16(from[0].bits), from_f16(from[1].bits), from_f16(from[2].bits), from_f16(from[3].bits)};
#endif
}

REPARAM_INLINE void store_quad(Quad q, float* to) { std::memcpy(to, &q, sizeof q); }
REPARAM_INLINE void store_quad(Quad q, Bf16* to) {  // as to_bf16
  const QuadBits b = (QuadBits)q, number = (QuadBits)(q == q);
  const QuadBits rounded = (b + 0x7fffu + (b >> 16 & 1u)) >> 16, nan = b >> 16 | 0x40u;
  const HalfQuad h = __builtin_convertvector((rounded & number) | (nan & ~number), HalfQuad);
  std::memcpy(to, &h, sizeof h);
}
REPARAM_INLINE void store_quad(Quad q, F16* to) {
#if defined(__F16C__)
  _mm_storel_epi64((__m128i*)to, _mm_cvtps_ph((__m128)q, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 4; ++i) to[i].bits = to_f16(q[i]);
#endif
}

// Sections of 16 bytes side by side, so that one shuffle works on several quads.
#if defined(__AVX__)
constexpr int kSections = 2;
#else
constexpr int kSections = 1;
#endif
typedef float Sections __attribute__((vector_size(16 * kSections)));
constexpr int kStep = 4 * kSections;  // positions that transpose at once

// Section s holds the quad at from + 4 * s * stride.
template <class Stored>
REPARAM_INLINE Sections load_sections(const Stored* from, int64_t stride) {
#if defined(__AVX__)
  return (Sections)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)load_quad(from)),
                                        (__m128)load_quad(from + 4 * stride), 1);
#else
  (void)stride;
  return load_quad(from);
#endif
}
template <class Stored>
REPARAM_INLINE void store_sections(Sections v, int64_t stride, Stored* to) {
#if defined(__AVX__)
  store_quad((Quad)_mm256_castps256_ps128((__m256)v), to);
  store_quad((Quad)_mm256_extractf128_ps((__m256)v, 1), to + 4 * stride);
#else
  (void)stride;
  store_quad(v, to);
#endif
}

// Interleaves halves of each section: the numbers of the low or high half, or pairs of them.
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
REPARAM_INLINE Sections high_pairs(Sections a, Sections b) {
  return REPARAM_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
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

// ---- tiles in one item: to[c * pitch + p] = from[p * stride + c], and back

// Calls body(c, p) for each block of four channels and kStep positions, and returns how many positions these cover. If
// the channels are not a multiple of four, the last blocks overlap.
template <class Body>
REPARAM_INLINE int for_blocks(int channels, int positions, Body body) {
  if (channels < 4) return 0;
  int p = 0;
  for (; p + kStep <= positions; p += kStep) {
    int c = 0;
    for (; c + 4 <= channels; c += 4) body(c, p);
    if (c < channels) body(channels - 4, p);
  }
  return p;
}

template <class C, class Stored>
inline void to_logical(const Stored* from, int64_t stride, int channels, int positions, C* to, int pitch) {
  int p = 0;
  if constexpr (sizeof(C) == 4 && sizeof(Stored) <= 4) {
    p = for_blocks(channels, positions, [&](int c, int at) {
      Sections v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = load_sections(from + (at + i) * stride + c, stride);
      transpose(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) std::memcpy(to + (c + i) * pitch + at, &v[i], sizeof v[i]);
    });
  }
  for (; p < positions; ++p) {
    for (int c = 0; c < channels; ++c) to[c * pitch + p] = from_storage(from[p * stride + c], C());
  }
}

template <class C, class Stored>
inline void from_logical(const C* from, int pitch, int channels, int positions, Stored* to, int64_t stride) {
  int p = 0;
  if constexpr (sizeof(C) == 4 && sizeof(Stored) <= 4) {
    p = for_blocks(channels, positions, [&](int c, int at) {
      Sections v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) std::memcpy(&v[i], from + (c + i) * pitch + at, sizeof v[i]);
      transpose(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store_sections(v[i], stride, to + (at + i) * stride + c);
    });
  }
  for (; p < positions; ++p) {
    for (int c = 0; c < channels; ++c) to_storage(from[c * pitch + p], to[p * stride + c]);
  }
}

// Calls body(offset, channels, at) for the part of a tile in each item: its first element in the tensor, its channels,
// and its first element in the tile.
template <class Body>
REPARAM_INLINE void for_items(const Operand& t, const ChannelLayout& l, const ChannelTile& tile, Body body) {
  const int64_t item_stride = t.ndim == 3 ? t.stride[0] : 0, stride = t.stride[t.ndim - 1];
  for (int done = 0; done < tile.channels;) {
    const int64_t item = (tile.channel + done) / l.channels, channel = (tile.channel + done) % l.channels;
    const int64_t left = l.channels - channel;
    const int count = left < tile.channels - done ? (int)left : tile.channels - done;
    body(item * item_stride + channel + tile.position * stride, count, done * tile.pitch);
    done += count;
  }
}

template <class C>
inline void read_tile(const Operand& t, const ChannelLayout& l, const ChannelTile& tile, C* to) {
  const int64_t stride = t.stride[t.ndim - 1];
  for_items(t, l, tile, [&](int64_t offset, int channels, int at) {
    const auto read = [&](const auto* from) {
      to_logical(from + offset, stride, channels, tile.positions, to + at, tile.pitch);
    };
    if constexpr (sizeof(C) == 8) {
      read((const double*)t.data);
    } else {
      switch (t.dtype) {
        case Dtype::f32: return read((const float*)t.data);
        case Dtype::f64: return read((const double*)t.data);
        case Dtype::bf16: return read((const Bf16*)t.data);
        case Dtype::f16: return read((const F16*)t.data);
      }
    }
  });
}

template <class C>
inline void write_tile(const C* from, const Operand& t, const ChannelLayout& l, const ChannelTile& tile) {
  const int64_t stride = t.stride[t.ndim - 1];
  for_items(t, l, tile, [&](int64_t offset, int channels, int at) {
    const auto write = [&](auto* to) {
      from_logical(from + at, tile.pitch, channels, tile.positions, to + offset, stride);
    };
    if constexpr (sizeof(C) == 8) {
      write((double*)t.data);
    } else {
      switch (t.dtype) {
        case Dtype::f32: return write((float*)t.data);
        case Dtype::f64: return write((double*)t.data);
        case Dtype::bf16: return write((Bf16*)t.data);
        case Dtype::f16: return write((F16*)t.data);
      }
    }
  });
}

}  // namespace
}  // namespace reparam
