// Threads and per-thread scratch memory for the metal. No torch and no STL here: this header is compiled
// with AVX-512 flags too, where a shared inline function could replace the baseline one at link time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyfast {

// body(context, begin, end) for pieces of [0, n), at least `grain` long but the last, on torch's threads: each has a
// part of its own, and takes of the others' when it has finished. Results may not depend on who does what.
void run_parallel(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
int64_t thread_count();

// 64-byte aligned memory of this thread, kept from call to call; each slot is one live buffer.
// Contents are undefined. Meant for cache-sized workspaces (a few MB at most).
void* scratch_bytes(int slot, size_t bytes);

namespace {

// f(begin, end) for pieces of [0, n), in no order.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  auto body = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  };
  run_parallel(n, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
}

template <class T>
inline T* scratch(int slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, size_t(count) * sizeof(T)));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace pyfast
