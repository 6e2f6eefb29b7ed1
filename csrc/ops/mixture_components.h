// The components of a mixture and their weights, as the kernels read them.
#pragma once
#include "ops/mixture_layout.h"
#include "ops/option_tags.h"

namespace reparam {
namespace {

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

template <Param kParam, class C>
REPARAM_INLINE Scale<C> scale_of(const Constants<C>& c, C unclamped) {
  C x = unclamped;
  if (c.clamped) x = x < c.low ? c.low : x > c.high ? c.high : x;  // keeps NaN
  Scale<C> s;
  if constexpr (kParam == Param::logvar || kParam == Param::logstd) {
    s.slope = kParam == Param::logvar ? C(.5) : C(1);
    s.log_sigma = s.slope * x;
    s.inverse = inverse_exp(s.log_sigma);
  } else if constexpr (kParam == Param::std) {
    s = {log(x), 1 / x, 1 / x};
  } else {
    const Softplus<C> p = softplus(x);
    const C sigma = p.value + c.min_std;
    const bool exponential = (c.min_std == 0) & (x < (sizeof(C) == 4 ? C(-17) : C(-37)));  // softplus(x) is exp(x)
    s = {exponential ? x : log(sigma), exponential ? inverse_exp(x) : 1 / sigma, exponential ? C(1) : p.slope / sigma};
  }
  const bool inside = (!c.clamped) | ((unclamped >= c.low) & (unclamped <= c.high));
  s.slope = inside ? s.slope : C(0);
  return s;
}

// All components as the kernels read them: block by block and dim by dim, the fields of a block's components side by
// side. The last block is filled up with components that count as 0.
template <class C>
struct Components {
  Buffer<C> fields;  // [blocks, D, kFields]
  Buffer<C> joint;   // [blocks, 2, kBlock]: the constant term of each whole event, in two words
  // [D]: the largest constant term. For dims, the constant terms in `fields` and the logarithms of all terms are less
  // by that, so that no term is above 1 unless points have weights of their own.
  Buffer<C> largest;

  Components(const MixtureArguments& a, int threads)
      : fields(divide_up(a.components, kBlock), a.cols, kFields),
        joint(divide_up(a.components, kBlock), 2 * kBlock),
        largest(a.cols) {
    const int64_t blocks = divide_up(a.components, kBlock);
    const Constants<C> c(a.options);
    parallel_for(blocks, a.components * a.cols, threads, [&](int64_t first, int64_t last) {
      dispatch_param(a.options.param, [&](auto param) {
        for (int64_t block = first; block < last; ++block) fill<param.value>(a, c, block);
      });
    });
    for (int64_t d = 0; a.dims.data && d < a.cols; ++d) subtract_largest(fields.data + d * kFields, blocks, a.cols, d);
  }
  const C* block(int64_t index, int64_t cols) const { return fields.data + index * cols * kFields; }

 private:
  template <Param kParam>
  void fill(const MixtureArguments& a, const Constants<C> c, int64_t block) {
    static_assert(kBlock == kPack);
    const int64_t first = block * kBlock;
    const int count = a.components - first < kBlock ? (int)(a.components - first) : kBlock;
    C* to = fields.data + block * a.cols * kFields;
    load_columns(a.mu, a.components, a.cols, first, C(0), to, kFields);
    load_columns(a.x, a.components, a.cols, first, C(1), to + kBlock, kFields);
    double weights[kBlock], totals[kBlock];
    C excluded[kBlock], weights_s[kBlock];
    const C* given = nullptr;
    if (a.log_weights.data && !a.weights_by_item) given = load(a.log_weights, first, count, weights_s);
    const double each = a.weights_by_item ? 0 : -__builtin_log((double)a.components);
    for (int k = 0; k < kBlock; ++k) {
      totals[k] = weights[k] = given && k < count ? (double)given[k] : each;
      excluded[k] = k < count ? C(0) : kExcluded<C>;
    }
    for (int64_t d = 0; d < a.cols; ++d, to += kFields) {
#pragma omp simd
      for (int k = 0; k < kBlock; ++k) {
        const Scale<C> s = scale_of<kParam>(c, to[kBlock + k]);
        const double term = -(double)s.log_sigma - kHalfLog2Pi;
        totals[k] += term;
        const C inverse = s.inverse > kSharpest<C> ? kSharpest<C> : s.inverse;  // keeps NaN
        to[kBlock + k] = fma(inverse, kRoot<C>, inverse * kRootRest<C>);
        to[2 * kBlock + k] = excluded[k] < 0 ? kExcluded<C> : (C)(kLog2e * (weights[k] + term));
      }
    }
    C* const constant = joint.data + block * 2 * kBlock;
    for (int k = 0; k < kBlock; ++k) {
      const double total = kLog2e * totals[k];
      const bool none = (k >= count) | (total < kLowest<C>);
      constant[k] = none ? kExcluded<C> : (C)total;
      constant[kBlock + k] = none ? C(0) : (C)(total - constant[k]);
    }
  }

  void subtract_largest(C* fields_of_dim, int64_t blocks, int64_t cols, int64_t d) {
    C* const constants = fields_of_dim + 2 * kBlock;
    Pack<C> most(kLowest<C>);
    for (int64_t i = 0; i < blocks; ++i) most = larger(load_pack(constants + i * cols * kFields), most);  // without NaN
    C top = kLowest<C>, lanes[kPack];
    store_pack(lanes, most);
    for (C each : lanes) top = each > top ? each : top;
    largest.data[d] = top = top > kFar<C> ? kFar<C> : top;
    for (int64_t i = 0; i < blocks; ++i) {
      C* const to = constants + i * cols * kFields;
      store_pack(to, load_pack(to) - Pack<C>(top));
    }
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

}  // namespace
}  // namespace reparam
