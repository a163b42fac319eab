// Few rows of bfloat16 times a weight whose rows are contiguous, by the instruction that multiplies pairs: both lie as
// it wants them, so the weight is read once, and nothing is packed or widened.
#pragma once

#include "linear_forward.h"
#include "sums_of_each.h"

namespace pyfast {
namespace {

#ifdef __AVX512BF16__
#define PYFAST_PAIR_ROWS
constexpr int64_t kPairRows = 16, kPairCols = 64, kPairTile = 4;   // columns of a block; rows of x and of W at a time

// sums[i][j] = x[i] . w[j]; past the last row of either is that row again.
inline void dot_pairs(const Operand<bf16>& x, const Operand<bf16>& w, float* sums) {
  constexpr int64_t n = kPairTile, kDeep = 32;
  const bf16 *of_x[n], *of_w[n];
  for (int64_t i = 0; i < n; ++i) {
    of_x[i] = x.data + min_of(i, x.lanes - 1) * x.lane_stride;
    of_w[i] = w.data + min_of(i, w.lanes - 1) * w.lane_stride;
  }
  VecF sum[n * n] = {};
  for (int64_t k = 0; k < x.depth; k += kDeep) {
    VecU pairs[n];
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) {
      __builtin_prefetch(of_w[j] + n * w.lane_stride + k, 0, 2);   // of the next four rows
      pairs[j] = depth_pairs(of_w[j] + k, x.depth - k);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) {
      const VecU own = depth_pairs(of_x[i] + k, x.depth - k);
#pragma GCC unroll 4
      for (int64_t j = 0; j < n; ++j)
        sum[i * n + j] = (VecF)_mm512_dpbf16_ps((__m512)sum[i * n + j], (__m512bh)own, (__m512bh)pairs[j]);
    }
  }
  store(sums, sums_of_each<8>(sum, typename NumbersBelow<16>::type()));
}

// finish(row, rows, col, cols, z, stride) as in linear_forward(), for x of at most kPairRows rows.
template <class Finish>
void pair_rows_forward(const Operand<bf16>& x, const Operand<bf16>& weight, const Finish& finish) {
  const int64_t blocks = ceil_div(weight.lanes, kPairCols);
  parallel_for(blocks, ceil_div(1 << 17, kPairCols * max_of(1, x.depth)), [&](int64_t begin, int64_t end) {
    float* z = scratch<float>(kBlockSlot, round_up(kPairRows, kPairTile) * kPairCols);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t col = block * kPairCols, cols = min_of(kPairCols, weight.lanes - col);
      for (int64_t j = 0; j < cols; j += kPairTile)
        for (int64_t i = 0; i < x.lanes; i += kPairTile) {
          float sums[kPairTile][kPairTile];
          dot_pairs(x.from(i, 0), weight.from(col + j, 0), sums[0]);
          for (int64_t r = 0; r < kPairTile; ++r)
            __builtin_memcpy(z + (i + r) * kPairCols + j, sums[r], sizeof sums[r]);
        }
      finish(0, x.lanes, col, cols, z, kPairCols);
    }
  });
}
#endif

}  // namespace
}  // namespace pyfast
