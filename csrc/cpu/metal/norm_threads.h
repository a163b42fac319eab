// layer_norm (kCentre: the mean is taken away first) and rms_norm, shared out among the threads.
#pragma once

#include "norm_narrow.h"
#include "norm_rows.h"

namespace pyfast {
namespace {

constexpr int64_t kRowGrain = 8;   // rows a thread takes at least: below that, waking it costs more
constexpr int64_t kGroupGrain = 4096;   // and elements, of narrow rows

// to[i] = the sum of block i's partials in order, so that the result does not depend on the threads.
template <class T, class A = acc_t<T>>
void add_partials(void* to, const A* partial, int64_t blocks, int64_t n) {
  parallel_for(ceil_div(n, kLanes<A>), 256, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes<A>, last = min_of(end * kLanes<A>, n);
    sweep<A>(last - first, [&](auto lanes, int64_t i) {
      Vec<A> total{};
      for (int64_t block = 0; block < blocks; ++block) total += lanes.load(partial + block * 2 * n + first + i);
      lanes.store(static_cast<T*>(to) + first + i, total);
    });
  });
}

template <bool kCentre>
void norm(const NormArgs& a) {
  dispatch_stored(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const int64_t group = a.cols <= kNarrow ? kLanes<A> : kRowsAtOnce;   // rows that share a buffer
    const auto rows_of = [&](int64_t begin, int64_t end) {
      const bool is_wide = size_of(a.affine_dtype) == sizeof(A);
      A* buffer = scratch<A>(0, group * round_up(a.cols, kLanes<A>));
      const A* weight = widened<T, A>(a.weight, is_wide, a.cols, 1, 1);
      const A* bias = kCentre ? widened<T, A>(a.bias, is_wide, a.cols, 2, 0) : nullptr;
      int64_t row = begin;
      if (a.cols <= kNarrow) {
        for (; row < end; row += group)
          norm_group<kCentre, T>(a, row, min_of(group, end - row), buffer, weight, bias);
      } else {
        for (; a.cols <= kMostTogether && row + kRowsAtOnce <= end; row += kRowsAtOnce)
          norm_rows<kCentre, kRowsAtOnce, T>(a, row, buffer, weight, bias);
        for (; row < end; ++row) norm_rows<kCentre, 1, T>(a, row, buffer, weight, bias);
      }
      if (a.streams) finish_streams();
    };
    if (a.cols > kNarrow) return parallel_for(a.rows, kRowGrain, rows_of);
    const int64_t grain = max_of(kGroupGrain / (group * a.cols), 1);
    parallel_for(ceil_div(a.rows, group), grain, [&](int64_t begin, int64_t end) {
      rows_of(begin * group, min_of(end * group, a.rows));
    });
  });
}

// Column sums in two steps: a partial per block of rows, then the partials in order.
template <bool kCentre, bool kSum, class T, class A = acc_t<T>>
void backward_blocks(const NormBackwardArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = norm_partials(a.rows), n = a.cols;
  const bool is_wide = size_of(a.affine_dtype) == sizeof(A);
  const A* weight = widened<T, A>(a.weight, is_wide, n, 0, 1);
  for (int64_t block = begin; block < end; ++block) {
    // Without gradients of weight and bias the sums go to memory that nobody reads: a branch a vector costs more.
    A* own = a.partial ? static_cast<A*>(a.partial) + block * 2 * n : scratch<A>(2, 2 * n);
    __builtin_memset(own, 0, size_t(2 * n) * sizeof(A));
    const int64_t last = (block + 1) * a.rows / blocks;
    int64_t row = block * a.rows / blocks;
    constexpr int64_t kGroup = kGroupBackward<kCentre, A>;
    for (; n <= kNarrow && row < last; row += kGroup)
      backward_group<kCentre, kSum, T>(a, row, min_of(kGroup, last - row), weight, own, own + n);
    for (; row + kRowsAtOnce <= last; row += kRowsAtOnce)
      backward_rows<kCentre, kRowsAtOnce, kSum, T>(a, row, weight, own, own + n);
    for (; row < last; ++row) backward_rows<kCentre, 1, kSum, T>(a, row, weight, own, own + n);
  }
  if (a.streams) finish_streams();
}

template <bool kCentre>
void norm_backward(const NormBackwardArgs& a) {
  dispatch_stored(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const int64_t blocks = norm_partials(a.rows), n = a.cols;
    const A* partial = static_cast<const A*>(a.partial);
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      a.grad_sum ? backward_blocks<kCentre, true, T>(a, begin, end) : backward_blocks<kCentre, false, T>(a, begin, end);
    });
    const auto add = size_of(a.affine_dtype) == sizeof(A) ? add_partials<A> : add_partials<T>;
    if (a.grad_weight) add(a.grad_weight, partial, blocks, n);
    if (a.grad_bias) add(a.grad_bias, partial + n, blocks, n);
  });
}

}  // namespace
}  // namespace pyfast
