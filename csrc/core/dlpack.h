// The part of the DLPack 1.x binary interface that reading a tensor needs (https://dmlc.github.io/dlpack).
// Declared here because the package builds without any tensor library's headers.
#pragma once
#include <cstdint>

namespace reparam::dlpack {

enum DeviceType : int32_t { kCpu = 1 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// The table behind torch.Tensor.__dlpack_c_exchange_api__; only the borrowing reader is used.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*borrow)(void* object, Tensor* out);  // 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace reparam::dlpack
