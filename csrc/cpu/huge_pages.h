// Huge pages for large fresh buffers: a gradient of 100 MB costs 25,000 page faults in pages of 4 KB, at 0.5 to 1.3 us
// each more time than computing it. malloc takes from 32 MB on (often less) fresh pages each time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pyfast {

constexpr size_t kManyBytes = size_t(4) << 20;   // less is not worth a system call

// Ask for huge pages in the aligned interior of a buffer nobody has touched yet. Only advice: what the
// system makes of it changes speed, never results.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + kHugePage - 1) & ~(kHugePage - 1), end = (start + bytes) & ~(kHugePage - 1);
  if (end > begin + kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace pyfast
