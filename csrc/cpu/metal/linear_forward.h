// z = x W^T for layers that finish z in cache: the blocked product with bounded packed copies, and a path for
// the few rows of a decoding step, which reads the weight once and packs nothing.
#pragma once

#include "act_rows.h"
#include "gemm.h"

namespace pyfast {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;   // of one packed operand: larger ones go in chunks
constexpr int64_t kFewRows = 3;              // up to here, reading the weight is all the work
constexpr int kRowsSlot = 1, kColsSlot = 2;

// pack(to, col, cols): panels of the weight lanes [col, col + cols). finish(row, rows, col, cols, z, stride): z, whose
// rows are `stride` apart, is in cache and may be overwritten.
template <class T, class Pack, class Finish>
void linear_forward(const Operand<T>& x, int64_t lanes, const Pack& pack, const Finish& finish) {
  using Core = CoreFor<T>;
  using Elem = typename Core::Elem;
  const int64_t bytes = padded_depth<Core>(x.depth) * int64_t(sizeof(Elem));
  const int64_t most = max_of(kBlockCols, kPackedBytes / max_of(1, bytes) / kBlockCols * kBlockCols);
  const int64_t row_chunk = min_of(most / Core::kRows * Core::kRows, round_up(x.lanes, Core::kRows));
  const int64_t col_chunk = min_of(most, round_up(lanes, kBlockCols));
  Elem* rows_packed = scratch<Elem>(kRowsSlot, panels_size<Core>(Core::kRows, row_chunk, x.depth));
  Elem* cols_packed = scratch<Elem>(kColsSlot, panels_size<Core>(Core::kCols, col_chunk, x.depth));
  for (int64_t row = 0; row < x.lanes; row += row_chunk) {
    Operand<T> part = x.from(row, 0);
    part.lanes = min_of(row_chunk, x.lanes - row);
    pack_rows<Core>(rows_packed, part);
    for (int64_t col = 0; col < lanes; col += col_chunk) {
      const int64_t cols = min_of(col_chunk, lanes - col);
      if (row == 0 || lanes > col_chunk) pack(cols_packed, col, cols);
      multiply_panels<Core>(Panels<Core>{rows_packed, part.lanes, x.depth}, Panels<Core>{cols_packed, cols, x.depth},
                            [&](int64_t r, int64_t block_rows, int64_t c, int64_t block_cols, auto* z) {
                              finish(row + r, block_rows, col + c, block_cols, z, kBlockCols);
                            });
    }
  }
}

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
