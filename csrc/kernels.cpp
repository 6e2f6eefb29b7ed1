// The three kernels. This file is compiled once for each instruction set, REPARAM_ISA naming the table that it fills.
#include "latent.h"

namespace reparam {
namespace {

// Calls body(param, prior) with both as compile-time constants.
template <Param kValue>
struct ParamTag {
  static constexpr Param value = kValue;
};
template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

template <class Body>
inline void with_param(Param param, Body body) {
  switch (param) {
    case Param::logvar: return body(ParamTag<Param::logvar>());
    case Param::logstd: return body(ParamTag<Param::logstd>());
    case Param::std: return body(ParamTag<Param::std>());
    case Param::softplus: return body(ParamTag<Param::softplus>());
  }
}

template <class Body>
inline void with_options(const Problem& p, Body body) {
  with_param(p.options.param, [&](auto param) {
    if (p.mu_p.data) return body(param, Bool<true>());
    return body(param, Bool<false>());
  });
}

// ---- randn

template <class C>
inline void randn_piece(const Problem& p, int64_t first, int n) {
  Scratch<C> eps_s, z_s;
  const C* eps = eps_of(p, 0, first, n, eps_s);
  C* z = target(p.z, first, z_s.data);
#pragma omp simd
  for (int i = 0; i < n; ++i) z[i] = eps[i];
  store(p.z, first, n, z);
}

// ---- forward

// sigma and, where asked, kl of each element.
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

template <class C>
inline void store_kl(const Problem& p, const Pieces& pieces, int64_t piece, int64_t first, int n, const C* k) {
  C* kl = (C*)p.kl.data;
  if (pieces.per_row > 1) {
    p.partial[piece] = ordered_sum(k, n);
  } else if (p.cols == 1) {
#pragma omp simd
    for (int i = 0; i < n; ++i) kl[first + i] = k[i];
  } else {
    const int cols = (int)p.cols;
    C* row = kl + first / cols;
    for (int i = 0; i < n; i += cols) *row++ = (C)ordered_sum(k + i, cols);
  }
}

template <class C>
inline void forward_piece(const Problem& p, const Constants<C>& c, const Pieces& pieces, int64_t piece) {
  const int64_t first = pieces.begin(piece);
  const int n = (int)(pieces.end(piece) - first);
  const Inputs<C> in(p, c, first, n);
  Scratch<C> sigma, kl, noise_s, z_s;
  with_options(p, [&](auto param, auto prior) {
    posterior<C, param.value, prior.value>(c, n, in.mu, in.x, in.mu_p, in.x_p, sigma.data,
                                           p.kl.data ? kl.data : nullptr);
  });
  if (p.kl.data) store_kl(p, pieces, piece, first, n, kl.data);
  if (!p.z.data) return;
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    const C* eps = eps_of(p, sample, first, n, noise_s);
    C* z = target(p.z, sample * p.n + first, z_s.data);
#pragma omp simd
    for (int i = 0; i < n; ++i) z[i] = fma(sigma.data[i], eps[i], in.mu[i]);
    store(p.z, sample * p.n + first, n, z);
  }
}

// ---- backward

// What reaches one element from above: dz and dz * eps, each summed over the samples, and its row's dkl; null where
// nothing does.
template <class C>
struct Incoming {
  const C *dz = nullptr, *dsigma = nullptr, *dkl = nullptr;
  Scratch<C> dz_s, dsigma_s, dkl_s;

  inline Incoming(const Problem& p, int64_t first, int n) {
    if (p.dz.data) take_samples(p, first, n);
    if (p.dkl.data) spread_rows(p, first, n);
  }

  inline void take_samples(const Problem& p, int64_t first, int n) {
    Scratch<C> sample_s, eps_s;
    dz = load(p.dz, first, n, dz_s.data);
    const C* eps = eps_of(p, 0, first, n, eps_s);
#pragma omp simd
    for (int i = 0; i < n; ++i) dsigma_s.data[i] = dz[i] * eps[i];
    dsigma = dsigma_s.data;
    for (int64_t sample = 1; sample < p.samples; ++sample) {
      const C* g = load(p.dz, sample * p.n + first, n, sample_s.data);
      eps = eps_of(p, sample, first, n, eps_s);
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        dz_s.data[i] = dz[i] + g[i];
        dsigma_s.data[i] = fma(g[i], eps[i], dsigma_s.data[i]);
      }
      dz = dz_s.data;
    }
  }

  inline void spread_rows(const Problem& p, int64_t first, int n) {
    Scratch<C> row_s;
    const int rows = (int)((first + n - 1) / p.cols - first / p.cols) + 1;
    const C* row = load(p.dkl, first / p.cols, rows, row_s.data);
    int at = 0;
    for (int r = 0; r < rows; ++r) {
      const int64_t end = (first / p.cols + r + 1) * p.cols - first;
      const int stop = end < n ? (int)end : n;
      for (; at < stop; ++at) dkl_s.data[at] = row[r];
    }
    dkl = dkl_s.data;
  }
};

// Where one gradient goes: in place, to a buffer on its way to the tensor, or to a buffer that nobody reads.
template <class C>
struct Outgoing {
  const Operand& t;
  const int64_t first;
  Scratch<C> buffer;
  C* const data;

  inline Outgoing(const Operand& t, int64_t first) : t(t), first(first), data(target(t, first, buffer.data)) {}
  inline void put(int n) const {
    if (t.data) store(t, first, n, data);
  }
};

// All the gradients in one loop; kZ and kKl say what comes in.
template <class C, Param kParam, bool kPrior, bool kZ, bool kKl>
inline void gradients(const Constants<C> c, int n, const Inputs<C>& in, const Incoming<C>& g, C* __restrict dmu,
                      C* __restrict dx, C* __restrict dmu_p, C* __restrict dx_p) {
  const C *mu = in.mu, *x = in.x, *mu_p = in.mu_p, *x_p = in.x_p, *dz = g.dz, *dsigma = g.dsigma, *dkl = g.dkl;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Element<C> e = element<kParam, kPrior>(c, mu[i], x[i], kPrior ? mu_p[i] : C(0), kPrior ? x_p[i] : C(0));
    if constexpr (kZ && kKl) {
      dmu[i] = fma(dkl[i], e.dkl_mu, dz[i]);
      dx[i] = fma(dsigma[i], e.dsigma, dkl[i] * e.dkl_x);
    } else if constexpr (kKl) {
      dmu[i] = dkl[i] * e.dkl_mu;
      dx[i] = dkl[i] * e.dkl_x;
    } else {
      dmu[i] = dz[i];
      dx[i] = dsigma[i] * e.dsigma;
    }
    if constexpr (kPrior) {
      dmu_p[i] = -(dkl[i] * e.dkl_mu);
      dx_p[i] = dkl[i] * e.dkl_xp;
    }
  }
}

template <class C>
inline void backward_piece(const Problem& p, const Constants<C>& c, const Pieces& pieces, int64_t piece) {
  const int64_t first = pieces.begin(piece);
  const int n = (int)(pieces.end(piece) - first);
  const Inputs<C> in(p, c, first, n);
  const Incoming<C> g(p, first, n);
  const Outgoing<C> dmu(p.dmu, first), dx(p.dx, first), dmu_p(p.dmu_p, first), dx_p(p.dx_p, first);
  const auto run = [&](auto from_z, auto from_kl) {
    with_options(p, [&](auto param, auto prior) {
      gradients<C, param.value, prior.value && from_kl.value, from_z.value, from_kl.value>(
          c, n, in, g, dmu.data, dx.data, dmu_p.data, dx_p.data);
    });
  };
  if (g.dz && g.dkl)
    run(Bool<true>(), Bool<true>());
  else if (g.dkl)
    run(Bool<false>(), Bool<true>());
  else if (g.dz)
    run(Bool<true>(), Bool<false>());
  else
    for (int i = 0; i < n; ++i) dmu.data[i] = dx.data[i] = 0;
  if (c.clamped) clamp_slope(c, n, in.raw, dx.data);
  dmu.put(n), dx.put(n), dmu_p.put(n), dx_p.put(n);
}

// ---- the table

void randn(const Problem& p, const Pieces& pieces, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const int n = (int)(pieces.end(i) - pieces.begin(i));
    p.wide ? randn_piece<double>(p, pieces.begin(i), n) : randn_piece<float>(p, pieces.begin(i), n);
  }
}

template <class C>
inline void forward_pieces(const Problem& p, const Pieces& pieces, int64_t first, int64_t last) {
  const Constants<C> c(p.options);
  for (int64_t i = first; i < last; ++i) forward_piece<C>(p, c, pieces, i);
}

template <class C>
inline void backward_pieces(const Problem& p, const Pieces& pieces, int64_t first, int64_t last) {
  const Constants<C> c(p.options);
  for (int64_t i = first; i < last; ++i) backward_piece<C>(p, c, pieces, i);
}

void forward(const Problem& p, const Pieces& pieces, int64_t first, int64_t last) {
  p.wide ? forward_pieces<double>(p, pieces, first, last) : forward_pieces<float>(p, pieces, first, last);
}

void backward(const Problem& p, const Pieces& pieces, int64_t first, int64_t last) {
  p.wide ? backward_pieces<double>(p, pieces, first, last) : backward_pieces<float>(p, pieces, first, last);
}

void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]) {
  Lanes c[4][1];
  for (int i = 0; i < 4; ++i) c[i][0] = Lanes{} + (uint64_t)counter[i];
  philox4x32_10<1>(c, key[0], key[1]);
  for (int i = 0; i < 4; ++i) {
    uint64_t lane;
    std::memcpy(&lane, &c[i], sizeof lane);
    words[i] = (uint32_t)lane;
  }
}

void box_mullers(const uint32_t* radius, const uint32_t* angle, int pairs, float* eps) {
#pragma omp simd
  for (int i = 0; i < pairs; ++i) {
    const Pair p = box_muller(radius[i], angle[i]);
    eps[2 * i] = p.first;
    eps[2 * i + 1] = p.second;
  }
}

void noise_window(int64_t seed, int64_t first, int n, float* eps) {
  Scratch<float> scratch;
  std::memcpy(eps, noise_run(seed, first, n, scratch.data), n * sizeof *eps);
}

}  // namespace

#define REPARAM_TEXT(x) #x
#define REPARAM_NAME(x) REPARAM_TEXT(x)
extern const Kernels REPARAM_ISA;
const Kernels REPARAM_ISA = {REPARAM_NAME(REPARAM_ISA), randn, forward, backward, philox, box_mullers, noise_window};

}  // namespace reparam
