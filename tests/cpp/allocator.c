// An allocator for LD_PRELOAD, over glibc. Memory is aligned to only 16 bytes for any request up to 64. It is filled
// with garbage when it is allocated and when it is freed.
#include <errno.h>
#include <malloc.h>
#include <string.h>

void *__libc_malloc(size_t), *__libc_memalign(size_t, size_t);
void __libc_free(void *);

void *malloc(size_t size) {
  void *p = __libc_malloc(size);
  if (p) memset(p, 0xA5, malloc_usable_size(p));
  return p;
}

int posix_memalign(void **out, size_t alignment, size_t size) {
  *out = alignment <= 64 ? malloc(size) : __libc_memalign(alignment, size);
  return *out ? 0 : ENOMEM;
}

void free(void *p) {
  if (p) memset(p, 0x5A, malloc_usable_size(p));
  __libc_free(p);
}
