#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "huge_pages.h"

namespace pyfast {
namespace {

constexpr int kSlots = 8;
constexpr size_t kAlignment = 64, kHugePage = size_t(2) << 20;

struct Scratch {
  void* data[kSlots] = {};
  size_t size[kSlots] = {};
  ~Scratch() {
    for (void* p : data) std::free(p);
  }
};

struct Piece {
  uint32_t begin, end;
};

// What a thread has still to do. From call to call it begins with the same part of the work, whose operands its own
// caches may hold: 1.5 to 3 times as quick for results of some MB where the threads' last caches are not one. It takes
// the first half of what is left each time, and others who have finished take the last: who is held up by other
// programs leaves the rest to them, and all end with small pieces.
class alignas(kAlignment) Share {
 public:
  static constexpr int64_t kMost = int64_t(1) << 31;   // units, of all shares together

  void set(int64_t begin, int64_t end) { left_ = Piece{uint32_t(begin), uint32_t(end)}; }

  Piece take(bool last) {
    Piece left = left_.load(std::memory_order_relaxed), rest = left;
    do {
      const uint32_t count = (left.end - left.begin + 1) / 2;
      rest = last ? Piece{left.begin, left.end - count} : Piece{left.begin + count, left.end};
    } while (!left_.compare_exchange_weak(left, rest, std::memory_order_relaxed));
    return last ? Piece{rest.end, left.end} : Piece{left.begin, rest.begin};
  }

 private:
  std::atomic<Piece> left_{Piece{0, 0}};
};

}  // namespace

void run_parallel(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= grain) return body(context, 0, n);   // torch's own shortcut costs a trip through its C interface
  const int64_t unit = std::max(grain, n / Share::kMost + 1), units = (n + unit - 1) / unit;
  const int64_t threads = std::min(thread_count(), units);
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) shares[i].set(i * units / threads, (i + 1) * units / threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(own + i) % threads];
      for (Piece piece = share.take(i > 0); piece.begin < piece.end; piece = share.take(i > 0))
        body(context, piece.begin * unit, std::min(piece.end * unit, n));
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
