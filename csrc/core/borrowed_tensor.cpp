#include "core/borrowed_tensor.h"

#include <algorithm>
#include <string>

#include "core/huge_pages.h"

namespace py = pybind11;

namespace reparam {
namespace {

const dlpack::ExchangeApi* exchange = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr;

// A view may claim any size through strides of 0, and an empty one may have any strides. An empty dim counts as one, so
// that the product of any of the dims stays in bounds.
bool extent_is_valid(const dlpack::Tensor& t) {
  int64_t n = 1, span = 0;
  for (int i = 0; i < t.ndim; ++i) {
    const int64_t size = t.shape[i], steps = size > 1 ? size - 1 : 0;
    int64_t reach;
    if (size < 0) return false;
    if (__builtin_mul_overflow(n, steps + 1, &n) || n > kMaxSpan) return false;
    if (__builtin_mul_overflow(steps, t.strides[i], &reach) || reach <= -kMaxSpan || reach >= kMaxSpan) return false;
    if ((span += reach < 0 ? -reach : reach) >= kMaxSpan) return false;
  }
  return true;
}

bool is_tensor(PyObject* object) {
  PyObject* type = (PyObject*)Py_TYPE(object);
  return type == tensor_type || type == parameter_type;  // false until a type is bound
}

// Reads a tensor of any device; false for one that only Python can describe, or whose values are to be negated.
bool borrow_plain(PyObject* object, dlpack::Tensor* t) {
  if (!is_tensor(object)) return false;
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* const neg = exchange->borrow(object, t) == 0 ? PyObject_CallMethodNoArgs(object, is_neg) : nullptr;
  if (!neg) PyErr_Clear();
  Py_XDECREF(neg);
  return neg == Py_False;
}

bool is_float(const dlpack::Tensor& t) {
  if (t.lanes != 1) return false;
  return t.code == dlpack::kFloat ? t.bits == 16 || t.bits == 32 || t.bits == 64
                                  : t.code == dlpack::kBfloat && t.bits == 16;
}

}  // namespace

int plain_pair_ndim(py::handle mu_, py::handle x_) noexcept {
  dlpack::Tensor mu, x;
  if (!borrow_plain(mu_.ptr(), &mu) || !borrow_plain(x_.ptr(), &x) || !is_float(mu)) return -1;
  const bool alike = mu.code == x.code && mu.bits == x.bits && x.lanes == 1 && mu.device_type == x.device_type &&
                     mu.device_id == x.device_id && mu.ndim == x.ndim;
  return alike && std::equal(mu.shape, mu.shape + mu.ndim, x.shape) ? mu.ndim : -1;
}

void throw_invalid(const char* name) { throw InvalidArgument(name); }

void bind_tensor_type(py::type tensor, py::type parameter) {
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* api = (const dlpack::ExchangeApi*)PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!api) throw py::error_already_set();
  if (api->major != 1) throw std::runtime_error("unknown DLPack version " + std::to_string(api->major));
  exchange = api;
  tensor_type = tensor.release().ptr();
  parameter_type = parameter.release().ptr();
}

BorrowedTensor::BorrowedTensor(const char* argument, py::handle object) {
  if (object.is_none()) return;
  name = argument;
  if (!is_tensor(object.ptr())) throw_invalid(name);
  if (exchange->borrow(object.ptr(), &t) != 0) {
    PyErr_Clear();  // meta and sparse tensors, among others
    throw_invalid(name);
  }
  if (t.device_type != dlpack::kCpu || t.ndim < 0 || t.ndim > kMaxDims) throw_invalid(name);
  if ((t.ndim > 0 && !t.strides) || !extent_is_valid(t)) throw_invalid(name);
  if (numel() == 0) return;
  if (!t.data) throw_invalid(name);
  t.data = (char*)t.data + t.byte_offset;
}

Dtype BorrowedTensor::dtype() const {
  if (t.code == dlpack::kFloat && t.lanes == 1 && t.bits == 16) return Dtype::f16;
  if (t.code == dlpack::kFloat && t.lanes == 1 && t.bits == 32) return Dtype::f32;
  if (t.code == dlpack::kFloat && t.lanes == 1 && t.bits == 64) return Dtype::f64;
  if (t.code == dlpack::kBfloat && t.lanes == 1 && t.bits == 16) return Dtype::bf16;
  throw_invalid(name);
}

int64_t BorrowedTensor::product(int from, int to) const {
  int64_t n = 1;
  for (int i = from; i < to; ++i) n *= t.shape[i];
  return n;
}

bool BorrowedTensor::same_sizes(int from, const BorrowedTensor& other, int other_from, int count) const {
  for (int i = 0; i < count; ++i) {
    if (t.shape[from + i] != other.t.shape[other_from + i]) return false;
  }
  return true;
}

// Drops dims of size 1 and merges neighbouring dims.
Operand coalesced(const int64_t* sizes, const int64_t* strides, int ndim) {
  Operand o;
  for (int i = 0; i < ndim; ++i) {
    const int64_t size = sizes[i], stride = strides[i];
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

Operand BorrowedTensor::operand() const {
  if (!name) return {};
  Operand o = coalesced(t.shape, t.strides, t.ndim);
  o.data = t.data;
  o.dtype = dtype();
  return o;
}

void BorrowedTensor::will_be_written() const {
  if (!name || numel() == 0) return;
  int64_t low = 0, high = 1;
  for (int i = 0; i < t.ndim; ++i) (t.strides[i] < 0 ? low : high) += (t.shape[i] - 1) * t.strides[i];
  prefer_huge_pages((char*)t.data + low * (t.bits / 8), (size_t)(high - low) * (t.bits / 8));
}

void BorrowedTensor::check_dtype(Dtype want) const {
  if (name && dtype() != want) throw_invalid(name);
}

void BorrowedTensor::check_shape(const BorrowedTensor& other) const {
  if (name && (t.ndim != other.t.ndim || !same_sizes(0, other, 0, t.ndim))) throw_invalid(name);
}

void BorrowedTensor::check_contiguous() const {
  if (!name || numel() == 0) return;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != stride) throw_invalid(name);
    stride *= t.shape[i];
  }
}

void BorrowedTensor::check_no_overlap() const {
  if (!name || numel() == 0) return;
  for (int i = 0; i < t.ndim; ++i) {
    int64_t inner = 1;  // the reach of the dims with smaller strides; of dims with equal ones the latter are inner
    for (int k = 0; k < t.ndim; ++k) {
      const bool inside = t.strides[k] < t.strides[i] || (t.strides[k] == t.strides[i] && k > i);
      if (k != i && inside) inner += (t.shape[k] - 1) * t.strides[k];
    }
    if (t.shape[i] > 1 && t.strides[i] < inner) throw_invalid(name);
  }
}

}  // namespace reparam
