// The gradients for the few rows of a batch of 1 or of a decoding step: reading the weight and writing its gradient are
// all the work, so neither is packed.
#pragma once

#include "linear_pairs.h"

namespace pyfast {
namespace {

#ifdef PYFAST_PAIR_ROWS
constexpr int64_t kFewGradients = kPairGradients;   // rows of the gradients made here, at most
#else
constexpr int64_t kFewGradients = kFewRows;
#endif

// Whether the gradients are those of pairs: the weight and its gradient lie row by row.
template <class T>
bool are_pairs(const LinearGrads<T>& g) {
  return kFewGradients > kFewRows && g.m <= kFewGradients && g.weight[0].lane_stride == 1 && !g.transposed;
}

template <class T>
bool are_few(const LinearGrads<T>& g) {
  return g.m <= kFewRows || are_pairs(g);
}

// to[0 .. n) = sum over rows r of factors[r * factor_stride] * rows[r * row_stride ..].
template <class To, class F, class T, class A = acc_t<To>>
void sum_of_rows(To* to, int64_t n, int64_t count, const F* factors, int64_t factor_stride, const T* rows,
                 int64_t row_stride) {
  A factor[kFewRows];
  for (int64_t r = 0; r < count; ++r) factor[r] = A(load_one(factors + r * factor_stride));
  sweep<A>(n, [&](auto lanes, int64_t i) {
    Vec<A> sum{};
    for (int64_t r = 0; r < count; ++r) sum += factor[r] * lanes.load(rows + r * row_stride + i);
    lanes.store(to + i, sum);
  });
}

// to[0 .. n) = the sum of the rows.
template <class To, class A>
void add_rows(To* to, int64_t n, int64_t count, const A* rows, int64_t row_stride) {
  sweep<A>(n, [&](auto lanes, int64_t i) {
    Vec<A> sum{};
    for (int64_t r = 0; r < count; ++r) sum += lanes.load(rows + r * row_stride + i);
    lanes.store(to + i, sum);
  });
}

// As linear_backward(), where are_few().
template <class T, class Fill, class A = acc_t<T>>
void few_rows_backward(const LinearGrads<T>& g, const Fill& fill) {
  const int64_t stride = round_up(g.n, kBlockCols);
  A* dz = scratch<A>(kDzRowsSlot, g.segments * g.m * stride);   // [segment][m][stride]
  for (int segment = 0; segment < g.segments; ++segment) {
    A* own = dz + segment * g.m * stride;
    few_rows(g.m, g.n, 64, kBlockCols,
             [&](int64_t row, int64_t col, int64_t cols) { fill(segment, row, col, cols, own + row * stride + col); });
    if (g.grad_bias[0]) add_rows(g.grad_bias[segment], g.n, g.m, own, stride);
  }
  for (int segment = 0; segment < g.segments && g.grad_weight[0] && g.m <= kFewRows; ++segment) {
    const A* own = dz + segment * g.m * stride;
    const int64_t lines = g.transposed ? g.k : g.n, line = g.transposed ? g.n : g.k;
    parallel_for(lines, ceil_div(16384, line), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* to = g.grad_weight[segment] + i * line;
        g.transposed ? sum_of_rows(to, line, g.m, g.x.data + i, g.x.depth_stride, own, stride)
                     : sum_of_rows(to, line, g.m, own + i, stride, g.x.data, g.x.depth_stride);
      }
    });
  }
#ifdef PYFAST_PAIR_ROWS
  if (are_pairs(g)) return pair_rows_gradients(g, dz, stride);
#endif
  if (!g.grad_x) return;
  few_rows(g.m, g.k, g.segments * g.n, kBlockCols, [&](int64_t row, int64_t col, int64_t cols) {
    A z[kBlockCols], part[kBlockCols];
    for (int segment = 0; segment < g.segments; ++segment) {
      multiply_row(dz + (segment * g.m + row) * stride, g.weight[segment].from(col, 0), cols, segment ? part : z);
      if (segment) add_row(z, part, cols);
    }
    store_row(g.grad_x + row * g.k + col, z, cols);
  });
}

}  // namespace
}  // namespace pyfast
