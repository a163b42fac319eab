// The product for a thin x, of so few rows that bringing the weight into panels would cost as much as multiplying:
// the operands change places. z^T = W x^T, the rows of W broadcast element by element, those of x lying side by side
// in vectors. Of W some rows at a time are copied as they are, so that they do not compete for the same cache lines.
#pragma once

#include "linear_forward.h"

namespace pyfast {
namespace {

constexpr int64_t kThinRows = 64;   // of x, at most
// Of the copied rows, which are 33 cache lines apart.
template <class Core> constexpr int64_t kThinDepth = 2048 / int64_t(sizeof(typename Core::Elem));
template <class Core> constexpr int64_t kThinStride = kThinDepth<Core> + 64 / int64_t(sizeof(typename Core::Elem));

// c[kRows][kThinRows] (+)= w[kRows][kThinStride] times the first kVectors vectors of a panel x[depth][kCols].
template <class Core, int kVectors, class A = typename Core::Acc>
void multiply_thin(int64_t depth, const typename Core::Elem* w, const typename Core::Elem* x, A* c, bool accumulate) {
  Vec<A> sum[Core::kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; k += Core::kDepth, x += Core::kDepth * Core::kCols) {
    typename Core::Step xk[kVectors];
    for (int v = 0; v < kVectors; ++v) xk[v] = Core::side_by_side(x + v * Core::kDepth * kLanes<A>);
#pragma GCC unroll 16
    for (int64_t r = 0; r < Core::kRows; ++r) {
      const auto wr = Core::spread(w + r * kThinStride<Core> + k);
      for (int v = 0; v < kVectors; ++v) Core::add_product(sum[r][v], wr, xk[v]);
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < Core::kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      A* to = c + r * kThinRows + v * kLanes<A>;
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
}

// A row of the weight for Core; the copy is padded with one more 0.
template <class Core, class T>
void copy_row(typename Core::Elem* to, const T* from, int64_t n) {
  if constexpr (Core::kDepth == 1) load_row(to, from, n);
  else {
    __builtin_memcpy(to, from, size_t(n) * sizeof(T));
    to[n] = {};
  }
}

// c[kRows][kThinRows] = kRows rows of the weight, fewer at its end, times all rows of x, packed.
template <class Core, class T, class A = typename Core::Acc>
void thin_panel(const Operand<T>& w, const typename Core::Elem* x, int64_t rows, typename Core::Elem* copy, A* c) {
  const int64_t depth = padded_depth<Core>(w.depth);
  for (int64_t k = 0; k == 0 || k < w.depth; k += kThinDepth<Core>) {
    const int64_t deep = min_of(kThinDepth<Core>, w.depth - k);
    for (int64_t r = 0; r < min_of(w.lanes, Core::kRows); ++r)
      copy_row<Core>(copy + r * kThinStride<Core>, w.data + r * w.lane_stride + k, deep);
    for (int64_t row = 0; row < rows; row += Core::kCols) {
      const auto* panel = x + row * depth + k * Core::kCols;
      if (rows - row > kLanes<A>) multiply_thin<Core, 2>(deep, copy, panel, c + row, k > 0);
      else multiply_thin<Core, 1>(deep, copy, panel, c + row, k > 0);
    }
  }
}

// finish(row, col, cols, z) as in linear_forward(); the weight's rows are contiguous.
template <class T, class Finish, class A = acc_t<T>>
void thin_forward(const Operand<T>& x, const Operand<T>& weight, const Finish& finish) {
  using Core = CoreFor<T>;
  using Elem = typename Core::Elem;
  constexpr int64_t kBlock = 4 * Core::kRows, kPadded = round_up(kBlock, kLanes<A>);
  Elem* packed = scratch<Elem>(kColsSlot, panels_size<Core>(Core::kCols, x.lanes, x.depth));
  pack_cols<Core>(packed, x);
  const int64_t flops = 2 * kBlock * x.lanes * max_of(1, x.depth);
  parallel_for(ceil_div(weight.lanes, kBlock), ceil_div(kBlockFlops, flops), [&](int64_t begin, int64_t end) {
    Elem* copy = scratch<Elem>(kRowsSlot, Core::kRows * kThinStride<Core>);
    A *c = scratch<A>(kBlockSlot, 2 * kPadded * kThinRows), *z = c + kPadded * kThinRows;
    for (int64_t col = begin * kBlock; col < min_of(end * kBlock, weight.lanes); col += kBlock) {
      const int64_t cols = min_of(kBlock, weight.lanes - col);
      for (int64_t i = 0; i < cols; i += Core::kRows)
        thin_panel<Core>(weight.from(col + i, 0), packed, x.lanes, copy, c + i * kThinRows);
      for (int64_t i = 0; i < cols; i += kLanes<A>)
        for (int64_t row = 0; row < x.lanes; row += kLanes<A>) {
          Vec<A> tile[kLanes<A>];
          for (int64_t j = 0; j < kLanes<A>; ++j) tile[j] = load(c + (i + j) * kThinRows + row);
          transpose(tile);
          for (int64_t j = 0; j < kLanes<A>; ++j) store(z + (row + j) * kPadded + i, tile[j]);
        }
      for (int64_t row = 0; row < x.lanes; ++row) finish(row, col, cols, z + row * kPadded);
    }
  });
}

}  // namespace
}  // namespace pyfast
