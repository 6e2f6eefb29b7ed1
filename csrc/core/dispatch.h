// Chooses the instruction set and spreads a call over threads. Nothing here knows what an op's arguments are.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/inline.h"

namespace reparam {

std::vector<std::string> available_isas();  // the instruction sets that this CPU can run, best first
std::string isa();                          // the one in use: the best, until set_isa() says otherwise
bool set_isa(const std::string& name);      // returns false and does nothing if it is not available
bool has_openmp();
int isa_level();  // its index in the tables of REPARAM_OP

// REPARAM_OP(Table, name) stands in an op's header. It declares the op's table of functions, compiled once for each
// instruction set, and name(), the table of the instruction set in use. The op's file defines REPARAM_ISA::name.
#define REPARAM_DECLARE(isa, Table, name) \
  namespace isa {                         \
  extern const Table name;                \
  }
#ifdef REPARAM_X86_LEVELS
#define REPARAM_OP(Table, name)                                                  \
  REPARAM_DECLARE(baseline, Table, name)                                         \
  REPARAM_DECLARE(avx2, Table, name)                                             \
  REPARAM_DECLARE(avx512, Table, name)                                           \
  REPARAM_INLINE const Table& name() {                                           \
    const Table* const tables[] = {&baseline::name, &avx2::name, &avx512::name}; \
    return *tables[isa_level()];                                                 \
  }
#else
#define REPARAM_OP(Table, name)             \
  REPARAM_DECLARE(REPARAM_ISA, Table, name) \
  REPARAM_INLINE const Table& name() { return REPARAM_ISA::name; }
#endif

// Calls body(context, first, last) on ranges that together are [0, count), on at most `threads` threads, fewer if
// `elements` are not worth their start-up.
void parallel_ranges(int64_t count, int64_t elements, int threads, void (*body)(const void* context, int64_t, int64_t),
                     const void* context);

// An array of `count` numbers, or a null pointer if count is 0. May throw std::bad_alloc.
class HeapArray {
 public:
  explicit HeapArray(int64_t count);
  ~HeapArray();
  HeapArray(const HeapArray&) = delete;
  HeapArray& operator=(const HeapArray&) = delete;
  double* const data;
};

namespace {

// Calls body(first, last) in the same way.
template <class Body>
inline void parallel_for(int64_t count, int64_t elements, int threads, const Body& body) {
  const auto call = [](const void* context, int64_t first, int64_t last) { (*(const Body*)context)(first, last); };
  parallel_ranges(count, elements, threads, call, &body);
}

}  // namespace
}  // namespace reparam
