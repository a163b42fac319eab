// Huge pages for large fresh buffers: a gradient of 100 MB costs 25,000 page faults in pages of 4 KB, at 0.5 to 1.3 us
// each more time than computing it. From 32 MB on malloc takes fresh pages each time; smaller buffers come from its
// heap, where most pages are known already, and a heap that shrinks and grows again would be cleared 2 MB at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pyfast {

constexpr size_t kManyBytes = size_t(32) << 20;

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
