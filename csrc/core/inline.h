// The base of every header that a kernel uses.
#pragma once

// A file in ops/ is compiled once for each instruction set. If an inline function had external linkage, the linker
// would keep one copy for all of them, perhaps one that this CPU cannot run. So whatever these files share is always
// inlined, or lies in an unnamed namespace, or is compiled once in a file of its own. For the same reason they do not
// use the standard library's templates.
#if defined(__GNUC__)
#define REPARAM_INLINE inline __attribute__((always_inline))
#else
#define REPARAM_INLINE inline
#endif

namespace reparam {
namespace {

template <class To, class From>
REPARAM_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}

}  // namespace
}  // namespace reparam
