// The stages of a chunk that concern log_q, or z = tanh(u). The noise enters the density of each sample, so that
// backward visits the samples one by one.
#pragma once
#include "core/sum.h"
#include "math/density.h"
#include "ops/latent.h"

namespace reparam {
namespace {

// What a pass over the samples needs of the densities.
enum class Pass { forward, backward };

// The fields of Densities, for each element of a chunk. Those that a call does not need are neither computed nor set.
template <class C>
struct DensityArrays {
  Scratch<C> sigma, log_sigma, inverse, dsigma, slope, d, f, delta, inverse_p, slope_p;

  template <Pass kPass, Param kParam, bool kPrior, bool kRatio, bool kInverse>
  inline void fill(const Constants<C> c, int n, const C* mu, const C* x, const C* mu_p, const C* x_p) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const Densities<C> e = densities<kParam, kPrior>(c, mu[i], x[i], kPrior ? mu_p[i] : C(0), kPrior ? x_p[i] : C(0));
      sigma.data[i] = e.sigma;
      if constexpr (kRatio) f.data[i] = e.f, delta.data[i] = e.delta;
      if constexpr (kPass == Pass::forward) {
        (kRatio ? d : log_sigma).data[i] = kRatio ? e.d : e.log_sigma;
      } else {
        dsigma.data[i] = e.dsigma, slope.data[i] = e.slope;
        if constexpr (kInverse) inverse.data[i] = e.inverse;
        if constexpr (kRatio) inverse_p.data[i] = e.inverse_p, slope_p.data[i] = e.slope_p;
      }
    }
  }
  REPARAM_INLINE Densities<C> operator[](int i) const {
    return {sigma.data[i], log_sigma.data[i], inverse.data[i], dsigma.data[i],    slope.data[i],
            d.data[i],     f.data[i],         delta.data[i],   inverse_p.data[i], slope_p.data[i]};
  }
};

// Computes z and the terms of log_q, one sample's.
template <class C, bool kRatio, bool kTanh>
inline void log_q_terms(const DensityArrays<C>& densities, int n, const C* mu, const C* eps, C* __restrict z,
                        C* __restrict terms) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Densities<C> e = densities[i];
    const C u = fma(e.sigma, eps[i], mu[i]), term = kRatio ? log_ratio_of_densities(e, eps[i]) : log_density(e, eps[i]);
    if constexpr (kTanh) {
      const Tanh<C> t = squash(u);
      z[i] = t.value;
      terms[i] = term - t.log_slope;
    } else {
      z[i] = u;
      terms[i] = term;
    }
  }
}

// The gradients of a chunk, summed over the samples: to u, to sigma by way of u, to log sigma in log q itself, and to
// mu_p / sigma_p and log sigma_p, if log_q is less log p.
template <class C>
struct LogQGrads {
  Scratch<C> u, sigma, log_sigma, mu_p, log_sigma_p;

  inline LogQGrads(int n, bool ratio) {
    for (int i = 0; i < n; ++i) u.data[i] = sigma.data[i] = log_sigma.data[i] = C(0);
    for (int i = 0; ratio && i < n; ++i) mu_p.data[i] = log_sigma_p.data[i] = C(0);
  }

  // Adds one sample. dz and dlog_q are its incoming gradients, zeros where there are none. kZeros: some may be 0, or
  // eps may be infinite.
  template <bool kRatio, bool kTanh, bool kPath, bool kZeros>
  inline void add(const DensityArrays<C>& densities, int n, const C* mu, const C* eps, const C* dz, const C* dlog_q) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const Densities<C> e = densities[i];
      const C g = dlog_q[i], noise = eps[i];
      C du = dz[i];
      if constexpr (kTanh) {
        const Tanh<C> t = squash(fma(e.sigma, noise, mu[i]));
        du = fma(du, factor<kZeros>(du, t.slope), g * factor<kZeros>(g, t.value + t.value));
      }
      if constexpr (kRatio) {
        const C q = e.f + C(1), v = fma(q, noise, e.delta);                    // v = (z - mu_p) / sigma_p
        const C score = fma(e.f, q * noise + noise, e.delta * q) * e.inverse;  // v / sigma_p - eps / sigma
        du = fma(g, factor<kZeros>(g, kPath ? score : v * e.inverse_p), du);
        mu_p.data[i] = fma(-g, factor<kZeros>(g, v), mu_p.data[i]);
        log_sigma_p.data[i] = fma(g, factor<kZeros>(g, fma(-v, v, C(1))), log_sigma_p.data[i]);
      } else if constexpr (kPath) {
        du = fma(-g, factor<kZeros>(g, noise * e.inverse), du);
      }
      u.data[i] += du;
      sigma.data[i] = fma(du, factor<kZeros>(du, noise), sigma.data[i]);
      if constexpr (!kPath) log_sigma.data[i] -= g;
    }
  }

  // Combines the sums to the gradients of the inputs.
  inline void finish(const DensityArrays<C>& e, int n, C* __restrict dmu, C* __restrict dx) const {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const C s = sigma.data[i], l = log_sigma.data[i];
      dmu[i] = u.data[i];
      dx[i] = fma(s, slope_at(s, e.dsigma.data[i]), l * slope_at(l, e.slope.data[i]));
    }
  }
  inline void finish_prior(const DensityArrays<C>& e, int n, C* __restrict dmu_p, C* __restrict dx_p) const {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const C m = mu_p.data[i], p = log_sigma_p.data[i];
      dmu_p[i] = m * slope_at(m, e.inverse_p.data[i]);
      dx_p[i] = p * slope_at(p, e.slope_p.data[i]);
    }
  }
};

}  // namespace
}  // namespace reparam
