// The blocked matrix product over packed panels: C[rows, cols] = sum over depth of A[row, k] B[k, col], handed
// block by block to an epilogue while the block is in the level-2 cache.
//
// A block is about 100 x 256, with tiles 256 x 256. Its A panels (100 x 512 deep, 200 KB in float) stay in L2 while
// the B panels stream past them, each fetched while the one before it is multiplied; C is accumulated there over slices
// of the depth, in an order that depends on the sizes alone, never on the number of threads. Blocks go along the rows:
// A is read from memory once; with the fetching ahead this took float of 2048 x 768 -> 3072 from 201 to 240 GFLOP/s a
// core, of 260.
#pragma once

#include "gemm_pack.h"

namespace pyfast {
namespace {

constexpr int64_t kBlockCols = 256, kSliceDepth = 512;
constexpr int64_t kBlockFlops = 1 << 20;   // a thread is worth waking for about this much work
constexpr int kBlockSlot = 0;              // scratch slot of the C block

template <class Core> constexpr int64_t kPanelsPerBlock = ceil_div(Core::kBlockRows, Core::kRows);

template <class Core>
struct Panels {
  const typename Core::Elem* data;
  int64_t lanes, depth;
};

// The A panels of one block of rows against the B panels of one block of columns.
template <class Core>
void multiply_block(const Panels<Core>& a, const Panels<Core>& b, int64_t row, int64_t rows, int64_t col, int64_t cols,
                    typename Core::Acc* c) {
  const int64_t depth = padded_depth<Core>(a.depth);
  const int64_t slices = max_of(1, ceil_div(depth, kSliceDepth));
  const int64_t slice = max_of(Core::kDepth, round_up(ceil_div(depth, slices), Core::kDepth));   // depth may be 0
  const auto* rows_of_a = a.data + row * depth;
  const auto* cols_of_b = b.data + col * depth;
  for (int64_t k = 0; k < depth || k == 0; k += slice) {
    const int64_t deep = min_of(slice, depth - k);
    const int64_t share = deep * Core::kCols / max_of(1, ceil_div(rows, Core::kRows));   // of the panel that comes next
    for (int64_t j = 0; j < cols; j += Core::kCols) {
      const auto* panel = cols_of_b + j * depth + k * Core::kCols;
      const auto* next = j + Core::kCols < cols ? panel + Core::kCols * depth
                         : k + slice < depth   ? cols_of_b + (k + slice) * Core::kCols
                                               : panel;
      for (int64_t i = 0; i < rows; i += Core::kRows)
        Core::multiply(deep, rows_of_a + i * depth + k * Core::kRows, panel, c + i * kBlockCols + j, kBlockCols, k > 0,
                       next + i / Core::kRows * share);
    }
  }
}

// epilogue(row, rows, col, cols, c): finish a block; element (i, j) of it is c[i * kBlockCols + j]. Blocks are
// disjoint and come on any thread.
template <class Core, class Epilogue>
void multiply_panels(const Panels<Core>& a, const Panels<Core>& b, const Epilogue& epilogue) {
  using Acc = typename Core::Acc;
  if (a.lanes == 0 || b.lanes == 0) return;
  const int64_t row_panels = ceil_div(a.lanes, Core::kRows), parts = ceil_div(b.lanes, kBlockCols);
  const int64_t block_cols = round_up(ceil_div(b.lanes, parts), 2 * Core::kCols);   // no small block at the end
  // Fewer rows to a block where that gives every thread something to do.
  const int64_t col_blocks = ceil_div(b.lanes, block_cols), wanted = ceil_div(2 * thread_count(), col_blocks);
  const int64_t most = max_of(1, min_of(kPanelsPerBlock<Core>, row_panels / wanted));
  const int64_t row_blocks = ceil_div(row_panels, most), panels = ceil_div(row_panels, row_blocks);
  const int64_t flops = 2 * panels * Core::kRows * block_cols * max_of(1, a.depth);
  parallel_for(row_blocks * col_blocks, ceil_div(kBlockFlops, flops), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename Core::Session session;
    Acc* c = scratch<Acc>(kBlockSlot, kPanelsPerBlock<Core> * Core::kRows * kBlockCols);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / col_blocks * panels * Core::kRows, col = task % col_blocks * block_cols;
      const int64_t rows = min_of(panels * Core::kRows, a.lanes - row), cols = min_of(block_cols, b.lanes - col);
      multiply_block(a, b, row, rows, col, cols, c);
      epilogue(row, rows, col, cols, c);
    }
  });
}

}  // namespace
}  // namespace pyfast
