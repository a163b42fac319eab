#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <new>

namespace pyfast {
namespace {

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
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
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
