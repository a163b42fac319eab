// The blocked matrix product over packed panels: C[rows, cols] = sum over depth of A[row, k] B[k, col], handed
// block by block to an epilogue while the block is in the level-2 cache.
//
// A block is about 112 x 256. Its A panels (112 x 512 deep, 230 KB in float) stay in L2 while the B panels stream
// past them; C is accumulated there over slices of the depth, in an order that depends on the sizes alone, never
// on the number of threads.
#pragma once

#include "gemm_pack.h"

namespace pyfast {
namespace {

constexpr int64_t kBlockCols = 256, kSliceDepth = 512;
constexpr int64_t kBlockFlops = 1 << 20;   // a thread is worth waking for about this much work
constexpr int kBlockSlot = 0;              // scratch slot of the C block

template <class Core> constexpr int64_t kPanelsPerBlock = ceil_div(96, Core::kRows);

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
  for (int64_t k = 0; k < depth || k == 0; k += slice) {
    const int64_t deep = min_of(slice, depth - k);
    for (int64_t j = 0; j < cols; j += Core::kCols)
      for (int64_t i = 0; i < rows; i += Core::kRows)
        Core::multiply(deep, a.data + (row + i) * depth + k * Core::kRows, b.data + (col + j) * depth + k * Core::kCols,
                       c + i * kBlockCols + j, kBlockCols, k > 0);
  }
}

// epilogue(row, rows, col, cols, c): finish a block; element (i, j) of it is c[i * kBlockCols + j]. Blocks are
// disjoint and come on any thread.
template <class Core, class Epilogue>
void multiply_panels(const Panels<Core>& a, const Panels<Core>& b, const Epilogue& epilogue) {
  using Acc = typename Core::Acc;
  const int64_t row_panels = ceil_div(a.lanes, Core::kRows), col_blocks = ceil_div(b.lanes, kBlockCols);
  // Fewer rows to a block where that gives every thread something to do.
  const int64_t wanted = ceil_div(2 * thread_count(), col_blocks);
  const int64_t panels = max_of(1, min_of(kPanelsPerBlock<Core>, row_panels / wanted));
  const int64_t row_blocks = ceil_div(row_panels, panels);
  const int64_t flops = 2 * panels * Core::kRows * kBlockCols * max_of(1, a.depth);
  parallel_for(row_blocks * col_blocks, ceil_div(kBlockFlops, flops), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename Core::Session session;
    Acc* c = scratch<Acc>(kBlockSlot, kPanelsPerBlock<Core> * Core::kRows * kBlockCols);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % row_blocks * panels * Core::kRows, col = task / row_blocks * kBlockCols;
      const int64_t rows = min_of(panels * Core::kRows, a.lanes - row), cols = min_of(kBlockCols, b.lanes - col);
      multiply_block(a, b, row, rows, col, cols, c);
      epilogue(row, rows, col, cols, c);
    }
  });
}

}  // namespace
}  // namespace pyfast
