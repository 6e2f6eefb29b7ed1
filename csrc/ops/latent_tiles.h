// The latent layer on tensors whose channels lie next to each other: tiles of them are brought into logical order, on
// which the kernels run. The sums are in logical order too, so every bit is that of contiguous tensors.
#pragma once
#include "core/channels.h"
#include "core/sum.h"
#include "ops/latent.h"

namespace reparam {
namespace {

template <class C>
constexpr int kTile = 16384 / sizeof(C);  // elements, so that the tiles of a call stay in the nearest caches
constexpr int kTileChannels = 16;         // float32 of a cache line
constexpr int kTileGap = 16;              // elements between channels, so that they do not meet in one set of a cache

// The sums of consecutive elements that come in parts. A part that starts inside a chunk of a longer row, or inside a
// short row, leaves it out: the stream before it adds it up.
template <class C>
struct StreamSums {
  int64_t begin = 0, end = 0, index = -1;  // of the chunk or row, which may be open
  bool skipped = true;
  OrderedSum<C> sum;

  REPARAM_INLINE bool open(int64_t at) const { return !skipped && begin < at && at < end; }

  inline void add(const Chunks& chunks, int64_t first, int n, const C* k, C* sums, double* partials) {
    for (int at = 0; at < n;) {
      const int64_t x = first + at;
      if (index < 0 || x >= end) enter(chunks, x);
      const int length = end - x < n - at ? (int)(end - x) : n - at;
      if (!skipped) {
        const bool whole = x == begin && x + length == end;
        if (!whole) sum.add(k + at, length);
        if (x + length == end) {
          const double total = whole ? ordered_sum(k + at, length) : sum.finish();
          if (chunks.per_row > 1)
            partials[index] = total;
          else
            sums[index] = (C)total;
        }
      }
      at += length;
    }
  }

 private:
  inline void enter(const Chunks& chunks, int64_t x) {
    const int64_t cols = chunks.cols;
    if (chunks.per_row > 1) {
      index = x / cols * chunks.per_row + x % cols / chunks.length;
      begin = chunks.begin(index), end = chunks.end(index);
    } else {
      const bool next = index >= 0 && x == end;
      index = next ? index + 1 : x / cols;
      begin = index * cols, end = begin + cols;
    }
    skipped = x != begin;
    sum = {};
  }
};

// How a call goes through such tensors. A span is the positions of some channels, each a stream of its own, or the
// whole of some channels, which are one stream. It is the unit of work, and consists of tiles.
struct ChannelSpans {
  ChannelLayout layout;
  bool whole;         // channels are so short that a tile holds many of them
  int channels;       // of a tile
  int64_t width;      // positions of a tile
  int64_t length;     // of a span: in positions, or in channels if they are whole
  int64_t per_block;  // spans of the same channels
  int64_t blocks;     // of channels: in each item, or in all if they are whole
  int64_t count = 0;  // of spans; 0: the call has another layout

  // Sums ask for long spans, since a chunk that two spans share is computed twice.
  inline ChannelSpans(const LatentArguments& a, int capacity, bool sums, int threads) {
    const Operand* const some[] = {&a.mu, &a.x, &a.z, &a.dz, &a.dmu, &a.dx, &a.mu_p, &a.x_p};
    for (const Operand* t : some) {
      layout = ChannelLayout(*t);
      if (layout.items > 0) break;
    }
    if (layout.items == 0 || a.samples != 1 || layout.items * layout.channels * layout.positions != a.n) return;
    const int64_t all = layout.items * layout.channels, enough = sums ? 4 * (int64_t)threads : 1;
    whole = layout.positions <= capacity / kTileChannels;
    if (whole) {
      width = layout.positions;
      int64_t most = capacity / width;
      if (most > layout.channels) most = most / layout.channels * layout.channels;  // whole items
      if (most > all) most = all;
      channels = (int)most;
      length = channels;
      while (sums && length < layout.channels && 2 * length * enough <= all) length *= 2;
      per_block = 1;
      blocks = count = (all + length - 1) / length;
      return;
    }
    channels = layout.channels < kTileChannels ? (int)layout.channels : kTileChannels;
    width = capacity / kTileChannels;
    while (2 * width * channels <= capacity / 2 && width < kChunk) width *= 2;
    const int64_t tiles = (layout.positions + width - 1) / width;
    width = ((layout.positions + tiles - 1) / tiles + 15) / 16 * 16;
    blocks = layout.items * ((layout.channels + channels - 1) / channels);
    length = width;
    while (sums && length < layout.positions && (length < 2 * kChunk || 2 * length * enough <= layout.positions * blocks))
      length *= 2;
    per_block = (layout.positions + length - 1) / length;
    count = blocks * per_block;
  }
};

// The tiles of the operands of a call, for one thread.
template <class C>
struct OperandTiles {
  LatentArguments local;  // the operands that have the layout are replaced by their tiles

  inline OperandTiles(const LatentArguments& a, const ChannelLayout& layout) : local(a), layout(layout) {
    for (Operand* t : {&local.mu, &local.x, &local.mu_p, &local.x_p, &local.eps.given, &local.dz, &local.dkl,
                       &local.dlog_q})
      bind(t, false);
    for (Operand* t : {&local.z, &local.kl, &local.log_q, &local.dmu, &local.dx, &local.dmu_p, &local.dx_p})
      bind(t, true);
  }
  inline void read(const ChannelTile& tile) {
    for (int i = 0; i < count; ++i)
      if (!bound[i].written) read_tile(bound[i].tensor, layout, tile, data[i]);
  }
  inline void write(const ChannelTile& tile) const {
    for (int i = 0; i < count; ++i)
      if (bound[i].written) write_tile(data[i], bound[i].tensor, layout, tile);
  }
  // Lets the tiles' elements from `at` on stand for those from `first` on.
  REPARAM_INLINE void place(int at, int64_t first) {
    for (int i = 0; i < count; ++i) bound[i].local->data = data[i] + at, bound[i].local->origin = first;
  }

 private:
  static constexpr int kMost = 12;  // backward has six inputs with eps, two incoming gradients and four outputs
  struct Bound {
    Operand tensor, *local;
    bool written;
  };
  const ChannelLayout layout;
  Bound bound[kMost];
  int count = 0;
  alignas(64) C data[kMost][kTile<C> + kTileChannels * kTileGap];

  inline void bind(Operand* t, bool written) {
    if (!(ChannelLayout(*t) == layout)) return;
    bound[count] = {*t, t, written};
    *t = {};
    t->dtype = kDtype<C>;
    t->ndim = 1;
    t->size[0] = bound[count].tensor.size[0], t->stride[0] = 1;
    ++count;
  }
};

// Calls run(arguments, first, n, sums) for elements that are contiguous in the tiles of a span, and `rest`, if it is
// not null, for those with which the sums of the span go on.
template <class C, class Run, class Rest>
inline void for_tiles(OperandTiles<C>& tiles, const ChannelSpans& s, int64_t span, const Run& run, const Rest& rest) {
  StreamSums<C> sums[kTileChannels];
  const ChannelLayout& l = s.layout;
  const auto run_all = [&](int at, int64_t first, int64_t n, StreamSums<C>& sum) {
    for (int64_t done = 0; done < n; done += kChunk) {
      tiles.place(at + (int)done, first + done);
      run(tiles.local, first + done, n - done < kChunk ? (int)(n - done) : kChunk, sum);
    }
  };
  if (s.whole) {
    const int64_t begin = span * s.length, all = l.items * l.channels;
    const int64_t end = begin + s.length < all ? begin + s.length : all;
    for (int64_t channel = begin; channel < end; channel += s.channels) {
      const int count = end - channel < s.channels ? (int)(end - channel) : s.channels;
      const ChannelTile tile{channel, 0, count, (int)l.positions, (int)l.positions};
      tiles.read(tile);
      run_all(0, channel * l.positions, count * l.positions, sums[0]);
      tiles.write(tile);
    }
    rest(end * l.positions, sums[0]);
    return;
  }
  const int64_t per_item = s.blocks / l.items, block = span / s.per_block;
  const int64_t in_item = block % per_item * s.channels, channel = block / per_item * l.channels + in_item;
  const int count = l.channels - in_item < s.channels ? (int)(l.channels - in_item) : s.channels;
  const int64_t begin = span % s.per_block * s.length;
  const int64_t end = begin + s.length < l.positions ? begin + s.length : l.positions;
  for (int64_t position = begin; position < end; position += s.width) {
    const int n = end - position < s.width ? (int)(end - position) : (int)s.width;
    const ChannelTile tile{channel, position, count, n, (int)s.width + kTileGap};
    tiles.read(tile);
    for (int c = 0; c < count; ++c) run_all(c * tile.pitch, (channel + c) * l.positions + position, n, sums[c]);
    tiles.write(tile);
  }
  for (int c = 0; c < count; ++c) rest((channel + c) * l.positions + end, sums[c]);
}

}  // namespace
}  // namespace reparam
