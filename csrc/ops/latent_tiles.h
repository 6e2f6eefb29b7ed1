// The latent layer on tensors whose channels lie next to each other. A tile is computed in the order of memory, in
// which its elements are read and written in place. Only what belongs to the logical order is transposed: the noise,
// and the terms of sums. So every bit is that of contiguous tensors.
#pragma once
#include "core/channels.h"
#include "core/sum.h"
#include "ops/latent.h"

namespace reparam {
namespace {

constexpr int kTileChannels = 16;                      // float32 of a cache line
constexpr int kTilePositions = 256;                    // so many that making their noise is as fast as for a chunk
constexpr int kTile = kTileChannels * kTilePositions;  // the most elements
static_assert(kTile >= kChunk);
constexpr int kTileGap = 80;  // elements between buffers, so that they do not meet in one set of a cache

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

// How a call is cut into tiles. They hold whole items, or all positions of some channels, or some positions of some
// channels. A block is a sequence of tiles that have the same channels, or else all of them. A span, the unit of work,
// is a part of a block, in which sums go on from tile to tile.
struct ChannelTiles {
  ChannelLayout layout;
  int items = 1, channels = 1;    // of a tile
  int64_t positions = 1;          // likewise
  int64_t tiles = 0, blocks = 0;  // tiles of a block
  int64_t length = 1;             // of a span, in tiles
  int64_t count = 0;              // of spans; 0: the tensors have another layout

  // Sums ask for long spans, since a chunk that two spans share is computed twice.
  inline ChannelTiles(const LatentArguments& a, bool sums, int threads) {
    if (a.samples != 1) return;
    const Operand* const leading[] = {&a.mu, &a.x, &a.z, &a.dz, &a.dmu, &a.dx};
    for (const Operand* t : leading) {
      if (layout.items == 0) layout = ChannelLayout(*t);
    }
    const int64_t per_item = layout.channels * layout.positions;
    if (layout.items == 0 || layout.items * per_item != a.n) return;
    positions = layout.positions;
    if (per_item <= kChunk) {
      items = (int)(kChunk / per_item < layout.items ? kChunk / per_item : layout.items);
      channels = (int)layout.channels;
      tiles = (layout.items + items - 1) / items;
      blocks = 1;
    } else if (positions <= kTilePositions) {
      const int64_t fit = kChunk / positions / 4 * 4;
      channels = (int)(fit < layout.channels ? fit : layout.channels);
      tiles = layout.items * per_item_blocks();
      blocks = 1;
    } else {
      channels = (int)(layout.channels < kTileChannels ? layout.channels : kTileChannels);
      const int64_t most = channels * kTilePositions < kChunk ? kChunk / channels / 16 * 16 : kTilePositions;
      tiles = (positions + most - 1) / most;
      positions = ((positions + tiles - 1) / tiles + 15) / 16 * 16;
      blocks = layout.items * per_item_blocks();
    }
    const int64_t enough = sums ? 4 * (int64_t)threads : tiles * blocks;
    while (length < tiles && 2 * length * enough <= tiles * blocks) length *= 2;
    while (sums && length < tiles && length * tile(0, 0).elements() < 8 * kChunk) length *= 2;
    count = blocks * spans_of_block();
  }
  REPARAM_INLINE int64_t spans_of_block() const { return (tiles + length - 1) / length; }
  REPARAM_INLINE bool one_stream() const { return positions == layout.positions; }

  inline ChannelTile tile(int64_t block, int64_t index) const {
    const ChannelLayout& l = layout;
    if (items > 1 || channels * positions == l.channels * l.positions) {
      const int64_t left = l.items - index * items;
      return {index * items, 0, 0, (int)(left < items ? left : items), channels, (int)positions};
    }
    if (one_stream()) block = index, index = 0;
    const int64_t channel = block % per_item_blocks() * channels, position = index * positions;
    const int64_t more_channels = l.channels - channel, more = l.positions - position;
    return {block / per_item_blocks(),
            channel,
            position,
            1,
            (int)(more_channels < channels ? more_channels : channels),
            (int)(more < positions ? more : positions)};
  }

 private:
  REPARAM_INLINE int64_t per_item_blocks() const { return (layout.channels + channels - 1) / channels; }
};

// One thread's tile: the arguments with which the kernels see it, as contiguous tensors without sums, and the memory
// for what they cannot read or write in place.
template <class C>
struct TileCall {
  LatentArguments local;

  inline TileCall(const LatentArguments& a, const ChannelTiles& tiles) : local(a), a(a), tiles(tiles) {
    const bool makes_eps = a.eps.seed && (a.z.data || a.log_q.data || a.dz.data || a.dlog_q.data);
    if (makes_eps) bind(&local.eps.given, Kind::eps, false);
    for (Operand* t : {&local.mu, &local.x, &local.mu_p, &local.x_p, &local.eps.given, &local.dz}) bind(t, false);
    for (Operand* t : {&local.z, &local.dmu, &local.dx, &local.dmu_p, &local.dx_p}) bind(t, true);
    for (Operand* t : {&local.dkl, &local.dlog_q}) a.cols > 1 ? bind(t, Kind::row, false) : bind(t, false);
    for (Operand* t : {&local.kl, &local.log_q}) a.cols > 1 ? bind(t, Kind::sum, true) : bind(t, true);
    local.cols = 1;
  }

  // Makes the noise of a tile. Its parts are then read, computed and written; at the end come the sums.
  inline void begin(const ChannelTile& tile) {
    for (int i = 0; i < count; ++i)
      if (bound[i].kind == Kind::eps) read_logical(bound[i], tile, data[i]);
  }
  inline void read(const ChannelTile& tile, int at) {
    for (int i = 0; i < count; ++i) {
      Bound& b = bound[i];
      if (b.kind == Kind::eps || b.kind == Kind::sum) {
        b.local->data = data[i] + at;
        continue;
      }
      C* const in_place = b.kind == Kind::adjacent ? tile_in_place<C>(b.tensor, tile) : nullptr;
      b.buffered = !in_place;
      b.local->data = in_place ? in_place : data[i];
      if (in_place || b.written) continue;
      if (b.kind == Kind::adjacent)
        read_tile(b.tensor, tile, data[i]);
      else if (b.kind == Kind::row && one_row(tile))
        fill_row(b, tile, data[i]);
      else
        b.filled_row = -1, read_logical(b, tile, data[i]);
    }
  }
  inline void write(const ChannelTile& tile) {
    for (int i = 0; i < count; ++i) {
      const Bound& b = bound[i];
      if (!b.written || !b.buffered || b.kind == Kind::sum) continue;
      if (b.kind == Kind::adjacent) {
        write_tile(data[i], b.tensor, tile);
      } else {
        all_to_logical(tile, data[i]);
        for_logical_runs(tile, [&](int64_t first, int at, int n, int) { put(b.tensor, first, n, logical + at); });
      }
    }
  }
  inline void end(const ChannelTile& tile, const Chunks& chunks, StreamSums<C>* streams, double* partials) {
    for (int i = 0; i < count; ++i) {
      const Bound& b = bound[i];
      if (b.kind != Kind::sum) continue;
      all_to_logical(tile, data[i]);
      for_logical_runs(tile, [&](int64_t first, int at, int n, int stream) {
        streams[stream].add(chunks, first, n, logical + at, (C*)b.tensor.data, partials);
      });
    }
  }

  REPARAM_INLINE int64_t first_of(const ChannelTile& tile, int channel) const {
    const ChannelLayout& l = tiles.layout;
    return (tile.item * l.channels + tile.channel + channel) * l.positions + tile.position;
  }

 private:
  enum class Kind { adjacent, logical, eps, row, sum };
  struct Bound {
    Operand tensor, *local;
    Kind kind;
    bool written, buffered;
    int64_t filled_row;  // whose gradient fills the buffer
  };
  static constexpr int kMost = 13;
  const LatentArguments& a;
  const ChannelTiles& tiles;
  Bound bound[kMost];
  int count = 0;
  alignas(64) C data[kMost][kTile + kTileGap];
  alignas(64) C logical[kTile + kSlack];
  Scratch<C> scratch;

  inline void bind(Operand* t, bool written) {
    bind(t, ChannelLayout(*t) == tiles.layout ? Kind::adjacent : Kind::logical, written);
  }
  inline void bind(Operand* t, Kind kind, bool written) {
    if (kind != Kind::eps && (!t->data || (count > 0 && t == bound[0].local))) return;
    bound[count] = {*t, t, kind, written, true, -1};
    t->data = data[count];  // in the order of memory
    t->dtype = kDtype<C>;
    t->ndim = 1;
    t->size[0] = kTile, t->stride[0] = 1;
    ++count;
  }

  // Calls body(first, at, n, stream) for runs of elements that are contiguous in the logical order of all elements, and
  // in that of the tile.
  template <class Body>
  REPARAM_INLINE void for_logical_runs(const ChannelTile& tile, Body body) const {
    if (tiles.one_stream()) {
      const int all = tile.elements();
      for (int at = 0; at < all; at += kChunk)
        body(first_of(tile, 0) + at, at, all - at < kChunk ? all - at : kChunk, 0);
    } else {
      for (int c = 0; c < tile.channels; ++c) body(first_of(tile, c), c * tile.positions, tile.positions, c);
    }
  }

  inline void all_to_logical(const ChannelTile& tile, const C* from) {
    for (int i = 0; i < tile.items; ++i)
      to_logical_order(from + i * tile.per_item(), tile.channels, tile.positions, logical + i * tile.per_item());
  }

  inline void read_logical(const Bound& b, const ChannelTile& tile, C* to) {
    for_logical_runs(tile, [&](int64_t first, int at, int n, int) {
      C* const wanted = logical + at;
      const C* got = b.kind == Kind::eps   ? noise(first, n, wanted)
                     : b.kind == Kind::row ? gradients_of_rows(b.tensor, first, n, wanted)
                                           : load(b.tensor, first, n, wanted);
      if (got != wanted) std::memmove(wanted, got, n * sizeof *got);
    });
    for (int i = 0; i < tile.items; ++i)
      to_memory_order(logical + i * tile.per_item(), tile.channels, tile.positions, to + i * tile.per_item());
  }

  // Writes up to kSlack elements more, which are those of the next run.
  inline const C* noise(int64_t first, int n, C* wanted) {
    const EpsSource& s = a.eps;
    if constexpr (sizeof(C) == 4) {
      const int64_t group = first / s.group, start = first - group * s.group;
      if (!s.windowed && start + n <= s.group) return fill_eps(s.seed[group], start, n, wanted);
    }
    return load_or_make_eps(s, 0, first, n, scratch);
  }
  inline const C* gradients_of_rows(const Operand& t, int64_t first, int n, C* wanted) {
    for (int at = 0; at < n;) {
      const int64_t row = (first + at) / a.cols, left = (row + 1) * a.cols - first - at;
      C buffer[8];  // one is used, and GCC warns of the conversion of eight
      const C g = *load(t, row, 1, buffer);
      for (const int stop = left < n - at ? at + (int)left : n; at < stop; ++at) wanted[at] = g;
    }
    return wanted;
  }

  // True if all elements of a tile are in one row.
  REPARAM_INLINE bool one_row(const ChannelTile& tile) const {
    const int64_t last =
        first_of(tile, tile.channels - 1) + (tile.items - 1) * tiles.layout.channels * tiles.layout.positions;
    return first_of(tile, 0) / a.cols == (last + tile.positions - 1) / a.cols;
  }
  inline void fill_row(Bound& b, const ChannelTile& tile, C* to) {
    const int64_t row = first_of(tile, 0) / a.cols;
    if (row == b.filled_row) return;
    b.filled_row = row;
    C buffer;
    const C g = *load(b.tensor, row, 1, &buffer);
    for (int i = 0; i < kChunk; ++i) to[i] = g;  // a part has no more
  }
};

// Calls run(arguments, first, n) for the elements of each tile of a span, and rest(first, stream) where its sums end.
template <class C, class Run, class Rest>
inline void for_tiles(TileCall<C>& call, const ChannelTiles& tiles, int64_t span, const Chunks& chunks,
                      double* partials, const Run& run, const Rest& rest) {
  StreamSums<C> streams[kTileChannels];
  const int64_t block = span / tiles.spans_of_block(), begin = span % tiles.spans_of_block() * tiles.length;
  const int64_t end = begin + tiles.length < tiles.tiles ? begin + tiles.length : tiles.tiles;
  ChannelTile tile{};
  for (int64_t i = begin; i < end; ++i) {
    tile = tiles.tile(block, i);
    call.begin(tile);
    const int most = tile.elements() <= kChunk ? tile.positions : kChunk / tile.channels;
    for (int done = 0; done < tile.positions; done += most) {
      ChannelTile part = tile;
      part.position += done;
      part.positions = tile.positions - done < most ? tile.positions - done : most;
      call.read(part, done * tile.channels);
      run(call.local, 0, part.elements());
      call.write(part);
    }
    call.end(tile, chunks, streams, partials);
  }
  if (tiles.one_stream()) {
    rest(call.first_of(tile, 0) + tile.elements(), streams[0]);
  } else {
    for (int c = 0; c < tile.channels; ++c) rest(call.first_of(tile, c) + tile.positions, streams[c]);
  }
}

}  // namespace
}  // namespace reparam
