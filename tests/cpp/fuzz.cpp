// Fuzzes the kernels. Each input is a string of bytes that decides op, options, shapes, strides, dtypes, seeds, threads
// and contents. Every buffer has its exact size, so that a sanitizer sees any step beyond it. Each call runs twice on
// every instruction set. Outputs must not depend on their previous contents or on threads, so every element is written;
// gaps and inputs must not change.
// With clang's -fsanitize=fuzzer, libFuzzer chooses the bytes. Else -DFUZZ_MAIN: `fuzz COUNT SEED`.
#include <algorithm>
#include <memory>

#include "bytes.h"
#include "ops/latent.h"
#include "ops/mixture.h"
#include "ops/noise.h"

using namespace reparam;

namespace {

int width(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

// A tensor in a heap buffer that ends where its last element ends.
struct Tensor {
  Shape shape, stride;
  Dtype dtype;
  int64_t low = 0, high = 0;  // offsets of the outermost elements
  std::unique_ptr<uint8_t[]> memory;

  size_t bytes() const { return product(shape) ? (size_t)((high - low + 1) * width(dtype)) : 0; }

  // Row-major, with gaps if asked; inputs also transposed, repeated (stride 0) and backwards.
  Tensor(Bytes& in, const Shape& shape, Dtype dtype, bool gaps, bool wild)
      : shape(shape), stride(shape.size()), dtype(dtype) {
    std::vector<int> order(shape.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = (int)i;
    if (wild)
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[(size_t)in.below((int)i)]);
    int64_t step = gaps ? 1 + in.below(3) : 1;
    for (size_t i = order.size(); i-- > 0;) {
      const int kind = wild ? in.below(8) : 7;
      stride[order[i]] = kind == 0 ? 0 : kind == 1 ? -step : step;
      step *= std::max<int64_t>(shape[order[i]], 1);
      if (gaps) step += in.below(4);
    }
    for (size_t i = 0; i < shape.size(); ++i) (stride[i] < 0 ? low : high) += (shape[i] - 1) * stride[i];
    memory.reset(new uint8_t[bytes()]);
  }

  void fill(uint64_t state, bool wild) {
    for (size_t at = 0; at < bytes(); at += (size_t)width(dtype)) {
      const uint64_t word = mix(state);
      const double tame = (double)(int64_t)(word >> 11) * 0x1p-51 - 2;  // in [-2, 2)
      const float narrow = (float)tame;
      uint32_t top;
      std::memcpy(&top, &narrow, 4);
      const uint16_t half = (uint16_t)(dtype == Dtype::bf16 ? top >> 16 : 0x3000 | (word & 0x8fff));
      const void* from = wild                  ? (const void*)&word
                         : dtype == Dtype::f64 ? (const void*)&tame
                         : dtype == Dtype::f32 ? (const void*)&narrow
                                               : (const void*)&half;
      std::memcpy(memory.get() + at, from, (size_t)width(dtype));
    }
  }

  // As the binding makes it, without dims of size 1 and with neighbouring dims merged.
  Operand operand() const {
    Operand o;
    o.data = bytes() ? memory.get() - low * width(dtype) : nullptr;
    o.dtype = dtype;
    for (size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] == 1) continue;
      if (o.ndim > 0 && o.stride[o.ndim - 1] == shape[i] * stride[i]) {
        o.size[o.ndim - 1] *= shape[i];
        o.stride[o.ndim - 1] = stride[i];
      } else {
        o.size[o.ndim] = shape[i];
        o.stride[o.ndim++] = stride[i];
      }
    }
    return o;
  }

  // The byte offset of element i, in row-major order.
  size_t offset(int64_t i) const {
    int64_t at = -low;
    for (size_t k = shape.size(); k-- > 0; i /= shape[k]) at += i % shape[k] * stride[k];
    return (size_t)(at * width(dtype));
  }

  bool is_nan(const uint8_t* at) const {
    uint64_t x = 0;
    std::memcpy(&x, at, (size_t)width(dtype));
    const uint64_t infinity = dtype == Dtype::f64   ? 0x7ff0000000000000u
                              : dtype == Dtype::f32 ? 0x7f800000u
                              : dtype == Dtype::f16 ? 0x7c00u
                                                    : 0x7f80u;
    const uint64_t sign = (uint64_t)1 << (8 * width(dtype) - 1);
    return (x & (sign - 1)) > infinity;
  }
};

using Results = std::vector<std::vector<uint8_t>>;

// The tensors of a call.
struct Tensors {
  Bytes& in;
  uint64_t state = in.word();
  bool wild = in.flip();  // contents of any bits
  std::vector<std::unique_ptr<Tensor>> all;
  std::vector<Tensor*> inputs, outputs;

  void read(bool wanted, Operand& to, const Shape& of, Dtype type, bool whole = false) {
    if (!wanted) return;
    all.emplace_back(whole ? new Tensor(in, of, type, false, false) : new Tensor(in, of, type, in.flip(), in.flip()));
    inputs.push_back(all.back().get());
    inputs.back()->fill(mix(state), wild);
    to = inputs.back()->operand();
  }
  void write(bool wanted, Operand& to, const Shape& of, Dtype type, bool gaps) {
    if (!wanted) return;
    all.emplace_back(new Tensor(in, of, type, gaps, false));
    outputs.push_back(all.back().get());
    to = outputs.back()->operand();
  }
};

// Runs the call on outputs that hold `filling` and returns their elements, with one NaN for all.
template <class Run>
Results results(const Run& run, int threads, std::vector<Tensor*>& outputs, uint8_t filling) {
  for (Tensor* t : outputs) std::memset(t->memory.get(), filling, t->bytes());
  run(threads);
  Results all;
  for (Tensor* t : outputs) {
    const size_t size = (size_t)width(t->dtype);
    const int64_t n = product(t->shape);
    std::vector<uint8_t> elements((size_t)n * size), gaps(t->memory.get(), t->memory.get() + t->bytes());
    for (int64_t i = 0; i < n; ++i) {
      const uint8_t* at = t->memory.get() + t->offset(i);
      if (t->is_nan(at))
        std::memset(&elements[(size_t)i * size], 0xff, size);
      else
        std::memcpy(&elements[(size_t)i * size], at, size);
      std::memset(&gaps[t->offset(i)], filling, size);
    }
    for (uint8_t byte : gaps) MUST(byte == filling);
    all.push_back(std::move(elements));
  }
  return all;
}

// Runs the call twice on each instruction set.
template <class Run>
void check(Bytes& in, Tensors& tensors, const Run& run) {
  std::vector<std::vector<uint8_t>> before;
  for (const Tensor* t : tensors.inputs) before.emplace_back(t->memory.get(), t->memory.get() + t->bytes());
  const int counts[] = {1, 2, 3, 0, -1, 7, INT32_MAX};
  const int threads = counts[in.below(7)];
  Results first;
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    const Results one = results(run, 1, tensors.outputs, 0x55), two = results(run, threads, tensors.outputs, 0xaa);
    MUST(one == two);
    if (first.empty()) first = one;
    MUST(one == first);
  }
  for (size_t i = 0; i < before.size(); ++i)
    MUST(before[i].empty() || !std::memcmp(before[i].data(), tensors.inputs[i]->memory.get(), before[i].size()));
}

enum class Op { randn, forward, backward };

// A call of the latent op or the noise.
void call(Bytes& in) {
  const Op op = (Op)in.below(3);
  const Dtype dtype = (Dtype)in.below(4), sums = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const int64_t sizes[] = {0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 20, 63, 255, 1023, 1024, 1025, 1029, 2065, 40000};
  Shape shape;
  const int ndim = in.below(8) ? in.below(5) : in.below(kMaxDims + 1);
  for (int64_t n = 1; (int)shape.size() < ndim;) {
    int64_t size = sizes[in.below(in.flip() ? 20 : 6)];
    if (n * size > 60000) size = 1;
    shape.push_back(size);
    n *= std::max<int64_t>(size, 1);
  }
  Shape z_shape;
  for (int i = in.below(3); i > 0 && (int)shape.size() + i <= kMaxDims && op != Op::randn; --i)
    z_shape.push_back(in.below(4));
  LatentArguments a;
  a.samples = product(z_shape);
  z_shape.insert(z_shape.end(), shape.begin(), shape.end());
  a.use_f64 = dtype == Dtype::f64;
  a.n = a.eps.n = product(shape);
  if (a.n == 0) return;  // only forward has something to do, and the fuzzer of the binding tests it
  a.options.param = (Param)in.below(4);
  a.options.min_std = in.real(), a.options.clamped = in.flip(), a.options.low = in.real(), a.options.high = in.real();
  const bool from_z = op == Op::randn || in.flip(), density = op != Op::randn && from_z && in.flip();
  const bool kl = op != Op::randn && !density && (!from_z || in.flip());
  const bool given = op != Op::randn && from_z && in.flip(), prior = op != Op::randn && in.flip();
  a.options.minus_log_p = density && in.flip(), a.options.path_derivative = density && in.flip();
  a.options.tanh = density && !a.options.minus_log_p && in.flip();
  const Dtype prior_dtype = in.flip() ? sums : dtype;
  Shape row(shape.begin(), shape.begin() + in.below((int)shape.size() + 1));
  if (kl || density) a.rows = product(row), a.cols = a.n / a.rows;
  Shape rows(z_shape.begin(), z_shape.end() - (int64_t)(shape.size() - row.size()));  // of log_q: the sample dims too

  Tensors tensors{in};
  const int64_t items = !shape.empty() && in.flip() ? shape[0] : 1;
  std::unique_ptr<int64_t[]> seed(new int64_t[items]);
  for (int64_t i = 0; i < items; ++i) seed[i] = (int64_t)mix(tensors.state);
  if (from_z && !given) a.eps.seed = seed.get(), a.eps.group = a.n / items;

  if (op != Op::randn) {
    tensors.read(true, a.mu, shape, dtype), tensors.read(true, a.x, shape, dtype);
    tensors.read(prior, a.mu_p, shape, prior_dtype), tensors.read(prior, a.x_p, shape, prior_dtype);
    tensors.read(given, a.eps.given, z_shape, dtype);
  }
  if (op == Op::backward) {
    const bool some = a.samples > 0;
    tensors.read(from_z && some && (!density || in.flip()), a.dz, z_shape, dtype), tensors.read(kl, a.dkl, row, sums);
    tensors.read(density && some, a.dlog_q, rows, sums);
    tensors.write(in.flip(), a.dmu, shape, dtype, true), tensors.write(in.flip(), a.dx, shape, dtype, true);
    const Dtype type = in.flip() ? sums : dtype;
    tensors.write(prior && (kl || density) && in.flip(), a.dmu_p, shape, type, true);
    tensors.write(prior && (kl || density) && in.flip(), a.dx_p, shape, type, true);
  } else {
    tensors.write(from_z, a.z, z_shape, dtype, false);
    tensors.write(kl, a.kl, row, sums, false), tensors.write(density, a.log_q, rows, sums, false);
  }
  check(in, tensors, [&](int threads) {
    switch (op) {
      case Op::randn: return noise().fill({a.eps, a.use_f64, a.z}, threads);
      case Op::forward: return latent().forward(a, threads);
      case Op::backward: return latent().backward(a, threads);
    }
  });
}

// A call of the mixture op.
void mixture_call(Bytes& in) {
  const int64_t points[] = {0, 1, 2, 15, 16, 17, 63, 64, 65, 129, 300}, dims[] = {0, 1, 2, 3, 7, 8, 9, 17, 63, 65};
  const int64_t some[] = {1, 2, 3, 15, 16, 17, 33, 150};
  const Dtype dtype = (Dtype)in.below(4), sums = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  MixtureArguments a;
  a.items = points[in.below(11)], a.components = some[in.below(8)], a.cols = dims[in.below(10)];
  if (a.items * a.components * a.cols > 60000) a.items = 5, a.cols = std::min<int64_t>(a.cols, 9);
  a.use_f64 = dtype == Dtype::f64;
  a.options.param = (Param)in.below(4);
  a.options.min_std = in.real(), a.options.clamped = in.flip(), a.options.low = in.real(), a.options.high = in.real();
  const bool backward = in.flip(), joint = in.flip(), of_dims = !joint || in.flip(), weighted = in.flip();
  const bool saving = backward || in.flip();
  a.weights_by_item = weighted && in.flip();
  const Shape z{a.items, a.cols}, mu{a.components, a.cols};
  const Shape weights = a.weights_by_item ? Shape{a.items, a.components} : Shape{a.components};
  Tensors tensors{in};
  tensors.read(true, a.z, z, dtype), tensors.read(true, a.mu, mu, dtype), tensors.read(true, a.x, mu, dtype);
  tensors.read(weighted, a.log_weights, weights, in.flip() ? sums : dtype);
  const Shape joint_sums{2, a.items}, dims_sums{2, a.items, a.cols};
  if (backward) {
    tensors.read(joint, a.joint, {a.items}, sums), tensors.read(of_dims, a.dims, z, sums);
    tensors.read(joint, a.joint_sums, joint_sums, sums, true),
        tensors.read(of_dims, a.dims_sums, dims_sums, sums, true);
    tensors.write(in.flip(), a.dz, z, dtype, false);
    tensors.write(in.flip(), a.dmu, mu, dtype, false), tensors.write(in.flip(), a.dx, mu, dtype, false);
    tensors.write(weighted && in.flip(), a.dlog_weights, weights, sums, false);
  } else {
    tensors.write(joint, a.joint, {a.items}, sums, false), tensors.write(of_dims, a.dims, z, sums, false);
    tensors.write(joint && saving, a.joint_sums, joint_sums, sums, false);
    tensors.write(of_dims && saving, a.dims_sums, dims_sums, sums, false);
  }
  check(in, tensors, [&](int threads) {
    if (backward)
      mixture().backward(a, threads);
    else
      mixture().forward(a, threads);
  });
}

// Checks that chunks cover all elements without overlap, for any sizes; this needs no memory.
void chunks(Bytes& in) {
  constexpr uint64_t kMaxSpan = (uint64_t)1 << 62;  // the binding takes no more elements
  const uint64_t a = in.word() >> in.below(64), b = in.word() >> in.below(64);
  const uint64_t cols = a % kMaxSpan + 1, rows = b % (kMaxSpan / cols) + 1;
  const Chunks all((int64_t)(rows * cols), (int64_t)cols);
  MUST(all.count > 0 && all.rows == (int64_t)rows && all.begin(0) == 0 &&
       all.end(all.count - 1) == all.rows * all.cols);
  for (int64_t i : {(int64_t)0, all.count / 2, (int64_t)(in.word() % (uint64_t)all.count), all.count - 1}) {
    const int64_t n = all.end(i) - all.begin(i);
    MUST(n > 0 && n <= kChunk);
    if (i > 0) MUST(all.end(i - 1) == all.begin(i));
    if (all.per_row == 1) MUST(all.begin(i) % all.cols == 0 && n % all.cols == 0);
    if (all.per_row > 1)
      MUST(i / all.per_row == all.begin(i) / all.cols && i / all.per_row == (all.end(i) - 1) / all.cols);
  }
}

// Checks a window of the noise, anywhere in a stream.
void window(Bytes& in) {
  const int64_t seed = (int64_t)in.word(), start = (int64_t)(in.word() >> 1 >> in.below(63));
  const int n = 1 + (int)(in.word() % kChunk);
  std::vector<float> first;
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    std::unique_ptr<float[]> eps(new float[n]);
    noise().test_eps(seed, start, n, eps.get());
    for (int i = 0; i < n; ++i) MUST(eps[i] > -6.8f && eps[i] < 6.8f);
    std::vector<float> here(eps.get(), eps.get() + n);
    if (first.empty()) first = here;
    MUST(here == first);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in{data, size};
  switch (in.below(10)) {
    case 0: chunks(in); break;
    case 1: window(in); break;
    case 2:
    case 3: mixture_call(in); break;
    default: call(in);
  }
  return 0;
}

#ifdef FUZZ_MAIN
int main(int argc, char** argv) {
  MUST(argc == 3);
  const long count = std::atol(argv[1]);
  uint64_t state = std::strtoull(argv[2], nullptr, 10);
  for (long i = 0; i < count; ++i) {
    uint64_t words[48];
    for (uint64_t& word : words) word = mix(state);
    LLVMFuzzerTestOneInput((const uint8_t*)words, sizeof words);
  }
  std::printf("%ld inputs\n", count);
}
#endif
