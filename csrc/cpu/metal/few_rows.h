// Products of the few rows of a decoding step: they read the weight once and pack nothing.
#pragma once

#include "act_rows.h"
#include "gemm_operand.h"

namespace pyfast {
namespace {

constexpr int64_t kFewRows = 3;   // up to here, reading the weight is all the work

// z = x W^T for one row and the lanes of `w`, straight from the weight: dot products where its rows are
// contiguous, sums of scaled rows where its columns are.
template <class X, class T, class A = acc_t<T>>
void multiply_row(const X* x, const Operand<T>& w, int64_t lanes, A* z) {
  if (w.depth_stride == 1) {
    for (int64_t j = 0; j < lanes; ++j) {
      const T* line = w.data + j * w.lane_stride;
      Vec<A> sum[2] = {};
      int64_t k = 0;
      for (; k + 2 * kLanes<A> <= w.depth; k += 2 * kLanes<A>) {
        sum[0] += load(x + k) * load(line + k);
        sum[1] += load(x + k + kLanes<A>) * load(line + k + kLanes<A>);
      }
      sweep<A>(w.depth - k, [&](auto part, int64_t i) { sum[0] += part.load(x + k + i) * part.load(line + k + i); });
      z[j] = sum_lanes(sum[0] + sum[1]);
    }
    return;
  }
  __builtin_memset(z, 0, size_t(lanes) * sizeof(A));
  for (int64_t k = 0; k < w.depth; ++k) {
    const Vec<A> xk = splat(A(load_one(x + k)));
    const T* line = w.data + k * w.depth_stride;
    sweep<A>(lanes, [&](auto part, int64_t j) { store(z + j, load(z + j) + xk * part.load(line + j)); });
  }
}

// body(row, col, cols) for every row of every block of `block` columns of [m, n], on all threads.
template <class F>
void few_rows(int64_t m, int64_t n, int64_t k, int64_t block, const F& body) {
  parallel_for(ceil_div(n, block), ceil_div(16384, block * max_of(1, k)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t row = 0; row < m; ++row) body(row, b * block, min_of(block, n - b * block));
  });
}

}  // namespace
}  // namespace pyfast
