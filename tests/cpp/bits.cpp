// Runs the kernels with every option on fixed inputs and writes each output's bytes to stdout, so that two builds can
// be compared.
#include <cstdio>
#include <vector>

#include "ops/latent.h"

using namespace reparam;

namespace {

constexpr int64_t kRows = 6;

// Numbers in [-2, 2) with short mantissas, exact in every dtype.
double value(int64_t i) { return ((double)((uint64_t)i * 2654435761u >> 8 & 63) - 32) / 16; }

struct Buffer {
  std::vector<unsigned char> bytes;
  Operand t;

  Buffer(Dtype dtype, int64_t n) : bytes((size_t)(8 * n)) {
    t.data = bytes.data();
    t.dtype = dtype;
    t.ndim = 1;
    t.size[0] = n;
    t.stride[0] = 1;
  }
  void fill(int64_t from, bool positive) {
    for (int64_t i = 0; i < t.size[0]; ++i) {
      const float x = (float)(positive ? value(i + from) + 2.25 : value(i + from));
      uint32_t b;
      __builtin_memcpy(&b, &x, 4);
      if (t.dtype == Dtype::f32) ((float*)t.data)[i] = x;
      if (t.dtype == Dtype::bf16) ((uint16_t*)t.data)[i] = (uint16_t)(b >> 16);
      if (t.dtype == Dtype::f16)  // exact: a normal number or zero
        ((uint16_t*)t.data)[i] = (uint16_t)(x == 0 ? 0 : (b >> 16 & 0x8000u) | ((b & 0x7fffffffu) - 0x38000000u) >> 13);
    }
  }
  void write() const {
    const size_t size = t.dtype == Dtype::f32 ? 4 : 2;
    std::fwrite(t.data, size, (size_t)t.size[0], stdout);
  }
};

void call(Dtype dtype, Param param, bool prior, bool clamped, int64_t cols, int64_t samples, int threads) {
  const int64_t n = kRows * cols;
  const int64_t seeds[kRows] = {7, 8, (int64_t)1 << 40, 3, 2, 1};
  const bool positive = param == Param::std;
  Buffer mu(dtype, n), x(dtype, n), mu_p(dtype, n), x_p(dtype, n), z(dtype, samples * n), dz(dtype, samples * n);
  Buffer kl(Dtype::f32, kRows), dkl(Dtype::f32, kRows), dmu(dtype, n), dx(dtype, n), dmu_p(dtype, n), dx_p(dtype, n);
  mu.fill(1, false), x.fill(2, positive), mu_p.fill(3, false), x_p.fill(4, positive), dz.fill(5, false),
      dkl.fill(6, false);
  LatentArguments a;
  a.options = {param, .125, clamped, -.5, 1};
  a.n = a.eps.n = n, a.samples = samples, a.rows = kRows, a.cols = cols, a.eps.group = cols, a.eps.seed = seeds;
  a.mu = mu.t, a.x = x.t;
  if (prior) a.mu_p = mu_p.t, a.x_p = x_p.t;
  LatentArguments back = a;
  a.z = z.t, a.kl = kl.t;
  latent().forward(a, threads);
  back.dz = dz.t, back.dkl = dkl.t, back.dmu = dmu.t, back.dx = dx.t;
  if (prior) back.dmu_p = dmu_p.t, back.dx_p = dx_p.t;
  latent().backward(back, threads);
  for (const Buffer* b : {&z, &kl, &dmu, &dx, &dmu_p, &dx_p}) b->write();
}

}  // namespace

int main() {
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
    for (Param param : {Param::logvar, Param::logstd, Param::std, Param::softplus})
      for (bool prior : {false, true})
        for (bool clamped : {false, true})
          for (int64_t cols : {(int64_t)1, (int64_t)20, (int64_t)3000})
            for (int64_t samples : {1, 2}) call(dtype, param, prior, clamped, cols, samples, 2);
}
