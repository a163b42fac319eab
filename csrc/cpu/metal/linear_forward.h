// z = x W^T for layers that finish z in cache: the blocked product with bounded packed copies.
#pragma once

#include "few_rows.h"
#include "gemm.h"

namespace pyfast {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;   // of one packed operand: larger ones go in chunks
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

}  // namespace
}  // namespace pyfast
