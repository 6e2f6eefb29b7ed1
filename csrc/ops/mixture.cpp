// The terms of a mixture, one for each point and component (and dim), are recomputed wherever they are needed and never
// stored. Logarithms of terms are in base 2. Points lie side by side in packs, and each sum over points or components
// has an order that depends on their numbers alone, so results have the same bits for any number of threads and any
// instruction set. docs/numerics.md explains the formulas.
#include "ops/mixture.h"

#include "core/chunks.h"
#include "math/pack.h"

namespace reparam {
namespace {

constexpr int kBlock = 16;  // components of a block
constexpr int kFields =
    3 * kBlock;  // of one dim of a block: mu, 1 / sigma and the constant term, each of 16 components
constexpr int kForwardTile = 64, kBackwardTile = 128;  // points
constexpr int kPiece = 64;                             // dims that are copied at a time
constexpr int kPlainDims = 8;                          // dims whose squares are added without compensation
constexpr int kComponentChunks = 8, kItemChunks = 4;   // the most independent sums over components and over points

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453, kHalfLog2Pi = 0.9189385332046727;

// The logarithm of a term is c + kHalf e^2, where kHalf + kHalfRest = -log2(e) / 2.
template <class C>
constexpr C kHalf = (C)(-.5 * kLog2e);
template <class C>
constexpr C kHalfRest = (C)(-.5 * kLog2e - (double)kHalf<C>);

// Stand-ins for infinity, so that differences are never NaN. Terms below kLowest count as 0. A sum of squares beyond
// kFar becomes 2 kFar, whose term is below kLowest, as are the terms of components with kExcluded.
template <class C>
constexpr C kFar = sizeof(C) == 4 ? C(2e37) : C(2e306);
template <class C>
constexpr C kLowest = -kFar<C>;
template <class C>
constexpr C kExcluded = 5 * kLowest<C>;

// Below -kPrecise a term is held in one word: the second would be too large for exp2.
template <class C>
constexpr C kPrecise = sizeof(C) == 4 ? C(1LL << 30) : C(1LL << 59);

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};
template <class Body>
inline void with_bool(bool value, Body body) {
  value ? body(Bool<true>()) : body(Bool<false>());
}

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

// ---- points

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
    for (int i = 0; i < n; ++i) {
      for (int lane = 0; lane < kPack; ++lane) to[(at + i) * stride + lane] = rows[lane][i];
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

// ---- components

// How a component reads its second argument: log sigma, 1 / sigma, and the derivative of log sigma.
template <class C>
struct Scale {
  C log_sigma, inverse, slope;
};

// The largest 1 / sigma, so that it times a distance of 0 is 0.
template <class C>
constexpr C kSharpest = sizeof(C) == 4 ? C(3e38) : C(1e308);

REPARAM_INLINE float inverse_exp(float x) { return exp_half(-2.f * x).sigma; }
REPARAM_INLINE double inverse_exp(double x) { return __builtin_exp(-x); }

template <class C>
inline Scale<C> scale_of(const Constants<C>& c, Param param, C unclamped) {
  C x = unclamped;
  if (c.clamped) x = x < c.low ? c.low : x > c.high ? c.high : x;  // keeps NaN
  const bool inside = !c.clamped || (unclamped >= c.low && unclamped <= c.high);
  Scale<C> s;
  if (param == Param::logvar || param == Param::logstd) {
    s.slope = param == Param::logvar ? C(.5) : C(1);
    s.log_sigma = s.slope * x;
    s.inverse = inverse_exp(s.log_sigma);
  } else if (param == Param::std) {
    s = {log(x), 1 / x, 1 / x};
  } else {
    const Softplus<C> p = softplus(x);
    const C sigma = p.value + c.min_std;
    const bool exponential = (c.min_std == 0) & (x < (sizeof(C) == 4 ? C(-17) : C(-37)));  // softplus(x) is exp(x)
    s = {exponential ? x : log(sigma), exponential ? inverse_exp(x) : 1 / sigma, exponential ? C(1) : p.slope / sigma};
  }
  s.slope = inside ? s.slope : C(0);
  return s;
}

// All components as the kernels read them: block by block and dim by dim, the fields of a block's components side by
// side. The last block is filled with copies of the last component that count as 0.
template <class C>
struct Components {
  Buffer<C> fields;  // [blocks, D, kFields]
  Buffer<C> joint;   // [blocks, 2, kBlock]: the constant term of each whole event, in two words

  Components(const MixtureArguments& a, int threads)
      : fields(divide_up(a.components, kBlock), a.cols, kFields), joint(divide_up(a.components, kBlock), 2 * kBlock) {
    const int64_t blocks = divide_up(a.components, kBlock);
    const Constants<C> c(a.options);
    parallel_for(blocks, a.components * a.cols, threads, [&](int64_t first, int64_t last) {
      for (int64_t n = first * kBlock; n < last * kBlock; ++n) fill(a, c, n);
    });
  }
  const C* block(int64_t index, int64_t cols) const { return fields.data + index * cols * kFields; }

 private:
  void fill(const MixtureArguments& a, const Constants<C>& c, int64_t n) {
    const bool excluded = n >= a.components;
    const int64_t source = excluded ? a.components - 1 : n;
    double weight = a.weights_by_item ? 0 : -__builtin_log((double)a.components);
    C mu_s[kPiece] = {}, x_s[kPiece];
    if (a.log_weights.data && !a.weights_by_item) weight = *load(a.log_weights, source, 1, mu_s);
    double total = weight;
    C* to = fields.data + n / kBlock * a.cols * kFields + n % kBlock;
    for (int64_t at = 0; at < a.cols; at += kPiece) {
      const int count = a.cols - at < kPiece ? (int)(a.cols - at) : kPiece;
      const C* mu = load(a.mu, source * a.cols + at, count, mu_s);
      const C* x = load(a.x, source * a.cols + at, count, x_s);
      for (int i = 0; i < count; ++i, to += kFields) {
        const Scale<C> s = scale_of(c, a.options.param, x[i]);
        const double term = -(double)s.log_sigma - kHalfLog2Pi;
        total += term;
        to[0] = mu[i];
        to[kBlock] = s.inverse > kSharpest<C> ? kSharpest<C> : s.inverse;  // keeps NaN
        to[2 * kBlock] = excluded ? kExcluded<C> : (C)(kLog2e * (weight + term));
      }
    }
    total *= kLog2e;
    const bool none = excluded | (total < kLowest<C>);
    C* constant = joint.data + n / kBlock * 2 * kBlock + n % kBlock;
    constant[0] = none ? kExcluded<C> : (C)total;
    constant[kBlock] = none ? C(0) : (C)(total - constant[0]);
  }
};

// Log-weights of one block for a pack of points, in base 2: to[component * kPack + lane].
template <class C>
inline void load_weights(const MixtureArguments& a, int64_t block, int64_t first, C* to) {
  const int64_t n = block * kBlock;
  const int count = a.components - n < kBlock ? (int)(a.components - n) : kBlock;
  for (int lane = 0; lane < kPack; ++lane) {
    C scratch[kBlock];
    const bool real = first + lane < a.items;
    const C* row = real ? load(a.log_weights, (first + lane) * a.components + n, count, scratch) : scratch;
    for (int k = 0; k < kBlock; ++k) {
      const C weight = real && k < count ? row[k] * (C)kLog2e : C(0);
      to[k * kPack + lane] = weight < kExcluded<C> ? kExcluded<C> : weight;  // keeps NaN
    }
  }
}

// ---- terms

// A sum in two words. `rest` is small beside `top`.
template <class C>
struct TwoWords {
  Pack<C> top, rest;
};

// Adds a number at least as large to another without an error, or nearly so if it is the smaller one.
template <class C>
REPARAM_INLINE void add_part(TwoWords<C>& sum, Pack<C> part) {
  const Pack<C> top = sum.top + part;
  sum.rest = sum.rest + (part - (top - sum.top));
  sum.top = top;
}

// Adds any number without an error.
template <class C>
REPARAM_INLINE TwoWords<C> two_sum(TwoWords<C> sum, Pack<C> x) {
  const Pack<C> top = sum.top + x, added = top - sum.top;
  return {top, sum.rest + ((sum.top - (top - added)) + (x - added))};
}

// Makes `rest` as small as it can be, and 0 where it would be too large for exp2.
template <class C>
REPARAM_INLINE TwoWords<C> normalized(TwoWords<C> sum) {
  const Pack<C> top = sum.top + sum.rest, rest = sum.rest - (top - sum.top);
  return {top, where_above(-top, kPrecise<C>, Pack<C>(C(0)), rest)};
}

// The sums over the dims of e^2, e = (z - mu) / sigma, for a pack of points and each component of a block.
template <class C>
inline void sum_squares(const C* block, const C* z, int64_t stride, int64_t cols, TwoWords<C>* squares) {
  constexpr int kGroup = kVectorBytes == 64 && sizeof(C) == 4 ? kBlock : kBlock / 4;  // as many as registers hold
  for (int g = 0; g < kBlock; g += kGroup) {
#pragma GCC unroll 16
    for (int k = 0; k < kGroup; ++k) squares[g + k] = {Pack<C>(C(0)), Pack<C>(C(0))};
    for (int64_t first = 0; first < cols; first += kPlainDims) {
      const int64_t last = first + kPlainDims < cols ? first + kPlainDims : cols;
      Pack<C> part[kGroup];
#pragma GCC unroll 16
      for (int k = 0; k < kGroup; ++k) part[k] = Pack<C>(C(0));
      for (int64_t d = first; d < last; ++d) {
        const C* fields = block + d * kFields + g;
        const Pack<C> at = load_pack(z + d * stride);
#pragma GCC unroll 16
        for (int k = 0; k < kGroup; ++k) {
          const Pack<C> e = (at - Pack<C>(fields[k])) * Pack<C>(fields[kBlock + k]);
          part[k] = fma(e, e, part[k]);
        }
      }
#pragma GCC unroll 16
      for (int k = 0; k < kGroup; ++k) add_part(squares[g + k], part[k]);
    }
  }
}

// Turns sums of squares into the logarithms of a block's terms. `weights` is null unless each point has its own.
template <class C>
inline void joint_terms(const C* constants, const C* weights, TwoWords<C>* terms) {
#pragma GCC unroll 16
  for (int k = 0; k < kBlock; ++k) {
    Pack<C> squares = terms[k].top, rest = where_above(squares, kFar<C>, Pack<C>(C(0)), terms[k].rest);
    squares = where_above(squares, kFar<C>, Pack<C>(2 * kFar<C>), squares);
    const Pack<C> half(kHalf<C>), product = squares * half;
    rest = fma(rest, half, fma(squares, Pack<C>(kHalfRest<C>), fma(squares, half, -product)));
    rest = rest + Pack<C>(constants[kBlock + k]);
    TwoWords<C> sum = {Pack<C>(constants[k]), rest};
    if (weights) sum = two_sum(sum, load_pack(weights + k * kPack));
    terms[k] = normalized(two_sum(sum, product));
  }
}

// Adds terms, given by their logarithms, to a sum that is held as its maximum so far and the sum of the quotients.
template <class C, class Rest>
REPARAM_INLINE void add_terms(const Pack<C>* terms, Rest rest, C* maximum, C* sum) {
  const Pack<C> before = load_pack(maximum);
  Pack<C> top = before;
#pragma GCC unroll 16
  for (int k = 0; k < kBlock; ++k) top = larger(terms[k], top);  // NaN comes back through the sum
  Pack<C> part[4] = {load_pack(sum) * exp2(before - top), Pack<C>(C(0)), Pack<C>(C(0)), Pack<C>(C(0))};
#pragma GCC unroll 16
  for (int k = 0; k < kBlock; ++k) part[k % 4] = part[k % 4] + exp2(rest(terms[k] - top, k));
  store_pack(maximum, top);
  store_pack(sum, (part[0] + part[1]) + (part[2] + part[3]));
}

// ---- forward

template <class C>
struct ForwardScratch {
  C *z, *maximum, *sum;  // [D, kForwardTile]
};

template <class C, bool kJoint, bool kDims>
inline void forward_block(const MixtureArguments& a, const Components<C>& components, int64_t block, int64_t first,
                          const C* z, C* maximum, C* sum, C* joint_maximum, C* joint_sum) {
  const C* fields = components.block(block, a.cols);
  alignas(64) C weights[kBlock * kPack];
  if (a.weights_by_item) load_weights(a, block, first, weights);
  TwoWords<C> joint[kBlock];
  if constexpr (!kDims) {
    sum_squares(fields, z, kForwardTile, a.cols, joint);
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < kBlock; ++k) joint[k] = {Pack<C>(C(0)), Pack<C>(C(0))};
    Pack<C> part[kBlock] = {};
    for (int64_t d = 0; d < a.cols; ++d, fields += kFields) {
      const Pack<C> at = load_pack(z + d * kForwardTile);
      Pack<C> terms[kBlock];
      if (kJoint && d % kPlainDims == 0) {
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; ++k) part[k] = Pack<C>(C(0));
      }
#pragma GCC unroll 16
      for (int k = 0; k < kBlock; ++k) {
        const Pack<C> e = (at - Pack<C>(fields[k])) * Pack<C>(fields[kBlock + k]);
        if constexpr (kJoint) part[k] = fma(e, e, part[k]);  // as in sum_squares, so that backward finds the same sum
        terms[k] = fma(e * e, Pack<C>(kHalf<C>), Pack<C>(fields[2 * kBlock + k]));
      }
      if (a.weights_by_item) {
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; ++k) terms[k] = terms[k] + load_pack(weights + k * kPack);
      }
      add_terms(terms, [](Pack<C> x, int) { return x; }, maximum + d * kForwardTile, sum + d * kForwardTile);
      if (kJoint && (d % kPlainDims == kPlainDims - 1 || d == a.cols - 1)) {
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; ++k) add_part(joint[k], part[k]);
      }
    }
  }
  if constexpr (kJoint) {
    joint_terms(components.joint.data + block * 2 * kBlock, a.weights_by_item ? weights : nullptr, joint);
    Pack<C> top[kBlock];
#pragma GCC unroll 16
    for (int k = 0; k < kBlock; ++k) top[k] = joint[k].top;
    add_terms(top, [&](Pack<C> x, int k) { return x + joint[k].rest; }, joint_maximum, joint_sum);
  }
}

// Turns a maximum and a sum into the value, and stores what backward needs.
template <class C>
inline void finish(C maximum, C sum, int64_t index, int64_t count, const Operand& value, const Operand& saved) {
  const C log_sum = log(sum);
  ((C*)value.data)[index] = (C)(kLn2 * (double)maximum + (double)log_sum);
  if (!saved.data) return;
  ((C*)saved.data)[index] = maximum;
  ((C*)saved.data)[count + index] = sum == 0 ? C(0) : (C)(kLog2e * (double)log_sum);
}

template <class C, bool kJoint, bool kDims>
inline void forward_tile(const MixtureArguments& a, const Components<C>& components, int64_t tile,
                         ForwardScratch<C> scratch) {
  const int64_t first = tile * kForwardTile, left = a.items - first;
  const int rows = left < kForwardTile ? (int)left : kForwardTile, packs = (int)divide_up(rows, kPack);
  alignas(64) C joint_maximum[kForwardTile], joint_sum[kForwardTile];
  for (int p = 0; p < packs; ++p)
    load_columns(a.z, a.items, a.cols, first + p * kPack, C(0), scratch.z + p * kPack, kForwardTile);
  for (int i = 0; i < kForwardTile; ++i) joint_maximum[i] = kLowest<C>, joint_sum[i] = 0;
  if constexpr (kDims) {
    for (int64_t i = 0; i < a.cols * kForwardTile; ++i) scratch.maximum[i] = kLowest<C>, scratch.sum[i] = 0;
  }
  for (int64_t block = 0; block < divide_up(a.components, kBlock); ++block) {
    for (int p = 0; p < packs; ++p) {
      const int at = p * kPack;
      forward_block<C, kJoint, kDims>(a, components, block, first + at, scratch.z + at, scratch.maximum + at,
                                      scratch.sum + at, joint_maximum + at, joint_sum + at);
    }
  }
  for (int i = 0; i < rows; ++i) {
    if constexpr (kJoint) finish(joint_maximum[i], joint_sum[i], first + i, a.items, a.joint, a.joint_sums);
    if constexpr (kDims) {
      for (int64_t d = 0; d < a.cols; ++d)
        finish(scratch.maximum[d * kForwardTile + i], scratch.sum[d * kForwardTile + i], (first + i) * a.cols + d,
               a.items * a.cols, a.dims, a.dims_sums);
    }
  }
}

// The number of terms, for the choice of the number of threads: a term takes an eighth of the time of an element of
// other ops.
inline int64_t work(const MixtureArguments& a) {
  const double terms = (double)a.items * (double)a.components * (double)a.cols / 8;
  return terms < 1e15 ? (int64_t)terms : (int64_t)1e15;
}

// The most threads that work on `count` tasks, and so the number of scratch areas. Each thread takes the next one.
inline int64_t scratch_areas(int64_t count, int threads) { return threads < 1 ? 1 : threads < count ? threads : count; }
inline int64_t next_area(int64_t& taken) { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); }

template <class C>
inline void forward_as(const MixtureArguments& a, int threads) {
  if (a.items == 0) return;
  const Components<C> components(a, threads);
  const int64_t tiles = divide_up(a.items, kForwardTile), areas = scratch_areas(tiles, threads);
  const Buffer<C> z(areas, a.cols, kForwardTile), maximum(areas, a.dims.data ? a.cols : 0, kForwardTile),
      sum(areas, a.dims.data ? a.cols : 0, kForwardTile);
  int64_t taken = 0;
  with_bool(a.joint.data, [&](auto joint) {
    with_bool(a.dims.data, [&](auto dims) {
      parallel_for(tiles, work(a), threads, [&](int64_t begin, int64_t end) {
        const int64_t at = next_area(taken) * a.cols * kForwardTile;
        for (int64_t tile = begin; tile < end; ++tile)
          forward_tile<C, joint.value, dims.value>(a, components, tile,
                                                   {z.data + at, maximum.data + at, sum.data + at});
      });
    });
  });
}

// ---- backward

// The points of a tile and their gradients as columns, [tiles, D, kBackwardTile] each, or [tiles, kBackwardTile] for
// the joint ones. Lanes without a point have a maximum beside which every term is 0.
template <class C>
struct Points {
  Buffer<C> z, dims_maximum, dims_log, dims_grad, joint_maximum, joint_log, joint_grad;

  Points(const MixtureArguments& a, int64_t tiles, int threads)
      : z(tiles, a.cols, kBackwardTile),
        dims_maximum(a.dims.data ? tiles : 0, a.cols, kBackwardTile),
        dims_log(a.dims.data ? tiles : 0, a.cols, kBackwardTile),
        dims_grad(a.dims.data ? tiles : 0, a.cols, kBackwardTile),
        joint_maximum(a.joint.data ? tiles : 0, kBackwardTile),
        joint_log(a.joint.data ? tiles : 0, kBackwardTile),
        joint_grad(a.joint.data ? tiles : 0, kBackwardTile) {
    parallel_for(tiles * (kBackwardTile / kPack), a.items * a.cols, threads, [&](int64_t begin, int64_t end) {
      for (int64_t pack = begin; pack < end; ++pack) {
        const int64_t first = pack * kPack, tile = first / kBackwardTile, lane = first % kBackwardTile;
        const int64_t at = tile * a.cols * kBackwardTile + lane;
        load_columns(a.z, a.items, a.cols, first, C(0), z.data + at, kBackwardTile);
        if (a.dims.data) {
          load_sums(a.dims, a.dims_sums, a.items, a.cols, first, dims_maximum.data + at, dims_log.data + at,
                    dims_grad.data + at);
        }
        if (a.joint.data) {
          load_sums(a.joint, a.joint_sums, a.items, 1, first, joint_maximum.data + first, joint_log.data + first,
                    joint_grad.data + first);
        }
      }
    });
  }

 private:
  static void load_sums(const Operand& grad, const Operand& sums, int64_t items, int64_t cols, int64_t first,
                        C* maximum, C* log_sum, C* to) {
    Operand second = sums;
    if (second.data) second.data = (C*)sums.data + items * cols;
    load_columns(sums, items, cols, first, kFar<C>, maximum, kBackwardTile);
    load_columns(second, items, cols, first, C(0), log_sum, kBackwardTile);
    load_columns(grad, items, cols, first, C(0), to, kBackwardTile);
  }
};

// The sums of one task, a chunk of components and a chunk of points. Sums over points are kept in kPack lanes until
// the task's points are done.
template <class C>
struct Task {
  C* sums;          // [D, 2, kBlock, kPack]: of dmu and dlog sigma, over the points
  C* joint;         // [kBlock, kBackwardTile]: the joint part of each term's gradient
  C* weight_grads;  // the same for the gradients to log-weights, or null
  C* dz;            // [tiles, D, kBackwardTile]: the sum over the chunk's components
};

constexpr int kTaskNumbers = 2 * kBlock * kPack;  // of Task::sums, to a dim

// Computes the joint part of the gradients of a block's terms.
template <class C>
inline void joint_gradients(const MixtureArguments& a, const Components<C>& components, const Points<C>& points,
                            int64_t block, int64_t tile, int packs, C* to) {
  for (int p = 0; p < packs; ++p) {
    const int64_t at = tile * kBackwardTile + p * kPack;
    alignas(64) C weights[kBlock * kPack];
    if (a.weights_by_item) load_weights(a, block, at, weights);
    TwoWords<C> terms[kBlock];
    sum_squares(components.block(block, a.cols), points.z.data + tile * a.cols * kBackwardTile + p * kPack,
                (int64_t)kBackwardTile, a.cols, terms);
    joint_terms(components.joint.data + block * 2 * kBlock, a.weights_by_item ? weights : nullptr, terms);
    const Pack<C> maximum = load_pack(points.joint_maximum.data + at), log_sum = load_pack(points.joint_log.data + at),
                  grad = load_pack(points.joint_grad.data + at);
#pragma GCC unroll 16
    for (int k = 0; k < kBlock; ++k) {
      const Pack<C> share = exp2((terms[k].top - maximum) + (terms[k].rest - log_sum));
      store_pack(to + k * kBackwardTile + p * kPack, share * grad);
    }
  }
}

// Adds one dim of a block's gradients to the sums: dmu and dlog sigma over the points, dz over the components.
template <class C, bool kJoint, bool kDims, bool kWeights>
inline void gradients_of_dim(const MixtureArguments& a, const C* fields, const Points<C>& points, int64_t at, int packs,
                             const C* item_weights, const Task<C>& task, C* sums, C* dz) {
  constexpr int kGroup = kVectorBytes == 64 && sizeof(C) == 4 ? 4 : 2;
  for (int g = 0; g < kBlock; g += kGroup) {
    Pack<C> dmu[kGroup], dlog_sigma[kGroup];
    C* const group = sums + g * kPack;
#pragma GCC unroll 16
    for (int k = 0; k < kGroup; ++k) {
      dmu[k] = load_pack(group + k * kPack);
      dlog_sigma[k] = load_pack(group + (kBlock + k) * kPack);
    }
    for (int p = 0; p < packs; ++p) {
      const int64_t lane = at + p * kPack;
      const Pack<C> z = load_pack(points.z.data + lane);
      Pack<C> dz_part(C(0)), maximum(C(0)), log_sum(C(0)), grad(C(0));
      if constexpr (kDims) {
        maximum = load_pack(points.dims_maximum.data + lane);
        log_sum = load_pack(points.dims_log.data + lane);
        grad = load_pack(points.dims_grad.data + lane);
      }
#pragma GCC unroll 16
      for (int k = 0; k < kGroup; ++k) {
        const Pack<C> inverse(fields[kBlock + g + k]), e = (z - Pack<C>(fields[g + k])) * inverse;
        const int term = (g + k) * kBackwardTile + p * kPack;
        Pack<C> total(C(0)), excess;
        if constexpr (kJoint) total = load_pack(task.joint + term);
        if constexpr (kDims) {
          const Pack<C> square = e * e;
          Pack<C> log_term = fma(square, Pack<C>(kHalf<C>), Pack<C>(fields[2 * kBlock + g + k]));
          if (item_weights) log_term = log_term + load_pack(item_weights + term);
          const Pack<C> own = exp2((log_term - maximum) - log_sum) * grad;
          if constexpr (kWeights) store_pack(task.weight_grads + term, load_pack(task.weight_grads + term) + own);
          total = kJoint ? total + own : own;
          excess = square - Pack<C>(C(1));
        } else {
          excess = fma(e, e, Pack<C>(C(-1)));
        }
        const Pack<C> slope = total * e;
        dmu[k] = dmu[k] + slope;
        dlog_sigma[k] = fma(total, excess, dlog_sigma[k]);
        dz_part = fma(slope, inverse, dz_part);
      }
      store_pack(dz + p * kPack, load_pack(dz + p * kPack) + dz_part);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kGroup; ++k) {
      store_pack(group + k * kPack, dmu[k]);
      store_pack(group + (kBlock + k) * kPack, dlog_sigma[k]);
    }
  }
}

// The sums over the chunks of points, [chunks, N, D] or [chunks, N], and over those of components.
template <class C>
struct Partials {
  int64_t tiles, blocks, tiles_per_chunk, blocks_per_chunk, item_chunks, component_chunks;
  Buffer<C> dmu, dlog_sigma, dlog_weights, dz;

  explicit Partials(const MixtureArguments& a)
      : tiles(divide_up(a.items, kBackwardTile)),
        blocks(divide_up(a.components, kBlock)),
        tiles_per_chunk(tiles > 0 ? divide_up(tiles, kItemChunks) : 1),
        blocks_per_chunk(divide_up(blocks, kComponentChunks)),
        item_chunks(divide_up(tiles, tiles_per_chunk)),
        component_chunks(divide_up(blocks, blocks_per_chunk)),
        dmu(item_chunks, a.components, a.cols),
        dlog_sigma(item_chunks, a.components, a.cols),
        dlog_weights(item_chunks, a.components),
        dz(component_chunks, tiles, a.cols, kBackwardTile) {}
};

template <class C, bool kJoint, bool kDims, bool kWeights>
inline void backward_task(const MixtureArguments& a, const Components<C>& components, const Points<C>& points,
                          const Partials<C>& partials, int64_t index, Task<C> task, C* item_weights) {
  const int64_t chunk = index / partials.item_chunks, item_chunk = index % partials.item_chunks;
  const int64_t first_tile = item_chunk * partials.tiles_per_chunk, first_block = chunk * partials.blocks_per_chunk;
  const int64_t last_tile =
      first_tile + partials.tiles_per_chunk < partials.tiles ? first_tile + partials.tiles_per_chunk : partials.tiles;
  const int64_t last_block = first_block + partials.blocks_per_chunk < partials.blocks
                                 ? first_block + partials.blocks_per_chunk
                                 : partials.blocks;
  const int64_t tile_numbers = a.cols * kBackwardTile;
  task.dz = partials.dz.data + chunk * partials.tiles * tile_numbers;
  for (int64_t i = first_tile * tile_numbers; i < last_tile * tile_numbers; ++i) task.dz[i] = 0;
  for (int64_t block = first_block; block < last_block; ++block) {
    const C* fields = components.block(block, a.cols);
    const int64_t n = block * kBlock;
    const int count = a.components - n < kBlock ? (int)(a.components - n) : kBlock;
    Pack<C> weight_sums[kBlock];
#pragma GCC unroll 16
    for (int k = 0; k < kBlock; ++k) weight_sums[k] = Pack<C>(C(0));
    for (int64_t i = 0; i < a.cols * kTaskNumbers; ++i) task.sums[i] = 0;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t first = tile * kBackwardTile, left = a.items - first;
      const int rows = left < kBackwardTile ? (int)left : kBackwardTile, packs = (int)divide_up(rows, kPack);
      if constexpr (kJoint) joint_gradients(a, components, points, block, tile, packs, task.joint);
      if constexpr (kWeights) {
        for (int i = 0; i < kBlock * kBackwardTile; ++i) task.weight_grads[i] = kJoint ? task.joint[i] : C(0);
      }
      if (kDims && a.weights_by_item) {
        for (int p = 0; p < packs; ++p) {
          alignas(64) C weights[kBlock * kPack];
          load_weights(a, block, first + p * kPack, weights);
#pragma GCC unroll 16
          for (int k = 0; k < kBlock; ++k)
            store_pack(item_weights + k * kBackwardTile + p * kPack, load_pack(weights + k * kPack));
        }
      }
      for (int64_t d = 0; d < a.cols; ++d) {
        const int64_t at = tile * tile_numbers + d * kBackwardTile;
        gradients_of_dim<C, kJoint, kDims, kWeights>(a, fields + d * kFields, points, at, packs,
                                                     a.weights_by_item ? item_weights : nullptr, task,
                                                     task.sums + d * kTaskNumbers, task.dz + at);
      }
      if constexpr (kWeights) {
        if (a.weights_by_item) {
          for (int i = 0; i < rows; ++i) {
            C* row = (C*)a.dlog_weights.data + (first + i) * a.components + n;
            for (int k = 0; k < count; ++k) row[k] = task.weight_grads[k * kBackwardTile + i];
          }
        } else {
#pragma GCC unroll 16
          for (int k = 0; k < kBlock; ++k) {
            for (int p = 0; p < packs; ++p)
              weight_sums[k] = weight_sums[k] + load_pack(task.weight_grads + k * kBackwardTile + p * kPack);
          }
        }
      }
    }
    for (int k = 0; k < count; ++k) {
      const int64_t row = (item_chunk * a.components + n + k);
      for (int64_t d = 0; d < a.cols; ++d) {
        const C* sums = task.sums + d * kTaskNumbers + k * kPack;
        partials.dmu.data[row * a.cols + d] = sum(load_pack(sums)) * fields[d * kFields + kBlock + k];
        partials.dlog_sigma.data[row * a.cols + d] = sum(load_pack(sums + kBlock * kPack));
      }
      if constexpr (kWeights) partials.dlog_weights.data[row] = sum(weight_sums[k]);
    }
  }
}

// Adds up the sums of a component's chunks of points.
template <class C>
inline void finish_component(const MixtureArguments& a, const Constants<C>& c, const Partials<C>& partials, int64_t n) {
  C dmu_s[kPiece], dx_s[kPiece], x_s[kPiece];
  for (int64_t at = 0; at < a.cols; at += kPiece) {
    const int count = a.cols - at < kPiece ? (int)(a.cols - at) : kPiece;
    const int64_t first = n * a.cols + at;
    const C* x = load(a.x, first, count, x_s);
    for (int i = 0; i < count; ++i) {
      C dmu = 0, dlog_sigma = 0;
      for (int64_t chunk = 0; chunk < partials.item_chunks; ++chunk) {
        dmu += partials.dmu.data[chunk * a.components * a.cols + first + i];
        dlog_sigma += partials.dlog_sigma.data[chunk * a.components * a.cols + first + i];
      }
      const Scale<C> s = scale_of(c, a.options.param, x[i]);
      dmu_s[i] = dmu;
      dx_s[i] = s.slope == 0 ? C(0) : dlog_sigma * s.slope;
    }
    if (a.dmu.data) write(a.dmu, first, count, dmu_s);
    if (a.dx.data) write(a.dx, first, count, dx_s);
  }
  if (a.dlog_weights.data && !a.weights_by_item) {
    C total = 0;
    for (int64_t chunk = 0; chunk < partials.item_chunks; ++chunk)
      total += partials.dlog_weights.data[chunk * a.components + n];
    ((C*)a.dlog_weights.data)[n] = total;
  }
}

// Adds up the sums of a pack of points over the chunks of components.
template <class C>
inline void finish_points(const MixtureArguments& a, const Partials<C>& partials, int64_t first) {
  alignas(64) C columns[kPiece * kPack], row[kPiece];
  const int64_t tile_numbers = a.cols * kBackwardTile, tile = first / kBackwardTile, lane = first % kBackwardTile;
  for (int64_t at = 0; at < a.cols; at += kPiece) {
    const int count = a.cols - at < kPiece ? (int)(a.cols - at) : kPiece;
    for (int i = 0; i < count; ++i) {
      Pack<C> total(C(0));
      for (int64_t chunk = 0; chunk < partials.component_chunks; ++chunk) {
        const int64_t begin = (chunk * partials.tiles + tile) * tile_numbers + (at + i) * kBackwardTile + lane;
        total = total + load_pack(partials.dz.data + begin);
      }
      store_pack(columns + i * kPack, -total);
    }
    for (int64_t b = first; b < first + kPack && b < a.items; ++b) {
      for (int i = 0; i < count; ++i) row[i] = columns[i * kPack + b - first];
      write(a.dz, b * a.cols + at, count, row);
    }
  }
}

template <class C>
inline void backward_as(const MixtureArguments& a, int threads) {
  const Constants<C> c(a.options);
  const Components<C> components(a, threads);
  const Partials<C> partials(a);
  const Points<C> points(a, partials.tiles, threads);
  const int64_t tasks = partials.component_chunks * partials.item_chunks, areas = scratch_areas(tasks, threads);
  const int64_t area_of_terms = kBlock * kBackwardTile;
  const Buffer<C> sums(areas, a.cols, kTaskNumbers), terms(areas, 3, area_of_terms);
  int64_t taken = 0;
  with_bool(a.joint.data, [&](auto joint) {
    with_bool(a.dims.data, [&](auto dims) {
      with_bool(a.dlog_weights.data, [&](auto weights) {
        parallel_for(tasks, work(a), threads, [&](int64_t begin, int64_t end) {
          const int64_t area = next_area(taken);
          C* of_terms = terms.data + area * 3 * area_of_terms;
          const Task<C> task = {sums.data + area * a.cols * kTaskNumbers, of_terms, of_terms + area_of_terms, nullptr};
          for (int64_t index = begin; index < end; ++index)
            backward_task<C, joint.value, dims.value, weights.value>(a, components, points, partials, index, task,
                                                                     of_terms + 2 * area_of_terms);
        });
      });
    });
  });
  parallel_for(a.components, a.components * a.cols, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) finish_component(a, c, partials, n);
  });
  if (!a.dz.data) return;
  parallel_for(divide_up(a.items, kPack), a.items * a.cols, threads, [&](int64_t begin, int64_t end) {
    for (int64_t pack = begin; pack < end; ++pack) finish_points(a, partials, pack * kPack);
  });
}

void forward(const MixtureArguments& a, int threads) {
  a.use_f64 ? forward_as<double>(a, threads) : forward_as<float>(a, threads);
}

void backward(const MixtureArguments& a, int threads) {
  a.use_f64 ? backward_as<double>(a, threads) : backward_as<float>(a, threads);
}

}  // namespace

const MixtureOp REPARAM_ISA::mixture = {forward, backward};

}  // namespace reparam
