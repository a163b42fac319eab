// Few rows of bfloat16 times a weight whose rows are contiguous, or times its transpose, by the instruction that
// multiplies pairs: the weight is read once as it lies, and nothing of it is packed or widened.
#pragma once

#include "linear_backward.h"
#include "linear_forward.h"

namespace pyfast {
namespace {

#ifdef __AVX512BF16__
#define PYFAST_PAIR_ROWS
constexpr int64_t kPairRows = 16, kPairGradients = 32;   // rows at most, forward and backward
constexpr int64_t kPairCols = 64, kPairTile = 4;   // columns of a block; rows of x and of W at a time

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
  store(sums, sum_each(sum));
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

// z [kPairTile][kPairCols] += dz W for rows of dz and `depth` rows of W, from `cols` columns on. The two halves of each
// 32 columns lie in z as one instruction leaves them: see in_order().
inline void add_pairs(const bf16* dz, int64_t stride, const bf16* w, int64_t w_stride, int64_t depth, int64_t cols,
                      float* z) {
  constexpr int64_t n = kPairTile, kAhead = 16;   // rows of W fetched ahead: each begins in another page
  const __mmask32 first = cols < 32 ? (1u << cols) - 1 : ~0u;
  const __mmask32 second = cols < 64 ? (1ull << max_of(cols - 32, 0)) - 1 : ~0u;
  VecF sum[n][n];
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) sum[i][j] = load(z + i * kPairCols + j * kLanes<float>);
  for (int64_t k = 0; k < depth; k += 2) {
    const bf16 *even = w + k * w_stride, *odd = even + w_stride;
    __builtin_prefetch(even + kAhead * w_stride), __builtin_prefetch(even + kAhead * w_stride + 32);
    __builtin_prefetch(odd + kAhead * w_stride), __builtin_prefetch(odd + kAhead * w_stride + 32);
    const bool both = k + 1 < depth;
    const __m512i a0 = _mm512_maskz_loadu_epi16(first, even), a1 = _mm512_maskz_loadu_epi16(second, even + 32);
    const __m512i b0 = _mm512_maskz_loadu_epi16(both ? first : 0, odd);
    const __m512i b1 = _mm512_maskz_loadu_epi16(both ? second : 0, odd + 32);
    const __m512i pairs[n] = {_mm512_unpacklo_epi16(a0, b0), _mm512_unpackhi_epi16(a0, b0),
                              _mm512_unpacklo_epi16(a1, b1), _mm512_unpackhi_epi16(a1, b1)};
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) {
      const __m512i own = _mm512_set1_epi32(load_bits<int32_t>(dz + i * stride + k));
#pragma GCC unroll 4
      for (int64_t j = 0; j < n; ++j)
        sum[i][j] = (VecF)_mm512_dpbf16_ps((__m512)sum[i][j], (__m512bh)own, (__m512bh)pairs[j]);
    }
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) store(z + i * kPairCols + j * kLanes<float>, sum[i][j]);
}

// Unpacking low and high quarters of pairs has put columns 0-3, 8-11, 16-19, 24-27 into the first vector.
inline void in_order(float* z) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 a = _mm512_loadu_ps(z), b = _mm512_loadu_ps(z + 16);
  _mm512_storeu_ps(z, _mm512_permutex2var_ps(a, low, b));
  _mm512_storeu_ps(z + 16, _mm512_permutex2var_ps(a, high, b));
}

// grad_x = the sum over segments of dz W, from dz [segment][rows][stride] with zeros past m and n.
inline void pair_rows_grad_x(const LinearGrads<bf16>& g, const bf16* dz, int64_t stride) {
  constexpr int64_t kDepth = 128;   // rows of W that stay in the first-level cache for all tiles of rows
  const int64_t rows = round_up(g.m, kPairTile), work = kPairCols * max_of(1, g.segments * g.n);
  parallel_for(ceil_div(g.k, kPairCols), ceil_div(1 << 17, work), [&](int64_t begin, int64_t end) {
    float* z = scratch<float>(kBlockSlot, kPairGradients * kPairCols);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t col = block * kPairCols, cols = min_of(kPairCols, g.k - col);
      __builtin_memset(z, 0, size_t(rows * kPairCols) * sizeof(float));
      for (int segment = 0; segment < g.segments; ++segment)
        for (int64_t k = 0; k < g.n; k += kDepth) {
          const Operand<bf16> w = g.weight[segment].from(col, k);
          for (int64_t i = 0; i < rows; i += kPairTile)
            add_pairs(dz + (segment * rows + i) * stride + k, stride, w.data, w.depth_stride, min_of(kDepth, g.n - k),
                      cols, z + i * kPairCols);
        }
      for (int64_t i = 0; i < g.m; ++i) {
        in_order(z + i * kPairCols), in_order(z + i * kPairCols + 32);
        store_row(g.grad_x + i * g.k + col, z + i * kPairCols, cols);
      }
    }
  });
}

// grad_weight [n, k] = dz^T x of one segment, for dz and x as pairs of rows: factors [n][pairs], rows [pairs][wide].
inline void pair_rows_grad_weight(bf16* to, int64_t n, int64_t k, int64_t pairs, const uint32_t* factors,
                                  const uint32_t* rows, int64_t wide) {
  constexpr int64_t t = kPairTile, lanes = kLanes<float>;
  parallel_for(ceil_div(n, t), ceil_div(1 << 14, t * max_of(1, k)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * t; i < min_of(end * t, n); i += t)
      for (int64_t col = 0; col < k; col += kPairCols) {
        VecF sum[t][t] = {};
        for (int64_t p = 0; p < pairs; ++p) {
          VecF own[t];
#pragma GCC unroll 4
          for (int64_t j = 0; j < t; ++j) own[j] = load((const float*)(rows + p * wide + col + j * lanes));
#pragma GCC unroll 4
          for (int64_t r = 0; r < t; ++r) {
            const __m512i factor = _mm512_set1_epi32(int32_t(factors[min_of(i + r, n - 1) * pairs + p]));
#pragma GCC unroll 4
            for (int64_t j = 0; j < t; ++j)
              sum[r][j] = (VecF)_mm512_dpbf16_ps((__m512)sum[r][j], (__m512bh)factor, (__m512bh)own[j]);
          }
        }
        for (int64_t r = 0; r < min_of(t, n - i); ++r)
          store_row(to + (i + r) * k + col, (const float*)sum[r], min_of(kPairCols, k - col));
      }
  });
}

// The gradients of weight (of up to kFewRows rows it is made already) and x from dz [segment][m][stride], with m of at
// most kPairGradients.
inline void pair_rows_gradients(const LinearGrads<bf16>& g, const float* dz, int64_t stride) {
  const int64_t rows = round_up(g.m, kPairTile), pairs = ceil_div(g.m, 2), wide = round_up(g.k, kPairCols);
  bf16* narrow = scratch<bf16>(kDzColsSlot, g.segments * rows * stride);   // past the last row and column: zeros
  __builtin_memset(narrow, 0, size_t(g.segments * rows * stride) * sizeof(bf16));
  for (int64_t i = 0; i < g.segments * g.m; ++i)
    store_row(narrow + (i / g.m * rows + i % g.m) * stride, dz + i * stride, g.n);
  if (g.grad_weight[0] && g.m > kFewRows) {
    uint32_t* factors = scratch<uint32_t>(kWeightSlot, g.n * pairs);
    uint32_t* of_x = scratch<uint32_t>(kInputSlot, pairs * wide);
    const auto pair = [](bf16 a, bf16 b) { return uint32_t(a.bits) | uint32_t(b.bits) << 16; };
    for (int64_t p = 0; p < pairs; ++p) {
      const bf16 *even = g.x.data + 2 * p * g.x.depth_stride, *odd = even + g.x.depth_stride;
      const bool both = 2 * p + 1 < g.m;
      for (int64_t j = 0; j < g.k; ++j) of_x[p * wide + j] = pair(even[j], both ? odd[j] : bf16{});
      __builtin_memset(of_x + p * wide + g.k, 0, size_t(wide - g.k) * sizeof(uint32_t));
    }
    for (int segment = 0; segment < g.segments; ++segment) {
      const bf16* own = narrow + segment * rows * stride;
      for (int64_t p = 0; p < pairs; ++p)
        for (int64_t i = 0; i < g.n; ++i)
          factors[i * pairs + p] = pair(own[2 * p * stride + i], own[(2 * p + 1) * stride + i]);
      pair_rows_grad_weight(g.grad_weight[segment], g.n, g.k, pairs, factors, of_x, wide);
    }
  }
  if (g.grad_x) pair_rows_grad_x(g, narrow, stride);
}
#endif

}  // namespace
}  // namespace pyfast
