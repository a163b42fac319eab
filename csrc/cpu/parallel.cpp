#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

namespace pyfast {
namespace {

constexpr int64_t kPieces = 4;   // of each thread's share: who is held up by other programs leaves the rest to others
constexpr int kSlots = 8;
constexpr size_t kAlignment = 64;

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
  const int64_t piece = std::max(grain, (n + threads * kPieces - 1) / (threads * kPieces));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < n;)
      body(context, begin, std::min(n, begin + piece));
  });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

void* scratch_bytes(int slot, size_t bytes) {
  static thread_local Scratch scratch;
  if (slot < 0 || slot >= kSlots) std::abort();
  if (scratch.size[slot] < bytes) {
    std::free(scratch.data[slot]);
    scratch.size[slot] = 0;
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    scratch.data[slot] = std::aligned_alloc(kAlignment, rounded);
    if (!scratch.data[slot]) throw std::bad_alloc();
    scratch.size[slot] = rounded;
  }
  return scratch.data[slot];
}

}  // namespace pyfast
