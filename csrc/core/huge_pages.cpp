#include "core/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>

#include <cstdint>
#endif

namespace reparam {

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  // glibc maps allocations of this size afresh and gives them back to the system when they are freed, so that the
  // request ends with the tensor.
  constexpr size_t kLeast = (size_t)32 << 20, kPage = (size_t)2 << 20;
  if (bytes < kLeast) return;
  const uintptr_t begin = ((uintptr_t)data + kPage - 1) / kPage * kPage,
                  end = ((uintptr_t)data + bytes) / kPage * kPage;
  (void)madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // a refusal changes no result
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace reparam
