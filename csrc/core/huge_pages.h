// Huge pages for large outputs.
#pragma once
#include <cstddef>

namespace reparam {

// Asks the system to map memory that is about to be written for the first time with huge pages. Where the system maps
// them on request, a large output then costs one page fault for 2 MB instead of one for 4 KB, which takes longer than
// computing it. Elsewhere, and for less memory than pays for the request, nothing happens.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace reparam
