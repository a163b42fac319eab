// What is packed: a matrix with any strides; and the transposition of square blocks in registers.
#pragma once

#include "gemm_core.h"

namespace pyfast {
namespace {

// A matrix seen as lanes x depth; element (lane, k) at data[lane * lane_stride + k * depth_stride].
template <class T>
struct Operand {
  const T* data;
  int64_t lane_stride, depth_stride;
  int64_t lanes, depth;

  Operand from(int64_t lane, int64_t k) const {
    return {data + lane * lane_stride + k * depth_stride, lane_stride, depth_stride, lanes - lane, depth - k};
  }
};

// v[i][j] becomes v[j][i], in log2(lanes) rounds of exchanging blocks between pairs of vectors.
template <class V>
inline void transpose(V* v) {
  constexpr int n = sizeof(V) / sizeof(v[0][0]);
  using Index = __typeof__(v[0] < v[0]);
#pragma GCC unroll 8
  for (int step = 1; step < n; step *= 2) {
    Index low, high;   // lanes of (a, b) that make the new a and the new b
    for (int j = 0; j < n; ++j) {
      low[j] = j & step ? n + j - step : j;
      high[j] = j & step ? n + j : j + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & step) continue;
      const V a = v[i], b = v[i + step];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace
}  // namespace pyfast
