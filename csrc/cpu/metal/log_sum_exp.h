// log(sum(exp(x))) of a row in one read: a running maximum, and the sum of exp(x - maximum), in every lane
// (Milakov & Gimelshein, 2018).
#pragma once

#include "vecmath.h"

namespace pyfast {
namespace {

constexpr float kInfinity = __builtin_inff();
template <class A> constexpr int64_t kLogitBlock = 32 * kLanes<A>;   // read twice, from L1; one rescaling each

// The maximum starts at the lowest finite number, so that a lane of nothing but -infinity adds 0 and not NaN.
template <class A>
struct LogSumExp {
  Vec<A> peak = splat(sizeof(A) == 8 ? A(-__DBL_MAX__) : A(-__FLT_MAX__)), total{};

  template <class T>
  void add(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; i += kLogitBlock<A>) add_block(x + i, min_of(kLogitBlock<A>, n - i));
  }

  template <class T>
  void add_block(const T* x, int64_t n) {
    Vec<A> top = peak, sum{};
    sweep<A>(n, [&](auto lanes, int64_t i) { top = max_of(lanes.keep(lanes.load(x + i), A(-kInfinity)), top); });
    sweep<A>(n, [&](auto lanes, int64_t i) { sum += lanes.keep(exp(lanes.load(x + i) - top), 0); });
    total = total * exp(peak - top) + sum;
    peak = top;
  }

  // lse[0] + lse[1] is the answer: the maximum, and the logarithm of the sum beside it.
  void result(A* lse) const {
    lse[0] = max_lanes(peak);
    lse[1] = A(__builtin_log(double(sum_lanes(total * exp(peak - lse[0])))));
  }
};

// The lowest of `first` and `row`, by any number of threads.
inline void note_first(int64_t* first, int64_t row) {
  int64_t seen = __atomic_load_n(first, __ATOMIC_RELAXED);
  while (row < seen &&
         !__atomic_compare_exchange_n(first, &seen, row, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

}  // namespace
}  // namespace pyfast
