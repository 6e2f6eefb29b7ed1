// Each kernel goes through a chunk in stages that stay in the first-level cache:
// load -> clamp -> element (posterior against prior) -> noise -> z and kl, or gradients -> store.
#include "ops/latent.h"

#include <type_traits>

#include "ops/latent_log_q.h"
#include "ops/latent_tiles.h"
#include "ops/option_tags.h"

namespace reparam {
namespace {

// Calls body(param, prior).
template <class Body>
inline void dispatch_options(const LatentArguments& a, Body body) {
  dispatch_param(a.options.param, [&](auto param) {
    if (a.mu_p.data) return body(param, Bool<true>());
    return body(param, Bool<false>());
  });
}

// ---- inputs

template <class C>
struct Inputs {
  const C *mu, *unclamped, *x, *mu_p = nullptr, *x_p = nullptr;  // x before and after the clamp
  Scratch<C> mu_s, unclamped_s, x_s, mu_p_s, x_p_s;

  inline Inputs(const LatentArguments& a, const Constants<C>& c, int64_t first, int n) {
    mu = load(a.mu, first, n, mu_s.data);
    x = unclamped = load(a.x, first, n, unclamped_s.data);
    if (c.clamped) {
      const C low = c.low, high = c.high;
#pragma omp simd
      for (int i = 0; i < n; ++i)  // keeps NaN
        x_s.data[i] = unclamped[i] < low ? low : unclamped[i] > high ? high : unclamped[i];
      x = x_s.data;
    }
    if (a.mu_p.data) {
      mu_p = load(a.mu_p, first, n, mu_p_s.data);
      x_p = load(a.x_p, first, n, x_p_s.data);
    }
  }
};

// The gradient is kept at a bound, and is 0 outside and for NaN.
template <class C>
inline void clamp_gradient(const Constants<C>& c, int n, const C* unclamped, C* __restrict dx) {
  const C low = c.low, high = c.high;
#pragma omp simd
  for (int i = 0; i < n; ++i) dx[i] = (unclamped[i] >= low) & (unclamped[i] <= high) ? dx[i] : C(0);
}

// ---- forward

// Computes sigma of each element, and kl if it is not null.
template <class C, Param kParam, bool kPrior>
inline void posterior(const Constants<C> c, int n, const C* mu, const C* x, const C* mu_p, const C* x_p,
                      C* __restrict sigma, C* __restrict kl) {
  if (kl) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const Element<C> e = element<kParam, kPrior>(c, mu[i], x[i], kPrior ? mu_p[i] : C(0), kPrior ? x_p[i] : C(0));
      sigma[i] = e.sigma;
      kl[i] = e.kl;
    }
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) sigma[i] = element<kParam, false>(c, mu[i], x[i], C(0), C(0)).sigma;
  }
}

// What the sums of a run of elements need. The run is a chunk, or a part of a stream of elements.
template <class C>
struct Sums {
  const Chunks& chunks;
  double *kl = nullptr,
         *log_q = nullptr;  // the sums of chunks if a row is longer than one: [chunks], [samples, chunks]
  int64_t chunk = 0;
  StreamSums<C>* stream = nullptr;
};

// Stores elements in `sums`, or the sums of rows or, if a row is longer than a chunk, the sums of chunks in partials.
template <class C>
inline void store_sums(const LatentArguments& a, const Sums<C>& s, int64_t sample, int64_t first, int n, const C* k,
                       const Operand& sums, double* partials) {
  C* const rows = (C*)sums.data + sample * a.rows;
  if (a.cols == 1) {
    put(sums, sample * a.rows + first, n, k);
  } else if (s.stream) {
    s.stream->add(s.chunks, first, n, k, rows, partials);
  } else if (s.chunks.per_row > 1) {
    partials[sample * s.chunks.count + s.chunk] = ordered_sum(k, n);
  } else {
    const int cols = (int)a.cols;
    C* row = rows + first / cols;
    for (int i = 0; i < n; i += cols) *row++ = (C)ordered_sum(k + i, cols);
  }
}

template <class C, Pass kPass>
inline void fill_densities(const LatentArguments& a, const Constants<C>& c, int n, const Inputs<C>& in, bool inverse,
                           DensityArrays<C>& e) {
  const auto fill = [&](auto param, auto prior, auto ratio, auto with_inverse) {
    e.template fill<kPass, param.value, prior.value, ratio.value, with_inverse.value>(c, n, in.mu, in.x, in.mu_p,
                                                                                      in.x_p);
  };
  if (a.options.minus_log_p)
    dispatch_options(a, [&](auto param, auto prior) { fill(param, prior, Bool<true>(), Bool<true>()); });
  else if (inverse)
    dispatch_param(a.options.param, [&](auto param) { fill(param, Bool<false>(), Bool<false>(), Bool<true>()); });
  else
    dispatch_param(a.options.param, [&](auto param) { fill(param, Bool<false>(), Bool<false>(), Bool<false>()); });
}

// Computes z and, if asked, log_q of each sample by way of the densities.
template <class C>
inline void forward_densities(const LatentArguments& a, const Constants<C>& c, int64_t first, int n,
                              const Inputs<C>& in, const Sums<C>& sums) {
  DensityArrays<C> e;
  Scratch<C> eps_s, z_s, terms;
  fill_densities<C, Pass::forward>(a, c, n, in, false, e);
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    const C* eps = load_or_make_eps(a.eps, sample, first, n, eps_s);
    C* z = target(a.z, sample * a.n + first, z_s.data);
    if (a.options.minus_log_p)
      log_q_terms<C, true, false>(e, n, in.mu, eps, z, terms.data);
    else if (a.options.tanh)
      log_q_terms<C, false, true>(e, n, in.mu, eps, z, terms.data);
    else
      log_q_terms<C, false, false>(e, n, in.mu, eps, z, terms.data);
    if (a.z.data) store(a.z, sample * a.n + first, n, z);
    if (a.log_q.data) store_sums(a, sums, sample, first, n, terms.data, a.log_q, sums.log_q);
  }
}

template <class C>
__attribute__((noinline)) void forward_run(const LatentArguments& a, const Constants<C>& c, int64_t first, int n,
                                           const Sums<C>& sums) {
  const Inputs<C> in(a, c, first, n);
  if (a.log_q.data || a.options.tanh) return forward_densities(a, c, first, n, in, sums);
  Scratch<C> sigma, kl, eps_s, z_s;
  dispatch_options(a, [&](auto param, auto prior) {
    posterior<C, param.value, prior.value>(c, n, in.mu, in.x, in.mu_p, in.x_p, sigma.data,
                                           a.kl.data ? kl.data : nullptr);
  });
  if (a.kl.data) store_sums(a, sums, 0, first, n, kl.data, a.kl, sums.kl);
  if (!a.z.data) return;
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    const C* eps = load_or_make_eps(a.eps, sample, first, n, eps_s);
    C* z = target(a.z, sample * a.n + first, z_s.data);
#pragma omp simd
    for (int i = 0; i < n; ++i) z[i] = fma(sigma.data[i], eps[i], in.mu[i]);
    store(a.z, sample * a.n + first, n, z);
  }
}

// ---- backward

// All ones if x is 0 or NaN, in the width of x, which vectorises without conversions.
template <class C>
using Mask = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
template <class C>
REPARAM_INLINE Mask<C> zero_or_nan(C x) {
  return __builtin_islessgreater(x, C(0)) ? 0 : -1;
}

template <class C>
inline bool any_zero_or_nan(int n, const C* x) {
  Mask<C> found = 0;
#pragma omp simd reduction(| : found)
  for (int i = 0; i < n; ++i) found |= zero_or_nan(x[i]);
  return found != 0;
}

// Repeats each row's number for those of elements [first, first + n) that lie in the row.
template <class C>
inline void repeat_rows(const C* row, int rows, int64_t cols, int64_t first, int n, C* to) {
  int at = 0;
  for (int r = 0; r < rows; ++r) {
    const int64_t end = (first / cols + r + 1) * cols - first;
    const int stop = end < n ? (int)end : n;
    for (; at < stop; ++at) to[at] = row[r];
  }
}

// The gradients that reach an element: dz and dz * eps, each summed over the samples, and its row's dkl. A null pointer
// means that there is none. zeros: some dsigma or dkl is 0 or NaN.
template <class C>
struct UpstreamGrads {
  const C *dz = nullptr, *dsigma = nullptr, *dkl = nullptr;
  bool zeros = false;
  Scratch<C> dz_s, dsigma_s, dkl_s;

  inline UpstreamGrads(const LatentArguments& a, int64_t first, int n) {
    if (a.dz.data) {
      zeros = sum_samples<false>(a, first, n);
      if (zeros && a.eps.given.data) sum_samples<true>(a, first, n);  // eps that is made is finite
    }
    if (a.dkl.data) expand_rows(a, first, n);
  }

  // Returns true if some dsigma is 0 or NaN. Inlined, so that the compiler sees that no output overlaps an input.
  template <bool kZeros>
  REPARAM_INLINE bool sum_samples(const LatentArguments& a, int64_t first, int n) {
    Scratch<C> sample_s, eps_s;
    dz = load(a.dz, first, n, dz_s.data);
    const C* eps = load_or_make_eps(a.eps, 0, first, n, eps_s);
    Mask<C> found = 0;
#pragma omp simd reduction(| : found)
    for (int i = 0; i < n; ++i) {
      const C d = dz[i] * factor<kZeros>(dz[i], eps[i]);
      dsigma_s.data[i] = d;
      found |= zero_or_nan(d);
    }
    dsigma = dsigma_s.data;
    for (int64_t sample = 1; sample < a.samples; ++sample) {
      const C* g = load(a.dz, sample * a.n + first, n, sample_s.data);
      eps = load_or_make_eps(a.eps, sample, first, n, eps_s);
      found = 0;
#pragma omp simd reduction(| : found)
      for (int i = 0; i < n; ++i) {
        dz_s.data[i] = dz[i] + g[i];
        const C d = fma(g[i], factor<kZeros>(g[i], eps[i]), dsigma_s.data[i]);
        dsigma_s.data[i] = d;
        found |= zero_or_nan(d);
      }
      dz = dz_s.data;
    }
    return found != 0;
  }

  inline void expand_rows(const LatentArguments& a, int64_t first, int n) {
    Scratch<C> row_s;
    const int rows = (int)((first + n - 1) / a.cols - first / a.cols) + 1;
    const C* row = load(a.dkl, first / a.cols, rows, a.cols == 1 ? dkl_s.data : row_s.data);
    zeros |= any_zero_or_nan(rows, row);
    dkl = a.cols == 1 ? row : dkl_s.data;
    if (a.cols > 1) repeat_rows(row, rows, a.cols, first, n, dkl_s.data);
  }
};

// One gradient is written in place, or into a buffer that store() converts. If it is not wanted, nobody reads the
// buffer.
template <class C>
struct GradOutput {
  const Operand& t;
  const int64_t first;
  Scratch<C> buffer;
  C* const data;

  inline GradOutput(const Operand& t, int64_t first) : t(t), first(first), data(target(t, first, buffer.data)) {}
  inline void store(int n) const {
    if (t.data) reparam::store(t, first, n, data);
  }
};

// Computes all gradients in one loop; kZ and kKl say which upstream gradients there are, kZeros if some may be 0.
template <class C, Param kParam, bool kPrior, bool kZ, bool kKl, bool kZeros>
inline void gradients(const Constants<C> c, int n, const Inputs<C>& in, const UpstreamGrads<C>& g, C* __restrict dmu,
                      C* __restrict dx, C* __restrict dmu_p, C* __restrict dx_p) {
  const C *mu = in.mu, *x = in.x, *mu_p = in.mu_p, *x_p = in.x_p, *dz = g.dz, *dsigma = g.dsigma, *dkl = g.dkl;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Element<C> e = element<kParam, kPrior>(c, mu[i], x[i], kPrior ? mu_p[i] : C(0), kPrior ? x_p[i] : C(0));
    if constexpr (kZ && kKl) {
      dmu[i] = fma(dkl[i], factor<kZeros>(dkl[i], e.dkl_mu), dz[i]);
      dx[i] = fma(dsigma[i], factor<kZeros>(dsigma[i], e.dsigma), dkl[i] * factor<kZeros>(dkl[i], e.dkl_x));
    } else if constexpr (kKl) {
      dmu[i] = dkl[i] * factor<kZeros>(dkl[i], e.dkl_mu);
      dx[i] = dkl[i] * factor<kZeros>(dkl[i], e.dkl_x);
    } else {
      dmu[i] = dz[i];
      dx[i] = dsigma[i] * factor<kZeros>(dsigma[i], e.dsigma);
    }
    if constexpr (kPrior) {
      dmu_p[i] = -(dkl[i] * factor<kZeros>(dkl[i], e.dkl_mu));
      dx_p[i] = dkl[i] * factor<kZeros>(dkl[i], e.dkl_xp);
    }
  }
}

// The incoming gradients of log_q, of one sample and the rows that a chunk has a part of.
template <class C>
struct RowGrads {
  const int rows;
  Scratch<C> row_s;

  inline RowGrads(const LatentArguments& a, int64_t first, int n)
      : rows((int)((first + n - 1) / a.cols - first / a.cols) + 1) {}
  inline const C* of(const LatentArguments& a, int64_t sample, int64_t first) {
    return load(a.dlog_q, sample * a.rows + first / a.cols, rows, row_s.data);
  }
};

// Computes the gradients of z and log_q where log_q is that of a Gaussian: its gradient reaches log sigma alone.
template <class C>
inline void backward_log_q(const LatentArguments& a, const Constants<C> c, int64_t first, int n, const Inputs<C>& in,
                           C* __restrict dmu, C* __restrict dx) {
  const UpstreamGrads<C> g(a, first, n);
  RowGrads<C> dlog_q(a, first, n);
  Scratch<C> of_rows, dlog_sigma_s, none;
  for (int i = 0; i < dlog_q.rows; ++i) of_rows.data[i] = 0;
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    const C* row = dlog_q.of(a, sample, first);
#pragma omp simd
    for (int i = 0; i < dlog_q.rows; ++i) of_rows.data[i] -= row[i];
  }
  if (a.cols > 1) repeat_rows(of_rows.data, dlog_q.rows, a.cols, first, n, dlog_sigma_s.data);
  const C* dlog_sigma = a.cols > 1 ? dlog_sigma_s.data : of_rows.data;
  const C *dz = g.dz, *dsigma = g.dsigma, *mu = in.mu, *x = in.x;
  if (!dz) {
    for (int i = 0; i < n; ++i) none.data[i] = 0;
    dz = dsigma = none.data;
  }
  const bool zeros = g.zeros || !g.dz || any_zero_or_nan(dlog_q.rows, of_rows.data);
  dispatch_param(a.options.param, [&](auto param) {
    const auto run = [&](auto with_zeros) {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const Densities<C> e = densities<param.value, false>(c, mu[i], x[i], C(0), C(0));
        const C s = dsigma[i] + C(0), l = dlog_sigma[i];  // a sum that starts at 0 is never -0
        dmu[i] = dz[i] + C(0);
        dx[i] = fma(s, factor<with_zeros.value>(s, e.dsigma), l * factor<with_zeros.value>(l, e.slope));
      }
    };
    with_bool(zeros, run);
  });
}

// Computes the gradients of z and log_q by way of the densities.
template <class C>
inline void backward_densities(const LatentArguments& a, const Constants<C>& c, int64_t first, int n,
                               const Inputs<C>& in, C* dmu, C* dx, C* dmu_p, C* dx_p) {
  const Options& o = a.options;
  DensityArrays<C> e;
  RowGrads<C> dlog_q(a, first, n);
  Scratch<C> eps_s, dz_s, dlog_q_s;
  fill_densities<C, Pass::backward>(a, c, n, in, o.path_derivative, e);
  LogQGrads<C> sums(n, o.minus_log_p);
  for (int i = 0; !a.dz.data && i < n; ++i) dz_s.data[i] = 0;
  for (int i = 0; !a.dlog_q.data && i < n; ++i) dlog_q_s.data[i] = 0;
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    const C* eps = load_or_make_eps(a.eps, sample, first, n, eps_s);
    const C *dz = dz_s.data, *of_elements = dlog_q_s.data;
    if (a.dz.data) dz = load(a.dz, sample * a.n + first, n, dz_s.data);
    bool zeros = a.eps.given.data || !a.dlog_q.data || any_zero_or_nan(n, dz);
    if (a.dlog_q.data) {
      const C* row = dlog_q.of(a, sample, first);
      zeros = zeros || any_zero_or_nan(dlog_q.rows, row);
      if (a.cols == 1) {
        of_elements = row;
      } else {
        repeat_rows(row, dlog_q.rows, a.cols, first, n, dlog_q_s.data);
      }
    }
    const auto add = [&](auto ratio, auto tanh) {
      with_bool(o.path_derivative, [&](auto path) {
        with_bool(zeros, [&](auto with_zeros) {
          sums.template add<ratio.value, tanh.value, path.value, with_zeros.value>(e, n, in.mu, eps, dz, of_elements);
        });
      });
    };
    if (o.minus_log_p)
      add(Bool<true>(), Bool<false>());
    else if (o.tanh)
      add(Bool<false>(), Bool<true>());
    else
      add(Bool<false>(), Bool<false>());
  }
  sums.finish(e, n, dmu, dx);
  if (o.minus_log_p) sums.finish_prior(e, n, dmu_p, dx_p);
}

template <class C>
__attribute__((noinline)) void backward_run(const LatentArguments& a, const Constants<C>& c, int64_t first, int n) {
  const Inputs<C> in(a, c, first, n);
  const GradOutput<C> dmu(a.dmu, first), dx(a.dx, first), dmu_p(a.dmu_p, first), dx_p(a.dx_p, first);
  if (a.dlog_q.data || (a.dz.data && a.options.tanh)) {
    const Options& o = a.options;
    if (a.mu_p.data && !o.minus_log_p) {
      for (int i = 0; i < n; ++i) dmu_p.data[i] = dx_p.data[i] = 0;
    }
    if (o.minus_log_p | o.tanh | o.path_derivative)
      backward_densities(a, c, first, n, in, dmu.data, dx.data, dmu_p.data, dx_p.data);
    else
      backward_log_q(a, c, first, n, in, dmu.data, dx.data);
    if (c.clamped) clamp_gradient(c, n, in.unclamped, dx.data);
    dmu.store(n), dx.store(n), dmu_p.store(n), dx_p.store(n);
    return;
  }
  const UpstreamGrads<C> g(a, first, n);
  const auto run_with = [&](auto from_z, auto from_kl, auto zeros) {
    dispatch_options(a, [&](auto param, auto prior) {
      gradients<C, param.value, prior.value && from_kl.value, from_z.value, from_kl.value, zeros.value>(
          c, n, in, g, dmu.data, dx.data, dmu_p.data, dx_p.data);
    });
  };
  const auto run = [&](auto from_z, auto from_kl) {
    g.zeros ? run_with(from_z, from_kl, Bool<true>()) : run_with(from_z, from_kl, Bool<false>());
  };
  if (g.dz && g.dkl)
    run(Bool<true>(), Bool<true>());
  else if (g.dkl)
    run(Bool<false>(), Bool<true>());
  else if (g.dz)
    run(Bool<true>(), Bool<false>());
  else
    for (int i = 0; i < n; ++i) dmu.data[i] = dx.data[i] = dmu_p.data[i] = dx_p.data[i] = 0;
  if (c.clamped) clamp_gradient(c, n, in.unclamped, dx.data);
  dmu.store(n), dx.store(n), dmu_p.store(n), dx_p.store(n);
}

// ---- tiles

template <class C>
__attribute__((noinline)) void forward_tiles(const LatentArguments& a, const Constants<C>& c, const ChannelTiles& tiles,
                                             int64_t first_span, int64_t last_span, const Sums<C>& all) {
  TileCall<C> call(a, tiles);
  LatentArguments only_sums = a;
  only_sums.z = {};
  Sums<C> sums = all;
  double* const partials = all.kl ? all.kl : all.log_q;
  const auto run = [&](const LatentArguments& part, int64_t first, int n) { forward_run(part, c, first, n, all); };
  const auto rest = [&](int64_t first, StreamSums<C>& stream) {
    sums.stream = &stream;
    if (stream.open(first)) forward_run(only_sums, c, first, (int)(stream.end - first), sums);
  };
  for (int64_t i = first_span; i < last_span; ++i) for_tiles(call, tiles, i, all.chunks, partials, run, rest);
}

template <class C>
__attribute__((noinline)) void backward_tiles(const LatentArguments& a, const Constants<C>& c,
                                              const ChannelTiles& tiles, int64_t first_span, int64_t last_span) {
  TileCall<C> call(a, tiles);
  const auto run = [&](const LatentArguments& part, int64_t first, int n) { backward_run(part, c, first, n); };
  const auto rest = [](int64_t, const StreamSums<C>&) {};
  for (int64_t i = first_span; i < last_span; ++i) for_tiles(call, tiles, i, Chunks(a.n, a.cols), nullptr, run, rest);
}

// ---- the op

template <class C>
inline void forward_as(const LatentArguments& a, int threads) {
  C *kl = (C*)a.kl.data, *log_q = (C*)a.log_q.data;
  if (a.n == 0) {
    for (int64_t row = 0; kl && row < a.rows; ++row) kl[row] = 0;
    for (int64_t row = 0; log_q && row < a.samples * a.rows; ++row) log_q[row] = 0;
    return;
  }
  const Constants<C> c(a.options);
  const Chunks chunks(a.n, a.cols);
  const bool long_rows = chunks.per_row > 1;
  const HeapArray kl_partials(kl && long_rows ? chunks.count : 0);
  const HeapArray log_q_partials(log_q && long_rows ? a.samples * chunks.count : 0);
  const Sums<C> all{chunks, kl_partials.data, log_q_partials.data};
  const ChannelTiles tiles(a, (kl || log_q) && a.cols > 1, threads);
  if (tiles.count > 0) {
    parallel_for(tiles.count, a.n, threads,
                 [&](int64_t first, int64_t last) { forward_tiles(a, c, tiles, first, last, all); });
  } else {
    parallel_for(chunks.count, a.n * (a.samples > 1 ? a.samples : 1), threads, [&](int64_t first, int64_t last) {
      Sums<C> sums = all;
      for (int64_t i = first; i < last; ++i) {
        sums.chunk = i;
        forward_run(a, c, chunks.begin(i), (int)(chunks.end(i) - chunks.begin(i)), sums);
      }
    });
  }
  if (all.kl) sum_partials(all.kl, chunks, kl);
  for (int64_t sample = 0; all.log_q && sample < a.samples; ++sample)
    sum_partials(all.log_q + sample * chunks.count, chunks, log_q + sample * a.rows);
}

template <class C>
inline void backward_as(const LatentArguments& a, int threads) {
  if (a.n == 0) return;
  const Constants<C> c(a.options);
  const ChannelTiles tiles(a, false, threads);
  if (tiles.count > 0) {
    parallel_for(tiles.count, a.n, threads,
                 [&](int64_t first, int64_t last) { backward_tiles(a, c, tiles, first, last); });
    return;
  }
  const Chunks chunks(a.n, a.cols);
  parallel_for(chunks.count, a.n * (a.samples > 1 ? a.samples : 1), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) backward_run(a, c, chunks.begin(i), (int)(chunks.end(i) - chunks.begin(i)));
  });
}

void forward(const LatentArguments& a, int threads) {
  a.use_f64 ? forward_as<double>(a, threads) : forward_as<float>(a, threads);
}

void backward(const LatentArguments& a, int threads) {
  a.use_f64 ? backward_as<double>(a, threads) : backward_as<float>(a, threads);
}

}  // namespace

const LatentOp REPARAM_ISA::latent = {forward, backward};

}  // namespace reparam
