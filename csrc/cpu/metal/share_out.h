// A parallel loop for little work, whose threads keep what they have at hand.
#pragma once

#include "../parallel.h"

namespace pyfast {
namespace {

constexpr int kCountersSlot = 7;

// body(take) on `threads` threads; take() gives the next of [0, n), -1 after the last. Each thread has a run of
// neighbours, whose results lie on the same cache lines, and helps the others when it has finished.
template <class F>
void share_out(int64_t n, int64_t threads, const F& body) {
  constexpr int64_t kLine = 8;   // counters on lines of their own
  int64_t* next = scratch<int64_t>(kCountersSlot, threads * kLine);
  for (int64_t t = 0; t < threads; ++t) next[t * kLine] = t * n / threads;
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own) {
      int64_t helped = 0;
      body([&, own]() -> int64_t {
        for (; helped < threads; ++helped) {
          const int64_t t = (own + helped) % threads;
          const int64_t task = __atomic_fetch_add(next + t * kLine, 1, __ATOMIC_RELAXED);
          if (task < (t + 1) * n / threads) return task;
        }
        return -1;
      });
    }
  });
}

}  // namespace
}  // namespace pyfast
