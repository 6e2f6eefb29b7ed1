// The Python module reparam_kernels._C. Each op's binding borrows its tensors, checks everything that the kernels rely
// on, releases the GIL and runs. Nothing that Python can pass here may crash the process.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "core/borrowed_tensor.h"
#include "ops/latent.h"
#include "ops/mixture.h"
#include "ops/noise.h"

namespace py = pybind11;

namespace reparam {
namespace {

template <size_t N>
using Tensors = std::array<BorrowedTensor, N>;

template <size_t>
using Handle = py::handle;

// Defines the function name(options, threads, tensors...) with one tensor for each of `arguments`. It takes handles
// rather than py::args, whose tuple costs 50 ns.
template <class OpOptions, size_t N, size_t... I>
void def_op(py::module_& m, const char* name, const char* const (&arguments)[N],
            void (*op)(const OpOptions&, int threads, const Tensors<N>&), std::index_sequence<I...>) {
  m.def(name, [op, &arguments](const OpOptions& options, int threads, Handle<I>... objects) {
    op(options, threads, {BorrowedTensor(arguments[I], objects)...});
  });
}
template <class OpOptions, size_t N>
void def_op(py::module_& m, const char* name, const char* const (&arguments)[N],
            void (*op)(const OpOptions&, int threads, const Tensors<N>&)) {
  def_op(m, name, arguments, op, std::make_index_sequence<N>());
}

// The type of the arithmetic, and of sums.
Dtype compute_dtype(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// `seed` has one element, or one for each item of the leading dim of `shape`.
void set_seed(EpsSource& eps, const BorrowedTensor& seed, const BorrowedTensor& shape) {
  const int64_t count = seed.numel();
  if (!seed.is_int64() || (count != 1 && count != (shape.t.ndim > 0 ? shape.t.shape[0] : 1))) throw_invalid("seed");
  seed.check_contiguous();
  eps.seed = (const int64_t*)seed.t.data;
  eps.group = count > 1 ? eps.n / count : eps.n;
}

// The place of a call's tensor in a larger one, whose noise it takes there. Both are empty without a window.
struct Window {
  std::vector<int64_t> whole, start;
};

// Sets where the elements of `eps`, of the shape of `shape`, lie in a larger whole. Call set_seed before.
void set_window(EpsSource& eps, const Window& window, const BorrowedTensor& shape) {
  const auto& [whole, start] = window;
  if (whole.empty() && start.empty()) return;
  const int ndim = shape.t.ndim;
  if ((int)whole.size() != ndim || (int)start.size() != ndim) throw_invalid("window");
  const bool seed_for_each = eps.group != eps.n;  // item of the leading dim
  int64_t n = 1, origin = 0;
  std::vector<int64_t> strides(ndim);
  for (int i = ndim - 1; i >= 0; --i) {
    int64_t end;
    if (start[i] < 0 || __builtin_add_overflow(start[i], shape.t.shape[i], &end) || end > whole[i])
      throw_invalid("window");
    if (seed_for_each && i == 0) break;  // the index restarts in each item
    strides[i] = n;
    if (__builtin_mul_overflow(n, whole[i] > 1 ? whole[i] : 1, &n) || n > kMaxSpan) throw_invalid("window");
    origin += start[i] * strides[i];
  }
  eps.windowed = true;
  eps.window_start = origin;
  eps.window_group = n;
  eps.window = coalesced(shape.t.shape, strides.data(), ndim);
}

void require_isa(const std::string& name) {
  if (!set_isa(name)) throw_invalid("isa");
}

// ---- noise

void randn(py::handle seed_, py::handle out_, int threads, std::vector<int64_t> whole, std::vector<int64_t> start) {
  const BorrowedTensor seed("seed", seed_), out("out", out_);
  if (!seed) throw_invalid("seed");
  if (!out) throw_invalid("out");
  NoiseArguments a;
  a.use_f64 = out.dtype() == Dtype::f64;
  a.eps.n = out.numel();
  set_seed(a.eps, seed, out);
  set_window(a.eps, {std::move(whole), std::move(start)}, out);
  out.check_contiguous();
  a.out = out.operand();
  out.will_be_written();
  py::gil_scoped_release release;
  noise().fill(a, threads);
}

std::array<uint32_t, 4> test_philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  std::array<uint32_t, 4> words;
  noise().test_philox(counter.data(), key.data(), words.data());
  return words;
}

// Turns pairs of 32-bit words into pairs of float32 normals, all as bytes.
py::bytes test_box_muller(const std::string& radius, const std::string& angle) {
  if (radius.size() % 4 != 0) throw_invalid("radius");
  if (angle.size() != radius.size()) throw_invalid("angle");
  std::string eps(2 * radius.size(), '\0');
  noise().test_box_muller((const uint32_t*)radius.data(), (const uint32_t*)angle.data(), (int)(radius.size() / 4),
                          (float*)eps.data());
  return eps;
}

// Returns eps[first, first + n) of a seed as bytes, without making what comes before.
py::bytes test_eps(int64_t seed, int64_t first, int n) {
  if (first < 0) throw_invalid("first");
  if (n < 1 || n > kChunk) throw_invalid("n");
  std::string eps(n * sizeof(float), '\0');
  noise().test_eps(seed, first, n, (float*)eps.data());
  return eps;
}

// ---- the latent layer

struct CallOptions : Options {
  Window window;
};

CallOptions make_options(Param param, double min_std, bool clamped, double low, double high, int event_ndim,
                         bool minus_log_p, bool tanh, bool path_derivative, std::vector<int64_t> whole,
                         std::vector<int64_t> start) {
  if (param < Param::logvar || param > Param::softplus) throw_invalid("param");  // Python makes an enum of any int
  if (minus_log_p && tanh) throw_invalid("tanh");
  if (event_ndim < 0) throw_invalid("event_ndim");
  return {{param, min_std, clamped, low, high, event_ndim, minus_log_p, tanh, path_derivative},
          {std::move(whole), std::move(start)}};
}

// Makes the arguments that forward and backward share. `z` is z or dz, `kl` is kl or dkl, `log_q` is log_q or dlog_q.
LatentArguments latent_arguments(const CallOptions& options, const BorrowedTensor& mu, const BorrowedTensor& x,
                                 const BorrowedTensor& mu_p, const BorrowedTensor& x_p, const BorrowedTensor& seed,
                                 const BorrowedTensor& eps, const BorrowedTensor& z, const BorrowedTensor& kl,
                                 const BorrowedTensor& log_q) {
  if (!mu) throw_invalid("mu");
  if (!x) throw_invalid("x");
  if (!mu_p != !x_p) throw_invalid(mu_p ? "x_p" : "mu_p");
  const Dtype dtype = mu.dtype();
  x.check_dtype(dtype);
  for (const BorrowedTensor* p : {&mu_p, &x_p}) {  // numbers keep the precision of the arithmetic
    if (*p && p->dtype() != dtype) p->check_dtype(compute_dtype(dtype));
  }
  for (const BorrowedTensor* t : {&x, &mu_p, &x_p}) t->check_shape(mu);

  LatentArguments a;
  a.options = options;
  a.use_f64 = dtype == Dtype::f64;
  a.n = a.eps.n = mu.numel();
  if (z) {  // sample dims, then the dims of mu
    const int sample_dims = z.t.ndim - mu.t.ndim;
    z.check_dtype(dtype);
    if (sample_dims < 0 || !z.same_sizes(sample_dims, mu, 0, mu.t.ndim)) throw_invalid(z.name);
    a.samples = z.product(0, sample_dims);
  }
  if (log_q) {  // sample dims, then the leading dims of mu; each element sums over the others
    const int kept = mu.t.ndim - options.event_ndim, sample_dims = log_q.t.ndim - kept;
    log_q.check_dtype(compute_dtype(dtype));
    if (kept < 0 || sample_dims < 0 || !log_q.same_sizes(sample_dims, mu, 0, kept)) throw_invalid(log_q.name);
    const int64_t samples = log_q.product(0, sample_dims);
    if (kl || (z && samples != a.samples)) throw_invalid(log_q.name);
    a.samples = samples;
    a.rows = mu.product(0, kept);
    a.cols = mu.product(kept, mu.t.ndim);
  }
  if (z || log_q) {
    if (!seed == !eps) throw_invalid("seed");
    if (seed) {
      set_seed(a.eps, seed, mu);
      set_window(a.eps, options.window, mu);
      int64_t all;
      if (__builtin_mul_overflow(a.eps.window_group, a.samples, &all) || all > kMaxSpan) throw_invalid("window");
    }
    eps.check_dtype(dtype);
    if (eps) {  // with as many samples, in any sample shape
      const int dims = eps.t.ndim - mu.t.ndim;
      if (dims < 0 || !eps.same_sizes(dims, mu, 0, mu.t.ndim) || eps.product(0, dims) != a.samples)
        throw_invalid("eps");
    }
    a.eps.given = eps.operand();
  }
  if (kl) {  // the leading dims of mu; each element sums over the others
    kl.check_dtype(compute_dtype(dtype));
    if (kl.t.ndim > mu.t.ndim || !kl.same_sizes(0, mu, 0, kl.t.ndim)) throw_invalid(kl.name);
    a.rows = kl.numel();
    a.cols = mu.product(kl.t.ndim, mu.t.ndim);
  }
  a.mu = mu.operand();
  a.x = x.operand();
  a.mu_p = mu_p.operand();
  a.x_p = x_p.operand();
  return a;
}

constexpr const char* kForward[] = {"mu", "x", "mu_p", "x_p", "seed", "eps", "z", "kl", "log_q"};

void latent_forward(const CallOptions& options, int threads, const Tensors<std::size(kForward)>& tensors) {
  const auto& [mu, x, mu_p, x_p, seed, eps, z, kl, log_q] = tensors;
  if (log_q && !z) throw_invalid("z");
  LatentArguments a = latent_arguments(options, mu, x, mu_p, x_p, seed, eps, z, kl, log_q);
  for (const BorrowedTensor* t : {&z, &kl, &log_q}) {
    a.cols == 1 || t == &z ? t->check_no_overlap() : t->check_contiguous();  // sums are written in row-major order
  }
  a.z = z.operand();
  a.kl = kl.operand();
  a.log_q = log_q.operand();
  for (const BorrowedTensor* t : {&z, &kl, &log_q}) t->will_be_written();
  py::gil_scoped_release release;
  latent().forward(a, threads);
}

constexpr const char* kBackward[] = {"mu",  "x",      "mu_p", "x_p", "seed",  "eps", "dz",
                                     "dkl", "dlog_q", "dmu",  "dx",  "dmu_p", "dx_p"};

void latent_backward(const CallOptions& options, int threads, const Tensors<std::size(kBackward)>& tensors) {
  const auto& [mu, x, mu_p, x_p, seed, eps, dz, dkl, dlog_q, dmu, dx, dmu_p, dx_p] = tensors;
  LatentArguments a = latent_arguments(options, mu, x, mu_p, x_p, seed, eps, dz, dkl, dlog_q);
  for (const BorrowedTensor* t : {&dmu, &dx, &dmu_p, &dx_p}) {
    t->check_shape(mu);
    t->check_no_overlap();
  }
  for (const BorrowedTensor* t : {&dmu, &dx}) t->check_dtype(mu.dtype());
  for (const BorrowedTensor* t : {&dmu_p, &dx_p}) {
    if (*t && !(mu_p && (dkl || dlog_q))) throw_invalid(t->name);
    if (*t && t->dtype() != mu.dtype()) t->check_dtype(compute_dtype(mu.dtype()));  // not rounded before it is summed
  }
  if (a.samples > 0) {  // a sum over no samples is absent
    a.dz = dz.operand();
    a.dlog_q = dlog_q.operand();
  }
  a.dkl = dkl.operand();
  a.dmu = dmu.operand();
  a.dx = dx.operand();
  a.dmu_p = dmu_p.operand();
  a.dx_p = dx_p.operand();
  for (const BorrowedTensor* t : {&dmu, &dx, &dmu_p, &dx_p}) t->will_be_written();
  py::gil_scoped_release release;
  latent().backward(a, threads);
}

// ---- the mixture

// Makes the arguments that forward and backward share. `joint` and `dims` are the outputs or their gradients.
MixtureArguments mixture_arguments(const Options& options, const BorrowedTensor& z, const BorrowedTensor& mu,
                                   const BorrowedTensor& x, const BorrowedTensor& log_weights,
                                   const BorrowedTensor& joint, const BorrowedTensor& dims,
                                   const BorrowedTensor& joint_sums, const BorrowedTensor& dims_sums) {
  if (!z) throw_invalid("z");
  if (!mu) throw_invalid("mu");
  if (!x) throw_invalid("x");
  const Dtype dtype = mu.dtype(), sums = compute_dtype(dtype);
  z.check_dtype(dtype);
  x.check_dtype(dtype);
  x.check_shape(mu);
  const int event = mu.t.ndim - 1, batch = z.t.ndim - event;
  if (event < 0 || mu.t.shape[0] < 1) throw_invalid("mu");
  if (batch < 0 || !z.same_sizes(batch, mu, 1, event)) throw_invalid("z");
  MixtureArguments a;
  a.options = options;
  a.use_f64 = dtype == Dtype::f64;
  a.items = z.product(0, batch);
  a.components = mu.t.shape[0];
  a.cols = mu.product(1, mu.t.ndim);
  if (log_weights) {
    if (log_weights.dtype() != dtype) log_weights.check_dtype(sums);
    a.weights_by_item = log_weights.t.ndim != 1;
    const int leading = a.weights_by_item ? batch : 0;
    if (log_weights.t.ndim != leading + 1 || !log_weights.same_sizes(0, z, 0, leading) ||
        log_weights.t.shape[leading] != a.components)
      throw_invalid("log_weights");
  }
  for (const BorrowedTensor* t : {&joint, &dims, &joint_sums, &dims_sums}) t->check_dtype(sums);
  if (joint && (joint.t.ndim != batch || !joint.same_sizes(0, z, 0, batch))) throw_invalid(joint.name);
  dims.check_shape(z);
  for (const auto& [saved, of] : {std::pair(&joint_sums, &joint), std::pair(&dims_sums, &dims)}) {
    if (!*saved) continue;
    if (!*of || saved->t.ndim != of->t.ndim + 1 || saved->t.shape[0] != 2 || !saved->same_sizes(1, *of, 0, of->t.ndim))
      throw_invalid(saved->name);
    saved->check_contiguous();
  }
  a.z = z.operand();
  a.mu = mu.operand();
  a.x = x.operand();
  a.log_weights = log_weights.operand();
  a.joint = joint.operand();
  a.dims = dims.operand();
  a.joint_sums = joint_sums.operand();
  a.dims_sums = dims_sums.operand();
  return a;
}

constexpr const char* kMixtureForward[] = {"z", "mu", "x", "log_weights", "joint", "dims", "joint_sums", "dims_sums"};

void mixture_forward(const CallOptions& options, int threads, const Tensors<std::size(kMixtureForward)>& tensors) {
  const auto& [z, mu, x, log_weights, joint, dims, joint_sums, dims_sums] = tensors;
  const MixtureArguments a = mixture_arguments(options, z, mu, x, log_weights, joint, dims, joint_sums, dims_sums);
  joint.check_contiguous();
  dims.check_contiguous();
  py::gil_scoped_release release;
  mixture().forward(a, threads);
}

constexpr const char* kMixtureBackward[] = {"z",          "mu",        "x",  "log_weights", "djoint", "ddims",
                                            "joint_sums", "dims_sums", "dz", "dmu",         "dx",     "dlog_weights"};

void mixture_backward(const CallOptions& options, int threads, const Tensors<std::size(kMixtureBackward)>& tensors) {
  const auto& [z, mu, x, log_weights, djoint, ddims, joint_sums, dims_sums, dz, dmu, dx, dlog_weights] = tensors;
  MixtureArguments a = mixture_arguments(options, z, mu, x, log_weights, djoint, ddims, joint_sums, dims_sums);
  if (djoint && !joint_sums) throw_invalid("joint_sums");
  if (ddims && !dims_sums) throw_invalid("dims_sums");
  dz.check_shape(z);
  for (const BorrowedTensor* t : {&dmu, &dx}) t->check_shape(mu);
  for (const BorrowedTensor* t : {&dz, &dmu, &dx}) t->check_dtype(mu.dtype());
  if (dlog_weights && !log_weights) throw_invalid("dlog_weights");
  dlog_weights.check_shape(log_weights);
  dlog_weights.check_dtype(compute_dtype(mu.dtype()));
  for (const BorrowedTensor* t : {&dz, &dmu, &dx, &dlog_weights}) t->check_contiguous();
  a.dz = dz.operand();
  a.dmu = dmu.operand();
  a.dx = dx.operand();
  a.dlog_weights = dlog_weights.operand();
  py::gil_scoped_release release;
  mixture().backward(a, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of reparam_kernels";
  py::register_exception<InvalidArgument>(m, "InvalidArgument", PyExc_ValueError);
  m.def("bind_tensor_type", &bind_tensor_type, py::arg("tensor"), py::arg("parameter"));
  m.def("plain_pair_ndim", &plain_pair_ndim);
  m.def("available_isas", &available_isas);
  m.def("isa", &isa);
  m.def("set_isa", &require_isa, py::arg("isa"));
  m.def("has_openmp", &has_openmp);

  m.def("randn", &randn, py::arg("seed"), py::arg("out"), py::arg("threads"), py::arg("whole") = py::tuple(),
        py::arg("start") = py::tuple());
  m.def("test_philox", &test_philox, py::arg("counter"), py::arg("key"));
  m.def("test_box_muller", &test_box_muller, py::arg("radius"), py::arg("angle"));
  m.def("test_eps", &test_eps, py::arg("seed"), py::arg("first"), py::arg("n"));

  py::enum_<Param>(m, "Param")
      .value("logvar", Param::logvar)
      .value("logstd", Param::logstd)
      .value("std", Param::std)
      .value("softplus", Param::softplus);
  py::class_<CallOptions>(m, "Options")
      .def(py::init(&make_options), py::arg("param"), py::arg("min_std"), py::arg("clamped"), py::arg("low"),
           py::arg("high"), py::arg("event_ndim") = 0, py::arg("minus_log_p") = false, py::arg("tanh") = false,
           py::arg("path_derivative") = false, py::arg("whole") = py::tuple(), py::arg("start") = py::tuple());
  def_op(m, "latent_forward", kForward, &latent_forward);
  def_op(m, "latent_backward", kBackward, &latent_backward);
  def_op(m, "mixture_forward", kMixtureForward, &mixture_forward);
  def_op(m, "mixture_backward", kMixtureBackward, &mixture_backward);
}

}  // namespace reparam
