// The three gradients of z = x W^T + b from dz [m, n], which a `fill` function makes block by block:
// dx = dz W, dW = dz^T x (or its transpose x^T dz), db = column sums of dz. A layer with two weights has two
// segments, each with its own dz, dW and db; dx is the sum over them.
//
// dz never exists as a matrix: each block is made once in cache, summed into the bias gradient and packed
// into both layouts the two products want. Rows go in chunks, so that the packed copies stay bounded;
// dW is accumulated over the chunks in float (double for double).
#pragma once

#include "act_rows.h"
#include "gemm.h"

namespace pyfast {
namespace {

// Packed dz: 8 KB (float64: 16 KB) times n. Of 16-bit panels as many rows go together as that holds.
template <class Core> constexpr int64_t kChunkRows = sizeof(typename Core::Elem) == 2 ? 2048 : 1024;
constexpr int kDzRowsSlot = 1, kDzColsSlot = 2, kWeightSlot = 3, kInputSlot = 4, kDzBlockSlot = 5, kSumSlot = 6;
constexpr int kMaxSegments = 2;

template <class T>
struct LinearGrads {
  int64_t m, n, k;
  int segments;
  bool transposed;                     // grad_weight is [k, n]
  Operand<T> x;                        // lanes k, depth m
  Operand<T> weight[kMaxSegments];     // lanes k, depth n
  T* grad_x;                           // [m, k]; these three null if not wanted
  T* grad_weight[kMaxSegments];        // [n, k] or [k, n]
  T* grad_bias[kMaxSegments];          // [n]
};

// Where everything lies for one call, in scratch memory of the calling thread.
template <class Core>
struct LinearWorkspace {
  using Elem = typename Core::Elem;
  using Acc = typename Core::Acc;
  static constexpr int64_t kMostRows = round_up(96, Core::kRows), kFewBlocks = 8;
  int64_t block_rows;   // dz is made in blocks of as many; of a few rows smaller ones, for all threads to have some
  int64_t chunk_rows, depth_n, lanes_n, bias_stride, bias_blocks;
  Elem *dz_rows = nullptr, *dz_cols = nullptr, *weight = nullptr, *x = nullptr;
  Acc *weight_sum = nullptr, *bias_sum = nullptr;   // [segment][n k], [block][segment][bias_stride]

  template <class T>
  explicit LinearWorkspace(const LinearGrads<T>& g, int64_t most_rows = kChunkRows<Core>) {
    block_rows = min_of(kMostRows, round_up(ceil_div(max_of(g.m, 1), kFewBlocks), Core::kRows));
    chunk_rows = round_up(min_of(most_rows, max_of(g.m, 1)), block_rows);
    depth_n = g.segments * padded_depth<Core>(g.n);
    lanes_n = round_up(g.n, g.transposed ? Core::kCols : Core::kRows);
    bias_stride = round_up(g.n, kBlockCols) + kLanes<Acc>;   // add_row stores whole vectors past n
    bias_blocks = ceil_div(g.m, block_rows);
    const int64_t lanes_k = round_up(g.k, g.transposed ? Core::kRows : Core::kCols);
    if (g.grad_x) {
      dz_rows = scratch<Elem>(kDzRowsSlot, chunk_rows * depth_n);
      weight = scratch<Elem>(kWeightSlot, round_up(g.k, Core::kCols) * depth_n);
    }
    if (g.grad_weight[0]) {
      dz_cols = scratch<Elem>(kDzColsSlot, g.segments * lanes_n * chunk_rows);
      x = scratch<Elem>(kInputSlot, lanes_k * chunk_rows);
    }
  }

  // Where the sums over all rows lie.
  template <class T>
  void take_sums(const LinearGrads<T>& g) {
    const int64_t bias_size = g.grad_bias[0] ? bias_blocks * g.segments * bias_stride : 0;
    const int64_t weight_size = g.grad_weight[0] && g.m > chunk_rows ? g.segments * g.n * g.k : 0;
    if (bias_size + weight_size) {
      Acc* sums = scratch<Acc>(kSumSlot, bias_size + weight_size);
      if (bias_size) bias_sum = sums;
      weight_sum = sums + bias_size;
    }
  }
};

// Makes dz of rows [row + at, row + at + rows), `at` within the chunk, and packs it; adds to `bias_sum` [n].
template <class Core, class T, class Fill>
void pack_dz(const LinearGrads<T>& g, const LinearWorkspace<Core>& w, const Fill& fill, int segment, int64_t row,
             int64_t at, int64_t rows, int64_t chunk, typename Core::Acc* bias_sum) {
  using Acc = typename Core::Acc;
  const int64_t width = g.transposed ? Core::kCols : Core::kRows;   // of the panels of dz^T
  const int64_t step = kBlockCols / width * width, depth_m = padded_depth<Core>(chunk);
  Acc* block = scratch<Acc>(kDzBlockSlot, w.block_rows * kBlockCols);
  for (int64_t col = 0; col < g.n; col += step) {
    const int64_t cols = min_of(step, g.n - col);
    for (int64_t i = 0; i < rows; ++i) {
      fill(segment, row + at + i, col, cols, block + i * kBlockCols);
      if (bias_sum) add_row(bias_sum + col, block + i * kBlockCols, cols);
    }
    if (w.dz_rows) {
      auto* to = w.dz_rows + at * w.depth_n + (segment * padded_depth<Core>(g.n) + col) * Core::kRows;
      for (int64_t i = 0; i < rows; i += Core::kRows)
        pack_row_panel<Core>(to + i * w.depth_n, Operand<Acc>{block + i * kBlockCols, kBlockCols, 1, rows - i, cols});
    }
    if (w.dz_cols) {
      auto* to = w.dz_cols + (segment * w.lanes_n + col) * depth_m + at * width;
      for (int64_t j = 0; j < cols; j += width) {
        const Operand<Acc> part{block + j, 1, kBlockCols, cols - j, rows};
        g.transposed ? pack_col_panel<Core>(to + j * depth_m, part) : pack_row_panel<Core>(to + j * depth_m, part);
      }
    }
  }
}

template <class Core, class T, class Fill>
void pack_chunk(const LinearGrads<T>& g, const LinearWorkspace<Core>& w, const Fill& fill, int64_t row, int64_t chunk) {
  const int64_t grain = ceil_div(32768, w.block_rows * max_of(1, g.n));
  parallel_for(ceil_div(chunk, w.block_rows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for (int segment = 0; segment < g.segments; ++segment) {
        typename Core::Acc* sum = nullptr;
        if (w.bias_sum) {
          sum = w.bias_sum + ((row / w.block_rows + block) * g.segments + segment) * w.bias_stride;
          __builtin_memset(sum, 0, size_t(w.bias_stride) * sizeof(*sum));
        }
        const int64_t at = block * w.block_rows;
        pack_dz<Core>(g, w, fill, segment, row, at, min_of(w.block_rows, chunk - at), chunk, sum);
      }
  });
}

// dW (+)= the product over one chunk of rows, kept in weight_sum between chunks.
template <class Core, class T>
void weight_grad(const LinearGrads<T>& g, const LinearWorkspace<Core>& w, int64_t row, int64_t chunk) {
  using Acc = typename Core::Acc;
  Operand<T> part = g.x.from(0, row);
  part.depth = chunk;
  g.transposed ? pack_rows<Core>(w.x, part) : pack_cols<Core>(w.x, part);
  const Panels<Core> x{w.x, g.k, chunk};
  const int64_t line = g.transposed ? g.n : g.k;
  for (int segment = 0; segment < g.segments; ++segment) {
    const Panels<Core> dz{w.dz_cols + segment * w.lanes_n * padded_depth<Core>(chunk), g.n, chunk};
    const auto finish = [&](int64_t r, int64_t rows, int64_t col, int64_t cols, Acc* c) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t offset = (r + i) * line + col;
        Acc *own = c + i * kBlockCols, *total = w.weight_sum + segment * g.n * g.k + offset;
        if (row > 0) prefetch_row(total + kWriteAhead * line, cols);
        if (row > 0) add_row(own, total, cols);
        row + chunk < g.m ? store_row(total, own, cols) : store_row(g.grad_weight[segment] + offset, own, cols);
      }
    };
    g.transposed ? multiply_panels<Core>(x, dz, finish) : multiply_panels<Core>(dz, x, finish);
  }
}

// The bias gradients: the sums of the row blocks, added in order.
template <class Core, class T>
void bias_grad(const LinearGrads<T>& g, const LinearWorkspace<Core>& w) {
  using Acc = typename Core::Acc;
  for (int segment = 0; segment < g.segments; ++segment)
    sweep<Acc>(g.n, [&](auto lanes, int64_t i) {
      Vec<Acc> total{};
      for (int64_t block = 0; block < w.bias_blocks; ++block)
        total += load(w.bias_sum + (block * g.segments + segment) * w.bias_stride + i);
      lanes.store(g.grad_bias[segment] + i, total);
    });
}

// fill(segment, row, col, cols, to): dz[row, col .. col + cols) as accumulators; it may write whole vectors.
template <class T, class Fill>
void linear_backward(const LinearGrads<T>& g, const Fill& fill) {
  using Core = CoreFor<T>;
  using Acc = typename Core::Acc;
  LinearWorkspace<Core> w(g);
  w.take_sums(g);
  if (g.grad_x)
    for (int segment = 0; segment < g.segments; ++segment)
      pack_cols<Core>(w.weight + segment * padded_depth<Core>(g.n) * Core::kCols, g.weight[segment], w.depth_n);
  for (int64_t row = 0; row < g.m; row += w.chunk_rows) {
    const int64_t chunk = min_of(w.chunk_rows, g.m - row);
    pack_chunk<Core>(g, w, fill, row, chunk);
    if (g.grad_x)
      multiply_panels<Core>(Panels<Core>{w.dz_rows, chunk, w.depth_n}, Panels<Core>{w.weight, g.k, w.depth_n},
                            [&](int64_t r, int64_t rows, int64_t col, int64_t cols, const Acc* c) {
                              T* to = g.grad_x + (row + r) * g.k + col;
                              for (int64_t i = 0; i < rows; ++i, to += g.k) {
                                prefetch_row(to + kWriteAhead * g.k, cols);
                                store_row(to, c + i * kBlockCols, cols);
                              }
                            });
    if (g.grad_weight[0]) weight_grad<Core>(g, w, row, chunk);
  }
  if (g.grad_bias[0]) bias_grad<Core>(g, w);
}

}  // namespace
}  // namespace pyfast
