// A tensor of Python, read through DLPack for the length of a call, and the checks that make it safe to read. A check
// that fails throws InvalidArgument, which only names the argument; core/cpu.py of the package adds the reason.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "core/dlpack.h"
#include "core/operand.h"

namespace reparam {

struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

[[noreturn]] void throw_invalid(const char* name);

// The limit on a tensor's elements and on its span. Beyond it, the arithmetic of the kernels would overflow.
constexpr int64_t kMaxSpan = (int64_t)1 << 62;

// Returns an operand without memory. Dims of size 1 are dropped, and neighbouring dims merged.
Operand coalesced(const int64_t* sizes, const int64_t* strides, int ndim);

// Sets the types whose instances are tensors; `tensor` has the exchange table of DLPack.
void bind_tensor_type(pybind11::type tensor, pybind11::type parameter);

// Returns the number of dims of two plain, dense float tensors of one dtype, shape and device, or -1 for anything else.
// It only reads, so that Python can say what is wrong with the others.
int plain_pair_ndim(pybind11::handle mu, pybind11::handle x) noexcept;

struct BorrowedTensor {
  const char* name = nullptr;  // null if None was passed
  dlpack::Tensor t{};

  BorrowedTensor() = default;
  BorrowedTensor(const char* name, pybind11::handle object);

  explicit operator bool() const { return name != nullptr; }
  Dtype dtype() const;
  bool is_int64() const { return t.code == dlpack::kInt && t.bits == 64 && t.lanes == 1; }
  int64_t numel() const { return product(0, t.ndim); }
  int64_t product(int from, int to) const;  // of the sizes of dims [from, to)
  bool same_sizes(int from, const BorrowedTensor& other, int other_from, int count) const;
  Operand operand() const;       // absent for None
  void will_be_written() const;  // asks for huge pages, which helps if the memory is new

  // None passes each of these checks.
  void check_dtype(Dtype) const;
  void check_shape(const BorrowedTensor& other) const;
  void check_contiguous() const;
  void check_no_overlap() const;  // of its elements; a gradient may be a view, as half of a packed tensor is
};

}  // namespace reparam
