// The Python module reparam_kernels._C: reads tensors through DLPack, checks everything a kernel relies on, releases
// the GIL, runs. Nothing that Python can pass here may crash the process.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "dlpack.h"

namespace py = pybind11;

namespace reparam {
namespace {

// ---- tensors

const dlpack::ExchangeApi* exchange = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr;

void bind_tensor_type(py::type tensor, py::type parameter) {
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* api = (const dlpack::ExchangeApi*)PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!api) throw py::error_already_set();
  if (api->major != 1) throw std::runtime_error("unknown DLPack version " + std::to_string(api->major));
  exchange = api;
  tensor_type = tensor.release().ptr();
  parameter_type = parameter.release().ptr();
}

[[noreturn]] void refuse(const char* name, const std::string& must, const std::string& got) {
  throw std::invalid_argument("reparam_kernels._C: " + std::string(name) + " must " + must + "; got " + got +
                              ". Call the functions of reparam_kernels, which prepare every tensor.");
}

constexpr int64_t kMost = (int64_t)1 << 62;  // elements; beyond it, the arithmetic here and in problem.h would overflow

struct View {
  dlpack::Tensor t{};
  const char* name = nullptr;  // null: None was passed

  explicit operator bool() const { return name != nullptr; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
    return n;
  }
  std::string shape() const {
    std::string s = "(";
    for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.shape[i]);
    return s + (t.ndim == 1 ? ",)" : ")");
  }
};

// A view without strides of its own may be of any size, and an empty one may have any strides. An empty dim counts as
// one, so that the product of any of the dims stays in bounds.
void check_extent(const View& v) {
  int64_t n = 1, span = 0;
  for (int i = 0; i < v.t.ndim; ++i) {
    const int64_t size = v.t.shape[i], steps = size > 1 ? size - 1 : 0;
    int64_t reach;
    if (size < 0) refuse(v.name, "have no negative size", v.shape());
    if (__builtin_mul_overflow(n, steps + 1, &n) || n > kMost) refuse(v.name, "have at most 2**62 elements", v.shape());
    if (__builtin_mul_overflow(steps, v.t.strides[i], &reach) || reach <= -kMost || reach >= kMost ||
        (span += reach < 0 ? -reach : reach) >= kMost)
      refuse(v.name, "span less than 2**62 elements", "stride " + std::to_string(v.t.strides[i]));
  }
}

View view(const char* name, py::handle object) {
  if (object.is_none()) return {};
  PyObject* type = (PyObject*)Py_TYPE(object.ptr());
  if (type != tensor_type && type != parameter_type)
    refuse(name, "be a plain torch.Tensor", py::str(py::handle(type)).cast<std::string>());
  View v;
  if (!exchange) throw std::runtime_error("reparam_kernels._C: no tensor type is bound. Import reparam_kernels.");
  if (exchange->borrow(object.ptr(), &v.t) != 0) {
    PyErr_Clear();  // meta and sparse tensors among others: the torch message is a stack trace
    refuse(name, "be a dense tensor with memory of its own", "one that DLPack cannot describe");
  }
  v.name = name;
  if (v.t.device_type != dlpack::kCpu)
    refuse(name, "be on the CPU", "DLPack device " + std::to_string(v.t.device_type));
  if (v.t.ndim < 0 || v.t.ndim > kMaxDims) refuse(name, "have at most 64 dims", std::to_string(v.t.ndim));
  if (v.t.ndim > 0 && !v.t.strides) refuse(name, "have strides", "a null pointer");
  check_extent(v);
  if (v.numel() == 0) return v;
  if (!v.t.data) refuse(name, "have memory", "a null pointer for shape " + v.shape());
  v.t.data = (char*)v.t.data + v.t.byte_offset;
  return v;
}

Dtype dtype_of(const View& v) {
  if (v.t.code == dlpack::kFloat && v.t.lanes == 1 && v.t.bits == 16) return Dtype::f16;
  if (v.t.code == dlpack::kFloat && v.t.lanes == 1 && v.t.bits == 32) return Dtype::f32;
  if (v.t.code == dlpack::kFloat && v.t.lanes == 1 && v.t.bits == 64) return Dtype::f64;
  if (v.t.code == dlpack::kBfloat && v.t.lanes == 1 && v.t.bits == 16) return Dtype::bf16;
  refuse(v.name, "be float16, bfloat16, float32 or float64",
         "DLPack type " + std::to_string(v.t.code) + ", " + std::to_string(v.t.bits) + " bits");
}

const char* dtype_name(Dtype d) {
  return d == Dtype::f16 ? "float16" : d == Dtype::bf16 ? "bfloat16" : d == Dtype::f32 ? "float32" : "float64";
}

// Dims of size 1 dropped, dims that lie one behind the other merged.
Operand operand(const View& v) {
  Operand o;
  if (!v) return o;
  o.data = v.t.data;
  o.dtype = dtype_of(v);
  for (int i = 0; i < v.t.ndim; ++i) {
    const int64_t size = v.t.shape[i], stride = v.t.strides[i];
    if (size == 1) continue;
    if (o.ndim > 0 && o.stride[o.ndim - 1] == size * stride) {
      o.size[o.ndim - 1] *= size;
      o.stride[o.ndim - 1] = stride;
    } else {
      o.size[o.ndim] = size;
      o.stride[o.ndim++] = stride;
    }
  }
  return o;
}

void check_contiguous(const View& v) {
  if (v.numel() == 0) return;
  int64_t stride = 1;
  for (int i = v.t.ndim - 1; v && i >= 0; --i) {
    if (v.t.shape[i] != 1 && v.t.strides[i] != stride) refuse(v.name, "be contiguous", "strides that are not");
    stride *= v.t.shape[i];
  }
}

// ---- checks

void check_dtype(const View& v, Dtype want) {
  if (v && dtype_of(v) != want) refuse(v.name, std::string("be ") + dtype_name(want), dtype_name(dtype_of(v)));
}

void check_like(const View& v, const View& mu) {
  if (!v) return;
  bool same = v.t.ndim == mu.t.ndim;
  for (int i = 0; same && i < mu.t.ndim; ++i) same = v.t.shape[i] == mu.t.shape[i];
  if (!same) refuse(v.name, "have the shape of mu, " + mu.shape(), v.shape());
}

// Gradients may be views, as the halves of a packed tensor are; no two elements may share memory.
void check_distinct(const View& v) {
  if (v.numel() == 0) return;
  for (int i = 0; v && i < v.t.ndim; ++i) {
    int64_t inner = 1;
    for (int k = i + 1; k < v.t.ndim; ++k) inner += (v.t.shape[k] - 1) * v.t.strides[k];
    if (v.t.shape[i] > 1 && v.t.strides[i] < inner)
      refuse(v.name, "have no overlap", "a stride smaller than the dim it spans");
  }
}

// z, eps, dz: sample dims, then mu's.
int64_t samples_of(const View& v, const View& mu) {
  const int extra = v.t.ndim - mu.t.ndim;
  bool ends = extra >= 0;
  for (int i = 0; ends && i < mu.t.ndim; ++i) ends = v.t.shape[extra + i] == mu.t.shape[i];
  if (!ends) refuse(v.name, "end in the shape of mu, " + mu.shape(), v.shape());
  int64_t samples = 1;
  for (int i = 0; i < extra; ++i) samples *= v.t.shape[i];
  return samples;
}

// kl, dkl: the leading dims of mu; what one of their elements sums over is the rest.
int64_t cols_of(const View& v, const View& mu) {
  bool leads = v.t.ndim <= mu.t.ndim;
  for (int i = 0; leads && i < v.t.ndim; ++i) leads = v.t.shape[i] == mu.t.shape[i];
  if (!leads) refuse(v.name, "have leading dims of mu, " + mu.shape(), v.shape());
  int64_t cols = 1;
  for (int i = v.t.ndim; i < mu.t.ndim; ++i) cols *= mu.t.shape[i];
  return cols;
}

void take_seed(Problem& p, const View& seed, int64_t items) {
  if (!seed) return;
  const int64_t count = seed.numel();
  if (seed.t.code != dlpack::kInt || seed.t.bits != 64 || seed.t.lanes != 1)
    refuse("seed", "be int64", "another dtype");
  if (count != 1 && count != items)
    refuse("seed", "have one element or " + std::to_string(items), std::to_string(count));
  check_contiguous(seed);
  p.seed = (const int64_t*)seed.t.data;
  p.group = count > 1 ? p.n / count : p.n;
}

// ---- the calls

// What forward and backward share: mu, its partner, the prior, and where eps comes from.
Problem problem_of(const Options& options, const View& mu, const View& x, const View& mu_p, const View& x_p) {
  if (!mu || !x) throw std::invalid_argument("reparam_kernels._C: mu and x must be given; got None.");
  if (!mu_p != !x_p) throw std::invalid_argument("reparam_kernels._C: mu_p and x_p go together; got one of them.");
  Problem p;
  const Dtype dtype = dtype_of(mu);
  p.options = options;
  p.wide = dtype == Dtype::f64;
  p.n = mu.numel();
  check_dtype(x, dtype);
  for (const View* v : {&mu_p, &x_p}) {
    // numbers keep the arithmetic's precision
    if (*v && dtype_of(*v) != dtype) check_dtype(*v, p.wide ? Dtype::f64 : Dtype::f32);
  }
  for (const View* v : {&x, &mu_p, &x_p}) check_like(*v, mu);
  p.mu = operand(mu);
  p.x = operand(x);
  p.mu_p = operand(mu_p);
  p.x_p = operand(x_p);
  return p;
}

void take_noise(Problem& p, const View& mu, const View& seed, const View& eps, const View& z) {
  if (!z) return;
  p.samples = samples_of(z, mu);
  if (!seed == !eps) throw std::invalid_argument("reparam_kernels._C: z takes one of seed and eps; got both or none.");
  check_dtype(eps, dtype_of(mu));
  if (eps && samples_of(eps, mu) != p.samples) refuse("eps", "have the shape of z, " + z.shape(), eps.shape());
  p.eps = operand(eps);
  take_seed(p, seed, mu.t.ndim > 0 ? mu.t.shape[0] : 1);
}

void forward(const Options& options, py::handle mu_, py::handle x_, py::handle mu_p_, py::handle x_p_, py::handle seed_,
             py::handle eps_, py::handle z_, py::handle kl_, int threads) {
  const View mu = view("mu", mu_), x = view("x", x_), mu_p = view("mu_p", mu_p_), x_p = view("x_p", x_p_);
  const View seed = view("seed", seed_), eps = view("eps", eps_), z = view("z", z_), kl = view("kl", kl_);
  Problem p = problem_of(options, mu, x, mu_p, x_p);
  take_noise(p, mu, seed, eps, z);
  check_dtype(z, dtype_of(mu));
  check_dtype(kl, p.wide ? Dtype::f64 : Dtype::f32);
  check_contiguous(z);
  check_contiguous(kl);
  if (kl) p.cols = cols_of(kl, mu);
  p.z = operand(z);
  p.kl = operand(kl);
  const int64_t empty_rows = kl && p.n == 0 ? kl.numel() : 0;  // empty sums
  py::gil_scoped_release release;
  for (int64_t i = 0; i < empty_rows; ++i) p.wide ? ((double*)p.kl.data)[i] = 0 : ((float*)p.kl.data)[i] = 0;
  run(Op::forward, p, threads);
}

void backward(const Options& options, py::handle mu_, py::handle x_, py::handle mu_p_, py::handle x_p_,
              py::handle seed_, py::handle eps_, py::handle dz_, py::handle dkl_, py::handle dmu_, py::handle dx_,
              py::handle dmu_p_, py::handle dx_p_, int threads) {
  const View mu = view("mu", mu_), x = view("x", x_), mu_p = view("mu_p", mu_p_), x_p = view("x_p", x_p_);
  const View seed = view("seed", seed_), eps = view("eps", eps_), dz = view("dz", dz_), dkl = view("dkl", dkl_);
  const View dmu = view("dmu", dmu_), dx = view("dx", dx_), dmu_p = view("dmu_p", dmu_p_), dx_p = view("dx_p", dx_p_);
  Problem p = problem_of(options, mu, x, mu_p, x_p);
  take_noise(p, mu, seed, eps, dz);
  check_dtype(dz, dtype_of(mu));
  check_dtype(dkl, p.wide ? Dtype::f64 : Dtype::f32);
  if ((dmu_p || dx_p) && !(mu_p && dkl))
    throw std::invalid_argument("reparam_kernels._C: the prior's gradients need a prior and dkl; got none.");
  for (const View* v : {&dmu, &dx, &dmu_p, &dx_p}) {
    const bool wide = *v && (v == &dmu_p || v == &dx_p) && dtype_of(*v) == Dtype::f32;  // yet to be summed
    if (!wide || p.wide) check_dtype(*v, dtype_of(mu));
    check_like(*v, mu);
    check_distinct(*v);
  }
  if (dkl) p.cols = cols_of(dkl, mu);
  if (p.samples > 0) p.dz = operand(dz);  // a sum over no samples is absent
  p.dkl = operand(dkl);
  p.dmu = operand(dmu);
  p.dx = operand(dx);
  p.dmu_p = operand(dmu_p);
  p.dx_p = operand(dx_p);
  py::gil_scoped_release release;
  run(Op::backward, p, threads);
}

void randn(py::handle seed_, py::handle out_, int threads) {
  const View seed = view("seed", seed_), out = view("out", out_);
  if (!seed || !out) throw std::invalid_argument("reparam_kernels._C: seed and out must be given; got None.");
  Problem p;
  p.wide = dtype_of(out) == Dtype::f64;
  p.n = out.numel();
  check_contiguous(out);
  take_seed(p, seed, out.t.ndim > 0 ? out.t.shape[0] : 1);
  p.z = operand(out);
  py::gil_scoped_release release;
  run(Op::randn, p, threads);
}

// ---- windows on the noise, for tests

using Words4 = std::array<uint32_t, 4>;

Words4 philox(Words4 counter, std::array<uint32_t, 2> key) {
  Words4 words;
  kernels().philox(counter.data(), key.data(), words.data());
  return words;
}

// Pairs of 32-bit words, as bytes, to pairs of float32 normals, as bytes.
py::bytes box_muller(const std::string& radius, const std::string& angle) {
  if (radius.size() != angle.size() || radius.size() % 4 != 0)
    throw std::invalid_argument("reparam_kernels._C: box_muller takes as many radius words as angle words.");
  std::string eps(2 * radius.size(), '\0');
  kernels().box_muller((const uint32_t*)radius.data(), (const uint32_t*)angle.data(), (int)(radius.size() / 4),
                       (float*)eps.data());
  return eps;
}

// eps[first, first + n) of a seed, as bytes: any place of a stream without what lies before it.
py::bytes noise(int64_t seed, int64_t first, int n) {
  if (first < 0 || n < 1 || n > kPiece)
    throw std::invalid_argument(
        "reparam_kernels._C: noise gives 1 to 1024 elements from an index that is not negative.");
  std::string eps(n * sizeof(float), '\0');
  kernels().noise(seed, first, n, (float*)eps.data());
  return eps;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of reparam_kernels";
  py::enum_<Param>(m, "Param")
      .value("logvar", Param::logvar)
      .value("logstd", Param::logstd)
      .value("std", Param::std)
      .value("softplus", Param::softplus);
  py::class_<Options>(m, "Options")
      .def(py::init([](Param param, double min_std, bool clamped, double low, double high) {
             if (param < Param::logvar || param > Param::softplus)  // Python may make an enum of any int
               throw std::invalid_argument("reparam_kernels._C: param must be a member of Param; got another number.");
             return Options{param, min_std, clamped, low, high};
           }),
           py::arg("param"), py::arg("min_std"), py::arg("clamped"), py::arg("low"), py::arg("high"));
  m.def("bind_tensor_type", &bind_tensor_type, py::arg("tensor"), py::arg("parameter"));
  m.def("forward", &forward, py::arg("options"), py::arg("mu"), py::arg("x"), py::arg("mu_p"), py::arg("x_p"),
        py::arg("seed"), py::arg("eps"), py::arg("z"), py::arg("kl"), py::arg("threads"));
  m.def("backward", &backward, py::arg("options"), py::arg("mu"), py::arg("x"), py::arg("mu_p"), py::arg("x_p"),
        py::arg("seed"), py::arg("eps"), py::arg("dz"), py::arg("dkl"), py::arg("dmu"), py::arg("dx"), py::arg("dmu_p"),
        py::arg("dx_p"), py::arg("threads"));
  m.def("randn", &randn, py::arg("seed"), py::arg("out"), py::arg("threads"));
  m.def("philox", &philox, py::arg("counter"), py::arg("key"));
  m.def("box_muller", &box_muller, py::arg("radius"), py::arg("angle"));
  m.def("noise", &noise, py::arg("seed"), py::arg("first"), py::arg("n"));
  m.def("available", &available);
  m.def("use", &use, py::arg("isa"));
  m.def("isa", [] { return std::string(kernels().isa); });
  m.def("has_openmp", &has_openmp);
}

}  // namespace reparam
