// The components of a mixture and their weights, as the kernels read them.
#pragma once
#include "ops/mixture_layout.h"

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

}  // namespace
}  // namespace reparam
