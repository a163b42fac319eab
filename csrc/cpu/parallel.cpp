#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "huge_pages.h"

namespace pyfast {
namespace {

constexpr int64_t kShare = 2;   // a thread takes 1 / (kShare threads) of what is left: who is held up by other programs
                                // leaves the rest to others, and all end with small pieces
constexpr int kSlots = 8;
constexpr size_t kAlignment = 64, kHugePage = size_t(2) << 20;

struct Scratch {
  void* data[kSlots] = {};
  size_t size[kSlots] = {};
  ~Scratch() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void run_parallel(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= grain) return body(context, 0, n);   // torch's own shortcut costs a trip through its C interface
  const int64_t threads = std::min(thread_count(), (n + grain - 1) / grain);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < n) {
      const int64_t end = std::min(n, begin + std::max(grain, (n - begin) / (threads * kShare)));
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      body(context, begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

void* scratch_bytes(int slot, size_t bytes) {
  static thread_local Scratch scratch;
  if (slot < 0 || slot >= kSlots) std::abort();
  if (scratch.size[slot] < bytes) {
    std::free(scratch.data[slot]);
    scratch.size[slot] = 0;
    const size_t alignment = bytes > 2 * kHugePage ? kHugePage : kAlignment;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    scratch.data[slot] = std::aligned_alloc(alignment, rounded);
    if (!scratch.data[slot]) throw std::bad_alloc();
    advise_huge_pages(scratch.data[slot], rounded);   // panels are read all over: up to 3% of a product in page walks
    scratch.size[slot] = rounded;
  }
  return scratch.data[slot];
}

}  // namespace pyfast
